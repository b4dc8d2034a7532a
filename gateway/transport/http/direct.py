"""Infer requests that wait for nothing but their body and the model: they are answered without a task.

A task and the coroutines inside it take a tenth of all the CPU that a small request costs. Such a request goes by three
calls in place of them: `begin`, `read` when its body has come, and `_answered` when the model has answered.
What has more to wait for is left to the application's own coroutine; what middleware answers gets a task when that is
known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from granian.rsgi import ProtocolClosed  # type: ignore[attr-defined]

from gateway.service.inference import Inference
from gateway.transport.http.codec import encode
from gateway.transport.http.compression import accepted
from gateway.transport.http.disconnects import Disconnects
from gateway.transport.http.endpoint import InferEndpoint, deadline_of, only
from gateway.transport.http.handover import Body, Head
from gateway.transport.http.replies import Reply
from gateway.types import InferResponse, Responses


class Direct:
    """Answers infer requests of nobody in particular. `failure` is what an error is answered with, on a path."""

    def __init__(
        self, endpoint: InferEndpoint, disconnects: Disconnects, failure: Callable[[Exception, str], Reply]
    ) -> None:
        self.endpoint = endpoint
        self.disconnects = disconnects
        self.failure = failure
        self._tasks: asyncio.TaskGroup = disconnects.tasks
        self.context = copy_context()  # one for all: to copy it for each costs more than it could be good for

    def begin(self, protocol: Any, head: Head, arrived: float, body: Body) -> bool:
        """Answer a request whose body is on its way; False if that takes a task."""
        header = head[1]
        try:
            accept = header("accept-encoding")
            if header("content-encoding") is not None or (accept is not None and accepted(accept) != "identity"):
                return False
            deadline = deadline_of(header, arrived)
        except Exception:  # noqa: BLE001 - whatever is wrong with it, the application says it
            return False
        request = _Request(self, protocol, head, deadline, body)
        self.disconnects.begin(request, protocol)
        if body.done():
            request.read(body)
        else:
            body.add_done_callback(request.read, context=self.context)
        return True

    def task(self, responses: Responses, target: tuple[str, str]) -> asyncio.Future[Any]:
        """What comes of responses that have more to wait for than a future; see `_response`."""
        return self._tasks.create_task(_outcome(responses, target))


class _Request:
    """One request on its way."""

    __slots__ = ("_body", "_deadline", "_head", "_home", "_inference", "_plan", "_protocol", "_waiter")

    def __init__(self, home: Direct, protocol: Any, head: Head, deadline: float | None, body: Body) -> None:
        self._home = home
        self._protocol = protocol
        self._head = head
        self._deadline = deadline
        self._body: Body | None = body  # until it has come
        self._inference: Inference | None = None
        self._waiter: asyncio.Future[Any] | None = None  # once it was submitted

    def read(self, body: Body) -> None:
        """The body has come, or will not."""
        if self._body is None:
            return  # the client has gone
        home, (target, header) = self._home, self._head
        self._body = None  # which may hold this, and the collector does not see what is held by granian's objects
        try:
            whole = body.result()
            responses, self._plan, composed = home.endpoint.begin(target, header, whole, self._deadline)
            if isinstance(responses, Inference) and not composed:
                self._waiter = responses.begin()
                self._inference = responses
            else:
                self._waiter = home.task(responses, target)  # which begins them: one cancelled before that has not
            self._waiter.add_done_callback(self._answered, context=home.context)
        except (ProtocolClosed, asyncio.CancelledError) as left:  # the client, while its body was read
            left.__traceback__ = None  # the body holds this error, which holds this frame, which holds the body
        except Exception as problem:  # noqa: BLE001 - whatever it is, the client is told
            self._protocol.response_bytes(*home.failure(problem, self._path))
        finally:
            if self._waiter is None:
                home.disconnects.end(self)

    def cancel(self) -> None:
        """The client has gone."""
        if self._waiter is not None:
            self._waiter.cancel()
        elif self._body is not None:
            self._body.cancel()
            self._body = None
            self._home.disconnects.end(self)

    def _answered(self, waiter: asyncio.Future[Any]) -> None:
        try:
            response = _response(waiter.result()) if self._inference is None else self._inference.finish(waiter)
            self._protocol.response_bytes(200, *encode(response, self._plan))
        except asyncio.CancelledError:
            pass  # the client has gone
        except Exception as problem:  # noqa: BLE001 - whatever it is, the client is told
            self._protocol.response_bytes(*self._home.failure(problem, self._path))
        finally:
            del waiter  # which holds the error, which holds this frame
            self._waiter = None
            self._home.disconnects.end(self)

    @property
    def _path(self) -> str:
        model, version = self._head[0]
        return f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"


async def _outcome(responses: Responses, target: tuple[str, str]) -> InferResponse | Exception:
    """What came of it, as a value: an error would end all tasks of the group."""
    try:
        return await only(responses, target)
    except Exception as problem:  # noqa: BLE001 - whatever it is, the client is told
        return problem


def _response(outcome: InferResponse | Exception) -> InferResponse:
    try:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
    finally:
        del outcome  # the error holds this frame

"""Infer requests that wait for nothing but their body and the model: they are answered without a task.

A task and the coroutines inside it cost a small request a fifth of all that the gateway does for it. Such a request goes
by three calls in place of them: `begin`, when its body has come `_read`, and `_answered` when the model has answered.
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
from gateway.types import NO_CONTEXT, NO_PARAMETERS, InferResponse


class Direct:
    """Answers infer requests of nobody in particular. `failure` is what an error is answered with, on a path."""

    def __init__(
        self, endpoint: InferEndpoint, disconnects: Disconnects, failure: Callable[[Exception, str], Reply]
    ) -> None:
        self.endpoint = endpoint
        self.disconnects = disconnects
        self.failure = failure
        self.context = copy_context()  # one for all: to copy it for each costs more than it could be good for

    def begin(self, protocol: Any, head: Head, arrived: float, body: Body) -> bool:
        """Answer a request whose body is on its way; False if that takes a task."""
        header = head[1]
        if header("content-encoding") is not None:
            return False
        accept = header("accept-encoding")
        if accept is not None and accepted(accept) != "identity":
            return False
        request = _Request(self, protocol, head, arrived, body)
        self.disconnects.begin(request, protocol)
        if body.done():
            request.read(body)
        else:
            body.add_done_callback(request.read, context=self.context)
        return True


class _Request:
    """One request on its way."""

    __slots__ = ("_arrived", "_body", "_head", "_home", "_inference", "_plan", "_protocol", "_waiter")

    def __init__(self, home: Direct, protocol: Any, head: Head, arrived: float, body: Body) -> None:
        self._home = home
        self._protocol = protocol
        self._head = head
        self._arrived = arrived
        self._body: Body | None = body  # until it has come
        self._waiter: asyncio.Future[InferResponse] | None = None  # once it was submitted

    def read(self, body: Body) -> None:
        """The body has come, or will not."""
        home, (target, header) = self._home, self._head
        self._body = None  # which may hold this, and the collector does not see what is held by granian's objects
        try:
            whole = body.result()
            caller = ("", deadline_of(header, self._arrived), NO_PARAMETERS, NO_CONTEXT, None)
            responses, self._plan = home.endpoint.begin(target, header, whole, caller)
            self._inference = responses if isinstance(responses, Inference) else None
            waiter = responses.begin() if isinstance(responses, Inference) else None
            if waiter is None:
                self._inference = None
                waiter = asyncio.get_running_loop().create_task(only(responses, target))
        except (ProtocolClosed, asyncio.CancelledError):
            home.disconnects.end(self)  # the client left while its body was read
        except Exception as problem:  # noqa: BLE001 - whatever it is, the client is told
            self._end(home.failure(problem, self._path))
        else:
            self._waiter = waiter
            waiter.add_done_callback(self._answered, context=home.context)

    def cancel(self) -> None:
        """The client has gone."""
        if self._body is not None:
            self._body.cancel()
        elif self._waiter is not None:
            self._waiter.cancel()

    def _answered(self, waiter: asyncio.Future[InferResponse]) -> None:
        try:
            response = waiter.result() if self._inference is None else self._inference.finish(waiter)
            reply = (200, *encode(response, self._plan))
        except asyncio.CancelledError:
            self._home.disconnects.end(self)
        except Exception as problem:  # noqa: BLE001 - whatever it is, the client is told
            self._end(self._home.failure(problem, self._path))
        else:
            self._end(reply)

    def _end(self, reply: Reply) -> None:
        self._protocol.response_bytes(*reply)
        self._home.disconnects.end(self)

    @property
    def _path(self) -> str:
        model, version = self._head[0]
        return f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"

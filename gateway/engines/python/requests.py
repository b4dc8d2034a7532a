"""`pb_utils.InferenceRequest`: a request that came to a model, or one that its code makes to call another (BLS)."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Self, TypedDict, Unpack

from gateway.engines.python.errors import TritonError, TritonModelException
from gateway.engines.python.responses import InferenceResponse, InferenceResponseSender
from gateway.engines.python.tensors import Tensor
from gateway.errors import GatewayError
from gateway.types import EMPTY_FINAL, RESERVED, InferRequest, InferResponse, Parameter, RequestedOutput

SEQUENCE_START, SEQUENCE_END = 1, 2  # TRITONSERVER_REQUEST_FLAG_*
RELEASE_ALL, RELEASE_RESCHEDULE = 1, 2  # TRITONSERVER_REQUEST_RELEASE_*
_NOT_THE_MODELS = (*RESERVED, EMPTY_FINAL)


class Options(TypedDict, total=False):
    """What a request may have besides."""

    flags: int
    timeout: int  # microseconds
    preferred_memory: object  # everything is in CPU memory
    trace: object
    parameters: Mapping[str, Parameter] | None


class InferenceRequest:
    """A request. The code of a model gets a list of them, and makes its own to call other models."""

    infer: ClassVar[Callable[[InferRequest], Iterator[InferResponse]]]
    """Runs a model; set in a subclass of each model's own. Raises `TritonModelException` outside `execute`."""

    def __init__(  # noqa: PLR0917 - Triton's order
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Sequence[Tensor] = (),
        requested_output_names: Sequence[str] = (),
        model_name: str = "",
        model_version: int = -1,
        **options: Unpack[Options],
    ) -> None:
        """A request to a model of the gateway: to its newest version unless one is given."""
        if not isinstance(correlation_id, int | str):
            raise TritonModelException("Correlation ID must be integer or string")
        if not all(isinstance(each, Tensor) for each in inputs):
            raise TritonModelException("inputs must be a list of pb_utils.Tensor.")
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(f"InferenceRequest has no argument '{min(unknown)}'")
        self._request_id = request_id
        self._correlation_id = correlation_id
        self._inputs = list(inputs)
        self._outputs = list(requested_output_names)
        self._model = model_name
        self._version = model_version
        self._flags = options.get("flags", 0)
        self._timeout = options.get("timeout", 0)
        self._parameters = dict(options.get("parameters") or {})
        trace = options.get("trace")
        self._trace = trace if isinstance(trace, InferenceTrace) else InferenceTrace()
        self._sender: InferenceResponseSender | None = None

    @classmethod
    def received(
        cls, request: InferRequest, inputs: Sequence[Tensor], names: Sequence[str], sender: InferenceResponseSender
    ) -> Self:
        """A request that came, with its part of the batch, the outputs that are wanted, and what answers it."""
        given = request.parameters
        sequence, timeout = given.get("sequence_id", 0), given.get("timeout", 0)
        made = cls(
            request.id,
            sequence if isinstance(sequence, int | str) else 0,
            inputs,
            names,
            flags=SEQUENCE_START * bool(given.get("sequence_start")) | SEQUENCE_END * bool(given.get("sequence_end")),
            timeout=timeout if isinstance(timeout, int) else 0,
            parameters={key: value for key, value in given.items() if key not in _NOT_THE_MODELS},
        )
        made._trace = InferenceTrace(request)
        made._sender = sender
        return made

    def inputs(self) -> list[Tensor]:
        """Its tensors."""
        return self._inputs

    def request_id(self) -> str:
        """Its id; empty when it has none."""
        return self._request_id

    def correlation_id(self) -> int | str:
        """The sequence it is of; 0 or empty for none."""
        return self._correlation_id

    def requested_output_names(self) -> list[str]:
        """The outputs that are wanted."""
        return self._outputs

    def flags(self) -> int:
        """TRITONSERVER_REQUEST_FLAG_SEQUENCE_START and _END."""
        return self._flags

    def set_flags(self, flags: int) -> None:
        """Set the flags."""
        self._flags = flags

    def timeout(self) -> int:
        """Microseconds that it may take; 0 for any time."""
        return self._timeout

    def parameters(self) -> str:
        """Its parameters as JSON."""
        return json.dumps(self._parameters)

    def trace(self) -> InferenceTrace:
        """Its trace, to be given to requests that are made for it."""
        return self._trace

    def get_response_sender(self) -> InferenceResponseSender:
        """What answers it. Only a request that came has one."""
        if self._sender is None:
            raise TritonModelException("get_response_sender is for requests that execute was given.")
        return self._sender

    def is_cancelled(self) -> bool:
        """Whether nobody waits for its answer any more."""
        return self._sender is not None and self._sender.is_cancelled()

    def set_release_flags(self, flags: int) -> None:
        """Only TRITONSERVER_REQUEST_RELEASE_ALL: there are no iterative sequences to put a request back into."""
        if flags != RELEASE_ALL:
            raise TritonModelException(
                "Request rescheduling needs iterative sequences, which this server does not have."
            )

    def exec(self, decoupled: bool = False) -> InferenceResponse | ResponseIterator:
        """Run the model and wait: for the one response, or with `decoupled` for each in turn. A failure is a response."""
        if not self._model:
            raise TritonModelException("model_name must be given to call a model.")
        responses = ResponseIterator(type(self).infer(self._to_gateway()))
        return responses if decoupled else responses.only(self._model)

    def async_exec(self, decoupled: bool = False) -> Awaitable[InferenceResponse | ResponseIterator]:
        """`exec` beside the event loop that runs."""
        return asyncio.get_running_loop().run_in_executor(None, self.exec, decoupled)

    def _to_gateway(self) -> InferRequest:
        parameters = dict(self._parameters)
        if self._correlation_id:
            parameters["sequence_id"] = self._correlation_id
        parameters |= {
            key: True
            for key, flag in (("sequence_start", SEQUENCE_START), ("sequence_end", SEQUENCE_END))
            if self._flags & flag
        }
        return InferRequest(
            self._model,
            {each.name(): each.to_gateway() for each in self._inputs},
            "" if self._version < 0 else str(self._version),
            self._request_id,
            tuple(RequestedOutput(name) for name in self._outputs),
            parameters,
            time.monotonic() + self._timeout / 1e6 if self._timeout else None,
            trace=self._trace.of,
        )


class ResponseIterator:
    """The responses of a called model, as they come; those that have come may be looked at again from the start."""

    def __init__(self, responses: Iterator[InferResponse]) -> None:
        self._responses = responses
        self._seen: list[InferenceResponse] = []
        self._at = 0
        self._ended = False
        self._lock = threading.Lock()

    def __iter__(self) -> Self:
        self._at = 0
        return self

    def __next__(self) -> InferenceResponse:
        with self._lock:
            if self._at == len(self._seen):
                self._receive()
            response = self._seen[self._at]
            self._at += 1
            return response

    def only(self, model: str) -> InferenceResponse:
        """The one response of a model that gives one."""
        response = next(self, None)
        if response is None or not self._ended:
            self.cancel()
            raise TritonModelException(
                f"Model {model} is using the decoupled. The current BLS request call doesn't support models using the "
                "decoupled transaction policy. Please use 'decoupled=True' argument to the 'exec' or 'async_exec' calls "
                "for decoupled models.'"
            )
        return response

    def cancel(self) -> None:
        """Ask for no more."""
        self._ended = True
        close = getattr(self._responses, "close", None)
        if close is not None:
            close()

    def _receive(self) -> None:
        if self._ended:
            raise StopIteration
        try:
            response = next(self._responses)
        except StopIteration:
            self._ended = True
            raise
        except GatewayError as error:
            self._ended = True
            self._seen.append(InferenceResponse(error=TritonError.from_gateway(error)))
            return
        if response.final:
            self.cancel()
        tensors = [Tensor.from_gateway(name, each.datatype, each.array) for name, each in response.outputs.items()]
        self._seen.append(InferenceResponse(tensors, parameters=response.parameters))


class InferenceTrace:
    """The trace of a request: of which one, `of`, whether it is traced or not."""

    def __init__(self, of: InferRequest | None = None) -> None:
        self.of = of

    def get_context(self) -> None:
        """Its context: None."""

"""What the code of a model answers with: `pb_utils.InferenceResponse` and `InferenceResponseSender`, and the run they end.

A `Run` is one batch while the model has it. Each of its requests gets any number of answers and exactly one that is
final: from what `execute` returns, from its sender, or from here, once nothing is left that could send one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue

from gateway import errors
from gateway.engines.python.errors import TritonError, TritonModelException
from gateway.engines.python.tensors import Tensor
from gateway.errors import GatewayError
from gateway.types import Answer, Array, DataType, Parameter

FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL
_FLAGS = (0, FINAL)


class InferenceResponse:
    """The output tensors of one request, or an error."""

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Parameter] | None = None,
    ) -> None:
        """With an error the tensors do not count. `parameters` are told to the client."""
        tensors = list(output_tensors)
        if not all(isinstance(each, Tensor) for each in tensors):
            raise TritonModelException("output_tensors must be a list of pb_utils.Tensor.")
        if error is not None and not isinstance(error, TritonError):
            raise TritonModelException(f"error must be a pb_utils.TritonError, got {type(error)}.")
        self._tensors = tensors
        self._error = error
        self._parameters = dict(parameters or {})

    def output_tensors(self) -> list[Tensor]:
        """Its tensors."""
        return self._tensors

    def has_error(self) -> bool:
        """Whether it is an error."""
        return self._error is not None

    def error(self) -> TritonError | None:
        """Its error, None when it is none."""
        return self._error

    def parameters(self) -> str:
        """Its parameters as JSON."""
        return json.dumps(self._parameters)

    def to_answer(self, request: int, wanted: Mapping[str, DataType], *, final: bool) -> Answer:
        """The answer to the request at this place of its batch: of the tensors those that are `wanted`."""
        if self._error is not None:
            return Answer(request, None, self._error.to_gateway(), final=True)
        outputs: dict[str, Array] = {}
        for each in self._tensors:
            datatype = wanted.get(each.name())
            if datatype is None:
                continue  # as Triton does with what was not asked for
            tensor = each.to_gateway()
            if tensor.datatype.dtype != datatype.dtype:
                gave, expected = tensor.datatype.name, datatype.name
                text = f"the model gave output '{each.name()}' as {gave}, its configuration says {expected}"
                return Answer(request, None, errors.Internal(text), final=True)
            outputs[each.name()] = tensor.array
        return Answer(request, outputs, final=final, parameters=self._parameters or None)


class Run:
    """One batch of `count` requests. Any thread may call."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._open = set(range(count))
        self._told: set[int] = set()  # of a failure, and told nothing more
        self._given: SimpleQueue[Sequence[Answer] | GatewayError | None] = SimpleQueue()
        self._begun = False

    def give(self, answers: Sequence[Answer], ended: Sequence[int] = ()) -> None:
        """Hand answers on, and know that these requests get no more."""
        with self._lock:
            if not self._open:
                return
            heard = [each for each in answers if each.request in self._open and each.request not in self._told]
            self._told.update(each.request for each in heard if each.error is not None)
            self._open.difference_update(ended)
            if heard:
                self._begun = True
                self._given.put(heard)
            if not self._open:
                self._given.put(None)

    def fail(self, requests: Sequence[int], error: GatewayError) -> None:
        """End those of these requests that have had no final answer."""
        self.give([Answer(each, None, error) for each in requests], requests)

    def fail_rest(self, error: GatewayError) -> None:
        """`fail` for all. Where none has had any answer the whole batch fails, to be tried again in parts."""
        with self._lock:
            rest, self._open = sorted(self._open - self._told), set()
            if not self._begun:
                self._given.put(error)
            elif rest:
                self._given.put([Answer(each, None, error) for each in rest])
            self._given.put(None)

    def answers(self) -> Iterator[Sequence[Answer]]:
        """What is given, as it comes, until every request has had its final answer."""
        while (given := self._given.get()) is not None:
            if isinstance(given, GatewayError):
                raise given
            yield given


class InferenceResponseSender:
    """Answers one request, from any thread. Without it and its request the model can answer no more."""

    def __init__(
        self, run: Run, request: int, wanted: Mapping[str, DataType], *, decoupled: bool, cancelled: Callable[[], bool]
    ) -> None:
        """Of the request at this place of the batch; `cancelled` tells whether nobody waits for it any more."""
        self.closed = False
        self.is_cancelled = cancelled
        self._run = run
        self._request = request
        self._wanted = wanted
        self._decoupled = decoupled
        self._sent = 0
        self._lock = threading.Lock()

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """Send a response, with flags 0 or TRITONSERVER_RESPONSE_COMPLETE_FINAL. Raises `TritonModelException`."""
        if flags not in _FLAGS:
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if response is None and not flags:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        with self._lock:
            self._advance(response, final=bool(flags))
            if response is not None:
                answer = response.to_answer(self._request, self._wanted, final=bool(flags))
            else:
                answer = Answer(self._request)
            self._run.give([answer], [self._request] if flags else [])

    def returned(self, response: InferenceResponse) -> Answer:
        """The answer of a response that `execute` returned, the last. Raises `TritonModelException` after another."""
        with self._lock:
            self._advance(response, final=True)
        return response.to_answer(self._request, self._wanted, final=True)

    def close(self) -> None:
        """Nothing more can be sent."""
        self.closed = True

    def _advance(self, response: InferenceResponse | None, *, final: bool) -> None:
        if not self._decoupled:
            if response is not None and self._sent:
                raise TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send more than one response."
                )
            if response is None and not self._sent:
                raise TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send complete final before sending a response."
                )
        if self.closed:
            raise TritonModelException("Unable to send response. Response sender has been closed.")
        self.closed = final
        self._sent += 1

    def __del__(self) -> None:
        if not self.closed:
            gone = "the model let go of the request without a final response"
            self._run.fail([self._request], errors.Internal(gone))

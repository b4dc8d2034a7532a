"""Triton's gRPC protocol, as a client (grpc.aio), with messages as bytes: they are written and read off the event loop.

The library connects again by itself, after pauses of at most a second. What it cannot see, a connection on which
nothing comes any more, is replaced when it is told to (`renew`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from tritonclient.grpc import service_pb2

from gateway.config.model import ModelConfigProto
from gateway.engines.remote.client import Payload, Question
from gateway.engines.remote.failures import Failure, of_status, unreachable
from gateway.engines.remote.options import Address, Options
from gateway.types import Array, DataType, Parameter, Tensor

_SERVICE = "/inference.GRPCInferenceService/"
_OWN_TIMER = "Deadline Exceeded"  # details of the library's own; a server's say more
_ABSENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_FIRST_PAUSE_MS, _LONGEST_PAUSE_MS = 100, 1000


class GrpcClient:
    """See `Client`."""

    def __init__(self, address: Address, options: Options) -> None:
        self._address = address
        self._options = options
        self._metadata = _metadata(options)
        self._line = _Line(self._open())

    def encode(self, question: Question) -> Payload:
        """See `Client`."""
        message: Any = service_pb2.ModelInferRequest(
            model_name=self._options.model, model_version=self._options.version, id=question.id
        )
        for name, tensor in question.inputs.items():
            message.inputs.add(name=name, datatype=tensor.datatype.name, shape=tensor.shape)
            message.raw_input_contents.append(bytes(tensor.wire))
        for name in question.outputs:
            message.outputs.add(name=name)
        for key, value in question.parameters.items():
            _set(message.parameters[key], value)
        if question.seconds is not None:  # the call's own deadline says it too, and Triton's queues read only this
            message.parameters["timeout"].int64_param = max(1, int(question.seconds * 1e6))
        return Payload((message.SerializeToString(),))

    async def send(self, payload: Payload, seconds: float) -> bytes:
        """See `Client`."""
        try:
            async with self._used() as line:
                return await line.infer(payload.parts[0], timeout=seconds, metadata=self._metadata)  # type: ignore[no-any-return]
        except grpc.aio.AioRpcError as problem:
            if problem.details() == _OWN_TIMER:
                raise TimeoutError from problem
            raise _failure(self._options.name, problem, problem.trailing_metadata()) from problem

    def size(self, raw: bytes) -> int:
        """See `Client`."""
        return len(raw)

    def decode(self, raw: bytes) -> dict[str, Array]:
        """See `Client`."""
        try:
            answer: Any = service_pb2.ModelInferResponse.FromString(raw)
            contents = answer.raw_output_contents or [_typed(output) for output in answer.outputs]
            return {
                output.name: Tensor(DataType(output.datatype), tuple(output.shape), wire).array
                for output, wire in zip(answer.outputs, contents, strict=True)
            }
        except DecodeError as problem:
            raise ValueError("no inference response") from problem

    async def live(self) -> None:
        """See `Client`."""
        try:
            async with self._used() as line:
                await line.live(b"", timeout=self._options.connect_timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as problem:
            if problem.code() in _ABSENT:
                raise unreachable(self._options.name, problem.details()) from problem

    async def renew(self) -> None:
        """See `Client`. Calls on the old connection may still be answered; the last of them closes it."""
        old, self._line = self._line, _Line(self._open())
        if not old.calls:
            await old.channel.close()

    async def close(self) -> None:
        """See `Client`."""
        await self._line.channel.close()

    @asynccontextmanager
    async def _used(self) -> AsyncGenerator[_Line, None]:
        """The channel, kept open until the call is over."""
        line = self._line
        line.calls += 1
        try:
            yield line
        finally:
            line.calls -= 1
            if line is not self._line and not line.calls:
                await line.channel.close()

    def _open(self) -> Any:
        options = (
            *_BASE,
            ("grpc.use_local_subchannel_pool", 1),  # or a new channel would share the silent connection
            ("grpc.initial_reconnect_backoff_ms", _FIRST_PAUSE_MS),
            ("grpc.min_reconnect_backoff_ms", int(self._options.connect_timeout * 1e3)),
            ("grpc.max_reconnect_backoff_ms", _LONGEST_PAUSE_MS),
        )
        if self._address.secure:
            return grpc.aio.secure_channel(self._address.name, _credentials(self._options), options)
        return grpc.aio.insecure_channel(self._address.name, options)


_BASE = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # what a gateway does, its settings say, and not its environment
)


class _Line:
    """A channel and the calls on it."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.infer = channel.unary_unary(_SERVICE + "ModelInfer")
        self.live = channel.unary_unary(_SERVICE + "ServerLive")
        self.calls = 0


def fetch(address: Address, options: Options) -> ModelConfigProto:
    """The configuration of the model there. Blocking. Raises `Failure`."""
    request = service_pb2.ModelConfigRequest(name=options.model, version=options.version)
    if address.secure:
        channel = grpc.secure_channel(address.name, _credentials(options), _BASE)
    else:
        channel = grpc.insecure_channel(address.name, _BASE)
    with channel:
        call = channel.unary_unary(
            _SERVICE + "ModelConfig", type(request).SerializeToString, service_pb2.ModelConfigResponse.FromString
        )
        try:
            return call(request, timeout=options.connect_timeout, metadata=_metadata(options)).config
        except grpc.RpcError as problem:
            raise _failure(options.name, problem, problem.trailing_metadata()) from problem


def _credentials(options: Options) -> Any:
    known = options.certificates
    return grpc.ssl_channel_credentials(known.authorities or None, known.key or None, known.chain or None)


def _metadata(options: Options) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {options.token}"),) if options.token else ()


def _failure(model: str, problem: Any, trailers: Any) -> Failure:
    said = dict(trailers or ())
    retry_after = _retry_after(said)
    if problem.code() is grpc.StatusCode.UNAVAILABLE and retry_after is None:
        return unreachable(model, problem.details())
    return of_status(model, problem.code().value[0], problem.details() or "", retry_after)


def _retry_after(trailers: dict[str, Any]) -> float | None:
    text = str(trailers.get("retry-after-ms", ""))
    if text.isdecimal():
        return int(text) / 1e3
    status, retry = status_pb2.Status(), error_details_pb2.RetryInfo()
    try:
        status.ParseFromString(trailers.get("grpc-status-details-bin", b""))
    except DecodeError:
        return None
    for detail in status.details:
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToMilliseconds() / 1e3)
    return None


def _set(message: Any, value: Parameter) -> None:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    setattr(message, kinds[type(value)], value)


def _typed(output: Any) -> bytes:
    """An output that came as numbers and not as bytes, in wire form."""
    (values,) = [values for _, values in output.contents.ListFields()] or [[]]
    datatype = DataType(output.datatype)
    if datatype is DataType.BYTES:
        return b"".join(len(value).to_bytes(4, "little") + value for value in values)
    return np.array(values, datatype.dtype).tobytes()

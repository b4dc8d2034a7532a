"""The handlers a `grpc.aio` server is given: Triton's service, `grpc.health.v1` and reflection.

Handlers take and give bytes where a message is large, authenticate for themselves (an interceptor costs every
call), and turn each `GatewayError` into its status. What the calls mean is in `calls`, `control`, `stream`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf import message_factory
from grpc.aio import InternalError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.reflection_pb2_grpc import (
    ServerReflectionServicer,
    add_ServerReflectionServicer_to_server,
)
from tritonclient.grpc import service_pb2

from gateway import errors
from gateway.middleware.wire_times import WireTimes
from gateway.service import Service
from gateway.service.shared_regions import SharedRegions
from gateway.transport.grpc.calls import Calls, explain
from gateway.transport.grpc.control import OPEN, Control
from gateway.transport.grpc.stream import Stream
from gateway.transport.grpc.trailers import trailers

SERVICE = "inference.GRPCInferenceService"
_STATUS = {status.value[0]: status for status in grpc.StatusCode}


def add_handlers(server: Any, service: Service, calls: Calls, regions: SharedRegions | None = None) -> None:
    """Have a `grpc.aio` server answer everything this gateway offers on gRPC."""
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, _inference(calls, Control(service, regions))),)
    )
    health_pb2_grpc.add_HealthServicer_to_server(_Health(service, calls), server)
    names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    add_ServerReflectionServicer_to_server(_Reflection(names, calls), server)


def _inference(calls: Calls, control: Control) -> dict[str, Any]:
    answers = control.answers
    handlers: dict[str, Any] = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(_model_infer(calls)),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(_model_stream_infer(calls)),
    }
    for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        if method.name in answers:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                _control(calls, method.name, answers[method.name]),
                request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
                response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
            )
    return handlers


def _model_infer(calls: Calls) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def model_infer(payload: bytes, context: Any) -> bytes:
        wire = calls.wire()
        if wire is not None:
            context.add_done_callback(lambda _: _sent(wire))
        try:
            return await calls.answer(payload, context.invocation_metadata(), context.time_remaining(), wire)
        except errors.GatewayError as error:
            await _abort(context, error)

    return model_infer


def _sent(wire: WireTimes) -> None:
    wire.sent()
    wire.close()


def _model_stream_infer(calls: Calls) -> Callable[[Any, Any], Awaitable[None]]:
    async def model_stream_infer(_: Any, context: Any) -> None:
        try:
            await Stream(calls, context).run()
        except Exception as error:  # noqa: BLE001 - explain() logs what is not ours
            await _abort(context, explain(error))

    return model_stream_infer


def _control(calls: Calls, rpc: str, answer: Callable[[Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def control(request: Any, context: Any) -> Any:
        try:
            calls.allow(rpc, context.invocation_metadata())
            if rpc in OPEN:
                return await answer(request)
            with calls.running:
                calls.caller(context.invocation_metadata(), None)
                return await answer(request)
        except Exception as error:  # noqa: BLE001 - explain() logs what is not ours
            await _abort(context, explain(error))

    return control


async def _abort(context: Any, error: errors.GatewayError) -> NoReturn:
    try:
        await context.abort(_STATUS[error.grpc], error.message, trailers(error))
    except InternalError:
        # The client has ended the call, of which gRPC tells the call itself a little later.
        raise asyncio.CancelledError from None
    raise error  # abort() never returns, which its type does not say


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Readiness of the whole server, whichever service is asked about. Needs no token, so that probes work."""

    def __init__(self, service: Service, calls: Calls) -> None:
        self._service = service
        self._calls = calls

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - the name and the call are gRPC's
        """SERVING while `Service.ready` is true."""
        try:
            self._calls.allow("ServerReady", context.invocation_metadata())
        except errors.GatewayError as error:
            await _abort(context, error)
        status = health_pb2.HealthCheckResponse.ServingStatus
        return health_pb2.HealthCheckResponse(status=status.SERVING if self._service.ready() else status.NOT_SERVING)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: ARG002, N802
        """Not offered; clients that ask take the status for the health protocol's "no health checking"."""
        await _abort(context, errors.Unsupported("health is answered on request only, call Check"))


class _Reflection(ServerReflectionServicer):  # type: ignore[misc]
    """What may be called here, for those who may call it."""

    def __init__(self, services: tuple[str, ...], calls: Calls) -> None:
        # The library's servicer for threads, which blocks nowhere; the one for asyncio is not public.
        self._answers: Any = reflection.ReflectionServicer(services)
        self._calls = calls

    async def ServerReflectionInfo(self, request_iterator: Any, context: Any) -> None:  # noqa: ARG002, N802
        """The reflection protocol, behind authentication. Clients keep it open, so a stop ends it."""
        try:
            self._calls.caller(context.invocation_metadata(), None)
        except errors.GatewayError as error:
            await _abort(context, error)
        while (request := await self._calls.running.unless_closed(context.read())) not in (None, grpc.aio.EOF):
            for response in self._answers.ServerReflectionInfo(iter((request,)), context):
                await context.write(response)

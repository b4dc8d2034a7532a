"""Triton's gRPC service with real clients, on each implementation: the same calls, answers and errors."""

import asyncio

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_sync
import tritonclient.grpc.aio as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from gateway import errors
from gateway.transport.auth import Callers, Tokens
from gateway.types import DataType, InferResponse, Tensor
from tests.api.grpc_support import IMPLEMENTATIONS, Running, failure, inputs, message, serving

TOKEN = "0123456789abcdef-secret"


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        pytest.importorskip("pygrpc_native")
    return request.param


@pytest.fixture
async def running(implementation):
    async with serving(implementation) as running:
        assert running.server.implementation == implementation
        yield running


# --- inference


async def test_an_inference_with_the_asyncio_client(running: Running):
    async with running.client() as client:
        result = await client.infer("m", inputs(3.5), request_id="a")
    assert result.as_numpy("OUT").tolist() == [[3.5] * 4]
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("a", "m", "1")


async def test_an_inference_with_the_blocking_client(running: Running):
    def ask() -> np.ndarray:
        with triton_sync.InferenceServerClient(running.url) as client:
            return client.infer("m", inputs(2.0)).as_numpy("OUT")

    assert (await asyncio.to_thread(ask)).tolist() == [[2.0] * 4]


async def test_an_inference_of_many_megabytes(running: Running):
    size = 4 << 20
    async with running.client() as client:
        result = await client.infer("m", inputs(1.25, size))
    assert result.as_numpy("OUT").shape == (1, size)
    assert (result.as_numpy("OUT") == 1.25).all()


async def test_many_inferences_at_once_each_get_their_own_answer(running: Running):
    async with running.client() as client:
        results = await asyncio.gather(*(client.infer("m", inputs(float(i)), request_id=str(i)) for i in range(200)))
    assert [result.get_response().id for result in results] == [str(i) for i in range(200)]
    assert [result.as_numpy("OUT")[0, 0] for result in results] == list(range(200))


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.NoCompression])
async def test_compressed_requests(running: Running, compression):
    async with running.stub() as stub:
        response = await stub.ModelInfer(message("z"), compression=compression)
    assert response.id == "z"


@pytest.mark.parametrize("level", ["low", "medium", "high"])
async def test_answers_are_compressed_where_that_is_asked_for(implementation, level):
    counted = 0

    async def count(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        nonlocal counted
        while data := await source.read(1 << 16):
            counted += len(data)
            sink.write(data)
        sink.close()
        await sink.wait_closed()

    async with serving(implementation, compression=level) as running:
        assert running.server.implementation == "grpcio"

        passing: list[asyncio.Task[None]] = []

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            passing.append(asyncio.current_task())
            back, to = await asyncio.open_connection("127.0.0.1", running.server.port)
            async with asyncio.TaskGroup() as group:
                group.create_task(count(reader, to))
                group.create_task(count(back, writer))

        async with await asyncio.start_server(pass_on, "127.0.0.1", 0) as proxy:
            port = proxy.sockets[0].getsockname()[1]
            async with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
                rows = triton.InferInput("IN", [8, 2**14], "FP32")
                rows.set_data_from_numpy(np.zeros((8, 2**14), np.float32))
                result = await client.infer("m", [rows], compression_algorithm="deflate")
            await asyncio.wait(passing)
    assert result.as_numpy("OUT").shape == (8, 2**14)
    assert counted < 2**14  # of half a megabyte each way


async def test_deflate_is_understood_by_grpcio_and_refused_by_the_front(running: Running, implementation):
    async with running.stub() as stub:
        call = stub.ModelInfer(message("z"), compression=grpc.Compression.Deflate)
        if implementation == "grpcio":
            assert (await call).id == "z"
        else:
            assert (await failure(call))[0] is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        (
            {"model_name": "nope"},
            grpc.StatusCode.NOT_FOUND,
            "Request for unknown model: 'nope' is not found",
        ),
        (
            {"model_version": "99"},
            grpc.StatusCode.NOT_FOUND,
            "Request for unknown model: 'm' version 99 is not found",
        ),
        (
            {"model_version": "x"},
            grpc.StatusCode.INVALID_ARGUMENT,
            errors.bad_version("x").message,
        ),
        (
            {"raw_input_contents": [bytes(7)]},
            grpc.StatusCode.INVALID_ARGUMENT,
            "[request id: q] input byte size mismatch for input 'IN' for model 'm'. Expected 8, got 7",
        ),
        (
            {"parameters": {"explode": pb.InferParameter(bool_param=True)}},
            grpc.StatusCode.INTERNAL,
            "the model fell over",
        ),
        (
            {"parameters": {"triton_x": pb.InferParameter(bool_param=True)}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified.",
        ),
    ],
)
async def test_errors_have_tritons_status_and_words(running: Running, change, status, text):
    request = message("q")
    for field in change:
        request.ClearField(field)
    request.MergeFrom(pb.ModelInferRequest(**change))
    async with running.stub() as stub:
        assert await failure(stub.ModelInfer(request)) == (status, text)


async def test_bytes_that_are_no_message(running: Running):
    async with running.channel() as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        status, text = await failure(call(b"\xff\xff\xff"))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert "not a valid inference.ModelInferRequest message" in text


async def test_an_error_text_of_any_characters_arrives(implementation):
    async def infer(_):
        raise errors.InvalidArgument("größer\nals 100 %")
        yield

    async with serving(implementation, infer=lambda _: infer) as running, running.stub() as stub:
        assert await failure(stub.ModelInfer(message())) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "größer\nals 100 %",
        )


async def test_a_fault_of_ours_is_logged_and_not_shown(implementation, caplog):
    async def infer(_):
        raise RuntimeError("secret path /etc")
        yield

    async with serving(implementation, infer=lambda _: infer) as running, running.stub() as stub:
        assert await failure(stub.ModelInfer(message())) == (grpc.StatusCode.INTERNAL, "internal error")
    (record,) = [record for record in caplog.records if record.name == "gateway.grpc"]
    assert "secret path" in str(record.exc_info)


async def test_a_model_with_many_answers_is_for_streams_only(implementation):
    async def infer(request):
        for final in (False, True):
            yield InferResponse("m", "1", {"OUT": Tensor(DataType.INT8, (1,), b"x")}, id=request.id, final=final)

    async with serving(implementation, infer=lambda _: infer) as running, running.stub() as stub:
        assert await failure(stub.ModelInfer(message())) == (
            grpc.StatusCode.UNIMPLEMENTED,
            "ModelInfer RPC doesn't support models with decoupled transaction policy",
        )


async def test_a_request_beyond_the_limit_of_bytes(implementation):
    async with serving(implementation, max_request_bytes=1000) as running, running.stub() as stub:
        assert (await stub.ModelInfer(message("x" * 500))).id == "x" * 500
        status, text = await failure(stub.ModelInfer(message("x" * 1000)))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1000" in text


async def test_a_request_beyond_the_limit_of_tensors(implementation):
    async with serving(implementation, max_request_tensors=2) as running, running.stub() as stub:
        request = message()
        for i in range(3):
            request.outputs.add(name=str(i))
        status, text = await failure(stub.ModelInfer(request))
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert text.startswith("the request has 3 outputs, more than the limit of 2")


# --- time and cancellation


async def test_the_calls_deadline_is_the_requests(running: Running):
    running.model.hold = True
    async with running.stub() as stub:
        status, _ = await failure(stub.ModelInfer(message(), timeout=0.05))
    assert status is grpc.StatusCode.DEADLINE_EXCEEDED
    job = await running.model.held.get()
    assert job.request.deadline is not None


async def test_a_call_without_deadline_has_none(running: Running):
    running.model.hold = True
    async with running.stub() as stub:
        call = stub.ModelInfer(message())
        job = await running.model.held.get()
        assert job.request.deadline is None
        running.model.echo(job)
        await call


async def test_the_timeout_in_metadata_is_a_deadline(running: Running):
    running.model.hold = True
    async with running.stub() as stub:
        call = stub.ModelInfer(message(), metadata=[("x-request-timeout-ms", "20")])
        assert await failure(call) == (grpc.StatusCode.DEADLINE_EXCEEDED, "Request timeout expired")


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
async def test_a_timeout_that_is_none(running: Running, value):
    async with running.stub() as stub:
        status, text = await failure(stub.ModelInfer(message(), metadata=[("x-request-timeout-ms", value)]))
    assert status is grpc.StatusCode.INVALID_ARGUMENT
    assert value in text


async def test_a_cancelled_call_leaves_the_queue(running: Running):
    running.model.hold = True
    async with running.stub() as stub:
        left, stayed = stub.ModelInfer(message("left")), stub.ModelInfer(message("stayed"))
        jobs = {(job := await running.model.held.get()).request.id: job for _ in range(2)}
        left.cancel()
        assert await running.ended.get() == "left"
        assert jobs["left"].done
        assert not jobs["stayed"].done
        running.model.echo(jobs["stayed"])
        assert (await stayed).id == "stayed"


# --- authentication


@pytest.fixture
async def guarded(implementation):
    async with serving(implementation, authenticate=Callers(Tokens({TOKEN: "acme"})).tenant) as running:
        yield running


async def test_a_call_without_a_token_is_refused(guarded: Running):
    async with guarded.stub() as stub:
        for call in (stub.ModelInfer(message()), stub.ModelMetadata(pb.ModelMetadataRequest(name="m"))):
            assert (await failure(call))[0] is grpc.StatusCode.UNAUTHENTICATED
        stream = stub.ModelStreamInfer(iter([message()]))
        assert (await failure(stream.read()))[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_names_the_tenant(guarded: Running):
    guarded.model.hold = True
    async with guarded.stub() as stub:
        call = stub.ModelInfer(message(), metadata=[("authorization", f"Bearer {TOKEN}")])
        job = await guarded.model.held.get()
        assert job.request.tenant == "acme"
        guarded.model.echo(job)
        await call


async def test_probes_need_no_token_and_reflection_does(guarded: Running):
    async with guarded.stub() as stub, guarded.channel() as channel:
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = reflection.ServerReflectionInfo()  # sends nothing: a write that meets the refusal fails in its own way
        assert (await failure(call.read()))[0] is grpc.StatusCode.UNAUTHENTICATED


# --- the other calls


async def test_health_and_metadata(running: Running):
    async with running.client() as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("m")
        assert await client.is_model_ready("m", "1")
        server = await client.get_server_metadata()
        assert (server.name, "statistics" in server.extensions) == ("triton", True)
        model = await client.get_model_metadata("m")
    assert (model.name, list(model.versions), model.platform) == ("m", ["1"], "fake")
    assert (model.inputs[0].name, model.inputs[0].datatype, list(model.inputs[0].shape)) == ("IN", "FP32", [-1, -1])


async def test_a_model_that_is_not_there_is_not_ready_and_that_is_no_error(running: Running):
    async with running.client() as client:
        assert not await client.is_model_ready("nope")
        assert not await client.is_model_ready("m", "2")


async def test_configuration_and_statistics(running: Running):
    async with running.client() as client:
        config = (await client.get_model_config("m")).config
        assert (config.name, config.max_batch_size) == ("m", 8)
        await client.infer("m", inputs())
        statistics = (await client.get_inference_statistics("m")).model_stats[0]
        assert (statistics.name, statistics.version) == ("m", "1")
        assert statistics.inference_stats.success.count == 1
        with pytest.raises(InferenceServerException, match="requested model 'nope' is not available") as caught:
            await client.get_inference_statistics("nope")
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


async def test_the_index_and_model_control(running: Running):
    async with running.client() as client:
        index = (await client.get_model_repository_index()).models
        assert [(each.name, each.version, each.state) for each in index] == [("m", "1", "READY"), ("sleeping", "", "")]
        for call in (client.load_model("m"), client.unload_model("m")):
            with pytest.raises(InferenceServerException, match="explicit model load / unload is not allowed"):
                await call
        with pytest.raises(InferenceServerException, match="unexpected load parameter 'files'"):
            await client.load_model("m", config="{}", files={"files": b""})


async def test_what_is_not_there_says_so(running: Running):
    async with running.client() as client:
        for call in (client.get_system_shared_memory_status(), client.unregister_cuda_shared_memory()):
            with pytest.raises(InferenceServerException, match=r"--allow-client-shm=true") as caught:
                await call
            assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


async def test_health_checking(running: Running):
    async with running.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService", "anything"):
            status = (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        running.service.drain()
        status = (await stub.Check(health_pb2.HealthCheckRequest())).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await failure(stub.Watch(health_pb2.HealthCheckRequest()).read()))[0] is (grpc.StatusCode.UNIMPLEMENTED)


async def test_reflection(running: Running):
    ask = reflection_pb2.ServerReflectionRequest
    async with running.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([ask(list_services=""), ask(file_containing_symbol="inference.ModelInferRequest")])
        services, file = [response async for response in stub.ServerReflectionInfo(requests)]
    assert {each.name for each in services.list_services_response.service} == {
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert file.file_descriptor_response.file_descriptor_proto

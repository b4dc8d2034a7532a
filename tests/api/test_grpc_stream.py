"""ModelStreamInfer with real clients, on each implementation."""

import asyncio

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from gateway import errors
from gateway.types import DataType, InferResponse, Tensor
from tests.api.grpc_support import IMPLEMENTATIONS, Running, failure, inputs, message, serving


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        pytest.importorskip("pygrpc_native")
    return request.param


@pytest.fixture
async def running(implementation):
    async with serving(implementation) as running:
        yield running


async def test_a_stream_with_tritons_client(running: Running):
    async def requests():
        for i in range(5):
            yield {"model_name": "m", "inputs": inputs(float(i)), "request_id": str(i)}

    answers = {}
    async with running.client() as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None
            response = result.get_response()
            assert response.parameters["triton_final_response"].bool_param
            answers[response.id] = result.as_numpy("OUT")[0, 0]
    assert answers == {str(i): float(i) for i in range(5)}


async def test_requests_of_one_stream_run_side_by_side(running: Running):
    running.model.hold = True
    async with running.stub() as stub:
        stream = stub.ModelStreamInfer()
        for each in ("a", "b"):
            await stream.write(message(each))
        jobs = [await running.model.held.get() for _ in range(2)]
        for job in reversed(jobs):
            running.model.echo(job)
            assert (await stream.read()).infer_response.id == job.request.id
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK


async def test_the_answers_of_one_request_keep_their_order(implementation):
    async def infer(request):
        for i in range(50):
            output = Tensor(DataType.UINT8, (1,), bytes([i]))
            yield InferResponse("m", "1", {"OUT": output}, id=request.id, final=i == 49)
            await asyncio.sleep(0)

    seen: dict[str, list[int]] = {"a": [], "b": []}
    async with serving(implementation, infer=lambda _: infer) as running, running.stub() as stub:
        async for answer in stub.ModelStreamInfer(iter([message("a"), message("b")])):
            response = answer.infer_response
            seen[response.id].append(response.raw_output_contents[0][0])
            assert response.parameters["triton_final_response"].bool_param is (seen[response.id][-1] == 49)
    assert seen == {"a": list(range(50)), "b": list(range(50))}


async def test_a_failed_request_leaves_the_stream_open(running: Running):
    async with running.stub() as stub:
        stream = stub.ModelStreamInfer()
        await stream.write(message("bad", model="nope"))
        answer = await stream.read()
        assert answer.error_message == "Request for unknown model: 'nope' is not found"
        assert answer.infer_response.id == "bad"
        await stream.write(message("good"))
        answer = await stream.read()
        assert (answer.error_message, answer.infer_response.id) == ("", "good")
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK


async def test_a_request_that_cannot_be_read_is_answered_too(running: Running):
    broken = message("x")
    broken.inputs[0].datatype = "NONE"
    async with running.stub() as stub:
        (answer,) = [answer async for answer in stub.ModelStreamInfer(iter([broken]))]
    assert "unknown data-type 'NONE'" in answer.error_message
    assert answer.infer_response.id == "x"


async def test_a_client_may_ask_for_errors_that_end_the_stream(running: Running):
    running.model.hold = True
    async with running.stub() as stub:
        stream = stub.ModelStreamInfer(metadata=[("triton_grpc_error", "true")])
        await stream.write(message("held"))
        job = await running.model.held.get()
        await stream.write(message("bad", model="nope"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == "Request for unknown model: 'nope' is not found"
        assert {await running.ended.get() for _ in range(2)} == {"held", "bad"}
        assert job.done


async def test_an_error_that_ends_the_stream_waits_for_the_answer_being_written(implementation):
    size = 8 << 20  # more than flow control lets through while the client does not read

    async def infer(request):
        if request.id == "bad":
            raise errors.NotFound("gone")
        output = Tensor(DataType.UINT8, (size,), bytes(size))
        yield InferResponse("m", "1", {"OUT": output}, id=request.id)

    options = [("grpc.max_receive_message_length", -1)]
    async with (
        serving(implementation, infer=lambda _: infer) as running,
        running.channel(options=options) as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stream = stub.ModelStreamInfer(metadata=[("triton_grpc_error", "true")])
        await stream.write(message("large"))
        await stream.write(message("bad"))
        assert await running.ended.get() == "bad"
        assert len((await stream.read()).infer_response.raw_output_contents[0]) == size
        assert await failure(stream.read()) == (grpc.StatusCode.NOT_FOUND, "gone")


async def test_a_client_that_ends_the_call_under_an_answer_is_no_failure(implementation, caplog):
    size = 8 << 20  # more than this client takes, and more than flow control lets through before it says so

    async def infer(request):
        output = Tensor(DataType.UINT8, (size,), bytes(size))
        yield InferResponse("m", "1", {"OUT": output}, id=request.id)

    async with serving(implementation, infer=lambda _: infer) as running, running.stub() as stub:
        stream = stub.ModelStreamInfer()
        for each in ("a", "b"):
            await stream.write(message(each))
        code, _ = await failure(stream.read())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert {await running.ended.get() for _ in range(2)} == {"a", "b"}
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_cancelling_a_stream_cancels_its_requests(running: Running):
    running.model.hold = True
    async with running.stub() as stub:
        stream = stub.ModelStreamInfer()
        for each in ("a", "b"):
            await stream.write(message(each))
        jobs = [await running.model.held.get() for _ in range(2)]
        stream.cancel()
        assert {await running.ended.get() for _ in range(2)} == {"a", "b"}
        assert all(job.done for job in jobs)


async def test_the_timeout_in_metadata_is_each_requests_own(running: Running):
    running.model.hold = True
    async with running.stub() as stub:
        stream = stub.ModelStreamInfer(metadata=[("x-request-timeout-ms", "30")])
        for each in ("a", "b"):
            await stream.write(message(each))
            answer = await stream.read()
            assert (answer.error_message, answer.infer_response.id) == ("Request timeout expired", each)
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK

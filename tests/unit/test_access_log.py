"""One line for each request, whatever became of it, and the request itself untouched."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np
import pytest

from gateway.errors import GatewayError, InvalidArgument, ResourceExhausted, Shed
from gateway.middleware.access_log import access_log
from gateway.types import DataType, InferRequest, InferResponse, Tensor, Timings

TENSOR = Tensor.from_array(DataType.FP32, np.array([1234.5], dtype=np.float32))


def request() -> InferRequest:
    return InferRequest("digits", {"IN": TENSOR}, id="r1", tenant="acme", rows=2)


def answer(*, final: bool = True) -> InferResponse:
    timings = Timings(
        queue_ns=40_000, compute_input_ns=1_000, compute_infer_ns=8_500, compute_output_ns=500, batch_rows=8
    )
    return InferResponse("digits", "3", {"OUT": TENSOR}, id="r1", timings=timings, final=final)


class Endpoint:
    """Yields `answers`, then raises `error` if there is one; `closed` tells that its stream ended."""

    def __init__(self, *answers: InferResponse, error: Exception | None = None) -> None:
        self.answers = answers
        self.error = error
        self.closed = False

    async def __call__(self, asked: InferRequest) -> AsyncGenerator[InferResponse, None]:
        try:
            for each in self.answers:
                yield each
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "gateway")

    def fields() -> dict:
        (record,) = caplog.records
        assert record.msg.name == "infer"
        return record.msg.fields

    return fields


async def test_an_answer(logged) -> None:
    given = answer()
    assert [each async for each in access_log(Endpoint(given))(request())] == [given]
    line = logged()
    assert line.pop("total_us") >= 0
    assert line == {
        "id": "r1",
        "model": "digits",
        "version": "3",
        "tenant": "acme",
        "status": "OK",
        "rows": 2,
        "batch_rows": 8,
        "queue_us": 40,
        "compute_us": 10,
    }


async def test_an_answer_no_model_ran_for(logged) -> None:
    given = InferResponse("digits", "3", {}, timings=None)
    assert [each async for each in access_log(Endpoint(given))(request())] == [given]
    assert (logged()["status"], logged()["queue_us"], logged()["compute_us"]) == ("OK", 0, 0)


async def test_a_stream_leaves_one_line(logged) -> None:
    given = [answer(final=False), answer(final=False), answer()]
    assert [each async for each in access_log(Endpoint(*given))(request())] == given
    assert logged()["status"] == "OK"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ResourceExhausted("full"), "ResourceExhausted"),
        (Shed("for others"), "Shed"),
        (RuntimeError("a bug"), "Internal"),
    ],
)
async def test_an_error_passes_through_and_is_named(logged, error: Exception, status: str) -> None:
    with pytest.raises((GatewayError, RuntimeError)) as raised:
        [each async for each in access_log(Endpoint(error=error))(request())]
    assert raised.value is error
    assert (logged()["status"], logged()["version"]) == (status, "")
    assert logged().get("refused") == getattr(error, "reason", None)


async def test_a_bad_request_is_no_refusal(logged) -> None:
    with pytest.raises(InvalidArgument):
        [each async for each in access_log(Endpoint(error=InvalidArgument("no such input")))(request())]
    assert "refused" not in logged()


async def test_a_caller_who_leaves_closes_the_endpoint(logged) -> None:
    endpoint = Endpoint(answer(final=False), answer())
    async with aclosing(access_log(endpoint)(request())) as responses:
        await anext(responses)
    assert endpoint.closed
    assert logged()["status"] == "Cancelled"


async def test_leaving_after_the_final_answer_is_no_cancellation(logged) -> None:
    async with aclosing(access_log(Endpoint(answer()))(request())) as responses:
        await anext(responses)
    assert logged()["status"] == "OK"


async def test_no_tensor_data_is_written(logged) -> None:
    [each async for each in access_log(Endpoint(answer()))(request())]
    assert "1234.5" not in str(logged())

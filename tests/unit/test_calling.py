"""What becomes of a call of one model by another: whose it is, until when, and who may not call whom."""

from contextlib import aclosing

import pytest

from gateway import errors
from gateway.engines.calling import call
from gateway.types import Batch, InferResponse
from tests.support import request


class Gateway:
    """Remembers what is asked of it, and how often a run gave its cores away."""

    def __init__(self):
        self.asked = []
        self.waits = 0

    async def infer(self, asked):
        self.asked.append(asked)
        yield InferResponse(asked.model_name, "1", {})

    def batch(self, *requests):
        return Batch(len(requests), dict, requests=requests, waits=self.lend)

    def lend(self):
        self.waits += 1

    async def call(self, batch, asked, model="a"):
        async with aclosing(call(self.infer, batch, model, asked)) as responses:
            async for _ in responses:
                pass
        return self.asked[-1]


@pytest.mark.parametrize(
    ("own", "of_batch", "until"),
    [
        (None, (), None), (5.0, (None,), 5.0), (None, (3.0, 4.0), 4.0), (None, (3.0, None), None), (9.0, (3.0, 4.0), 4.0),
        (2.0, (3.0, 4.0), 2.0),
    ],
)  # fmt: skip
async def test_it_has_no_more_time_than_the_last_of_those_who_wait_for_it(own, of_batch, until):
    gateway = Gateway()
    batch = gateway.batch(*[request(deadline=deadline) for deadline in of_batch])
    asked = await gateway.call(batch, request(model_name="b", deadline=own))
    assert asked.deadline == until
    assert gateway.waits == 1


async def test_it_is_of_the_tenant_of_the_batch_if_that_is_one():
    gateway = Gateway()
    own = await gateway.call(gateway.batch(request(tenant="t"), request(tenant="t")), request(model_name="b"))
    mixed = await gateway.call(gateway.batch(request(tenant="t"), request(tenant="u")), request(model_name="b"))
    assert (own.tenant, mixed.tenant) == ("t", "")


async def test_a_model_that_waits_is_not_called_by_those_it_waits_for():
    gateway = Gateway()
    inner = await gateway.call(gateway.batch(request()), request(model_name="b"))
    assert inner.callers == ("a",)
    batch = gateway.batch(request(), inner)
    assert (await gateway.call(batch, request(model_name="c"), "b")).callers == ("b", "a")
    for name in ("a", "b"):
        with pytest.raises(errors.InvalidArgument, match=f"model 'b' cannot call '{name}', which waits for it"):
            await gateway.call(batch, request(model_name=name), "b")
    assert gateway.waits == 2


async def test_it_is_a_part_of_the_trace_of_the_request_that_it_is_for():
    gateway, trace = Gateway(), object()
    batch = gateway.batch(request(), request(trace=trace))
    for of, expected in ((1, trace), (0, None), (-1, None), (2, None), (None, None)):
        assert (await gateway.call(batch, request(model_name="b", trace=of))).trace is expected

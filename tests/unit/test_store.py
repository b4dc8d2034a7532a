"""The memory store is bounded in bytes and time; digests tell requests apart, and only those."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.middleware.digest import Digests
from gateway.middleware.store import Kept, MemoryStore, compact, replay, size_of
from gateway.types import DataType, InferRequest, InferResponse, RequestedOutput, Tensor
from tests.support import answer, request, tensor


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def kept(size: int = 0) -> Kept:
    return Kept(b"", answer(request(), OUT=Tensor(DataType.UINT8, (size,), bytes(size))))


async def test_what_is_put_is_got_until_its_time_is_over():
    clock = Clock()
    store = MemoryStore(1 << 20, clock)
    entry = kept(5)
    await store.put(b"a", entry, 10)
    clock.now = 9.9
    assert await store.get(b"a") is entry
    assert await store.claim(b"a", b"") is entry
    clock.now = 10
    assert await store.get(b"a") is None
    assert store.bytes == 0


async def test_letting_go_before_the_time_is_said_once(caplog: pytest.LogCaptureFixture):
    clock = Clock()
    store = MemoryStore(3_000, clock, warns="keys_forgotten")
    for name in (b"a", b"b"):
        await store.put(name, kept(), 10)
    clock.now = 11
    await store.put(b"c", kept(), 10)  # in the place of one whose time is over
    assert caplog.records == []
    for name in (b"d", b"e", b"f"):
        await store.put(name, kept(), 10)
    (record,) = caplog.records
    assert record.msg.name == "keys_forgotten"


async def test_the_bytes_are_those_of_the_entries():
    store = MemoryStore(10_000)
    for size in (5000, 100, 3000, 0):
        await store.put(b"a", kept(size), 10)
        assert store.bytes == size_of(kept(size))
    await store.put(b"b", kept(1), 10)
    assert store.bytes == size_of(kept(0)) + size_of(kept(1))


async def test_what_is_larger_than_the_store_takes_nobodys_place():
    store = MemoryStore(10_000)
    await store.put(b"a", kept(), 10)
    await store.put(b"b", kept(10_000), 10)
    assert await store.get(b"a") is not None
    assert await store.get(b"b") is None


async def test_a_larger_entry_that_does_not_fit_does_not_leave_the_old_one():
    store = MemoryStore(10_000)
    await store.put(b"a", kept(), 10)
    await store.put(b"a", kept(10_000), 10)
    assert await store.get(b"a") is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5000)), max_size=60))
def test_the_store_never_holds_more_than_it_may_and_forgets_the_least_used(puts: list[tuple[int, int]]):
    async def run() -> None:
        store = MemoryStore(10_000)
        used: list[bytes] = []
        for key, size in puts:
            name = bytes((key,))
            await store.put(name, kept(size), 10)
            used = [each for each in used if each != name] + [name]
            held = [each for each in used if await store.get(each) is not None]
            assert store.bytes <= 10_000
            assert held == used[len(used) - len(held) :]  # the newest, in the order of their use
            used = held

    asyncio.run(run())


async def test_what_is_kept_has_bytes_of_its_own_and_no_timings():
    batch = np.arange(8, dtype=np.float32).reshape(4, 2)
    words = Tensor.from_array(DataType.BYTES, np.array([[b"a", b"bc"]], object))
    response = InferResponse("m", "1", {"OUT": tensor(batch[1:2]), "W": words}, id="r", parameters={"p": 1})
    copy = await compact(response)
    batch[:] = 0
    assert (copy.id, copy.timings, copy.parameters) == ("", None, {"p": 1})
    again = replay(copy, "s")
    assert again.id == "s"
    assert again.outputs["OUT"].array.tolist() == [[2, 3]]
    assert again.outputs["W"].array.tolist() == [[b"a", b"bc"]]


async def test_a_large_response_is_kept_like_a_small_one():
    values = np.random.default_rng(0).random((1, 1 << 19), np.float32)
    response = InferResponse("m", "1", {"OUT": tensor(values)})
    assert bytes((await compact(response)).outputs["OUT"].wire) == values.tobytes()


# --- digests


def asked(**changes) -> InferRequest:
    inputs = changes.pop("inputs", {"A": tensor([[1.0, 2.0]]), "B": tensor([[3.0]])})
    return InferRequest(changes.pop("model", "m"), inputs, **changes)


SAME: dict[str, Callable[[], InferRequest]] = {
    "another id": lambda: asked(id="x"),
    "another deadline and priority": lambda: asked(deadline=1.0, priority=3, parameters={"timeout": 1, "priority": 3}),
    "another order": lambda: asked(inputs={"B": tensor([[3.0]]), "A": tensor([[1.0, 2.0]])}),
    "the same bytes": lambda: asked(
        inputs={
            "A": Tensor(DataType.FP32, (1, 2), memoryview(np.array([1, 2], np.float32).tobytes())),
            "B": Tensor(DataType.FP32, (1, 1), bytearray(np.array([3], np.float32).tobytes())),
        }
    ),
    "an array of strides": lambda: asked(
        inputs={"A": tensor(np.array([[1, 0, 2, 0]], np.float32)[:, ::2]), "B": tensor([[3.0]])}
    ),
}
OTHER: dict[str, Callable[[], InferRequest]] = {
    "values swapped": lambda: asked(inputs={"A": tensor([[2.0, 1.0]]), "B": tensor([[3.0]])}),
    "a value in the other tensor": lambda: asked(inputs={"A": tensor([[1.0]]), "B": tensor([[2.0, 3.0]])}),
    "names swapped": lambda: asked(inputs={"B": tensor([[1.0, 2.0]]), "A": tensor([[3.0]])}),
    "a shape": lambda: asked(inputs={"A": tensor([[1.0], [2.0]]), "B": tensor([[3.0]])}),
    "a type": lambda: asked(
        inputs={"A": Tensor(DataType.INT32, (1, 2), tensor([[1.0, 2.0]]).wire), "B": tensor([[3.0]])}
    ),
    "an input less": lambda: asked(inputs={"A": tensor([[1.0, 2.0]])}),
    "an output": lambda: asked(outputs=(RequestedOutput("O"),)),
    "a parameter": lambda: asked(parameters={"p": ""}),
}


@pytest.mark.parametrize("form", [None, object()], ids=["new", "remembered"])
@pytest.mark.parametrize("other", SAME.values(), ids=SAME)
async def test_equal_requests_have_one_digest(other: Callable[[], InferRequest], form: object):
    digests = Digests()
    one, two = asked(form=form), other()
    two.form = None if list(two.inputs) != ["A", "B"] else form
    assert await digests.of(one, ("t",)) == await digests.of(two, ("t",))


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
async def test_other_requests_have_another(other: Callable[[], InferRequest]):
    digests = Digests()
    assert await digests.of(asked()) != await digests.of(other())


async def test_a_remembered_form_says_nothing_of_values_and_parameters():
    digests, form = Digests(), object()
    every = [asked(form=form), asked(form=form, parameters={"p": 1}), asked(form=form, parameters={"p": True})]
    every.append(asked(form=form, inputs={"A": tensor([[5.0, 2.0]]), "B": tensor([[3.0]])}))
    found = [await digests.of(each) for each in every]
    assert len(set(found)) == 4
    assert found == [await Digests().of(each) for each in every]


async def test_the_context_counts_part_by_part():
    digests, form = Digests(), object()
    contexts = [("a", "b"), ("ab", ""), ("", "ab"), (None, "ab"), ("None", "ab"), ("a', 'b",), ()]
    assert len({await digests.of(asked(form=form), context) for context in contexts}) == len(contexts)


@pytest.mark.parametrize("classes", [True, False])
async def test_classifications_count_where_they_are_to(classes: bool):
    digests = Digests(classes=classes)
    found = {await digests.of(asked(outputs=(RequestedOutput("O", k),))) for k in (0, 1, 2)}
    assert len(found) == (3 if classes else 1)


async def test_a_large_request_has_the_digest_it_would_have_anyway():
    small, large = asked(), asked()
    large.size = 1 << 30
    assert await Digests().of(small) == await Digests().of(large)


async def test_a_name_that_is_no_utf8_has_a_digest():
    odd = asked(inputs={"\ud800": tensor([[1.0]])}, parameters={"\udc00": "\ud800"})
    assert len(await Digests().of(odd, ("\ud800",))) == 32


async def test_forms_are_forgotten_before_they_are_many():
    digests = Digests()
    for _ in range(1500):
        await digests.of(asked(form=object()))
    assert len(digests._heads) <= 512

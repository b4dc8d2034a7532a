"""The chain of engines as an engine: when a batch goes to the next link, when a link comes back, what is told of it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gateway import engines, errors
from gateway.config.model import TensorConfig
from gateway.engines import fallback
from gateway.engines.base import EngineCrashed, EngineSpec
from gateway.engines.chain import Chain, Link
from gateway.engines.fallback import FallbackEngine, tender
from gateway.engines.fallback.health import Health, Room, Times
from gateway.engines.fallback.parts import Part, cut
from gateway.types import Answer, Array, Batch, BatchResult
from tests.support import background, model_config, refusal, request, soon, tensor_config, until

FIRST, SECOND = "fake", "fake:b"


def spec(**parameters: str) -> EngineSpec:
    named = {key.replace("__", "."): str(value) for key, value in parameters.items()}
    named = {key.replace("b.", "fake:b.", 1) if key.startswith("b.") else key: value for key, value in named.items()}
    return EngineSpec(model_config(parameters={"fallback": f"{FIRST},{SECOND}"} | named), "1", Path("m/1"), "cpu")


class Fault:
    """A fault of one link of the fake model, set and mended by a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "fault"

    def __call__(self, word: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(word)
        new.replace(self.path)

    def mend(self) -> None:
        self.path.unlink()


@pytest.fixture
def fault(tmp_path: Path) -> Fault:
    return Fault(tmp_path)


@asynccontextmanager
async def chain(count: int = 1, tensors: Sequence[TensorConfig] = (), **parameters: str):
    """Engines of a chain of two fake links, whose background work is done meanwhile; `moves` is told of changes.

    With `tensors` they are the model's input and output.
    """
    made = spec(**parameters)
    if tensors:
        made = replace(made, config=replace(made.config, inputs=(tensors[0],), outputs=(tensors[1],)))
    created = await engines.create(made, count)
    assert all(isinstance(engine, FallbackEngine) for engine in created)
    moves: list[str] = []
    try:
        async with background(*(engine.tend(lambda: moves.append(created[0].link)) for engine in created)):
            yield (*created, moves)
    finally:
        for engine in created:
            await engine.close()


async def results(engine, batch: Batch) -> list[BatchResult]:
    async with aclosing(engine.run(batch)) as given:
        return [result async for result in given]


async def run(engine, value: float = 1.0, *, rows: int = 1, deadline: float | None = None) -> BatchResult:
    """Run a batch of requests of one row each, numbered from `value`, whose answers are checked."""
    requests = [request(value + row, deadline=deadline) for row in range(rows)]
    inputs = {"IN": np.concatenate([each.inputs["IN"].array for each in requests])}
    (result,) = await results(engine, Batch(rows, lambda: inputs, requests=requests))
    assert result.outputs["OUT"].tolist() == inputs["IN"].tolist()
    return result


def told(result: BatchResult) -> tuple[object, object]:
    parameters = result.parameters or {}
    return parameters.get("link"), parameters.get("fallback")


# --- going down


async def test_with_one_link_there_is_no_wrapper() -> None:
    for parameters in ({"fallback": "none"}, {"fallback": ""}, {"fallback": "fake"}):
        (engine,) = await engines.create(spec(**parameters))
        assert type(engine).__name__ == "ThreadEngine"
        await engine.close()


async def test_the_first_link_answers_and_nothing_is_said_of_it(fault: Fault) -> None:
    async with chain() as (engine, moves):
        assert told(await run(engine)) == (None, None)
        assert (engine.link, engine.reason, engine.warnings, moves) == (FIRST, "", (), [])
        assert engine.counted() == ({FIRST: 1}, {})


@pytest.mark.parametrize("word", ["unavailable", "error", "memory", "lost"])
async def test_what_one_link_cannot_do_the_next_one_does_in_the_same_call(fault: Fault, word: str) -> None:
    reason = {"lost": "crash"}.get(word, word)
    async with chain(fake__fault_file=str(fault.path)) as (engine, _):
        await run(engine)
        fault(word)
        result = await run(engine, 5.0, rows=3)
        assert told(result) == (SECOND, reason)
        assert result.parameters["engine"] == "Fake"
        assert engine.counted() == ({FIRST: 1, SECOND: 3}, {reason: 3})


async def test_a_link_that_says_it_is_not_there_goes_out_of_use_at_once_and_comes_back(
    fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    async with chain(2, fake__fault_file=str(fault.path)) as (engine, other, moves):
        await run(engine)
        fault("unavailable")
        assert told(await run(engine)) == (SECOND, "unavailable")
        assert told(await run(other)) == (SECOND, "unavailable")
        assert {engine.link, other.link} == {SECOND}
        assert engine.reason == (
            "not on fake: it cannot be reached, or says that it cannot run: the fake model 'm' is not to be reached, as "
            "its fault_file says"
        )
        fault.mend()
        await until(lambda: engine.link == FIRST)
        assert told(await run(other)) == (None, None)
        assert moves == [SECOND, FIRST]
    lines = [record.getMessage().split()[0] for record in caplog.records if "engine_" in record.getMessage()]
    assert lines == ["engine_out_of_use", "engine_changed", "engine_back_in_use", "engine_changed"]


async def test_a_link_that_does_not_load_is_loaded_later(fault: Fault) -> None:
    fault("load")
    async with chain(fake__fault_file=str(fault.path)) as (engine, _):
        assert engine.link == SECOND
        assert engine.warnings == (
            "runs on fake:b, not on fake: it does not load: the fake model 'm' does not load, as its fault_file says",
        )
        assert told(await run(engine)) == (SECOND, "load")
        fault.mend()
        await until(lambda: engine.link == FIRST)
        assert told(await run(engine)) == (None, None)
        assert engine.warnings == ()


async def test_a_chain_of_which_nothing_loads_says_why_of_each(fault: Fault) -> None:
    fault("load")
    with pytest.raises(errors.Unavailable) as caught:
        await engines.create(spec(fault_file=str(fault.path)))
    why = "the fake model 'm' does not load, as its fault_file says"
    assert caught.value.message == f"model 'm' has no engine that loads: fake: {why}; fake:b: {why}"


async def test_no_fallback_fails_as_the_first_link_does(fault: Fault) -> None:
    fault("load")
    with pytest.raises(errors.Unavailable, match="the fake model 'm' does not load"):
        await engines.create(spec(fallback="none", fault_file=str(fault.path)))


async def test_all_links_failed_and_the_last_error_is_raised_and_the_next_batch_is_tried_on_all(fault: Fault) -> None:
    async with chain(fault_file=str(fault.path)) as (engine, _):
        await run(engine)
        fault("unavailable")
        for _ in range(2):
            with pytest.raises(errors.Unavailable, match="not to be reached"):
                await run(engine)
        fault.mend()
        await run(engine)


@pytest.mark.parametrize(
    ("problem", "raised"),
    [(errors.InvalidArgument("x"), errors.InvalidArgument), (EngineCrashed("x"), EngineCrashed)],
)
async def test_what_is_the_requests_own_fault_is_tried_nowhere_else(problem: Exception, raised: type) -> None:
    asked: list[int] = []

    def stack() -> dict[str, Array]:
        asked.append(1)
        raise problem

    async with chain() as (engine, _):
        await run(engine)
        with pytest.raises(raised):
            await results(engine, Batch(1, stack, requests=[request()]))
        assert (len(asked), engine.link) == (1, FIRST)
        assert told(await run(engine)) == (None, None)


async def test_crashes_of_different_batches_are_the_engines_fault(fault: Fault) -> None:
    """One request in three batches and their parts is its own fault; three requests in a row are not."""
    crashing = True

    def batch(*requests) -> Batch:
        def stack() -> dict[str, Array]:
            if crashing:
                raise EngineCrashed("dead")
            return {"IN": np.concatenate([each.inputs["IN"].array for each in requests])}

        return Batch(len(requests), stack, requests=requests)

    poison, *others = (request(float(number)) for number in range(6))
    async with chain() as (engine, _):
        await run(engine)
        for part in ([poison, *others[:3]], [poison, others[0]], [poison], [poison, others[4]]):
            with pytest.raises(EngineCrashed):
                await results(engine, batch(*part))
        with pytest.raises(EngineCrashed):
            await results(engine, batch(others[1]))
        assert engine.link == FIRST
        with pytest.raises(EngineCrashed):  # the second link crashes as well
            await results(engine, batch(others[2]))
        assert engine.reason.startswith("not on fake: its process crashed again and again")
        crashing = False
        await until(lambda: not engine.reason)  # the link may not have changed yet: the second was to be loaded first
        assert told(await run(engine)) == (None, None)


async def test_failures_that_the_next_link_does_not_share_take_a_link_out_of_use(fault: Fault) -> None:
    async with chain(fake__fault_file=str(fault.path)) as (engine, _):
        await run(engine)
        fault("error")
        await run(engine)
        await run(engine)
        assert engine.link == FIRST
        await run(engine)
        assert (engine.link, engine.reason[:12]) == (SECOND, "not on fake:")


async def test_a_request_that_fails_on_every_link_is_no_evidence_against_any() -> None:
    async with chain(poison="7") as (engine, _):
        for _ in range(5):
            with pytest.raises(errors.Internal, match="poison"):
                await run(engine, 7.0)
        assert engine.link == FIRST
        assert told(await run(engine)) == (None, None)


@pytest.mark.slow
async def test_a_lost_device_is_loaded_anew(fault: Fault) -> None:
    async with chain(fake__fault_file=str(fault.path)) as (engine, _):
        await run(engine)
        fault("lost")
        for _ in range(3):
            assert told(await run(engine)) == (SECOND, "crash")
        assert engine.link == SECOND
        fault.mend()  # the engine that is loaded stays lost
        await until(lambda: engine.link == FIRST)
        assert told(await run(engine)) == (None, None)


@pytest.mark.slow
async def test_when_everything_is_lost_it_still_says_what_it_is_and_comes_back(fault: Fault) -> None:
    async with chain(fault_file=str(fault.path)) as (engine, _):
        await run(engine)
        fault("lost")
        for _ in range(3):
            with pytest.raises(EngineCrashed):
                await run(engine)
        links = engine._tender.links
        assert [link.used for link in links] == [False, False]
        await until(lambda: not any(link.engines for link in links))
        assert (engine.provider, engine.widest, engine.concurrency) == ("Fake", 1, 1)
        fault.mend()
        await until(lambda: engine.link == FIRST and links[0].used)
        assert told(await run(engine)) == (None, None)


# --- memory


async def test_a_batch_that_does_not_fit_is_halved_and_the_next_is_cut_before_it_runs() -> None:
    async with chain(fake__memory_rows="2") as (engine, _):
        assert told(await run(engine, rows=8)) == (None, None)
        first = engine._tender.links[0]
        assert list(first.engines[0].loaded.runs) == [8, 4, 2, 2, 2, 2]
        assert told(await run(engine, rows=5)) == (None, None)
        assert list(first.engines[0].loaded.runs)[6:] == [2, 2, 1]
        for _ in range(40):
            await run(engine, rows=2)
        await run(engine, rows=4)  # more is tried again after many that fitted
        assert list(first.engines[0].loaded.runs)[-3:] == [4, 2, 2]


async def test_requests_are_not_cut_in_two_and_a_large_one_is() -> None:
    async with chain(fake__memory_rows="3") as (engine, _):
        requests = [request(float(rows), rows=rows) for rows in (2, 2, 1, 3)]
        inputs = {"IN": np.concatenate([each.inputs["IN"].array for each in requests])}
        (result,) = await results(engine, Batch(8, lambda: inputs, requests=requests))
        assert result.outputs["OUT"].tolist() == inputs["IN"].tolist()
        first = engine._tender.links[0].engines[0].loaded
        assert list(first.runs) == [8, 4, 2, 2, 1, 2, 1]
        large = {"IN": np.arange(16, dtype="<f4").reshape(8, 2)}
        (result,) = await results(engine, Batch(8, lambda: large, requests=[request(rows=8)]))
        assert result.outputs["OUT"].tolist() == large["IN"].tolist()
        assert list(first.runs)[7:] == [2, 2, 2, 2]


def test_what_is_cut_is_not_gathered_from_all_requests() -> None:
    requests = [request(row) for row in range(4)]
    inputs = {"IN": np.concatenate([each.inputs["IN"].array for each in requests])}
    batch = Batch(4, lambda: inputs, requests=requests, gather=dict)
    parts = cut(Part(batch), 2)
    assert [(part.batch.gather, part.batch.stack()["IN"][:, 0].tolist()) for part in parts] == [
        (None, [0.0, 1.0]),
        (None, [2.0, 3.0]),
    ]


async def test_a_batch_that_is_not_made_of_rows_is_not_cut_but_tried_elsewhere() -> None:
    ragged = tensor_config("IN", dims=(), ragged=True), tensor_config("OUT", dims=(), like="IN")
    async with chain(tensors=ragged, fake__memory_rows="2") as (engine, _):
        elements = {"IN": np.arange(6, dtype="<f4")}
        batch = Batch(3, lambda: elements, requests=[request(row) for row in range(3)])
        (result,) = await results(engine, batch)
        assert told(result) == (SECOND, "memory")
        assert result.outputs["OUT"].tolist() == elements["IN"].tolist()


async def test_such_a_batch_is_kept_whole_to_try_a_link_with() -> None:
    ragged = tensor_config("IN", dims=(), ragged=True), tensor_config("OUT", dims=(), like="IN")
    async with chain(tensors=ragged) as (engine, _):
        elements = {"IN": np.arange(6, dtype="<f4")}
        await results(engine, Batch(3, lambda: elements, requests=[request(row) for row in range(3)]))
        inputs, outputs, _ = engine._tender.sample._kept
        assert inputs["IN"].tolist() == outputs["OUT"].tolist() == elements["IN"].tolist()


async def test_answers_request_by_request_keep_their_places_when_the_batch_is_cut() -> None:
    class Answering:
        """Answers requests one by one, and has memory for two of them."""

        provider, artefact, warnings, widest, concurrency, ahead, contained = "A", None, (), 1, 1, False, True

        async def run(self, batch: Batch):
            if len(batch.requests) > 2:
                raise MemoryError
            for place, each in enumerate(batch.requests):
                yield BatchResult({}, 0, 0, 0, [Answer(place, each.inputs)])

        async def close(self) -> None:
            """Nothing to close."""

    async def start(_spec: EngineSpec, _count: int):
        return [Answering()]

    links = Chain((Link("a", spec()), Link("b", spec())))
    (engine,) = await fallback.open_chain(links, 1, start)
    requests = [request(float(number)) for number in range(5)]
    given = await results(engine, Batch(5, dict, requests=requests))
    answers = [answer for result in given for answer in result.answers]
    assert [answer.outputs["IN"].array[0, 0] for answer in answers] == [
        requests[a.request].inputs["IN"].array[0, 0] for a in answers
    ]
    assert [answer.request for answer in answers] == [0, 1, 2, 3, 4]


# --- deadlines


@pytest.mark.slow
async def test_a_run_that_would_be_late_is_given_to_a_quicker_link_in_time(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    async with chain(fallback__preload="true", fake__a_us="1000", fake__slow_file=str(slow)) as (engine, _):
        await run(engine)
        second = engine._tender.links[1]
        await until(lambda: second.times.predict(1) is not None)
        slow.write_text("1000")  # a second
        health = engine._tender.links[0].health
        for _ in range(10):  # given up while it runs, until it is known to be too slow and not begun
            assert told(await run(engine, deadline=soon(0.5))) == (SECOND, "deadline")
            if health.retry_at < math.inf:
                break
        assert health.retry_at < math.inf
        assert told(await run(engine)) == (None, None)  # with time enough the first link answers
        slow.write_text("1")
        for _ in range(1000):  # the first link gets them again once it was measured again
            if told(await run(engine, deadline=soon(0.5))) == (None, None):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it was never measured again")


async def test_a_late_run_stays_where_it_is_when_the_next_link_is_not_known(tmp_path: Path) -> None:
    async with chain(fallback__preload="false", fake__a_us="30000") as (engine, _):
        await run(engine)
        assert told(await run(engine, deadline=soon(0.001))) == (None, None)


async def test_a_run_that_is_too_late_for_everybody_is_not_repeated() -> None:
    def stack() -> dict[str, Array]:
        raise errors.deadline_passed()

    async with chain() as (engine, _):
        await run(engine)
        late = request(deadline=soon(-1.0))
        with pytest.raises(errors.DeadlineExceeded):
            await results(engine, Batch(1, stack, requests=[late]))
        assert not engine._tender.links[1].engines
        with pytest.raises(errors.DeadlineExceeded):
            await results(engine, Batch(2, stack, requests=[late, request()]))
        assert engine._tender.links[1].engines


async def test_a_link_that_refuses_for_its_slowness_is_measured_again_and_what_it_loads_in_is_not_its_time() -> None:
    """A remote engine knows how slow its server is, and does not even try."""
    tried: list[int] = []

    class Slow:
        provider, artefact, warnings, widest, concurrency, ahead, contained = "S", None, (), 1, 1, False, True

        async def run(self, batch: Batch):
            tried.append(len(batch.requests))
            if batch.requests and batch.requests[0].deadline is not None:
                raise errors.DeadlineExceeded("too slow for that")
            yield BatchResult({"OUT": batch.stack()["IN"]}, 0, 0, 1000)

        async def close(self) -> None:
            """Nothing to close."""

    async def start(link: EngineSpec, count: int):
        if link.version == "1":
            return [Slow()]
        await asyncio.sleep(0.05)  # of loading
        return await engines.create(replace(spec(fallback="none"), version="2"), count)

    links = Chain((Link("a", spec()), Link("b", replace(spec(), version="2"))))
    (engine,) = await fallback.open_chain(links, 1, start)
    first, second = engine._tender.links
    async with background(engine.tend(lambda: None)):
        await run(engine)
        assert told(await run(engine, deadline=soon(5.0))) == ("b", "deadline")
        assert second.times.predict(1) < 0.05
        assert first.health.retry_at < math.inf
        await until(lambda: tried[-1] == 0)  # a probe, which is of no request
        await until(lambda: first.health.retry_at == math.inf)
        assert (engine.link, first.times.predict(1) is None) == ("a", False)
    await engine.close()


# --- what is loaded when


@pytest.mark.parametrize(("preload", "loaded"), [("true", True), ("", False), ("false", False)])
async def test_the_next_link_is_loaded_when_the_configuration_says(preload: str, loaded: bool) -> None:
    async with chain(**({"fallback__preload": preload} if preload else {})) as (engine, _):
        await run(engine)
        await asyncio.sleep(0)
        second = engine._tender.links[1]
        if loaded:
            await until(lambda: second.engines)
        assert bool(second.engines) == loaded


async def test_trouble_loads_the_next_link_before_it_is_needed() -> None:
    def stack() -> dict[str, Array]:
        raise EngineCrashed("dead")

    async with chain() as (engine, _):
        await run(engine)
        with pytest.raises(EngineCrashed):
            await results(engine, Batch(1, stack, requests=[request()]))
        await until(lambda: engine._tender.links[1].engines)


async def test_closing_ends_a_run_and_it_goes_nowhere_else(tmp_path: Path) -> None:
    async with chain(hang="7") as (engine, _):
        await run(engine)
        async with background(refusal(run(engine, 7.0))) as (hanging,):
            first = engine._tender.links[0].engines[0].loaded
            await until(lambda: len(first.runs) == 2)
            await engine.close()
            assert "hung until" in (await hanging).message
        assert not engine._tender.links[1].engines
        with pytest.raises(errors.Unavailable, match="closed"):
            await run(engine)


# --- coming back


@pytest.mark.slow
async def test_a_link_that_answers_rubbish_does_not_come_back(fault: Fault) -> None:
    """The sample that is kept has several values; an engine that gives one value all over is not right."""
    rubbish = False

    class Engine:
        provider, artefact, warnings, widest, concurrency, ahead, contained = "E", None, (), 1, 1, False, True

        def __init__(self, *, breaks: bool) -> None:
            self._breaks = breaks
            self.runs = 0

        async def run(self, batch: Batch):
            self.runs += 1
            array = batch.stack()["IN"]
            if self._breaks and rubbish:
                if batch.requests:
                    raise errors.Unavailable("gone")
                array = np.zeros_like(array)
            yield BatchResult({"OUT": array}, 0, 0, 0)

        async def close(self) -> None:
            """Nothing to close."""

    made: list[Engine] = []

    async def start(link: EngineSpec, _count: int):
        made.append(Engine(breaks=link.version == "1"))
        return [made[-1]]

    links = Chain((Link("a", spec()), Link("b", replace(spec(), version="2"))))
    (engine,) = await fallback.open_chain(links, 1, start)
    batch = Batch(1, lambda: {"IN": np.array([[1.0, 2.0]], "<f4")}, requests=[request()])
    async with background(engine.tend(lambda: None)):
        await results(engine, batch)
        rubbish = True
        await results(engine, batch)
        assert engine.link == "b"
        first = engine._tender.links[0]
        await until(lambda: "one value all over" in first.health.text)
        assert (engine.link, first.engines) == ("b", ())
        rubbish = False
        await until(lambda: engine.link == "a")


async def test_a_link_that_hangs_when_it_is_tried_stays_out_of_use(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tender, "_TRY_MOST", 0.05)
    fault("load")
    async with chain(fake__fault_file=str(fault.path), fake__hang="1") as (engine, _):
        await run(engine)  # its sample is what the first link hangs on
        fault.mend()
        first = engine._tender.links[0]
        await until(lambda: "no answer to a request of one row in 0.05 s" in first.health.text)
        assert (engine.link, first.engines) == (SECOND, ())


# --- what is known of a link


def test_pauses_between_probes_double_up_to_the_longest_and_begin_anew_after_good_service() -> None:
    health = Health(4.0)
    health.trip("crash", "x", 100.0)
    pauses = []
    now = 100.0
    for _ in range(6):
        pauses.append(health.retry_at - now)
        now = health.retry_at
        health.refused("crash", "x", now)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0]
    health.recovered(now)
    assert (health.trouble, health.retry_at) == ("", float("inf"))
    health.trip("crash", "x", now + 1.0)
    assert health.retry_at == now + 1.0 + 4.0  # it came back too early
    health.recovered(now + 5.0)
    health.trip("crash", "x", now + 60.0)
    assert health.retry_at == now + 60.25


def test_times_are_known_by_size_and_estimated_on_the_safe_side() -> None:
    times = Times()
    assert times.predict(4) is None
    times.learn(4, 0.04)
    assert times.predict(3) == 0.04
    assert times.predict(1) == 0.04
    assert times.predict(16) == pytest.approx(0.16)
    times.learn(4, 0.14)
    assert times.predict(4) == pytest.approx(0.07)
    for _ in range(3):
        assert times.predict(4) < 0.5
        times.exceeded(4, 0.5)  # a lower bound: only several of these make it too slow
    assert times.predict(4) > 0.5
    assert times.at_least(64) == times.predict(4)
    assert times.at_least(1) is None


def test_room_grows_back_after_patience_that_doubles() -> None:
    room = Room()
    assert room.holds(1000)
    assert room.refuse(8) == 4

    def runs_until_it_grows() -> int:
        before = room.rows
        for number in range(1, 1000):
            room.fitted(room.rows)
            if room.rows != before:
                return number
        raise AssertionError("it never grew")

    assert runs_until_it_grows() == 32
    assert room.rows == 8
    assert room.refuse(8) == 4
    assert runs_until_it_grows() == 64
    assert runs_until_it_grows() == 64
    assert room.holds(1000)

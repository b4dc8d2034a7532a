"""What instances in child processes promise beyond `Engine` (`gateway/engines/isolated/`), against real processes."""

import asyncio
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from gateway import engines, errors
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines.base import EngineCrashed, EngineSpec
from gateway.engines.fake import Gate
from gateway.engines.isolated.children import Children
from gateway.engines.isolated.engine import IsolatedEngine
from gateway.engines.isolated.frames import Done, pack
from gateway.engines.isolated.layout import lay_out
from gateway.types import Batch, DataType, InferRequest, InferResponse, Tensor
from tests.isolated_support import children, fake_spec, kept, opened, result_of, run, run_arrays
from tests.python_support import CONFIG, write
from tests.support import refusal, settle
from tests.support import until as turn_until

if sys.platform != "linux":
    pytest.skip("children are for Linux", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home():
    async with kept(children()) as there:
        yield there


def pid_of(home: Children, name: str = "m/1#0") -> int:
    return next(each.child.pid for each in home.homes if name in each.names)


async def gone(pid: int) -> None:
    """Wait until the process has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    await ended.wait()
    loop.remove_reader(descriptor)
    os.close(descriptor)


async def until(engine, condition) -> None:
    while not condition():
        await engine._changed.wait()


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def files_of(pid: int | str) -> list[str]:
    return [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]  # noqa: PTH115, PTH208


async def crash_of(running) -> EngineCrashed:
    with pytest.raises(EngineCrashed) as crash:
        await running
    return crash.value


def crashes(home: Children) -> dict[str, int]:
    return home.statistics.of("m", "1").crashes


@pytest.fixture(autouse=True)
def counted_from_zero(home: Children) -> None:
    home.statistics.forget("m", "1")


@pytest.mark.parametrize(
    ("way", "cause"),
    [("kill", "killed"), ("abort", "abort"), ("segfault", "segfault"), ("exit", "exit"), ("hang", "hang"),
     ("hang_gil", "hang"), ("sticky", "exit")],
)  # fmt: skip
async def test_a_run_that_ends_its_process_raises_and_the_next_one_is_answered(home, tmp_path, way, cause):
    spec = fake_spec(home, tmp_path, allow_crash="true", watchdog_ms="200", **{way: "13"})
    async with opened(spec) as (engine,):
        assert (await run(engine, 1, 2)).outputs["OUT"].tolist() == [[1, 1], [2, 2]]
        first = pid_of(home)
        with pytest.raises(EngineCrashed, match=cause) as crash:
            await run(engine, 1, 13)
        assert crash.value.sure == (way != "kill")
        assert (await run(engine, 1, 2)).outputs["OUT"].tolist() == [[1, 1], [2, 2]]
        assert pid_of(home) != first
        assert crashes(home) == {cause: 1}
        assert home.statistics.of("m", "1").restarts == 1


@pytest.mark.parametrize("crossing", [True, False], ids=["beside each other", "one as the last ends"])
async def test_batches_laid_out_ahead_keep_their_rows_apart(home, tmp_path, crossing):
    """Of any size, so that they lie before and behind each other in shared memory, and cross the line on both paths."""
    sizes = np.random.default_rng(7).integers(1, 40, (2, 60))

    async def many(engine, first, rows):
        for number, count in enumerate(rows):
            given = np.arange(count * 9000, dtype="<f4").reshape(count, 9000) + first + number
            assert (await run_arrays(engine, {"IN": given})).outputs["OUT"].tobytes() == given.tobytes()

    async with opened(fake_spec(home, tmp_path, dims="-1")) as (engine,):
        assert engine.ahead
        if crossing:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(many(engine, 0, sizes[0].tolist()))
                tasks.create_task(many(engine, 1000, sizes[1].tolist()))
        else:
            await many(engine, 0, sizes.reshape(-1).tolist())
        assert crashes(home) == {}


async def test_a_batch_laid_out_ahead_outlives_a_crash_of_the_one_before_it(home, tmp_path):
    rows = np.array([[1, 1], [2, 2]], "<f4")
    spec = fake_spec(home, tmp_path, allow_crash="true", abort="13", gate=str(tmp_path / "g"))
    async with opened(spec) as (engine,):
        async with asyncio.TaskGroup() as tasks:
            async with Gate(tmp_path / "g") as gate:
                first = tasks.create_task(crash_of(run(engine, 13)))
                held = await gate.arrival()
                laid_out = threading.Event()
                second = tasks.create_task(result_of(engine, Batch(2, lambda: laid_out.set() or {"IN": rows})))
                await turn_until(laid_out.is_set)
                held.release()
                assert "abort" in str(await first)
            assert (await second).outputs["OUT"].tolist() == rows.tolist()
        assert crashes(home) == {"abort": 1}


async def test_out_of_memory_is_an_error_of_the_run_alone(home, tmp_path):
    async with opened(fake_spec(home, tmp_path, allow_crash="true", oom="13")) as (engine,):
        before = pid_of(home)
        with pytest.raises(MemoryError, match="Unable to allocate") as problem:
            await run(engine, 13)
        assert "_allocate" in problem.value.__notes__[0]  # the child's trace
        await run(engine, 1)
        assert pid_of(home) == before


async def test_a_memory_limit_holds_for_the_process_and_not_for_ours(home, tmp_path):
    wide = fake_spec(home, tmp_path, dims="-1", memory_limit_mb="64")
    async with opened(wide) as (engine,):
        await run_arrays(engine, {"IN": np.zeros((1, 1 << 20), "<f4")})
        with pytest.raises(MemoryError):
            await run_arrays(engine, {"IN": np.zeros((1, 1 << 26), "<f4")})
        assert (await run_arrays(engine, {"IN": np.ones((1, 3), "<f4")})).outputs["OUT"].tolist() == [[1, 1, 1]]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


async def test_affinity_is_the_childs(home, tmp_path):
    core = min(os.sched_getaffinity(0))
    async with opened(fake_spec(home, tmp_path, cpu_affinity=str(core))):
        assert os.sched_getaffinity(pid_of(home)) == {core}


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("isolation", "jail"), ("memory_limit_mb", "-1"), ("cpu_affinity", "a"), ("watchdog_ms", "x")],
)
async def test_a_bad_parameter_is_told(home, tmp_path, parameter, value):
    with pytest.raises(errors.InvalidArgument, match=f"parameter '{parameter}' of model 'm'"):
        async with opened(fake_spec(home, tmp_path, **{parameter: value})):
            pass


async def test_a_long_run_that_was_predicted_is_no_hang(home, tmp_path):
    async with opened(fake_spec(home, tmp_path, a_us="300000", watchdog_ms="1")) as (engine,):
        await run(engine, 1, predicted=0.3)
        with pytest.raises(EngineCrashed, match="hang"):
            await run(engine, 1, predicted=0.001)


async def test_runs_wait_while_the_process_starts_again(home, tmp_path):
    async with opened(fake_spec(home, tmp_path)) as (engine,):
        for value in range(5):
            pid = pid_of(home)
            os.kill(pid, signal.SIGKILL)
            await gone(pid)
            assert (await run(engine, value)).outputs["OUT"].tolist() == [[value, value]]


async def test_a_child_that_stands_still_between_runs_is_found_and_replaced(tmp_path):
    async with children(beat=0.05) as home, opened(fake_spec(home, tmp_path)) as (engine,):
        pid = pid_of(home)
        os.kill(pid, signal.SIGSTOP)
        await gone(pid)
        await run(engine, 1)
        assert crashes(home) == {"silent": 1}


async def test_a_heartbeat_leaves_a_long_run_alone(tmp_path):
    async with children(beat=0.02) as home, opened(fake_spec(home, tmp_path, a_us="300000")) as (engine,):
        await run(engine, 1)
        assert crashes(home) == {}


async def test_the_nursery_may_die_too(tmp_path):
    async with children() as home, opened(fake_spec(home, tmp_path)) as (engine,):
        child, nursery = pid_of(home), home.nursery.pid
        os.kill(nursery, signal.SIGKILL)
        await gone(child)
        await run(engine, 1)
        assert home.nursery.pid != nursery


async def test_a_process_that_answers_otherwise_is_not_used(home, tmp_path):
    drift = tmp_path / "drift"
    async with opened(fake_spec(home, tmp_path, drift_file=str(drift))) as (engine,):
        drift.touch()
        os.kill(pid_of(home), signal.SIGKILL)
        await until(engine, lambda: "self_test" in crashes(home))
        drift.unlink()
        assert (await run(engine, 1)).outputs["OUT"].tolist() == [[1, 1]]


async def test_without_fixed_shapes_the_first_good_batch_is_the_test(home, tmp_path):
    drift = tmp_path / "drift"
    async with opened(fake_spec(home, tmp_path, dims="-1", drift_file=str(drift))) as (engine,):
        await run(engine, 7)
        drift.touch()
        os.kill(pid_of(home), signal.SIGKILL)
        await until(engine, lambda: "self_test" in crashes(home))
        drift.unlink()
        assert (await run(engine, 1)).outputs["OUT"].tolist() == [[1, 1]]


async def test_what_went_well_stays_so_when_the_process_ends_at_the_next_batch_before_it_is_the_test(home, tmp_path):
    spec = fake_spec(home, tmp_path, dims="-1", allow_crash="true", abort="13", gate=str(tmp_path / "g"))
    async with opened(spec) as (engine,), asyncio.TaskGroup() as tasks:
        async with Gate(tmp_path / "g") as gate:
            first = tasks.create_task(run(engine, 7))
            held = await gate.arrival()
            laid_out = threading.Event()
            poison = Batch(1, lambda: laid_out.set() or {"IN": np.full((1, 2), 13, "f4")})
            second = tasks.create_task(crash_of(result_of(engine, poison)))
            await turn_until(laid_out.is_set)
            held.release()
            held = await gate.arrival()
            await turn_until(lambda: len(engine._life.link._asked) == 2)  # the test waits behind it
            held.release()
            assert "abort" in str(await second)
        assert (await first).outputs["OUT"].tolist() == [[7, 7]]
        assert engine._origin.golden.inputs is None, "nobody knows whether it varies"
        assert (await run(engine, 1)).outputs["OUT"].tolist() == [[1, 1]]


async def test_an_instance_that_cannot_start_is_given_a_pause_and_says_so(home, tmp_path):
    drift = tmp_path / "drift"
    async with opened(fake_spec(home, tmp_path, drift_file=str(drift))) as (engine,):
        engine._breaker._pause = 0.1
        drift.touch()
        pid = pid_of(home)
        os.kill(pid, signal.SIGKILL)
        await gone(pid)
        with pytest.raises(errors.Unavailable, match="keeps failing") as refused:
            await run(engine, 1)
        assert 0 < refused.value.retry_after <= 0.1
        drift.unlink()
        await until(engine, lambda: engine._life is not None)
        assert (await run(engine, 1)).outputs["OUT"].tolist() == [[1, 1]]


async def test_a_model_that_crashes_on_zeros_is_served_without_a_test(home, tmp_path):
    async with opened(fake_spec(home, tmp_path, allow_crash="true", segfault="0")) as (engine,):
        assert (await run(engine, 1)).outputs["OUT"].tolist() == [[1, 1]]


async def test_large_batches_and_answers_go_through_memory_that_grows(home, tmp_path):
    async with opened(fake_spec(home, tmp_path, dims="-1")) as (engine,):
        for columns in (1, 300_000, 3, 2_000_000, 700_000):
            given = np.arange(columns, dtype="<f4")[np.newaxis]
            out = (await run_arrays(engine, {"IN": given})).outputs["OUT"]
            assert np.array_equal(out, given)
        assert home.shortages == 0


async def test_results_are_not_overwritten_by_later_runs(home, tmp_path):
    async with opened(fake_spec(home, tmp_path)) as (engine,):
        results = [await run(engine, value) for value in range(10)]
        assert [result.outputs["OUT"][0, 0] for result in results] == list(range(10))


async def test_without_shared_memory_tensors_go_by_the_socket(tmp_path, monkeypatch):
    def refused(*_: object) -> int:
        raise OSError(28, "No space left on device")

    given = np.arange(3_000_000, dtype="<f4")[np.newaxis]
    texts = np.array([[b"", b"\0", b"x" * 300_000]], dtype=object)
    monkeypatch.setattr(os, "memfd_create", refused)
    async with children() as home:
        async with opened(fake_spec(home, tmp_path, dims="-1")) as (engine,):
            assert np.array_equal((await run_arrays(engine, {"IN": given})).outputs["OUT"], given)
        async with opened(fake_spec(home, tmp_path, dims="-1", kind="STRING")) as (engine,):
            assert (await run_arrays(engine, {"IN": texts})).outputs["OUT"].tolist() == texts.tolist()
        assert home.shortages >= 2


async def test_when_shared_memory_runs_out_tensors_go_by_the_socket(home, tmp_path):
    given = np.arange(3_000_000, dtype="<f4")[np.newaxis]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with opened(fake_spec(home, tmp_path, dims="-1")) as (engine,):
        await run(engine, 1)
        before = home.shortages
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            assert np.array_equal((await run_arrays(engine, {"IN": given})).outputs["OUT"], given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert home.shortages > before


async def test_a_run_given_up_holds_nobody_up_for_good(home, tmp_path):
    async with opened(fake_spec(home, tmp_path, gate=str(tmp_path / "g"))) as (engine,):
        async with Gate(tmp_path / "g") as gate, asyncio.TaskGroup() as tasks:
            task = tasks.create_task(run(engine, 1))
            held = await gate.arrival()
            task.cancel()
            next_one = tasks.create_task(run(engine, 5))
            held.release()
            (await gate.arrival()).release()
        assert (await next_one).outputs["OUT"].tolist() == [[5, 5]]


async def test_closing_ends_a_run_that_never_ends_and_the_process(home, tmp_path):
    async with opened(fake_spec(home, tmp_path, gate=str(tmp_path / "g"))) as (engine,):
        pid = pid_of(home)
        async with Gate(tmp_path / "g") as gate, asyncio.TaskGroup() as tasks:
            task = tasks.create_task(refusal(run(engine, 1)))
            await gate.arrival()
            await engine.close()
        assert "closed" in (await task).message
        assert not lives(pid)
        with pytest.raises(errors.Unavailable, match="closed"):
            await run(engine, 1)


async def test_small_models_share_beyond_the_limit_and_crash_apart(tmp_path):
    async with children(most=1) as home:
        spec = fake_spec(home, tmp_path, allow_crash="true", segfault="13", a_us="20000")
        async with opened(spec, 3) as (one, two, three):
            assert len(home.homes) == 1
            together = [run(one, 1), run(two, 13), run(three, 3)]
            results = await asyncio.gather(*together, return_exceptions=True)
            assert results[0].outputs["OUT"].tolist() == [[1, 1]]
            assert isinstance(results[1], EngineCrashed)
            assert results[1].sure
            assert results[2].outputs["OUT"].tolist() == [[3, 3]]
        for each in list(home.homes):  # one may have been starting
            await each.child.exited
        assert home.homes == []


async def test_a_limited_model_never_shares(tmp_path):
    async with children(most=1) as home:
        spec = fake_spec(home, tmp_path, memory_limit_mb="1000")
        async with opened(spec, 2):
            assert len(home.homes) == 2


async def test_children_have_no_descriptors_of_ours(home, tmp_path):
    async with opened(fake_spec(home, tmp_path), 2) as created:
        await run(created[0], 1)
        files = files_of(pid_of(home))
        assert len([name for name in files if name.startswith("socket:")]) == 2  # its own line, and its instance's
        assert len([name for name in files if "memfd:" in name]) == 4  # two areas, and each mapping's own
        assert not [name for name in files if "eventpoll" in name or "pipe:" in name]


async def test_many_crashes_leave_nothing_behind(home, tmp_path):
    """The long version: `python -m loadtest.isolation --crashes 200`."""
    async with opened(fake_spec(home, tmp_path, allow_crash="true", segfault="13")) as (engine,):

        async def crash() -> tuple[int, int]:
            with pytest.raises(EngineCrashed):
                await run(engine, 13)
            await run(engine, 1)
            return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()  # noqa: ASYNC240

        await crash()
        first = await crash()
        for _ in range(10):
            last = await crash()
        assert last[0] == first[0]
        assert last[1] <= first[1], "a thread of an earlier test may end meanwhile"


async def test_metrics_tell_of_children(home, tmp_path):
    async with opened(fake_spec(home, tmp_path)) as (engine,):
        await run(engine, 1)
        families = {family.name: family.samples for family in home.metrics()}
        assert families["gateway_children"] == [({}, 1)]
        ((labels, size),) = families["gateway_child_memory_bytes"]
        assert labels == {"child": "m/1#0", "pid": str(pid_of(home))}
        assert size > 1 << 20


async def test_a_broken_answer_is_the_end_of_its_process_and_not_of_us(home, tmp_path):
    """A child is not trusted: here one says that its answer is where no memory is."""
    lie = pack(Done(0, lay_out({"OUT": np.zeros((1, 1 << 24), "<f4")})[0].form, 0))
    async with opened(fake_spec(home, tmp_path, gate=str(tmp_path / "g"))) as (engine,):
        async with Gate(tmp_path / "g") as gate, asyncio.TaskGroup() as tasks:
            task = tasks.create_task(crash_of(run(engine, 1)))
            await gate.arrival()
            engine._life.link._frames.feed(lie)
            engine._life.link._take(engine._life.link._frames.next())
        assert "protocol" in str(await task)
        assert (await run(engine, 2)).outputs["OUT"].tolist() == [[2, 2]]
        assert crashes(home) == {"protocol": 1}


async def test_engines_close_when_the_caller_forgot(tmp_path):
    async with children() as home:
        created = await engines.create(fake_spec(home, tmp_path), 3)
        pids = [pid_of(home, engine.name) for engine in created]
        await run(created[0], 1)
    for pid in pids:
        await gone(pid)


def code_spec(home, folder, body, config=CONFIG, infer=None) -> EngineSpec:
    """A Python model with these methods."""
    path = write(folder / "m", body, config)
    proto = parse_text(Source("config.pbtxt", config))
    proto.name, proto.default_model_filename = "m", "model.py"
    return EngineSpec(build(proto, Source("config.pbtxt")), "1", path, "cpu", infer=infer, children=home)


def asked(value: float) -> InferRequest:
    return InferRequest("m", {"IN": Tensor.from_array(DataType.FP32, np.full((1, 2), value, "f4"))})


async def no_other_model(_):
    raise NotImplementedError
    yield


async def test_a_run_that_waits_for_another_model_has_not_hung(home, tmp_path, monkeypatch):
    looks, answered = 0, asyncio.Event()
    look = IsolatedEngine._hung

    def looked(engine):
        nonlocal looks
        looks += 1
        look(engine)
        if looks >= 3:
            answered.set()

    async def infer(called):
        if called.id == "waits":
            await answered.wait()
        yield InferResponse(called.model_name, "1", {"OUT": called.inputs["IN"]})

    monkeypatch.setattr(IsolatedEngine, "_hung", looked)
    monkeypatch.setattr("gateway.engines.isolated.patience._FIRST", 0.0)
    config = CONFIG + 'parameters { key: "watchdog_ms" value { string_value: "20" } }'
    calls = "def execute(self, requests): return [pb_utils.InferenceRequest(model_name='b', inputs=each.inputs(), "
    calls += "request_id='waits', requested_output_names=['OUT']).exec() for each in requests]"
    async with opened(code_spec(home, tmp_path, calls, config, infer)) as (engine,):
        result = await run_arrays(engine, {"IN": np.ones((1, 2), "f4")}, requests=(asked(1),))
    assert result.answers[0].outputs["OUT"].tolist() == [[1, 1]]
    assert looks >= 3
    assert crashes(home) == {}


async def test_code_that_crashes_for_nobody_any_more_does_not_fail_the_next_batch(home, tmp_path):
    body = f"""def execute(self, requests):
        import os, pathlib
        if pb_utils.get_input_tensor_by_name(requests[0], 'IN').as_numpy()[0, 0] == 13:
            pathlib.Path({str(tmp_path / "begun")!r}).touch()
            os.read(os.open({str(tmp_path / "go_on")!r}, os.O_RDONLY), 1)
            os.abort()
        return [pb_utils.InferenceResponse([pb_utils.Tensor('OUT', np.ones((1, 2), np.float32))]) for _ in requests]"""
    os.mkfifo(tmp_path / "go_on")
    go_on = os.open(tmp_path / "go_on", os.O_RDWR)
    async with opened(code_spec(home, tmp_path, body, infer=no_other_model)) as (engine,):
        inputs = {"IN": np.full((1, 2), 13, "f4")}
        async with asyncio.TaskGroup() as tasks:
            given_up = tasks.create_task(run_arrays(engine, inputs, requests=(asked(13),)))
            await turn_until((tmp_path / "begun").exists)
            given_up.cancel()
            waits = tasks.create_task(run_arrays(engine, {"IN": np.ones((1, 2), "f4")}, requests=(asked(1),)))
            await settle()
            os.write(go_on, b"!")
        assert waits.result().answers[0].outputs["OUT"].tolist() == [[1, 1]]
        assert crashes(home) == {"abort": 1}
    os.close(go_on)


async def test_code_can_ask_whether_anybody_still_waits(home, tmp_path):
    body = "def execute(self, requests): return [pb_utils.InferenceResponse([pb_utils.Tensor('OUT', "
    body += "np.full((1, 2), each.is_cancelled(), np.float32))]) for each in requests]"
    async with opened(code_spec(home, tmp_path, body, infer=no_other_model)) as (engine,):
        requests = (asked(1), asked(2), asked(3))
        inputs = {"IN": np.ones((3, 2), "f4")}
        result = await run_arrays(engine, inputs, requests=requests, wanted=lambda place: place != 1)
    assert [answer.outputs["OUT"][0, 0] for answer in result.answers] == [0, 1, 0]


async def test_children_die_with_a_gateway_that_is_killed(tmp_path):
    program = f"""
import asyncio, pathlib, sys
from tests.isolated_support import children, fake_spec, opened, run
async def main():
    async with children() as home, opened(fake_spec(home, pathlib.Path({str(tmp_path)!r})), 2) as created:
        await run(created[0], 1)
        print(home.nursery.pid, *(each.child.pid for each in home.homes), flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, cwd=Path(__file__).parents[2], stdout=asyncio.subprocess.PIPE
    )
    pids = [int(word) for word in (await gateway.stdout.readline()).split()]
    assert len(pids) == 3
    gateway.kill()
    await gateway.wait()
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        for pid in pids:
            tasks.create_task(gone(pid))

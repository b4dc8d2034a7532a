"""The background build of a plan: real child processes that run `gateway build --plan`, with the fake TensorRT."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from gateway import engines, errors
from gateway.build import plans
from gateway.engines.tensorrt import background, packages, plan
from gateway.engines.tensorrt.background import PlanKeeper
from gateway.engines.tensorrt.fakes.cuda import GPU
from tests.support import background as working
from tests.tensorrt_support import add_sub, opened, pair, right, run, spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

ROOT = Path(__file__).resolve().parents[2]
SHAPES = "".join(
    f"parameters {{ key: 'trt_profile_{key}_shapes' value {{ string_value: 'A:{shape},B:{shape}' }} }}"
    for key, shape in (("min", "1x1"), ("opt", "4x8"), ("max", "8x16"))
)


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict]]:
    """What was logged."""
    found: list[tuple[str, dict]] = []
    monkeypatch.setattr(background, "log_event", lambda event, _level=20, **values: found.append((event, values)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return found


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """The folder of version 1 of model m, with its ONNX file."""
    add_sub(tmp_path / "m/1/model.onnx")
    GPU.reset()
    return tmp_path / "m/1"


async def test_a_missing_plan_is_built_and_can_be_loaded(version: Path, events) -> None:
    given = spec(version, SHAPES, "model.onnx")
    with pytest.raises(plan.PlanMissing):
        plan.find(given, "")
    await PlanKeeper(given).prepare()
    async with opened(given) as (engine,):
        assert right(pair(2, 3), await run(engine, **pair(2, 3)))
    names = [name for name, _ in events]
    assert (names[0], names[-1]) == ("plan_build_begins", "plan_built")
    assert [values["progress"] for name, values in events if name == "plan_build"] == [
        "model.onnx: checking the file", "model.onnx: parsing", "model.onnx: Building", "model.onnx: compiled",
    ]  # fmt: skip
    assert "plan of" in events[-1][1]["plan"]
    assert {(values["model"], values["version"]) for _, values in events} == {("m", "1")}


async def test_nothing_is_done_for_a_plan_that_is_there(version: Path, events) -> None:
    given = spec(version, SHAPES, "model.onnx")
    plans.build(plans.Order(given), plans.Target(packages.FAKE, ""), lambda *_: None)
    await PlanKeeper(given).prepare()
    assert events == []


async def test_what_a_plan_would_not_help_is_left_to_the_load(version: Path, events, monkeypatch) -> None:
    def no_driver() -> None:
        raise errors.Unavailable("no NVIDIA driver")

    monkeypatch.setattr(background.driver, "probe", no_driver)
    text = SHAPES + "parameters { key: 'tensorrt_package' value { string_value: 'tensorrt' } }"
    await PlanKeeper(spec(version, text, "model.onnx")).prepare()
    await PlanKeeper(spec(version, SHAPES, "no.onnx")).prepare()
    assert events == []


async def test_a_build_that_fails_says_why_and_is_not_begun_again_for_an_hour(version: Path, events) -> None:
    clock = Clock()
    keeper = PlanKeeper(spec(version, "", "model.onnx"), clock)  # open dimensions of which nothing is known
    for _ in range(3):
        with pytest.raises(errors.Unavailable, match=r"m/1 could not be built: .*input 'A' of model 'm' has an open"):
            await keeper.prepare()
    assert [name for name, _ in events].count("plan_build_begins") == 1
    clock.now = 3601.0
    with pytest.raises(errors.Unavailable):
        await keeper.prepare()
    assert [name for name, _ in events].count("plan_build_begins") == 2


async def test_a_cancelled_build_ends_its_process(version: Path, events, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[asyncio.subprocess.Process] = []
    original = asyncio.create_subprocess_exec
    begun = asyncio.Event()

    async def start(*arguments, **options):
        started.append(await original(*arguments, **options))
        begun.set()
        return started[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(PlanKeeper(spec(version, SHAPES, "model.onnx")).prepare())
        await begun.wait()
        task.cancel()
    assert started[0].returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


@pytest.mark.parametrize("stale", [False, True], ids=["missing", "stale"])
async def test_onnx_runtime_serves_until_the_plan_is_there_and_then_tensorrt_does(
    version: Path, events, stale: bool
) -> None:
    given = spec(version, SHAPES, "model.onnx")
    if stale:
        made = plans.build(plans.Order(given), plans.Target(packages.FAKE, ""), lambda *_: None)
        described = plan.described_by(made.path)
        described.write_text(described.read_text().replace('"10.0"', '"9.3"'))
    (engine,) = await engines.create(given)
    moved: list[str] = []
    there = asyncio.Event()

    def changed() -> None:
        moved.append(engine.link)
        there.set()

    try:
        assert (engine.link, engine.provider) == ("cpu", "CPUExecutionProvider")
        why = ": one is of fake 9.3, and 10.0 is installed." if stale else "."
        assert f"m/1/model.onnx has no TensorRT plan for this device{why} " in engine.reason
        assert right(pair(2, 3), await run(engine, **pair(2, 3)))
        async with working(engine.tend(changed)):
            await there.wait()
        assert moved == ["tensorrt"]
        assert (engine.link, engine.provider, engine.reason) == ("tensorrt", "TensorRT-fake", "")
        assert right(pair(4, 5), await run(engine, **pair(4, 5)))
    finally:
        await engine.close()
    assert events[0][0] == "plan_build_begins"

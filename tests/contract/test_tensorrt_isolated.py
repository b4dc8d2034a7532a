"""The TensorRT backend, on a fake GPU, in a child process: what the process survives and what it must not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gateway import engines, errors
from gateway.engines.base import EngineCrashed
from gateway.engines.isolated.children import Children
from gateway.statistics import Statistics
from tests.tensorrt_support import opened, pair, right, run, spec, write_plan

pytestmark = pytest.mark.slow

GRAPHS = "optimization { cuda { graphs: true } }"


def isolated(children: Children, tmp_path: Path, **options):
    version = tmp_path / "1"
    write_plan(version, **options)
    return dataclasses.replace(spec(version, GRAPHS), children=children)


async def test_answers_are_right_and_come_from_a_child(tmp_path: Path) -> None:
    async with Children(Statistics()) as children, opened(isolated(children, tmp_path), 2) as created:
        for engine in created:
            assert (engine.provider, engine.contained) == ("TensorRT-fake", True)
            for shape in ((1, 1), (8, 16), (8, 16), (8, 16), (2, 3)):
                assert right(pair(*shape), await run(engine, **pair(*shape)))


async def test_a_sticky_error_ends_the_process_and_the_next_run_is_right(tmp_path: Path) -> None:
    statistics = Statistics()
    async with (
        Children(statistics) as children,
        opened(isolated(children, tmp_path, faults={"sticky": 7.0})) as (engine,),
    ):
        for _ in range(3):
            assert right(pair(2, 3), await run(engine, **pair(2, 3)))
            with pytest.raises(EngineCrashed):
                await run(engine, **pair(1, 2, 7.0))
        assert right(pair(2, 3), await run(engine, **pair(2, 3)))
    assert statistics.of("m", "1").crashes == {"exit": 3}


async def test_without_memory_the_process_lives_on(tmp_path: Path) -> None:
    statistics = Statistics()
    async with (
        Children(statistics) as children,
        opened(isolated(children, tmp_path, faults={"memory_rows": 4})) as (engine,),
    ):
        for _ in range(2):
            with pytest.raises(MemoryError, match="out of memory"):
                await run(engine, **pair(5, 2))
            assert right(pair(4, 2), await run(engine, **pair(4, 2)))
    assert statistics.of("m", "1").crashes == {}


async def test_what_does_not_load_says_why(tmp_path: Path) -> None:
    async with Children(Statistics()) as children:
        with pytest.raises(errors.Unavailable, match=r"expecting library version 10\.0 got 9\.3"):
            async with opened(isolated(children, tmp_path, written_by="9.3")):
                pytest.fail("it loaded")


async def test_several_that_do_not_load_say_so_once_and_write_no_trace(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with Children(Statistics()) as children:
        for _ in range(3):
            with pytest.raises(errors.Unavailable, match="expecting library version"):
                await engines.create(isolated(children, tmp_path, written_by="9.3"), 3)
    assert "Traceback" not in capfd.readouterr().err

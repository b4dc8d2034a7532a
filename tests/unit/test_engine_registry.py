"""Backends by name, and the thread an engine runs on."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

import pytest

from gateway import engines, errors
from gateway.config.model import ModelConfig
from gateway.engines.base import EngineSpec
from gateway.engines.threads import EngineThread


def spec(backend: str, **parameters: str) -> EngineSpec:
    config = ModelConfig(
        name="m", backend=backend, platform="", max_batch_size=8, inputs=(), outputs=(), instance_groups=(),
        batching=None, warmup=(), default_model_filename="", parameters=parameters, execution_providers=(),
        decoupled=False, proto=None,
    )  # fmt: skip
    return EngineSpec(config, "1", Path(), "cpu")


async def test_an_unknown_backend_names_those_there_are() -> None:
    with pytest.raises(errors.Unsupported) as caught:
        await engines.create(spec("tensorflow"))
    assert caught.value.message == (
        "there is no backend 'tensorflow'; there are: onnxruntime, tensorrt, remote, fake, python. Change backend in config.pbtxt"
    )


async def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gateway.engines.onnxruntime", "gateway.engines.tensors"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(errors.Unavailable) as caught:
        await engines.create(spec("onnxruntime"))
    assert "needs the package 'onnxruntime'" in caught.value.message
    assert "pip install 'lockgate[cpu]'" in caught.value.message


async def test_a_failed_load_leaves_no_threads() -> None:
    before = set(threading.enumerate())
    with pytest.raises(errors.InvalidArgument):
        await engines.create(spec("fake", a_us="x"), 3)
    for thread in set(threading.enumerate()) - before:
        thread.join()  # hangs, and fails by the test's timeout, if a thread was left to wait


async def test_what_a_thread_does_is_in_order_and_its_results_come_back() -> None:
    thread, seen = EngineThread("t"), []
    results = await asyncio.gather(*(thread.call(lambda n=n: seen.append(n) or n) for n in range(100)))
    assert results == seen == list(range(100))
    await thread.close()


async def test_a_thread_finishes_what_is_queued_then_does_the_last_thing() -> None:
    thread, seen = EngineThread("t"), []
    async with asyncio.TaskGroup() as tasks:
        queued = tasks.create_task(thread.call(lambda: seen.append("queued")))
        await asyncio.sleep(0)
        await thread.close(lambda: seen.append("last"))
        await thread.close(lambda: seen.append("never"))
        await queued
    assert seen == ["queued", "last"]
    with pytest.raises(errors.Unavailable):
        await thread.call(int)


async def test_giving_up_on_a_run_that_never_ends() -> None:
    thread, go_on, seen = EngineThread("t"), threading.Event(), []
    async with asyncio.TaskGroup() as tasks:
        stuck = tasks.create_task(thread.call(go_on.wait))
        closing = tasks.create_task(thread.close(lambda: seen.append("last")))
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        assert closing.cancelled()
        go_on.set()
        assert await stuck
    await thread.close()
    assert seen == ["last"]


def test_a_thread_ends_when_the_event_loop_closed_under_it() -> None:
    go_on, threads = threading.Event(), []

    async def leave_work() -> None:
        thread, begun, loop = EngineThread("t"), asyncio.Event(), asyncio.get_running_loop()
        threads.append(thread._thread)
        calls = [asyncio.ensure_future(thread.call(lambda: (loop.call_soon_threadsafe(begun.set), go_on.wait())))]
        await begun.wait()
        assert not calls[0].done()

    asyncio.run(leave_work())
    go_on.set()
    threads[0].join()

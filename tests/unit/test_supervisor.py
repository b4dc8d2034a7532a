"""What processes are planned, what they are told, and when they are started again."""

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from gateway import placement
from gateway.config.arguments import parse_args
from gateway.config.settings import Settings
from gateway.supervisor import post as posts
from gateway.supervisor.post import Backoff, Post
from gateway.supervisor.supervisor import Plan, cores_each, gateway_arguments, plan, worker_arguments

OWN = ["--model-repository", "/a", "--queue", "embedded", "--workers", "3", "--http-workers=2", "--insecure"]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GATEWAY_{name.upper()}", raising=False)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ([], None),
        (["--workers=2"], Plan(1, 2)),
        (["--http-workers=2"], Plan(2, 1)),
        (["--workers=2", "--role=worker"], Plan(0, 2)),
        (["--workers=2", "--role=gateway"], None),
        (["--http-workers=3", "--role=gateway"], Plan(3, 0)),
        (["--http-workers=3", "--role=worker"], None),
    ],
)
def test_which_settings_need_several_processes(more: list[str], wanted: Plan | None) -> None:
    assert plan(parse_args(["--model-repository", "/a", "--queue", "redis://x", *more])) == wanted


def test_a_gateways_arguments_overrule_the_operators() -> None:
    own = [*OWN, "--queue", "unix:///run/x", "--grpc-port=0", "--http-port=0"]
    settings = parse_args(gateway_arguments(own, 1, {"http_fd": 7, "metrics_fd": 8}, 4321))
    assert (settings.role, settings.process_name) == ("gateway", "gateway-1")
    assert (settings.http_fd, settings.metrics_fd, settings.grpc_port) == (7, 8, 4321)
    assert settings.share_ports
    assert settings.queue == "unix:///run/x"
    assert settings.model_repository == (Path("/a"),)
    assert settings.insecure
    assert plan(settings) is None


def test_a_workers_arguments_overrule_the_operators() -> None:
    settings = parse_args(worker_arguments([*OWN, "--queue", "unix:///run/x", "--cpu-cores=9"], 2, 4))
    assert (settings.role, settings.process_name, settings.cpu_cores) == ("worker", "worker-2", 4)
    assert not any((settings.allow_http, settings.allow_grpc, settings.allow_metrics, settings.share_ports))
    assert plan(settings) is None


def test_arguments_overrule_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_WORKERS", "2")
    monkeypatch.setenv("GATEWAY_HTTP_WORKERS", "2")
    monkeypatch.setenv("GATEWAY_MODEL_REPOSITORY", "/a")
    monkeypatch.setenv("GATEWAY_QUEUE", "redis://:secret@host")
    settings = parse_args(worker_arguments([], 0, 1))
    assert plan(settings) is None
    assert settings.queue == "redis://:secret@host"  # which no command line shows


@pytest.mark.parametrize(("workers", "own", "each"), [(1, 8, 8), (2, 8, 4), (3, 8, 2), (9, 8, 1)])
def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch, workers: int, own: int, each: int) -> None:
    settings = parse_args([*OWN, "--cpu-cores", str(own)])
    assert cores_each(settings, Plan(1, workers)) == each
    monkeypatch.setattr(placement, "cpu_cores", lambda: own)
    assert cores_each(parse_args(OWN), Plan(1, workers)) == each


def test_the_wait_before_a_restart_doubles_up_to_a_limit_and_a_steady_run_forgets_it() -> None:
    backoff = Backoff()
    waits = [backoff.after(1.0) for _ in range(8)]
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert backoff.after(60.0) == 0.1
    assert backoff.after(9.0) == 0.2


class Watched:
    """A post whose process runs this Python, with `told` the descriptor for its news; and what it made known."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *scripts: str) -> None:
        lives = iter(scripts)

        def command(arguments: list[str]) -> list[str]:
            told = arguments[arguments.index("--status-fd") + 1]
            return [sys.executable, "-c", f"import os, signal, sys, time; told = {told}; {next(lives)}"]

        monkeypatch.setattr(posts, "command", command)
        monkeypatch.setattr(posts, "_FIRST_DELAY", 0.0)
        self.states: list[str] = []
        self.failures: list[int] = []
        self.ready = asyncio.Event()
        self.post = Post("p", [], [], self.changed, self.failures.append)

    def changed(self) -> None:
        self.states.append(self.post.state)
        if self.post.state == "ready":
            self.ready.set()


READY = """os.write(told, b'{"state": "ready", "table": "MODEL m"}\\n'); """
FOR_EVER = "signal.pause()"


async def test_a_process_that_dies_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, READY + "os.kill(os.getpid(), 9)", READY + "sys.exit(1)", READY + FOR_EVER)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watched.post.keep())
        for _ in range(3):
            await watched.ready.wait()
            watched.ready.clear()
        watched.post.stop(signal.SIGTERM)
    assert watched.post.restarts == 2
    assert watched.post.table == "MODEL m"
    assert watched.states == ["starting", "ready", "ended"] * 3
    assert watched.failures == []


@pytest.mark.parametrize("status", [1, 2])
async def test_a_process_that_cannot_start_is_not_started_again(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    watched = Watched(monkeypatch, f"sys.exit({status})")
    await watched.post.keep()
    assert watched.failures == [status]
    assert watched.post.restarts == 0


async def test_a_process_killed_before_it_was_ready_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, "os.kill(os.getpid(), 11)", READY + FOR_EVER)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watched.post.keep())
        await watched.ready.wait()
        watched.post.kill()
    assert watched.post.restarts == 1
    assert watched.failures == []


async def test_a_stop_before_the_process_is_ready_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, FOR_EVER)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watched.post.keep())
        await asyncio.sleep(0)  # it is being started
        watched.post.stop(signal.SIGINT)
    assert watched.failures == []


async def test_a_bad_end_after_a_stop_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, f"signal.signal(signal.SIGINT, lambda *_: sys.exit(3)); {READY} {FOR_EVER}")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watched.post.keep())
        await watched.ready.wait()
        watched.post.stop(signal.SIGINT)
    assert watched.failures == [1]

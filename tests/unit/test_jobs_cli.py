"""`gateway jobs`, as an operator runs it, against the queue's Redis."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from gateway import cli, errors
from gateway.jobs.leases import Leases
from gateway.redis_client import RedisOptions
from tests.jobs_support import Gateway, gateway
from tests.redis_support import options

Run: TypeAlias = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    async def run(*arguments: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(cli.main, ["jobs", *arguments])
        return status, *capsys.readouterr()

    return run


def where(of: RedisOptions) -> list[str]:
    return ["--queue", of.url, "--queue-prefix", of.prefix]


async def dead_letter(one: Gateway) -> Any:
    leases = Leases(one.jobs.store, 0.0)
    job = await one.submit(tenant="a")
    for _ in range(3):
        await leases.claim(job.id)
        await leases.recover()
    return job


async def test_dead_letters_are_listed_shown_and_run_again(redis_url: str, run: Run) -> None:
    of = options(redis_url)
    async with gateway(of, runs=False) as one:
        dead = await dead_letter(one)
        queued = await one.submit()
        status, out, _ = await run("list", *where(of), "--state", "dead")
        assert (status, len(out.splitlines())) == (0, 2)
        assert dead.id in out
        assert "lost 3 times" in out
        status, out, _ = await run("list", *where(of), "--json")
        assert {json.loads(line)["id"]: json.loads(line)["state"] for line in out.splitlines()} == {
            dead.id: "dead", queued.id: "queued",
        }  # fmt: skip
        status, out, _ = await run("show", *where(of), dead.id)
        told = json.loads(out)
        assert (told["tenant"], told["crashes"], told["state"]) == ("a", 3, "dead")
        assert await run("requeue", *where(of), "--all") == (0, f"{dead.id} queued\n", "")
        assert await run("requeue", *where(of), "--all") == (0, "there are no dead letters\n", "")
        assert await run("cancel", *where(of), queued.id) == (0, f"{queued.id} cancelled\n", "")
    async with gateway(of) as other:
        assert (await other.ended(dead)).state == "done"


async def test_problems_are_told_in_one_line(redis_url: str, run: Run) -> None:
    of = options(redis_url)
    async with gateway(of) as one:
        one.model.problems = [errors.InvalidArgument("no")]
        await one.ended(await one.submit())
        done = await one.ended(await one.submit())
        status, _, err = await run("requeue", *where(of), done.id)
        assert (status, err) == (
            1, f"gateway jobs: job {done.id} is done; only failed and dead jobs can be queued again\n",
        )  # fmt: skip
    for arguments, words in (
        (("show", *where(of), "0" * 32), "there is no job"),
        (("show", *where(of), "../x"), "there is no job"),
        (("list", "--queue", "unix:///nowhere"), "Redis"),
        (("list", "--queue", "http://x"), "redis://"),
        (("webhook-key", "--queue-key-file", "/nowhere"), "No such file"),
    ):
        status, _, err = await run(*arguments)
        assert (status, err.count("\n")) == (1, 1), err
        assert words in err
    with pytest.raises(SystemExit, match="2"):
        await run("list")


async def test_the_key_for_receivers(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"k" * 32 + b"\n")
    status, out, _ = await run("webhook-key", "--queue-key-file", str(file))
    assert status == 0
    assert out.strip() == hmac.new(b"k" * 32, b"lockgate webhook 1", hashlib.sha256).hexdigest()

"""Settings over a real Redis: whichever process is asked, it knows what any of them was told."""

import pytest

from gateway import errors
from gateway.config.trace import TraceConfig
from gateway.service.controls import Controls
from gateway.service.registers import QUESTION
from tests.fleet_support import Mortal, known
from tests.redis_support import options
from tests.support import refusal


def controls(process: Mortal) -> Controls:
    queue = process.queue
    made = Controls(queue.process, queue.ask, traces=TraceConfig())
    queue.answers[QUESTION] = made.registers.answer
    return made


async def test_a_change_is_known_everywhere_and_to_who_comes_later(redis_url: str) -> None:
    of = options(redis_url)
    one, other, late = (Mortal(of, role) for role in ("gateway", "worker", "gateway"))
    async with one, other:
        await known(lambda: len(one.queue._directory.members) == len(other.queue._directory.members) == 1)
        first, second = controls(one), controls(other)
        await first.logs.change({"log_verbose_level": 1})
        assert second.registers.get("logging") == {"log_verbose_level": 1}
        await second.logs.change({"log_info": False})
        assert (await first.logs.read())["log_info"] is False
        await first.logs.change({"log_info": True, "log_verbose_level": 0})
        async with late:
            await known(lambda: len(late.queue._directory.members) == 2)
            third = controls(late)
            await third.informed()
            assert third.registers.get("logging") == {"log_info": True, "log_verbose_level": 0}


async def test_traces_are_not_counted_over_processes(redis_url: str) -> None:
    process = Mortal(options(redis_url), "gateway")
    async with process:
        error = await refusal(controls(process).traces.change("", {"trace_count": ["5"]}))
        assert isinstance(error, errors.Unsupported)


async def test_nothing_changes_when_nobody_can_be_told() -> None:
    async def ask(_: str) -> list[bytes]:
        raise errors.Unavailable("Redis is away")

    told = Controls("a", ask)
    assert "away" in (await refusal(told.logs.change({"log_info": False}))).message
    assert told.registers.get("logging") is None


@pytest.mark.parametrize("said", ["", "[]", '{"logging":3}'])
async def test_words_that_are_not_understood_are_passed_over(said: str) -> None:
    assert Controls().registers.answer(said) == b"{}"

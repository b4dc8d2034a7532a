"""The answers on their way to one caller. What every queue promises of them is in tests/contract/test_queue.py."""

import asyncio
import gc

import pytest

from gateway import errors
from gateway.queues.answers import Answers
from tests.support import request


class Asked(Answers):
    def _leave(self):
        pass


async def ask():
    answers = Asked(request(), asyncio.get_running_loop())
    asyncio.get_running_loop().call_soon(answers.fail, errors.deadline_passed())
    try:
        await anext(answers)
    finally:
        await answers.aclose()


async def test_an_error_leaves_no_ring_of_references():
    """What a ring holds is freed when the garbage collector gets there, which in a server is late on purpose."""
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(errors.DeadlineExceeded):
            await ask()
        await asyncio.sleep(0)  # asyncio holds the error until the next turn
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [each for each in gc.garbage if isinstance(each, Asked)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []

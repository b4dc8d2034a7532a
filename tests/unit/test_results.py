"""`Once`: the results of a model of one answer."""

import gc
import warnings

import pytest

from gateway.engines.base import Once
from gateway.types import BatchResult

RESULT = BatchResult({}, 1, 2, 3)


async def computed() -> BatchResult:
    return RESULT


async def test_there_is_one_and_no_more() -> None:
    results = Once(computed())
    assert [result async for result in results] == [RESULT]
    with pytest.raises(StopAsyncIteration):
        await anext(results)
    await results.aclose()


async def test_an_error_comes_out_as_it_is() -> None:
    async def failing() -> BatchResult:
        raise ValueError("no")

    results = Once(failing())
    with pytest.raises(ValueError, match="no"):
        await anext(results)
    await results.aclose()


async def test_what_nobody_asks_for_is_never_begun() -> None:
    begun = []

    async def noting() -> BatchResult:
        begun.append(1)
        return RESULT

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await Once(noting()).aclose()
        gc.collect()
    assert not begun

"""What every engine promises, kept by engines whose model lives in a child process. One nursery serves all tests."""

import sys

import pytest
import pytest_asyncio

from tests.contract import test_engine
from tests.contract.test_engine import Zoo
from tests.isolated_support import children, kept

if sys.platform != "linux":
    pytest.skip("children are for Linux", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

globals().update({name: each for name, each in vars(test_engine).items() if name.startswith("test_")})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home():
    async with kept(children()) as there:
        yield there


@pytest.fixture(params=["fake", "onnxruntime"])
def zoo(request, tmp_path, home) -> Zoo:
    return Zoo(request.param, tmp_path, home)

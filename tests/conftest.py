"""What all tests may ask for."""

import gc
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.redis_support import redis_server

# How long an example takes says something of the machine only.
settings.register_profile("lockgate", deadline=None)
settings.load_profile("lockgate")

# The gateways that tests start have their models on threads, which is quicker; what is of child processes asks for them.
os.environ.setdefault("GATEWAY_ISOLATION", "thread")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server that all tests share; see `redis_support.options`."""
    with redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def debian_redis_url() -> Iterator[str]:
    """As `redis_url`, of the redis-server that Debian installs."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("needs Debian's redis-server: apt-get install redis-server")
    with redis_server(server=server) as url:
        yield url


@pytest.fixture(scope="session")
def ort_gpu_python() -> str:
    """A Python that has onnxruntime-gpu in place of onnxruntime, and this project's dependencies; see README.md."""
    python = os.environ.get("LOCKGATE_ORT_GPU_PYTHON", "")
    if not python:
        pytest.skip("needs LOCKGATE_ORT_GPU_PYTHON, a Python that has onnxruntime-gpu")
    return python


@pytest.fixture(scope="session")
def trtrtx_python() -> str:
    """A Python that has tensorrt-rtx-cu13, onnx and this project's dependencies: this one, or LOCKGATE_TRTRTX_PYTHON."""
    python = os.environ.get("LOCKGATE_TRTRTX_PYTHON", "")
    if not python and importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx-cu13: pip install 'lockgate[trtrtx]', or LOCKGATE_TRTRTX_PYTHON")
    return python or sys.executable


def pytest_collection_finish() -> None:
    """Thousands of tests are objects too: without this each full collection, of which some tests make many, walks them all."""
    gc.collect()
    gc.freeze()

"""What all tests may ask for."""

from collections.abc import Iterator

import pytest

from tests.redis_support import redis_server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server that all tests share; see `redis_support.options`."""
    with redis_server() as url:
        yield url

"""What all tests may ask for."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.redis_support import redis_server

# How long an example takes says something of the machine only.
settings.register_profile("lockgate", deadline=None)
settings.load_profile("lockgate")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server that all tests share; see `redis_support.options`."""
    with redis_server() as url:
        yield url

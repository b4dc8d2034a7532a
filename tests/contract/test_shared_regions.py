"""Clients' shared memory over a real Redis: what is registered with one process of a host is there in all of them."""

from multiprocessing import shared_memory

import pytest

from gateway import errors
from gateway.service.registers import QUESTION, Registers
from gateway.service.shared_regions import SharedRegions
from gateway.shm import Regions
from gateway.types import Place
from tests.fleet_support import Mortal, known
from tests.redis_support import options
from tests.support import refusal

pytestmark = pytest.mark.slow


@pytest.fixture
def memory():
    made = shared_memory.SharedMemory(create=True, size=64)
    made.buf[:4] = b"\x01\x02\x03\x04"
    yield made
    made.close()
    made.unlink()


def regions_of(process: Mortal, host: str = "") -> SharedRegions:
    queue = process.queue
    registers = Registers(queue.process, queue.ask)
    queue.answers[QUESTION] = registers.answer
    return SharedRegions(Regions(), registers, host or queue.host)


def read(regions: SharedRegions, name: str) -> bytes:
    place = Place(name, 0, 4)
    with regions.regions.using([place]) as used:
        return bytes(used[name].read(place))


async def test_a_region_is_known_to_every_process_of_its_host(redis_url: str, memory) -> None:
    of = options(redis_url)
    one, other, late = (Mortal(of, "gateway") for _ in range(3))
    async with one, other:
        await known(lambda: len(one.queue._directory.members) == len(other.queue._directory.members) == 1)
        assert one.queue.host == other.queue.host
        first, second, elsewhere = regions_of(one), regions_of(other), None
        await first.register("r", memory.name, 0, 64)
        assert read(second, "r") == b"\x01\x02\x03\x04"
        assert isinstance(await refusal(second.register("r", memory.name, 0, 8)), errors.AlreadyExists)
        async with late:
            await known(lambda: len(late.queue._directory.members) == 2)
            elsewhere = regions_of(late, "another host")
            assert [each.name for each in await elsewhere.status()] == []
        await second.unregister()
        assert [each.name for each in await first.status()] == []
        await first.register("r", memory.name, 8, 8)
        assert [(each.offset, each.byte_size) for each in await second.status("r")] == [(8, 8)]


async def test_a_region_is_registered_nowhere_when_nobody_can_be_told(memory) -> None:
    away = False

    async def ask(_: str) -> list[bytes]:
        if away:
            raise errors.Unavailable("Redis is away")
        return []

    regions = SharedRegions(Regions(), Registers("a", ask), "h")
    await regions.register("kept", memory.name, 0, 8)
    away = True
    assert "away" in (await refusal(regions.register("r", memory.name, 0, 8))).message
    assert [each.name for each in regions.regions.status()] == ["kept"]

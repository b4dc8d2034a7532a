"""Clients' regions: what may be registered, what a request may use, and what a client that misbehaves can do: nothing."""

import os
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from gateway import errors
from gateway.middleware.shared_memory import Limits, shared_memory
from gateway.shm import Regions
from gateway.shm import regions as regions_module
from gateway.types import DataType, InferRequest, InferResponse, Place, Places, Tensor
from tests.support import refusal

LIMITS = Limits(1 << 20, 1 << 20)
SIZE = 64


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        (Path(name) / "data").write_bytes(bytes(range(SIZE)))
        yield Path(name)


@pytest.fixture
def regions(folder: Path) -> Iterator[Regions]:
    made = Regions(folder)
    made.register("r", "/data", 0, SIZE)
    yield made
    made.unregister()
    assert made.status() == []


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


# --- registering


@pytest.mark.parametrize(
    "key",
    ["", "/", ".", "/..", "../data", "sub/data", "/sub/data", "nothing", "link", "fifo", "sub", "a\0b", "x" * 300,
     "\ud800"],
)  # fmt: skip
def test_nothing_outside_the_folder_and_nothing_but_files_is_opened(folder: Path, key: str):
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_bytes(b"secret")
    (folder / "link").symlink_to(folder / "data")
    os.mkfifo(folder / "fifo")
    before = open_files()
    with pytest.raises(errors.Internal) as caught:
        Regions(folder).register("r", key, 0, 1)
    assert caught.value.message == f"Unable to open shared memory region: '{key}'"
    assert open_files() == before


@pytest.mark.parametrize(("prefix", "key"), [("triton_python_backend_shm_region_", "/triton_python_backend_shm_region_1"),
                                             ("lockgate-", "//lockgate-1.2.3.a.b.0")])  # fmt: skip
def test_the_servers_own_objects_are_reserved(folder: Path, prefix: str, key: str):
    (folder / key.lstrip("/")).write_bytes(b"x" * SIZE)
    with pytest.raises(errors.InvalidArgument) as caught:
        Regions(folder).register("mine", key, 0, 1)
    assert caught.value.message == (
        f"cannot register shared memory region 'mine' with key '{key}' as the key contains the reserved prefix '{prefix}'"
    )


@pytest.mark.parametrize(("offset", "size"), [(0, SIZE + 1), (1, SIZE), (SIZE, 1), (SIZE + 1, 0), (0, 0), (1 << 63, 1)])
def test_a_region_lies_within_its_object(regions: Regions, offset: int, size: int):
    before = open_files()
    with pytest.raises(errors.InvalidArgument) as caught:
        regions.register("x", "data", offset, size)
    assert caught.value.message == "failed to register shared memory region 'x': invalid args"
    assert open_files() == before


def test_a_name_is_taken_until_it_is_unregistered(regions: Regions):
    with pytest.raises(errors.AlreadyExists) as caught:
        regions.register("r", "data", 0, 1)
    assert caught.value.message == "shared memory region 'r' already in manager"
    regions.unregister("nobody")
    regions.unregister("r")
    before = open_files()
    regions.register("r", "data", 8, 16)
    (region,) = regions.status("r")
    assert (region.name, region.key, region.offset, region.byte_size) == ("r", "data", 8, 16)
    assert open_files() == before + 1
    del region
    regions.unregister()
    assert open_files() == before
    with pytest.raises(errors.NotFound, match="Unable to find system shared memory region: 'r'"):
        regions.status("r")


def test_there_are_no_more_regions_than_leave_files_for_connections(regions: Regions, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (4, 4))
    regions.register("s", "data", 0, 1)
    with pytest.raises(errors.ResourceExhausted, match="2 shared memory regions are registered"):
        regions.register("t", "data", 0, 1)


# --- using


@pytest.mark.parametrize(
    ("place", "error", "text"),
    [
        (Place("q", 0, 1), errors.NotFound, "Unable to find shared memory region: 'q'"),
        (Place("r", SIZE, 0), errors.InvalidArgument, "Invalid offset for shared memory region: 'r'"),
        (Place("r", 2**64 - 32, 64), errors.InvalidArgument, "Invalid offset for shared memory region: 'r'"),
        (Place("r", 60, 64), errors.InvalidArgument, "Invalid offset + byte size for shared memory region: 'r'"),
        (Place("r", 32, 2**64 - 32), errors.InvalidArgument,
         f"Integer overflow detected: byte_size ({2**64 - 32}) + offset (32) exceeds maximum value ({2**64 - 1}) for region 'r'"),
    ],
)  # fmt: skip
def test_a_place_lies_within_its_region(regions: Regions, place: Place, error: type, text: str):
    regions.register("other", "data", 0, 1)
    with pytest.raises(error) as caught, regions.using([Place("other", 0, 1), place]):
        pass
    assert caught.value.message == text
    regions.unregister("other")  # nothing was left in use
    assert [each.name for each in regions.status()] == ["r"]


async def test_a_region_in_use_is_unregistered_when_its_last_request_has_ended(regions: Regions):
    with regions.using([Place("r", 0, 8)]):
        regions.unregister()
        assert [each.name for each in regions.status()] == ["r"]
        with pytest.raises(errors.AlreadyExists):
            regions.register("r", "data", 0, 8)
        with regions.using([Place("r", 8, 8), Place("r", 16, 8)]):
            pass
        assert [each.name for each in regions.status("r")] == ["r"]
    assert regions.status() == []


def asked(**places: Place) -> InferRequest:
    """IN is read from, OUT is written to, where their places are given."""
    inputs = {name: place for name, place in places.items() if name == "IN"}
    outputs = {name: place for name, place in places.items() if name == "OUT"}
    tensor = Tensor(DataType.UINT8, (places["IN"].size,)) if inputs else Tensor(DataType.UINT8, (2,), b"ab")
    return InferRequest("m", {"IN": tensor}, places=Places(inputs, outputs))


async def echo(request: InferRequest) -> AsyncGenerator[InferResponse, None]:
    yield InferResponse("m", "1", {"OUT": request.inputs["IN"], "MORE": request.inputs["IN"]})


def no_check(*_: str) -> None:
    """Every model is there."""


async def answer(regions: Regions | None, request: InferRequest, limits: Limits = LIMITS) -> InferResponse:
    async with aclosing(shared_memory(echo, regions, limits, no_check)(request)) as responses:
        return await anext(responses)


@pytest.mark.parametrize("blocking", [1, 1 << 20])
async def test_inputs_are_read_and_outputs_written(regions: Regions, folder: Path, monkeypatch, blocking: int):
    monkeypatch.setattr(regions_module, "_BLOCKING", blocking)
    regions.register("inner", "data", 32, 16)
    response = await answer(regions, asked(IN=Place("r", 4, 8), OUT=Place("inner", 2, 14)))
    assert response.placed == ["OUT"]
    assert (response.outputs["OUT"].shape, bytes(response.outputs["OUT"].wire)) == ((8,), b"")
    assert bytes(response.outputs["MORE"].wire) == bytes(range(4, 12))
    expected = bytearray(range(SIZE))
    expected[34:42] = range(4, 12)
    assert (folder / "data").read_bytes() == expected


async def test_what_is_read_is_a_copy(regions: Regions, folder: Path):
    response = await answer(regions, asked(IN=Place("r", 0, 8)))
    (folder / "data").write_bytes(b"\0" * SIZE)
    assert bytes(response.outputs["OUT"].wire) == bytes(range(8))


async def test_an_output_that_does_not_fit(regions: Regions, folder: Path):
    error = await refusal(answer(regions, asked(OUT=Place("r", 0, 1))))
    assert isinstance(error, errors.Internal)
    assert error.message == (
        "shared memory size specified with the request for output 'OUT' (1 bytes) should be at least 2 bytes to hold "
        "the results"
    )
    assert (folder / "data").read_bytes() == bytes(range(SIZE))


@pytest.mark.parametrize("places", [{"IN": Place("r", 0, SIZE)}, {"OUT": Place("r", 8, 2)}])
async def test_an_object_that_is_cut_short_harms_nobody(regions: Regions, folder: Path, places: dict[str, Place]):
    os.truncate(folder / "data", 8)
    error = await refusal(answer(regions, asked(**places)))
    assert isinstance(error, errors.InvalidArgument)
    assert error.message == "shared memory region 'r' has become smaller than it was registered; register it again"
    assert (folder / "data").stat().st_size == 8


async def test_an_object_that_is_unlinked_stays(regions: Regions, folder: Path):
    (folder / "data").unlink()
    response = await answer(regions, asked(IN=Place("r", 0, 2)))
    assert bytes(response.outputs["OUT"].wire) == b"\x00\x01"


async def test_what_is_read_is_bounded(regions: Regions):
    request = asked(IN=Place("r", 0, SIZE))
    error = await refusal(answer(regions, request, Limits(SIZE - 1, 1 << 20)))
    assert isinstance(error, errors.InvalidArgument)
    assert error.message.startswith("the request's inputs in shared memory have 64 bytes, more than the limit of 63")
    infer = shared_memory(echo, regions, Limits(SIZE, SIZE), no_check)
    async with aclosing(infer(request)) as first:
        await anext(first)
        async with aclosing(infer(asked(IN=Place("r", 0, 1)))) as second:
            assert isinstance(await refusal(anext(second)), errors.ResourceExhausted)
    async with aclosing(infer(request)) as again:
        await anext(again)


async def test_without_regions_the_remedy_is_told():
    error = await refusal(answer(None, asked(IN=Place("r", 0, 1))))
    assert isinstance(error, errors.Unsupported)
    assert error.message == (
        "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
    )


def test_a_request_without_places_is_handed_on_as_it_is(regions: Regions):
    request = InferRequest("m", {})
    assert shared_memory(lambda asked: asked, regions, LIMITS, no_check)(request) is request

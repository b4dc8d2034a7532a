"""Content-Encoding and Accept-Encoding."""

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.transport.http.compression import UnsupportedEncoding, accepted, compress, decompress
from tests.support import refusal

LARGE = bytes(range(256)) * 400


@pytest.mark.parametrize("body", [b"", b"small", LARGE], ids=["empty", "small", "large"])
async def test_round_trip(body: bytes) -> None:
    for encoding, reference in (("gzip", gzip.decompress), ("deflate", zlib.decompress)):
        packed = await compress(body, encoding)
        assert reference(packed) == body
        assert await decompress(packed, encoding, len(body)) == body


async def test_either_format_is_found_whatever_it_is_called() -> None:
    assert await decompress(zlib.compress(b"x"), "gzip", 10) == b"x"
    assert await decompress(b"x", "identity", 10) == b"x"


async def test_refusals() -> None:
    unknown = await refusal(decompress(b"x", "br", 10))
    assert (type(unknown), unknown.http, unknown.message) == (UnsupportedEncoding, 501, "Unsupported compression type")
    large = await refusal(decompress(gzip.compress(bytes(1 << 20)), "gzip", 1000))
    assert large.http == 400
    assert "exceeds the maximum allowed input size of 1000 bytes" in large.message
    short = await refusal(decompress(gzip.compress(LARGE)[:-1], "gzip", len(LARGE)))
    assert (short.http, short.message) == (400, "the compressed request body ends too early")
    assert (await refusal(decompress(b"not zlib", "deflate", 10))).http == 400


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("", "identity"),
        ("gzip, deflate", "gzip"),
        ("deflate, gzip", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip;q=0.5, identity", "identity"),
        ("gzip;q=0", "identity"),
        ("GZIP; q=1", "gzip"),
        ("br, zstd", "identity"),
        ("gzip;q=nonsense", "identity"),
        ("*", "identity"),
    ],
)
def test_accept_encoding(header: str, encoding: str) -> None:
    assert accepted(header) == encoding


@given(st.text(max_size=40))
def test_any_accept_encoding_gives_an_answer(header: str) -> None:
    assert accepted(header) in ("gzip", "deflate", "identity")


@given(st.binary(max_size=60))
async def test_arbitrary_bytes_raise_only_gateway_errors(body: bytes) -> None:
    try:
        await decompress(body, "gzip", 1000)
    except GatewayError as problem:
        assert problem.http == 400  # noqa: PT017

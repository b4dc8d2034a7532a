"""Messages: what is packed comes back equal, and what is damaged comes back as `BadMessage` and as nothing else."""

import hmac
import math
from contextlib import suppress

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from gateway import errors, message
from gateway.message import (
    VERSION,
    BadMessage,
    pack_error,
    pack_request,
    pack_response,
    unpack_error,
    unpack_request,
    unpack_response,
    version_of,
)
from gateway.queues.redis.seal import Seal
from gateway.types import NO_PARAMETERS, DataType, InferRequest, InferResponse, RequestedOutput, Tensor, Timings

SHAPES = st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INT64 = st.integers(-(2**63), 2**63 - 1)
PARAMETERS = st.dictionaries(TEXT, TEXT | INT64 | st.booleans() | st.floats(allow_nan=False), max_size=3)
SIGNATURES = st.recursive(
    st.none() | TEXT | st.integers(-1, 2**40) | st.booleans(), lambda inner: st.lists(inner, max_size=3).map(tuple)
)


@st.composite
def tensors(draw):
    datatype = draw(st.sampled_from(DataType))
    if datatype is DataType.BYTES:
        array = draw(st_numpy.arrays(object, SHAPES, elements=st.binary(max_size=5)))
    else:
        array = draw(st_numpy.arrays(datatype.dtype, SHAPES, elements=st_numpy.from_dtype(datatype.dtype)))
    made = Tensor.from_array(datatype, array.T if draw(st.booleans()) else array)
    return (
        Tensor(datatype, made.shape, draw(st.sampled_from([bytes, memoryview]))(made.wire))
        if draw(st.booleans())
        else made
    )


NAMED = st.dictionaries(TEXT, tensors(), max_size=3)
REQUESTS = st.builds(
    InferRequest,
    TEXT,
    NAMED,
    TEXT,
    TEXT,
    st.lists(st.builds(RequestedOutput, TEXT, st.integers(0, 9)), max_size=2).map(tuple),
    PARAMETERS,
    st.just(7.0),
    st.integers(-3, 9),
    TEXT,
    st.just(object()),
    st.integers(1, 64),
    st.integers(0, 2**40),
    SIGNATURES,
    st.just(True),
    TEXT,
    st.lists(TEXT, max_size=2).map(tuple),
)
RESPONSES = st.builds(
    InferResponse,
    TEXT,
    TEXT,
    NAMED,
    TEXT,
    PARAMETERS,
    st.none() | st.builds(Timings, *[st.integers(0, 2**62)] * 5),
    st.booleans(),
    TEXT,
)


def fields(struct, *without):
    return {name: getattr(struct, name) for name in struct.__struct_fields__ if name not in without}


def same_tensors(got, sent):
    assert list(got) == list(sent)
    for name, tensor in sent.items():
        assert got[name].datatype is tensor.datatype
        assert got[name].shape == tensor.shape
        assert bytes(got[name].wire) == bytes(tensor.wire)
        assert got[name].array.shape == tensor.shape


def sent_over(pack, unpack, sent):
    header, parts = pack(sent)
    return unpack(header, b"".join(parts))


def tensor(*shape, datatype=DataType.FP32):
    return Tensor(datatype, shape, bytes(math.prod(shape) * datatype.itemsize))


def tiny():
    return InferRequest("m", {"IN": tensor(1, 2)}, "1", "a", size=8, signature=(("IN", (2,)),))


# --- what is packed comes back


@settings(deadline=None)
@given(REQUESTS)
def test_a_request_comes_back_as_it_was(sent):
    header, parts = pack_request(sent)
    assert version_of(header) == VERSION
    got = unpack_request(header, b"".join(parts))
    same_tensors(got.inputs, sent.inputs)
    left_here = ("inputs", "form", "deadline", "admitted", "idempotency_key", "trace_context")
    assert fields(got, *left_here) == fields(sent, *left_here)
    assert (got.form, got.deadline, got.admitted, got.idempotency_key) == (None, None, False, "")
    assert hash(got.signature) == hash(sent.signature)


@settings(deadline=None)
@given(RESPONSES)
def test_a_response_comes_back_as_it_was(sent):
    got = sent_over(pack_response, unpack_response, sent)
    same_tensors(got.outputs, sent.outputs)
    assert fields(got, "outputs", "timings") == fields(sent, "outputs", "timings")
    assert type(got.timings) is type(sent.timings)
    assert got.timings == sent.timings


def test_every_field_of_a_request_is_sent_or_left_out_on_purpose():
    assert InferRequest.__struct_fields__ == (
        "model_name", "inputs", "model_version", "id", "outputs", "parameters", "deadline", "priority", "tenant", "form",
        "rows", "size", "signature", "admitted", "idempotency_key", "callers", "places", "one_answer", "trace_context",
        "trace",
    )  # fmt: skip
    assert InferResponse.__struct_fields__ == (
        "model_name", "model_version", "outputs", "id", "parameters", "timings", "final", "digest", "placed",
    )  # fmt: skip


def test_kinds_of_parameters_are_kept():
    sent = tiny()
    sent.parameters = {"yes": True, "one": 1, "float": 1.0, "text": "1"}
    got = sent_over(pack_request, unpack_request, sent)
    assert {name: type(value) for name, value in got.parameters.items()} == {
        "yes": bool, "one": int, "float": float, "text": str,
    }  # fmt: skip
    assert sent_over(pack_request, unpack_request, tiny()).parameters is NO_PARAMETERS


def test_requests_that_were_equal_still_share_a_batch():
    one, other = (sent_over(pack_request, unpack_request, tiny()) for _ in range(2))
    assert one.signature == other.signature == tiny().signature
    assert len({one.signature, other.signature, tiny().signature}) == 1


def test_large_tensors_are_views_at_both_ends():
    array = np.arange(300_000, dtype=np.float32).reshape(2, -1)
    header, parts = pack_response(InferResponse("m", "1", {"OUT": Tensor.from_array(DataType.FP32, array)}))
    assert np.shares_memory(np.frombuffer(parts[0], np.float32), array)
    payload = bytearray(b"".join(parts))
    got = unpack_response(header, payload)
    payload[:4] = np.float32(5).tobytes()
    assert got.outputs["OUT"].array[0, 0] == 5


def test_a_payload_that_must_not_be_written_can_be_read():
    header, parts = pack_request(tiny())
    assert unpack_request(header, memoryview(b"".join(parts)).toreadonly()).inputs["IN"].array.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda sent: setattr(sent, "parameters", {"big": 2**70}),
        lambda sent: setattr(sent, "id", "\ud800"),
        lambda sent: setattr(sent, "signature", object()),
    ],
)
def test_what_msgpack_cannot_carry_is_the_clients_to_hear(break_it):
    sent = tiny()
    break_it(sent)
    with pytest.raises(errors.InvalidArgument, match="cannot be queued"):
        pack_request(sent)


def test_a_response_that_msgpack_cannot_carry_is_an_internal_error():
    with pytest.raises(errors.Internal, match="cannot be sent back"):
        pack_response(InferResponse("m", "1", {}, parameters={"big": 2**70}))


# --- errors


def tree(of=errors.GatewayError):
    return [of, *(each for child in of.__subclasses__() for each in tree(child) if each.__module__ == errors.__name__)]


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("retry_after", [None, 0.25])
def test_every_error_comes_back_as_it_was(kind, retry_after):
    error = kind("what was wrong: 日本", retry_after)
    error.seconds, error.names = 1.5, ["a", "b"]
    got = unpack_error(pack_error(error))
    assert type(got) is kind
    assert vars(got) == vars(error)
    assert str(got) == str(error)


def test_an_error_of_another_module_comes_back_as_the_nearest_of_ours():
    class Mine(errors.QueueFull):
        pass

    assert type(unpack_error(pack_error(Mine("full")))) is errors.QueueFull
    assert type(unpack_error(pack_error(BadMessage("damaged")))) is errors.Internal


def test_an_error_that_is_not_known_here_is_internal():
    header = pack_error(errors.Shed("dropped", 2.0)).replace(b"\xa4Shed", b"\xa4Shod")
    got = unpack_error(header)
    assert (type(got), got.message, got.retry_after) == (errors.Internal, "dropped", 2.0)


def test_an_error_gets_home_without_what_cannot_travel():
    error = errors.Shed("half a \ud800", 1.0)
    error.cause = object()
    got = unpack_error(pack_error(error))
    assert (type(got), got.message, got.retry_after) == (errors.Shed, "half a ?", 1.0)
    assert vars(got).keys() == {"message", "retry_after"}


def test_an_attribute_from_the_network_does_not_change_what_a_class_answers_with():
    error = errors.Shed("dropped")
    vars(error).update(http=200, retryable=False, args=("x",))
    got = unpack_error(pack_error(error))
    assert (got.http, got.retryable, got.args) == (429, True, ("dropped",))


# --- versions


def test_a_newer_message_is_told_before_anything_of_it_is_read():
    header = bytes([VERSION + 1]) + b"what no release of today can read"
    assert version_of(header) == VERSION + 1
    for unpack in (
        lambda: unpack_request(header, b""),
        lambda: unpack_response(header, b""),
        lambda: unpack_error(header),
    ):
        with pytest.raises(BadMessage, match=f"version {VERSION + 1}, this release reads version {VERSION}"):
            unpack()


def test_fields_that_are_not_known_are_passed_over():
    header, parts = pack_request(tiny())
    form, *rest = msgspec.msgpack.decode(header[2:])
    form = msgspec.msgpack.encode([*msgspec.msgpack.decode(form), {"new": 1}])
    got = unpack_request(header[:2] + msgspec.msgpack.encode([form, *rest, [], "new", [1]]), b"".join(parts))
    assert fields(got, "inputs") == fields(sent_over(pack_request, unpack_request, tiny()), "inputs")


def test_a_message_is_read_as_what_it_is():
    request, _ = pack_request(tiny())
    response, _ = pack_response(InferResponse("m", "1", {}))
    with pytest.raises(BadMessage, match="expected a request, got a response"):
        unpack_request(response, b"")
    with pytest.raises(BadMessage, match="expected an error, got a request"):
        unpack_error(request)
    for header in (b"", b"\x01", b"\x01z"):
        with pytest.raises(BadMessage):
            unpack_response(header, b"")


# --- damage


def described(name="IN", datatype="FP32", shape=(1, 2), size=8, *, count=1, **form):
    values = {
        "model": "m", "version": "1", "tensors": [[name, datatype, list(shape), size]] * count, "outputs": [], "rows": 1,
        "size": 8, "signature": [None], **form,
    }  # fmt: skip
    body = msgspec.msgpack.encode(list(values.values()))
    return bytes([VERSION]) + b"q" + msgspec.msgpack.encode([body, "a", {}, 0, ""])


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (described(datatype="FP8"), 8),
        (described(datatype=5), 8),
        (described(shape=(1, 3)), 8),
        (described(shape=(-1, -2)), 8),
        (described(shape=(0, 2**60), size=0), 0),
        (described(shape=(0, 2**40, 2**40), size=0), 0),
        (described(shape=(2**48, 2**48), size=8), 8),
        (described(shape=(1,) * 65, size=4), 4),
        (described(shape=(1.5, 2)), 8),
        (described(size=-8), 0),
        (described(size=2**63), 8),
        (described(), 7),
        (described(), 9),
        (described(), 0),
        (described(count=2), 16),
        (described(datatype="BYTES", shape=(3,)), 8),
        (described(datatype="BYTES", shape=(0,)), 8),
        (described(rows=0), 8),
        (described(rows=-1), 8),
        (described(size=-1), 8),
        (described(signature=[]), 8),
        (described(signature=[1, 2]), 8),
        (described(signature=[{"not": "hashable"}]), 8),
        (described(signature=None), 8),
        (described(outputs=[["OUT", "many"]]), 8),
        (described(tensors=[["IN", "FP32", [1, 2]]]), 8),
        (described(tensors=None), 8),
        (described(model=b"\xff"), 8),
        (b"\x01q", 8),
        (b"\x01q\xdd\xff\xff\xff\xff", 8),
        (b"\x01q" + b"\x91" * 100_000, 8),
        (b"\x01q\x95\xc6\xff\xff\xff\xff", 8),
    ],
)
def test_damage_is_told(header, payload):
    with pytest.raises(BadMessage, match=r"\w+"):
        unpack_request(header, bytes(payload))


def test_a_nested_bomb_is_told():
    with pytest.raises(BadMessage):
        unpack_request(described(signature=[]).replace(b"\x90", b"\x91" * 60_000), bytes(8))
    deep = bytes([VERSION]) + b"e" + b"\x94\xa1N\xa1m\xc0\x81\xa1x" + b"\x91" * 60_000
    with pytest.raises(BadMessage):
        unpack_error(deep)


@pytest.mark.parametrize("wire", [b"\x05\0\0\0abcd", b"\0\0\0\0\0\0\0\0", b"\xff\xff\xff\xffabcd"])
def test_strings_that_do_not_add_up_are_told(wire):
    with pytest.raises(BadMessage, match="'IN'"):
        unpack_request(described(datatype="BYTES", shape=(1,)), wire)


def damaged(data, header):
    """The header cut, grown, or with some bytes changed."""
    header = bytearray(header)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(header)))
        match data.draw(st.sampled_from(["set", "cut", "put"])):
            case "set" if at < len(header):
                header[at] = data.draw(st.integers(0, 255))
            case "cut":
                del header[at:]
            case _:
                header[at:at] = data.draw(st.binary(min_size=1, max_size=5))
    return bytes(header)


@settings(max_examples=60, deadline=None)
@given(st.data(), REQUESTS)
def test_a_damaged_request_is_refused_or_can_be_used(data, sent):
    header, parts = pack_request(sent)
    payload = b"".join(parts)
    payload = payload[: data.draw(st.integers(0, len(payload)))] if data.draw(st.booleans()) else payload
    with suppress(BadMessage):
        got = unpack_request(damaged(data, header), payload)
        hash(got.signature)
        for each in got.inputs.values():
            assert each.array.shape == each.shape


@settings(max_examples=60, deadline=None)
@given(st.data(), RESPONSES)
def test_a_damaged_response_is_refused_or_can_be_used(data, sent):
    header, parts = pack_response(sent)
    with suppress(BadMessage):
        got = unpack_response(damaged(data, header), b"".join(parts))
        for each in got.outputs.values():
            if each.datatype is not DataType.BYTES:
                assert each.array.shape == each.shape


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(tree()), TEXT)
def test_a_damaged_error_is_refused_or_an_error(data, kind, text):
    with suppress(BadMessage):
        assert isinstance(unpack_error(damaged(data, pack_error(kind(text, 1.0)))), errors.GatewayError)


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from(b"qre"))
@example(b"", ord("q"))
def test_noise_is_refused(noise, kind):
    header = bytes([VERSION, kind]) + noise
    for unpack in (
        lambda: unpack_request(header, b""),
        lambda: unpack_response(header, b""),
        lambda: unpack_error(header),
    ):
        with suppress(BadMessage):
            unpack()


def test_what_is_remembered_is_bounded():
    for number in range(2000):
        sent_over(pack_request, unpack_request, InferRequest(f"m{number}", {}, size=0))
    assert message._request_form.cache_info().currsize <= 512


# --- the seal


KEY = bytes(range(32))


@pytest.mark.parametrize("key", [KEY, bytes(16), bytes(64), bytes(65), bytes(300)], ids=len)
@settings(deadline=None)
@given(parts=st.lists(st.binary(max_size=300), max_size=4))
def test_a_signature_is_hmac_sha256_over_the_lengths_and_the_parts(key, parts):
    lengths = b"".join(number.to_bytes(8, "little") for number in [len(parts), *map(len, parts)])
    signature = Seal(key).sign(*parts)
    assert signature == hmac.digest(key, lengths + b"".join(parts), "sha256")
    Seal(key).verify(signature, *parts)
    Seal(key).verify(memoryview(signature), *map(memoryview, parts))


@pytest.mark.parametrize(
    "parts",
    [
        (b"header", b"payloae"),
        (b"headerp", b"ayload"),
        (b"headerpayload",),
        (b"payload", b"header"),
        (b"header", b"payload", b""),
    ],
)
def test_another_message_does_not_pass(parts):
    signature = Seal(KEY).sign(b"header", b"payload")
    with pytest.raises(BadMessage, match="--queue-key-file"):
        Seal(KEY).verify(signature, *parts)


@pytest.mark.parametrize("signature", [b"", b"x", bytes(32), bytes(1000)])
def test_another_signature_does_not_pass(signature):
    with pytest.raises(BadMessage, match="--queue-key-file"):
        Seal(KEY).verify(signature, b"header")


def test_another_key_does_not_pass():
    with pytest.raises(BadMessage, match="--queue-key-file"):
        Seal(KEY[::-1]).verify(Seal(KEY).sign(b"header"), b"header")


def test_without_a_key_nothing_is_signed_and_everything_passes():
    assert Seal(None).sign(b"header") == b""
    Seal(None).verify(b"", b"header")
    Seal(None).verify(b"what another release signed", b"header")


@pytest.mark.parametrize("key", [b"", b"secret", bytes(15)])
def test_a_short_key_is_refused(key):
    with pytest.raises(ValueError, match=f"has {len(key)} bytes; it needs 16 or more"):
        Seal(key)

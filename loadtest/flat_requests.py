"""The requests of the soak: good ones whose answer is known, and bad ones of every kind that a client, a proxy or an attacker sends.

Everything is built once as bytes; the clients (`flat_clients.py`) only choose and send. The model is `add_sub`.
"""

from __future__ import annotations

import gzip
import json
import struct
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import numpy as np

from loadtest import samples
from loadtest.bench import bodies

HOST = "127.0.0.1"
INFER = "/v2/models/add_sub/infer"


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `data` is a whole HTTP/1.1 request, or a gRPC message when `method` names one."""

    kind: str
    data: bytes
    good: bool = False
    want: bytes = b""  # the last bytes of a good answer
    method: str = ""
    alone: bool = False  # on a connection of its own, which may be closed without an answer
    hang_up: bool = False  # the client leaves without reading
    timeout: float = 30.0


def http(path: str = INFER, body: bytes = b"", headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    """The bytes of one request."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _sums(sample: samples.Sample) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    low, high = sample.inputs["INPUT0"], sample.inputs["INPUT1"]
    return low + high, low - high  # type: ignore[operator]  # both are float32


def good_http() -> list[Request]:
    """Binary and JSON, plain and compressed, from one row to a full batch."""
    found: list[Request] = []
    for seed, rows in enumerate((1, 1, 2, 7, 64)):
        one = samples.add_sub(seed)
        sample = samples.Sample("add_sub", {name: np.repeat(array, rows, 0) for name, array in one.inputs.items()})
        tail = b"".join(array.tobytes() for array in _sums(sample))
        wire = bodies.http_binary(sample)
        packed = gzip.compress(wire.body, 1)
        found += [
            Request(f"binary {rows}", http(wire.path, wire.body, wire.headers), good=True, want=tail),
            Request(f"gzip {rows}", http(wire.path, packed, {**wire.headers, "Content-Encoding": "gzip"}), True, tail),
        ]
    wire = bodies.http_json(samples.add_sub(9))
    found.append(Request("json", http(wire.path, wire.body, wire.headers), good=True))
    return found


def good_grpc() -> list[Request]:
    """Raw contents, one row."""
    found = []
    for seed in range(3):
        sample = samples.add_sub(seed)
        tail = b"".join(array.tobytes() for array in _sums(sample))
        found.append(Request("grpc", bodies.grpc_message(sample), True, tail, bodies.GRPC_PATH))
    return found


def _document(**changes: Any) -> dict[str, Any]:
    """The good JSON request with the first input changed; None takes a key away."""
    document: dict[str, Any] = json.loads(bodies.http_json(samples.add_sub(1)).body)
    for key, value in changes.items():
        document["inputs"][0][key] = value
        if value is None:
            del document["inputs"][0][key]
    return document


def _top(**changes: Any) -> dict[str, Any]:
    return {**_document(), **changes}


def _json_documents() -> dict[str, Any]:
    """JSON that parses and is wrong."""
    first = _document()["inputs"][0]
    return {
        "wrong shape": _document(shape=[1, 15], data=[0.0] * 15),
        "data does not fill shape": _document(data=[0.0] * 7),
        "negative dim": _document(shape=[1, -16]),
        "huge dim": _document(shape=[1, 2**62]),
        "overflowing dims": _document(shape=[2**32, 2**32]),
        "many dims": _document(shape=[1] * 5000),
        "float dim": _document(shape=[1, 16.5]),
        "shape is text": _document(shape="1,16"),
        "no shape": _document(shape=None),
        "no data": _document(data=None),
        "no name": _document(name=None),
        "null data": _document(data=[None] * 16),
        "text data": _document(data=["x"] * 16),
        "wrong type": _document(datatype="INT32"),
        "unknown type": _document(datatype="FP12"),
        "unknown input": _document(name="INPUT7"),
        "duplicate input": _document(name="INPUT1"),
        "missing input": {"inputs": [first]},
        "no inputs": {},
        "inputs not a list": {"inputs": {"INPUT0": 1}},
        "a thousand inputs": {"inputs": [{**first, "name": f"X{i}", "data": [], "shape": [0]} for i in range(1000)]},
        "batch too big": _rows(65),
        "unequal batches": _document(shape=[2, 16], data=[0.0] * 32),
        "unknown output": _top(outputs=[{"name": "OUTPUT7"}]),
        "duplicate output": _top(outputs=[{"name": "OUTPUT0"}, {"name": "OUTPUT0"}]),
        "outputs not a list": _top(outputs=3),
        "reserved parameter": _top(parameters={"triton_x": 1}),
        "parameters not an object": _top(parameters=[1]),
        "id is an object": _top(id={"a": 1}),
        "blob promised, none sent": _document(data=None, parameters={"binary_data_size": 64}),
        "blob and data": _document(parameters={"binary_data_size": 64}),
        "negative blob": _document(data=None, parameters={"binary_data_size": -1}),
        "shared memory": _document(data=None, parameters={"shared_memory_region": "x", "shared_memory_byte_size": 64}),
    }


def _rows(count: int) -> dict[str, Any]:
    zeros = [0.0] * (16 * count)
    names = ("INPUT0", "INPUT1")
    return {"inputs": [{"name": n, "shape": [count, 16], "datatype": "FP32", "data": zeros} for n in names]}


def _raw_bodies() -> dict[str, bytes]:
    """Bodies that are not the JSON they should be."""
    whole = bodies.http_json(samples.add_sub(1)).body
    return {
        "empty body": b"",
        "cut JSON": whole[:-40],
        "not JSON": b"\x00\xff\xfe not json",
        "JSON array": b"[1,2,3]",
        "JSON number": b"1e999999",
        "text after JSON": whole + b"{}",
        "bad UTF-8": whole.replace(b"INPUT0", b"INP\xff\xfe0"),
        "deep list": b'{"inputs":' + b"[" * 20_000,
        "deep object": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        "deep data": whole.replace(b'"data":[', b'"data":' + b"[" * 500, 1),
        "huge number": whole.replace(b'"data":[', b'"data":[' + b"9" * 20_000 + b",", 1),
    }


def _headers() -> dict[str, tuple[bytes, dict[str, str]]]:
    """Headers that lie about the body."""
    wire = bodies.http_binary(samples.add_sub(1))
    length = bodies.HEADER_LENGTH
    return {
        "header length too long": (wire.body, {length: "100000"}),
        "header length too short": (wire.body, {length: "17"}),
        "header length negative": (wire.body, {length: "-1"}),
        "header length text": (wire.body, {length: "many"}),
        "header length huge": (wire.body, {length: "99999999999999999999"}),
        "raw body to two inputs": (wire.body, {length: "0"}),
        "cut blob": (wire.body[:-20], wire.headers),
        "bytes left over": (wire.body + b"x" * 20, wire.headers),
        "unknown encoding": (wire.body, {**wire.headers, "Content-Encoding": "br"}),
        "not gzip": (wire.body, {**wire.headers, "Content-Encoding": "gzip"}),
        "cut gzip": (gzip.compress(wire.body)[:-12], {**wire.headers, "Content-Encoding": "gzip"}),
        "gzip of a megabyte": (gzip.compress(bytes(1 << 20)), {"Content-Encoding": "gzip"}),
        "not deflate": (wire.body, {**wire.headers, "Content-Encoding": "deflate"}),
    }


def _paths() -> list[Request]:
    body = bodies.http_json(samples.add_sub(1)).body
    paths = {
        "unknown model": "/v2/models/nobody/infer",
        "unknown version": "/v2/models/add_sub/versions/99/infer",
        "version is text": "/v2/models/add_sub/versions/x/infer",
        "unknown path": "/v2/nothing/here",
        "long path": "/v2/models/" + "a" * 4000 + "/infer",
        "escaped path": "/v2/models/%2e%2e%2f%2e%2e%2fetc/infer",
    }
    return [Request(kind, http(path, body)) for kind, path in paths.items()] + [
        Request("wrong method", http(INFER, method="DELETE")),
        Request("GET infer", http(INFER, method="GET")),
    ]


def bad_http() -> list[Request]:
    """Bad requests that must be answered with an error, on a connection that others share."""
    documents = {kind: json.dumps(document).encode() for kind, document in _json_documents().items()}
    found = [Request(kind, http(body=body)) for kind, body in {**documents, **_raw_bodies()}.items()]
    found += [Request(kind, http(INFER, body, headers)) for kind, (body, headers) in _headers().items()]
    return found + _paths()


def broken_http() -> list[Request]:
    """Bytes after which a connection cannot be used any more: answered with an error, or closed."""
    good = good_http()[0].data
    cut = {
        "hang up in the body": good[:-30],
        "hang up in the headers": good[:60],
        "hang up before the answer": good,
    }
    start = f"POST {INFER} HTTP/1.1\r\nHost: {HOST}\r\n".encode()
    broken = {
        "not HTTP": b"\x16\x03\x01 hello\r\n\r\n",
        "bad content length": start + b"Content-Length: -5\r\n\r\n",
        "two content lengths": start + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        "bad chunk": start + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n0\r\n\r\n",
        "huge header": start + b"X-Long: " + b"a" * 600_000 + b"\r\n\r\n",
        "many headers": start + b"".join(b"X-%d: 1\r\n" % i for i in range(5000)) + b"\r\n",
    }
    found = [Request(kind, data, alone=True, hang_up=True) for kind, data in cut.items()]
    return found + [Request(kind, data, alone=True) for kind, data in broken.items()]


def bad_grpc() -> list[Request]:
    """Messages that must be answered with an error status."""
    from tritonclient.grpc import service_pb2

    whole = bodies.grpc_message(samples.add_sub(1))

    def changed(kind: str, **fields: Any) -> Request:
        message = service_pb2.ModelInferRequest.FromString(whole)
        for name, value in fields.items():
            if name == "shape":
                message.inputs[0].shape[:] = value
            elif name == "blobs":
                message.raw_input_contents[:] = value
            elif name == "input":
                message.inputs[0].name = value
            else:
                setattr(message, name, value)
        return Request(f"grpc {kind}", message.SerializeToString(), method=bodies.GRPC_PATH)

    changes: list[tuple[str, dict[str, Any]]] = [
        ("unknown model", {"model_name": "nobody"}),
        ("bad version", {"model_version": "x"}),
        ("wrong shape", {"shape": [1, 15]}),
        ("huge shape", {"shape": [2**62, 16]}),
        ("negative shape", {"shape": [-1, 16]}),
        ("unknown input", {"input": "INPUT7"}),
        ("duplicate input", {"input": "INPUT1"}),
        ("short blobs", {"blobs": [b"abc", b"abc"]}),
        ("too few blobs", {"blobs": [bytes(64)]}),
        ("too many blobs", {"blobs": [bytes(64)] * 9}),
        ("no blobs", {"blobs": []}),
    ]
    found = list(starmap(lambda kind, fields: changed(kind, **fields), changes))
    return [
        *found,
        Request("grpc empty message", b"", method=bodies.GRPC_PATH),
        Request("grpc not a message", struct.pack(">Q", 2**63 + 7) * 9, method=bodies.GRPC_PATH),
        Request("grpc cut message", whole[:-30], method=bodies.GRPC_PATH),
        Request("grpc unknown method", whole, method="/inference.GRPCInferenceService/Nothing"),
    ]

"""PROTOCOL.md section 4: compression."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import grpc
import requests
from tritonclient.grpc import service_pb2 as pb

from tests.api.protocol.facts import GRPC, HTTP, Grpc, Http, Section, tensor
from tests.api.protocol.world import LIMIT

SECTION = Section("4")
fact = SECTION.fact
REQUEST = "Request: `Content-Encoding` exactly"
RESPONSE = "Response: only /infer"
MESSAGES = "gRPC: message compression negotiated per call"
BODY = json.dumps({"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}).encode()
PATH = "/v2/models/m/infer"
UNPACK: dict[str, Any] = {"gzip": gzip.decompress, "deflate": zlib.decompress, "": bytes}


@fact(REQUEST, "gzip, deflate and identity are unpacked", HTTP)
def _(on: Http) -> None:
    for encoding, packed in (("gzip", gzip.compress(BODY)), ("deflate", zlib.compress(BODY)), ("identity", BODY)):
        assert on.post(PATH, packed, Content_Encoding=encoding).ok, encoding


@fact(REQUEST, "which of the two it is is found out from the data", HTTP)
def _(on: Http) -> None:
    assert on.post(PATH, zlib.compress(BODY), Content_Encoding="gzip").ok
    assert on.post(PATH, gzip.compress(BODY), Content_Encoding="deflate").ok


@fact(REQUEST, "another encoding is 501 and the answer says which there are", HTTP)
def _(on: Http) -> None:
    for encoding in ("br", "zstd", "gzip, deflate"):
        told = on.post(PATH, BODY, Content_Encoding=encoding)
        told.refuses(501, "Unsupported compression type")
        assert told.headers["accept-encoding"] == "gzip, deflate"


@fact(REQUEST, "what is not in its encoding is 400", HTTP)
def _(on: Http) -> None:
    assert on.post(PATH, BODY, Content_Encoding="gzip").code == "400"
    assert on.post(PATH, gzip.compress(BODY)[:-9], Content_Encoding="gzip").code == "400"


@fact(REQUEST, "what unpacks to more than the limit is 400", HTTP, needs="strict")
def _(on: Http) -> None:
    on.post(PATH, gzip.compress(b" " * (LIMIT + 1)), Content_Encoding="gzip").refuses(
        400, f"exceeds the maximum allowed input size of {LIMIT} bytes"
    )


@fact(REQUEST, "generate refuses any encoding", HTTP)
def _(on: Http) -> None:
    for word in ("generate", "generate_stream"):
        on.post(f"/v2/models/m/{word}", gzip.compress(b'{"IN":[1,2]}'), Content_Encoding="gzip").refuses(
            400, "Unsupported content-encoding, only 'identity' is supported."
        )


def _packed(on: Http, accept: str, body: bytes = BODY, path: str = PATH) -> tuple[str, bytes]:
    """The encoding and the bytes as they came, which requests would unpack."""
    assert on.process is not None
    headers = {"Accept-Encoding": accept}
    with requests.post(on.process.url(path), data=body, headers=headers, stream=True, timeout=20) as answer:
        return answer.headers.get("content-encoding", ""), answer.raw.read()


@fact(RESPONSE, "the answer is packed as accepted", HTTP)
def _(on: Http) -> None:
    for encoding, unpack in UNPACK.items():
        told, packed = _packed(on, encoding or "identity")
        assert told == encoding
        assert json.loads(unpack(packed))["outputs"][0]["data"] == [1.0, 2.0]


@fact(RESPONSE, "the heaviest weight wins and the first of equals", HTTP)
def _(on: Http) -> None:
    for accept, encoding in (
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip;q=0.5, identity;q=0.8", ""),
        ("deflate, gzip", "deflate"),
        ("gzip, deflate", "gzip"),
        ("identity;q=0.1, gzip", "gzip"),
        ("br, gzip;q=0.2", "gzip"),
        ("br", ""),
        ("gzip;q=0", ""),
    ):
        assert _packed(on, accept)[0] == encoding, accept


@fact(RESPONSE, "errors are not packed", HTTP)
def _(on: Http) -> None:
    assert _packed(on, "gzip", b"{")[0] == ""


@fact(RESPONSE, "only infer packs", HTTP)
def _(on: Http) -> None:
    assert _packed(on, "gzip", b"{}", "/v2/repository/index")[0] == ""
    assert _packed(on, "gzip", b'{"IN":[1,2]}', "/v2/models/m/generate")[0] == ""


@fact(RESPONSE, "the header still counts the JSON that is not packed", HTTP)
def _(on: Http) -> None:
    assert on.process is not None
    body = BODY.removesuffix(b"}") + b', "parameters": {"binary_data_output": true}}'
    headers = {"Accept-Encoding": "gzip"}
    answer = requests.post(on.process.url(PATH), data=body, headers=headers, timeout=20)
    length = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.content[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert len(answer.content) == length + 8


@fact(MESSAGES, "messages packed by gzip are read and answered", GRPC)
def _(on: Grpc) -> None:
    _asked_packed(on, grpc.Compression.Gzip)


@fact(MESSAGES, "deflated messages are read and answered", GRPC)
def _(on: Grpc) -> None:
    _asked_packed(on, grpc.Compression.Deflate)


def _asked_packed(on: Grpc, kind: grpc.Compression) -> None:
    message = on.message("m", tensor("IN", [[1, 2]]))
    assert on.stub.ModelInfer(message, timeout=20, compression=kind).model_name == "m"
    assert on.stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=20, compression=kind).name == "triton"

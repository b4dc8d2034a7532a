"""PROTOCOL.md section 2: health and readiness."""

from __future__ import annotations

import grpc

from tests.api.protocol.facts import GRPC, HTTP, Grpc, Http, Section

SECTION = Section("2")
fact = SECTION.fact
SERVER = "`GET /v2/health/live`, `/v2/health/ready`"
STRICT = "Default `--strict-readiness=true`"
MODEL = "`GET /v2/models/m[/versions/v]/ready`"
CHECK = "gRPC `grpc.health.v1.Health/Check`"


@fact(SERVER, "a server that lives says so", needs="strict")
def _(on: Http | Grpc) -> None:
    assert on.server_live()


@fact(SERVER, "live and ready have a small JSON body", HTTP, needs="strict")
def _(on: Http) -> None:
    for word in ("live", "ready"):
        answer = on.request("GET", f"/v2/health/{word}")
        assert (answer.status_code, answer.json()[word]) == (200, True)


@fact(SERVER, "a server that is not ready answers 400 with JSON", HTTP)
def _(on: Http) -> None:
    answer = on.request("GET", "/v2/health/ready")
    assert (answer.status_code, answer.json()["ready"]) == (400, False)
    assert on.request("GET", "/v2/health/live").status_code == 200


@fact(SERVER, "health needs no token", HTTP, needs="strict")
def _(on: Http) -> None:
    on.token = ""
    assert on.server_live()
    assert on.server_ready()


@fact(STRICT, "a server whose models are all ready is ready", needs="strict")
def _(on: Http | Grpc) -> None:
    assert on.server_ready()


@fact(STRICT, "without strict readiness a broken model is no hindrance", needs="lenient")
def _(on: Http | Grpc) -> None:
    assert on.server_ready()
    assert not on.ready("bad")
    assert on.ready("good")


@fact(STRICT, "a server without models is ready and has empty lists", needs="empty")
def _(on: Http | Grpc) -> None:
    assert on.server_ready()
    assert on.index() == []
    assert on.statistics() == []
    assert on.server()["name"] == "triton"


@fact(STRICT, "a model that did not load keeps the server from being ready")
def _(on: Http | Grpc) -> None:
    assert not on.server_ready()


@fact(MODEL, "a ready model is 200 and ready")
def _(on: Http | Grpc) -> None:
    assert on.ready("m")
    assert on.ready("m", "1")


@fact(MODEL, "an unknown model, an unknown version and a broken model are not ready, and gRPC is OK")
def _(on: Http | Grpc) -> None:
    assert not on.ready("foo")
    assert not on.ready("m", "99")
    assert not on.ready("gone")
    assert not on.ready("wrong", "1")


@fact(MODEL, "an error of readiness is one member of JSON", HTTP)
def _(on: Http) -> None:
    for model, status in (("foo", 404), ("wrong/versions/1", 503), ("gone", 404)):
        answer = on.request("GET", f"/v2/models/{model}/ready")
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]


def _health(on: Grpc, service: bytes = b"") -> object:
    check = on.channel.unary_unary("/grpc.health.v1.Health/Check")
    return check(b"\x0a" + bytes([len(service)]) + service if service else b"", timeout=20)


@fact(CHECK, "grpc health says whether the server is ready", GRPC, needs="strict")
def _(on: Grpc) -> None:
    assert _health(on) == b"\x08\x01"  # SERVING


@fact(CHECK, "grpc health says so where it is not", GRPC)
def _(on: Grpc) -> None:
    assert _health(on) == b"\x08\x02"  # NOT_SERVING


@fact(CHECK, "grpc health ignores the service's name", GRPC, needs="strict")
def _(on: Grpc) -> None:
    try:
        assert _health(on, b"inference.GRPCInferenceService") == b"\x08\x01"
        assert _health(on, b"any") == b"\x08\x01"
    except grpc.RpcError as error:
        raise AssertionError(error.details()) from None

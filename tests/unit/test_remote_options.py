"""What `config.pbtxt` may say of a remote server, and how its answers are understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway import errors
from gateway.engines.remote import failures
from gateway.engines.remote.options import _DEFAULTS, read

URL = {"remote.url": "grpc://host:1"}


@pytest.mark.parametrize(
    ("url", "names", "path"),
    [
        ("grpc://10.0.0.7:9001", ["10.0.0.7:9001"], ""),
        ("grpc://far", ["far:8001"], ""),
        ("grpcs://far", ["far:443"], ""),
        ("http://far", ["far:8000"], ""),
        ("https://far/serving/", ["far:443"], "/serving"),
        ("http://[::1]:80", ["[::1]:80"], ""),
        ("grpc://a:1, grpc://b:2 grpc://c:3", ["a:1", "b:2", "c:3"], ""),
    ],
)
def test_urls(url: str, names: list[str], path: str) -> None:
    options = read("m", {"remote.url": url, "unrelated": "1"})
    assert [each.name for each in options.addresses] == names
    assert {each.path for each in options.addresses} == {path}
    assert options.model == "m"


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({}, "remote.url of model 'm' must say where the server is"),
        ({"remote.url": "host:8001"}, "must be grpc://, grpcs://, http:// or https://"),
        ({"remote.url": "ftp://host"}, "must be grpc://"),
        ({"remote.url": "http://host:port"}, "must be grpc://"),
        ({"remote.url": "http://me:secret@host"}, "must hold no user or password"),
        ({"remote.url": "grpc://host/path"}, "has a path"),
        ({"remote.url": "grpc://a,http://b"}, "servers of different kinds"),
        ({**URL, "remote.modle": "x"}, "remote.modle of model 'm' is not known; there are: remote.url"),
        ({**URL, "remote.timeout_ms": "0"}, "must be a whole number above 0, got '0'"),
        ({**URL, "remote.concurrency": "many"}, "must be a whole number above 0, got 'many'"),
        ({**URL, "remote.token_file": "/nonesuch"}, "token_file of model 'm' cannot be read: No such file"),
        ({**URL, "remote.cert_file": __file__}, "and remote.key_file belong together"),
        ({"remote.url": "grpcs://host", "remote.ca_file": __file__}, "is no PEM file"),
    ],
)
def test_mistakes_are_explained(parameters: dict[str, str], text: str) -> None:
    with pytest.raises(errors.InvalidArgument) as problem:
        read("m", parameters)
    assert text in problem.value.message
    assert "secret" not in problem.value.message
    assert problem.value.message.endswith("correct it in config.pbtxt")


@pytest.mark.parametrize(("url", "warns"), [("http://127.0.0.1", 0), ("https://far", 0), ("grpc://far", 1)])
def test_a_token_in_the_clear_is_warned_of(tmp_path: Path, url: str, warns: int) -> None:
    (tmp_path / "token").write_text("t0ken\n")
    options = read("m", {"remote.url": url, "remote.token_file": str(tmp_path / "token")})
    assert options.token == "t0ken"
    assert len(options.warnings) == warns


def test_the_readme_lists_every_parameter() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert [key for key in _DEFAULTS if f"`remote.{key}`" not in readme] == []


@pytest.mark.parametrize(
    ("status", "retry_after", "kind", "error", "keeps_text"),
    [
        (400, None, "declined", errors.InvalidArgument, True),
        (413, None, "declined", errors.InvalidArgument, True),
        (401, None, "gone", errors.Unavailable, False),
        (403, None, "gone", errors.Unavailable, False),
        (404, None, "gone", errors.Unavailable, False),
        (301, None, "gone", errors.Unavailable, False),
        (501, None, "gone", errors.Unavailable, False),
        (429, 0.25, "busy", errors.Overloaded, True),
        (500, None, "declined", errors.Internal, False),
        (502, None, "gone", errors.Unavailable, False),
        (503, None, "gone", errors.Unavailable, False),
        (503, 2.0, "busy", errors.Unavailable, False),
        (504, None, "declined", errors.DeadlineExceeded, True),
    ],
)
def test_an_answer_is_one_row_of_the_error_table(
    status: int, retry_after: float | None, kind: str, error: type[errors.GatewayError], keeps_text: bool
) -> None:
    failure = failures.of_http("m", status, "its words", retry_after)
    assert failure.kind == kind
    assert type(failure.error) is error
    assert ("its words" in failure.error.message) == keeps_text
    assert str(status) in failure.reason
    if retry_after is not None:
        assert failure.error.retry_after == retry_after


@pytest.mark.parametrize("row", [each for each in vars(errors).values() if isinstance(each, type)], ids=str)
def test_grpc_and_http_of_one_row_mean_the_same(row: type[errors.GatewayError]) -> None:
    if not issubclass(row, errors.GatewayError) or row.http in (400, 405, 409):
        return  # rows whose HTTP status says less, or more, than their code
    by_code, by_status = failures.of_status("m", row.grpc, "t"), failures.of_http("m", row.http, "t")
    assert (by_code.kind, type(by_code.error)) == (by_status.kind, type(by_status.error))

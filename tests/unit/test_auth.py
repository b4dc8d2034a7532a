"""The token file and who a token belongs to."""

import logging
from pathlib import Path

import pytest

from gateway.errors import InvalidArgument, Unauthenticated
from gateway.transport.auth import Callers, Tokens

ALICE, BOB, SPARE = "a" * 16, "b" * 32, "c" * 20


def write(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_each_token_has_its_tenant(tmp_path: Path) -> None:
    tokens = Tokens.load(write(tmp_path, f"# callers\n\nalice:{ALICE}\n  bob : {BOB}  \nalice:{SPARE}\n"))
    assert tokens.tenant(f"Bearer {ALICE}") == "alice"
    assert tokens.tenant(f"bearer  {BOB}") == "bob"
    assert tokens.tenant(f"Bearer {SPARE}") == "alice"


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", f"Bearer {ALICE}x", ALICE, f"Basic {ALICE}", "Bearer \ud800", "Bearer é"],
)
def test_others_are_refused_without_an_echo(authorization: str | None) -> None:
    with pytest.raises(Unauthenticated) as refused:
        Tokens({ALICE: "alice"}).tenant(authorization)
    assert ALICE not in refused.value.message
    assert "Authorization: Bearer" in refused.value.message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "tokens has no tokens"),
        ("# none\n", "tokens has no tokens"),
        (f"\n{ALICE}\n", "tokens:2: expected 'tenant:token'"),
        (f":{ALICE}\n", "tokens:1: expected 'tenant:token'"),
        ("alice:short\n", "tokens:1: the token of 'alice' has 5 characters, fewer than 16"),
        (f"alice:{ALICE} {BOB}\n", "tokens:1: the token of 'alice' may have printable ASCII characters only"),
        (f"alice:{ALICE}\nbob:{ALICE}\n", "tokens:2: this token is on an earlier line too"),
    ],
)
def test_bad_files_name_the_line_and_show_no_token(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as refused:
        Tokens.load(write(tmp_path, text))
    assert ALICE not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o644, True)])
def test_a_file_that_others_can_read_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    with caplog.at_level(logging.WARNING, "gateway"):
        Tokens.load(write(tmp_path, f"alice:{ALICE}\n", mode))
    assert ("token_file_exposed" in caplog.text) is warned
    assert ALICE not in caplog.text


# --- tenants


def test_without_tokens_and_header_everybody_is_the_default_tenant() -> None:
    assert Callers().tenant({"authorization": f"Bearer {ALICE}", "": "x", "x-tenant": "x"}.get) == ""


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [({}, ""), ({"x-tenant": ""}, ""), ({"x-tenant": " acme "}, "acme"), ({"x-tenant": "a" * 128}, "a" * 128)],
)
def test_the_trusted_header_names_the_tenant(headers: dict[str, str], tenant: str) -> None:
    assert Callers(header="X-Tenant").tenant(headers.get) == tenant


def test_a_token_says_more_than_the_header() -> None:
    callers = Callers(Tokens({ALICE: "alice"}), "x-tenant")
    assert callers.tenant({"authorization": f"Bearer {ALICE}", "x-tenant": "bob"}.get) == "alice"
    with pytest.raises(Unauthenticated):
        callers.tenant({"x-tenant": "alice"}.get)


@pytest.mark.parametrize("name", ["a" * 129, "a\nb", "a\x00"])
def test_a_tenant_that_is_no_name(name: str) -> None:
    with pytest.raises(InvalidArgument, match="the header 'x-tenant' must name a tenant in at most 128 printable"):
        Callers(header="x-tenant").tenant({"x-tenant": name}.get)

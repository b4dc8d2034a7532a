"""The command `gateway explain MODEL`: asks a running server over HTTP why a model's requests fared as they did."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from gateway.transport.explanation import explanation

_SECONDS = 10.0


class _Problem(Exception):
    """What went wrong and what to do, for people."""


def run(argv: Sequence[str]) -> int:
    """Print what a server says of a model, and return the exit status.

    Prints the problem and raises `SystemExit` 2 on a bad option.
    """
    options = _parser().parse_args(argv)
    try:
        told = _ask(options.url, _path(options.model, options.version), _token(options))
        text = json.dumps(told, indent=2) if options.json else _text(told, options.url)
    except _Problem as problem:
        sys.stderr.write(f"gateway explain: {problem}\n")
        return 1
    sys.stdout.write(f"{text}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway explain",
        description="Show why a running server closed its batches, what it refused and what to do about it, and what "
        "it has learned of a model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="name of a model")
    add("--version", type=_version, metavar="N", help="one of its versions (default: the newest)")
    add("--url", default="http://127.0.0.1:8000", help="the server's HTTP port (default: http://127.0.0.1:8000)")
    token = parser.add_mutually_exclusive_group()
    token.add_argument(
        "--token-file", type=Path, metavar="FILE", help="a file with the token, or the server's own --token-file"
    )
    token.add_argument("--token", metavar="TEXT", help="the token; others on this machine can see it, a file is safer")
    add("--json", action="store_true", help="print the server's answer as it is")
    return parser


def _version(text: str) -> str:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a version")
    return text


def _path(model: str, version: str | None) -> str:
    return f"/v2/models/{quote(model, safe='')}" + (f"/versions/{version}" if version else "") + "/explain"


def _token(options: argparse.Namespace) -> str | None:
    """The token to show, if any: the first line of the file that has one, without the tenant before it."""
    file: Path | None = options.token_file
    given: str | None = options.token
    if file is None:
        return given
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "it is not text"
        raise _Problem(f"cannot read {file}: {reason}") from None
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise _Problem(f"{file} has no token; write a line 'tenant:token', or the token alone")
    tenant, colon, token = entries[0].partition(":")
    return token.strip() if colon else tenant


def _ask(url: str, path: str, token: str | None) -> Mapping[str, Any]:
    """The server's answer. Raises `_Problem`."""
    where = urlsplit(url if "://" in url else f"http://{url}")
    headers = {"accept": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    try:
        connection = _connection(where)
        try:
            connection.request("GET", where.path.rstrip("/") + path, headers=headers)
            response = connection.getresponse()
            status, body = response.status, response.read()
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        raise _Problem(
            f"no gateway answers at {url} ({reason}); is it running, and is this its HTTP port? --url says where it is"
        ) from None
    return _read(status, body, url, token)


def _connection(where: SplitResult) -> http.client.HTTPConnection:
    """Raises ValueError for a URL that is none."""
    if where.scheme not in ("http", "https") or not where.hostname:
        raise ValueError("not a URL such as http://127.0.0.1:8000")
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    return kind(where.hostname, where.port, timeout=_SECONDS)


def _read(status: int, body: bytes, url: str, token: str | None) -> Mapping[str, Any]:
    try:
        told = json.loads(body)
    except ValueError:
        told = None
    if status == 200 and isinstance(told, dict):
        return told
    error = str(told.get("error", "")) if isinstance(told, dict) else ""
    if status == 401:
        remedy = "the server knows no such token" if token else "the server wants a token"
        raise _Problem(f"{remedy}; give --token-file FILE with one of the lines of its own --token-file")
    if error and error != "Not Found":
        hint = f"; `curl -X POST {url}/v2/repository/index` lists the models" if status in (400, 404) else ""
        raise _Problem(f"{error}{hint}")
    raise _Problem(f"the server at {url} does not explain itself (status {status}); is it a Lockgate of this version?")


def _text(told: Mapping[str, Any], url: str) -> str:
    try:
        return explanation(told)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _Problem(f"the server at {url} is of another version; --json shows what it said") from None

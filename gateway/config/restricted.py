"""`--http-restricted-api` and `--grpc-restricted-protocol` in Triton's form: `API,API,...:KEY=VALUE`."""

from __future__ import annotations

import re
from collections.abc import Iterable

APIS = (
    "health",
    "metadata",
    "inference",
    "shared-memory",
    "model-config",
    "model-repository",
    "statistics",
    "trace",
    "logging",
)
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def read_restricted(entries: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Key and value by API. Raises ValueError for an entry in another form, and for an API that is named twice."""
    rules: dict[str, tuple[str, str]] = {}
    for entry in entries:
        apis, colon, rest = entry.partition(":")
        key, equals, value = rest.partition("=")
        if not colon or not equals or not _KEY.fullmatch(key) or not value:
            raise ValueError("expected API,API,...:KEY=VALUE")
        for api in apis.split(","):
            if api not in APIS:
                raise ValueError(f"'{api}' is no group of APIs; expected some of {', '.join(APIS)}")
            if api in rules:
                raise ValueError(f"'{api}' is restricted twice; a group of APIs has one header")
            rules[api] = key, value
    return rules


def checked_pattern(pattern: str) -> str:
    """`pattern` itself. Raises ValueError when it is no regular expression."""
    try:
        re.compile(pattern.removeprefix("(?-i)"))
    except re.error as problem:
        raise ValueError(f"it is no regular expression: {problem}") from None
    return pattern

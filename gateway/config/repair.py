"""Reads a `config.pbtxt` past its mistakes, so that all of them can be told at once and not only the first.

Each mistake is mended as its own remedy says, in memory only, and the text is read again. Where that takes a guess, what
the rest of the text says is told, and what it means is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from gateway.config.model import ModelConfigProto
from gateway.config.parse import Source, parse_text
from gateway.errors import InvalidArgument

_MOST = 100  # mistakes of one file
_PLACE = re.compile(r" line (\d+) column (\d+): (.*)", re.DOTALL)
_QUOTES = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"})


def parse_all(source: Source) -> tuple[ModelConfigProto | None, list[str]]:
    """What the text means once mended, None when that cannot be told; and each mistake with line, column and remedy."""
    problems: list[str] = []
    text, sure = source.text, True
    while len(problems) < _MOST:
        try:
            proto = parse_text(Source(source.file, text))
        except InvalidArgument as problem:
            problems.append(problem.message)
            mended, certain = _mend(text, problem.message)
            if mended == text:
                break
            text, sure = mended, sure and certain
        else:
            return proto if sure else None, problems
    return None, problems


def _mend(text: str, problem: str) -> tuple[str, bool]:
    """The text without this mistake and whether it means what its author meant; the same text if that takes a guess too far."""
    found = _PLACE.search(problem)
    lines = text.splitlines()
    if found is None or int(found[1]) > len(lines):
        return text, False
    number, column = int(found[1]) - 1, int(found[2]) - 1
    before, after = lines[number][:column], lines[number][column:]
    for pattern, mend, certain in _MENDS:
        if hint := re.search(pattern, found[3]):
            lines[number] = mend(before, after, hint)
            return "\n".join(lines), certain
    return text, False


def _instead(before: str, after: str, hint: re.Match[str]) -> str:
    return before + re.sub(r"^[\"']?\w+[\"']?", hint[1], after)


def _quoted(before: str, after: str, _: re.Match[str]) -> str:
    return before + re.sub(r"^[^\s\]},]+", lambda word: f'"{word[0]}"', after)


def _plain_quotes(before: str, after: str, _: re.Match[str]) -> str:
    return (before + after).translate(_QUOTES)


def _without_comma(before: str, after: str, _: re.Match[str]) -> str:
    return re.sub(r",(\s*[\]}])", r"\1", before + after)


def _a_number(before: str, after: str, _: re.Match[str]) -> str:
    return before + re.sub(r"^(\$?\{+[^}]*\}+|[^\s\]},]+)", "1", after)


def _without_field(before: str, after: str, _: re.Match[str]) -> str:
    """Without the field that stands alone on its line."""
    line = before + after
    return "" if re.fullmatch(r"\s*\w+\s*:\s*[^\[\]{}]*", line) else line


_MENDS: tuple[tuple[str, Callable[[str, str, re.Match[str]], str], bool], ...] = (
    (r"Did you mean '(\w+)'\?", _instead, True),
    (r"Write (\w+) without quotes", _instead, True),
    ("typographic quotes", _plain_quotes, True),
    ("Remove the comma", _without_comma, True),
    ("parse integer", _a_number, False),
    (r"Put the value in quotes", _quoted, True),
    ("Known here: ", _without_field, True),
    ("Give it once", _without_field, True),
    ("", _without_field, False),
)

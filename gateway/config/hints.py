"""What to do about a `config.pbtxt` that protobuf refuses: one remedy for each mistake seen in the wild.

Pure text in, text out. It explains a parse error and never decides whether there is one.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

_SMART_QUOTES = "\u201c\u201d\u2018\u2019"
_PLACEHOLDER = re.compile(r"\$\{[^}]*\}|\{\{|\$[A-Za-z_]|#[A-Z]+|<[A-Za-z_ ]+>")
_PYTHON = re.compile(r"\s*(import|from|def|class|if __name__)\b")
_ALIASES = {
    "TYPE_FLOAT": "TYPE_FP32",
    "TYPE_FLOAT32": "TYPE_FP32",
    "TYPE_FLOAT16": "TYPE_FP16",
    "TYPE_DOUBLE": "TYPE_FP64",
    "TYPE_BYTES": "TYPE_STRING",
    "TYPE_INT": "TYPE_INT32",
    "TYPE_LONG": "TYPE_INT64",
}
_FORMS = (
    ("should not have multiple|specified along with", "Give it once"),
    ("missing ending quote", "Close the quote on the same line"),
    ("Couldn't parse integer: [A-Za-z_]", "Write a number; if the word is a template placeholder, fill in its value"),
    ('Expected "{"', 'The field holds a message; write its fields in { }, e.g. value: { string_value: "1" }'),
    ("Expected string", 'Put the value in quotes ("...")'),
    ("", "Compare with Triton's model configuration documentation"),
)


def remedy(problem: str, text: str, line: str, pool: Any) -> str:
    """Say how to put right what `problem`, protobuf's message, complains of on `line` of `text`.

    `pool` is the descriptor pool that knows the messages and enums named in the problem.
    """
    return _wrong_file(text, line) or _wrong_character(line) or _wrong_name(problem, pool) or _wrong_form(problem, line)


def _wrong_file(text: str, line: str) -> str:
    if text.lstrip().startswith("{"):
        return "This is JSON; write protobuf text: no outer braces, field names without quotes"
    if _PYTHON.match(line):
        return "This looks like Python; config.pbtxt holds protobuf text, the code belongs in <version>/model.py"
    return ""


def _wrong_character(line: str) -> str:
    if any(quote in line for quote in _SMART_QUOTES):
        return 'Replace the typographic quotes with plain ones (")'
    if placeholder := _PLACEHOLDER.search(line):
        return f"'{placeholder.group()}' looks like a template placeholder; fill in its value"
    return ""


def _wrong_name(problem: str, pool: Any) -> str:
    if found := re.search(r'Message type "([\w.]+)" has no field named "(\w+)"', problem):
        fields = [field.name for field in pool.FindMessageTypeByName(found[1]).fields]
        return _suggest("data_type" if found[2] in {"type", "datatype", "dtype"} else found[2], fields)
    if found := re.search(r'Enum type "([\w.]+)" has no value named ("?)(\w*)', problem):
        values = [value.name for value in pool.FindEnumTypeByName(found[1]).values]
        if found[2]:
            return f"Write {found[3]} without quotes"
        name = found[3].upper()
        candidates = (name, f"TYPE_{name}", _ALIASES.get(name, ""), _ALIASES.get(f"TYPE_{name}", ""))
        return _suggest(next((name for name in candidates if name in values), name), values)
    return ""


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"Did you mean '{close[0]}'?" if close else f"Known here: {', '.join(known)}"


def _wrong_form(problem: str, line: str) -> str:
    # The end of the file has no line to look at, and protobuf's complaint about it misleads.
    if not line.strip():
        return "The file ends inside a [ or {; close it"
    if re.search(r",\s*[\]}]", line):
        return "Remove the comma before the closing bracket"
    return next(text for pattern, text in _FORMS if re.search(pattern, problem))

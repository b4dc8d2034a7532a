"""Reads JSON text into plain Python values, leaving the tensors' numbers in the parser's own memory.

A JSON tensor may hold millions of numbers, so `data` members stay `simdjson.Array` proxies that `numbers`
copies out as one buffer: no Python object per element. Such proxies die with the next `read`. What
simdjson refuses and Triton's parser accepts (NaN, Infinity, integers beyond 64 bits) takes a slower parser.
All of it runs on the event loop: no parser here lets go of the interpreter, so a thread would free nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import orjson
import simdjson

from gateway.errors import GatewayError, Internal, InvalidArgument
from gateway.transport.http.arrays import cut
from gateway.types import Array

NumberKind: TypeAlias = Literal["d", "i", "u"]

_SMALL = 1 << 10  # below this orjson is as fast and leaves nothing behind in a parser
_COUNTED = 0xFFFFFF  # elements; simdjson says this of all longer arrays, and `as_list` writes beyond the list it makes
_PARSER_KEPT = 4 << 20  # a parser keeps some ten times its largest text for ever; larger texts get their own
_NUMBERS: dict[NumberKind, tuple[str, type[np.generic]]] = {
    "d": ("number", np.float64),
    "i": ("integer", np.int64),
    "u": ("unsigned-integer", np.uint64),
}
_NO_OBJECT = "failed to parse the request JSON buffer: expected a JSON object at 0"
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')
_INFINITY = re.compile(r'("(?:[^"\\]|\\.)*")|\bInf\b')
_SURROGATES = re.compile(r"\\u[dD][89a-fA-F]")


class Members(list[tuple[str, Any]]):
    """The members of a JSON object in their order, each as often as it is there."""


class DocumentReader:
    """Parses one JSON object at a time. Not for use by two threads."""

    def __init__(self, max_bytes: int, max_depth: int) -> None:
        self._max_bytes = max_bytes
        self._max_depth = max_depth
        self._parser = simdjson.Parser()

    def read(self, text: bytes) -> dict[str, Any]:
        """The members of the object in `text`; in each member of `inputs`, `data` may be a `simdjson.Array`.

        Raises Internal for text that is not a JSON object (Triton's 500), InvalidArgument over a limit.
        """
        self._check(text)
        document = self._parse(text)
        if isinstance(document, simdjson.Object):
            return _top_members(document)
        if not isinstance(document, dict):
            raise Internal(_NO_OBJECT)
        return document

    def read_around(self, text: bytes) -> dict[str, Any] | None:
        """What `read` finds, but that the long arrays of `inputs` are `Cut`: their numbers are not looked at yet.

        None where there are none, or where the rest of the text is not what it seemed: `read` knows.
        """
        found = cut(text) if len(text) <= self._max_bytes else None
        if found is None or _depth_exceeds(found.text, self._max_depth - found.depth) or _too_many(found.text):
            return None
        try:
            document = self._parse_large(found.text)
        except (ValueError, RuntimeError):
            return None
        if not isinstance(document, simdjson.Object):
            return None
        members = _top_members(document)
        # Each mark is in the text once: if all are found in inputs, none is anywhere else.
        inputs, placed = members.get("inputs"), 0
        for each in inputs if isinstance(inputs, list) else ():
            if isinstance(each, dict) and (array := found.arrays.get(each.get("data", ""))):
                each["data"] = array
                placed += 1
        return members if placed == len(found.arrays) else None

    def members(self, text: bytes) -> Members:
        """As `read`, with every object as its `Members`; a text of nothing has none."""
        self._check(text)
        try:
            document = _parse_slowly(text, Members) if text else Members()
        except RecursionError:
            raise self._too_deep() from None
        if not isinstance(document, Members):
            raise Internal(_NO_OBJECT)
        return document

    def _check(self, text: bytes) -> None:
        if len(text) > self._max_bytes:
            raise too_large(len(text), self._max_bytes)
        if _depth_exceeds(text, self._max_depth):
            raise self._too_deep()

    def _parse(self, text: bytes) -> Any:
        try:
            return orjson.loads(text) if len(text) < _SMALL or _too_many(text) else self._parse_large(text)
        except (ValueError, RuntimeError) as problem:
            if "DEPTH_ERROR" in str(problem):
                raise self._too_deep() from None
        try:
            return _parse_slowly(text)
        except RecursionError:
            raise self._too_deep() from None

    def _parse_large(self, text: bytes) -> Any:
        if len(text) > _PARSER_KEPT:
            return simdjson.Parser().parse(text)
        try:
            return self._parser.parse(text)
        except RuntimeError:
            # Raised too while the last document is still referenced, by a traceback somebody keeps.
            self._parser = simdjson.Parser()
            return self._parser.parse(text)

    def _too_deep(self) -> InvalidArgument:
        return InvalidArgument(f"JSON nesting depth exceeds maximum allowed limit ({self._max_depth})")


def too_large(size: int, limit: int) -> InvalidArgument:
    """More JSON, raw or decompressed bytes than `--http-max-input-size`."""
    return InvalidArgument(
        f"request JSON size of {size} bytes exceeds the maximum allowed input size of {limit} bytes. "
        "Use --http-max-input-size to increase the limit."
    )


def bad_member(name: str, got: str, wanted: str) -> GatewayError:
    """A member of the wrong JSON type, in the words of Triton's JSON helper; 500 as there."""
    return Internal(f"Unable to parse '{name}': attempt to access JSON non-{got} as {wanted}")


def numbers(data: Any, kind: NumberKind) -> Array:
    """The numbers of a (nested) JSON array as a flat float64 ("d"), int64 ("i") or uint64 ("u") array.

    Raises Internal for elements of another type, or outside the 64 bits of an integer type.
    """
    word, dtype = _NUMBERS[kind]
    try:
        if isinstance(data, simdjson.Array):
            return np.frombuffer(data.as_buffer(of_type=kind), dtype)
        elements = flatten(data)
        allowed = {int, float} if kind == "d" else {int}
        if not allowed.issuperset(map(type, elements)):
            raise bad_member("data", word, word)
        return np.array(elements, dtype)
    except (TypeError, ValueError, OverflowError):
        raise bad_member("data", word, word) from None


def flatten(data: Any) -> list[Any]:
    """The elements of a (nested) JSON array in row-major order, as Python objects.

    Raises Internal when `data` is no array.
    """
    nested = data.as_list() if isinstance(data, simdjson.Array) else data
    if not isinstance(nested, list):
        raise bad_member("data", "array", "array")
    if list not in set(map(type, nested)):
        return nested
    # Not by recursion: the depth is the client's choice.
    flat: list[Any] = []
    open_lists = [iter(nested)]
    while open_lists:
        for element in open_lists[-1]:
            if type(element) is list:
                open_lists.append(iter(element))
                break
            flat.append(element)
        else:
            open_lists.pop()
    return flat


def _top_members(document: simdjson.Object) -> dict[str, Any]:
    return {key: _inputs(document[key]) if key == "inputs" else _plain(document[key]) for key in _keys(document)}


def _inputs(value: Any) -> Any:
    if not isinstance(value, simdjson.Array):
        return _plain(value)
    return [
        {key: each[key] if key == "data" else _plain(each[key]) for key in _keys(each)}
        if isinstance(each, simdjson.Object)
        else _plain(each)
        for each in value
    ]


def _keys(document: simdjson.Object) -> list[str]:
    # csimdjson looks keys up as C strings, so one with a NUL is not found; no member of the protocol has one.
    return [key for key in document if "\0" not in key]


def _plain(value: Any) -> Any:
    if isinstance(value, simdjson.Object):
        return value.as_dict()
    return value.as_list() if isinstance(value, simdjson.Array) else value


def _parse_slowly(text: bytes, members: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    if not text.strip():
        raise Internal("failed to parse the request JSON buffer: The document is empty. at 0")
    try:
        decoded = text.decode()
        if "Inf" in decoded:
            # rapidjson's other word for it, which Python does not read.
            decoded = _INFINITY.sub(lambda found: found[1] or "Infinity", decoded)
        value = json.loads(decoded, object_pairs_hook=members)
        if _SURROGATES.search(decoded):
            # Half a surrogate pair is accepted there, and could not be written back in an answer.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as problem:
        raise Internal(f"failed to parse the request JSON buffer: {problem.msg}. at {problem.pos}") from None
    except ValueError as problem:
        reason = "Invalid encoding in string." if isinstance(problem, UnicodeError) else "Invalid value."
        raise Internal(f"failed to parse the request JSON buffer: {reason} at 0") from None
    return value


def _too_many(text: bytes) -> bool:
    """Whether an array in the text may be longer than simdjson can count."""
    return len(text) > 2 * _COUNTED and text.count(b",") >= _COUNTED - 1


def _depth_exceeds(text: bytes, limit: int) -> bool:
    if _found(text, b"[", limit) + _found(text, b"{", limit) <= limit:
        return False
    # Brackets inside strings can only raise the first figure, so most texts need one look.
    return _bracket_depth(text) > limit and _bracket_depth(_STRINGS.sub(b"", text)) > limit


def _found(text: bytes, bracket: bytes, limit: int) -> int:
    """How often the bracket occurs, not looking beyond limit + 1; bytes.count takes ten times as long."""
    count, at = 0, text.find(bracket)
    while at >= 0 and count <= limit:
        count += 1
        at = text.find(bracket, at + 1)
    return count


def _bracket_depth(text: bytes) -> int:
    # In ASCII { and } differ from [ and ] by one bit.
    folded = np.frombuffer(text, np.uint8) | 0x20
    brackets = folded[(folded == 0x7B) | (folded == 0x7D)].astype(np.int32)
    return int(np.cumsum(0x7C - brackets).max(initial=0))

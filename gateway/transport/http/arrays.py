"""Long JSON arrays of numbers, read by compiled code (arrays.c) straight into the memory of a tensor.

A JSON parser first writes a document of its own, sixteen bytes a number, and the tensor is made of that. Here
a long array is cut out of the text, so that a parser reads what is left, and its numbers are read in one pass.
What is accepted is what the parser would have found; all else is left to it, the whole text. So where
the compiled code is missing (deploy/native.py makes it at installation, if there is a C compiler) everything is
the same, but slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from gateway.errors import Internal
from gateway.telemetry import log_event
from gateway.types import Array

SOURCE = Path(__file__).with_name("arrays.c")
LIBRARY = Path(__file__).with_name("_arrays.so")

_LONG = 1 << 14  # bytes of an array worth the trouble
_QUOTES = 256  # of a text, looked at for arrays; what comes behind them is left to the parser
_DEEPEST = 8  # arrays around a number
# Possessive and bounded: white space by the megabyte takes no longer than anything else.
_OPENING = re.compile(rb'"data"[ \t\n\r]{0,64}+:[ \t\n\r]{0,64}+((?:\[[ \t\n\r]{0,64}+){1,%d}+)' % _DEEPEST)
_BEHIND = b" \t\n\r,{}]"  # what may stand between the last number and the next string
_FARTHEST = 512  # bytes of that
_CLOSING = re.compile(rb"[ \t\n\r]*\]")
_NOT_PLAIN = "the array holds something else than as many plain numbers as its shape says"
_AGAIN = "where cc, gcc or clang is installed, install the gateway again, with --no-cache-dir --force-reinstall"
_MARK = secrets.token_hex(16)  # no client can send what stands for its array


@dataclass(frozen=True, slots=True)
class Cut:
    """An array in a text: where it starts, how many bytes it has, and how many arrays deep its numbers are."""

    text: bytes
    start: int
    size: int
    depth: int

    def numbers(self, dtype: np.dtype[np.generic], count: int) -> Array:
        """All numbers, as float32, float64, int64 or uint64. Raises Internal if there are not `count`, all plain ones."""
        # Two bytes hold at most one number: no memory for counts that cannot be.
        places = np.empty(min(count, self.size // 2), dtype)
        read = _functions()[dtype]
        if read(self.text, self.start, self.size, self.depth, places.ctypes.data, len(places)) != count:
            raise Internal(_NOT_PLAIN)
        if dtype.kind == "u" and places.view(np.int64).min(initial=0) < 0:
            raise Internal(_NOT_PLAIN)
        return places


@dataclass(frozen=True, slots=True)
class Rest:
    """A text with a string in the place of each long `data` array: the arrays by these strings."""

    text: bytes
    arrays: Mapping[str, Cut]

    @property
    def depth(self) -> int:
        """How many arrays deep the arrays go."""
        return max(each.depth for each in self.arrays.values())


def cut(text: bytes) -> Rest | None:
    """Cut the long `data` arrays out of a JSON text. None where there are none, or no compiled code to read them.

    `"data":[` outside of a string is the start of a member, and inside of one its first quote would end that and
    make the rest no JSON; so the text left is JSON only if the text was, the arrays themselves apart.
    """
    if len(text) < _LONG or not available():
        return None
    cuts: dict[str, Cut] = {}
    parts: list[bytes] = []
    done, quote = 0, text.find(b'"')
    for _ in range(_QUOTES):
        following = text.find(b'"', quote + 1)
        stop = following if following >= 0 else len(text)
        if stop - quote > _LONG and (found := _array(text, quote, stop)):
            name = f"{_MARK}{len(cuts)}"
            cuts[name] = found
            parts += text[done : found.start], b'"', name.encode(), b'"'
            done = found.start + found.size
        if following < 0:
            break
        quote = following
    return Rest(b"".join((*parts, text[done:])), cuts) if cuts else None


def available() -> bool:
    """Whether the compiled code is there, and made from the source that lies beside it."""
    return bool(_functions())


def _array(text: bytes, quote: int, stop: int) -> Cut | None:
    """The array of the member whose name ends at `quote`; there is no other quote before `stop`."""
    opening = _OPENING.match(text, max(quote - 5, 0), stop)
    if opening is None:
        return None
    depth, last = opening[1].count(b"["), max(opening.end(), stop - _FARTHEST)
    end = last + len(text[last:stop].rstrip(_BEHIND))
    if end == last:
        return None
    for _ in range(depth):
        closing = _CLOSING.match(text, end, stop)
        if closing is None:
            return None
        end = closing.end()
    return Cut(text, opening.start(1), end - opening.start(1), depth)


@cache
def _functions() -> Mapping[np.dtype[np.generic], Callable[..., int]]:
    """What reads numbers of each type; nothing, which is logged once, without code compiled from the source."""
    try:
        # Not CDLL, which lets go of the interpreter: to get it back would take longer than to read an array.
        library = ctypes.PyDLL(str(LIBRARY))
        library.lockgate_source.restype = ctypes.c_char_p
        if library.lockgate_source().decode() != hashlib.sha256(SOURCE.read_bytes()).hexdigest():
            return _missing(f"it was compiled from another arrays.c; {_AGAIN}")
        integers, size = library.lockgate_integers, ctypes.c_int64
        functions = {"f4": library.lockgate_floats, "f8": library.lockgate_doubles, "i8": integers, "u8": integers}
    except (OSError, AttributeError) as problem:
        return _missing(f"{problem}; {_AGAIN}")
    for each in functions.values():
        each.restype = size
        each.argtypes = [ctypes.c_char_p, size, size, size, ctypes.c_void_p, size]
    return {np.dtype(name): each for name, each in functions.items()}


def _missing(problem: str) -> dict[np.dtype[np.generic], Callable[..., int]]:
    log_event("json_not_compiled", effect="JSON tensors are read at half the speed", reason=problem)
    return {}

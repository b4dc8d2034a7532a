"""Settings that may be changed while the gateway runs, the same in every process of a fleet.

Each name has one value, and the latest change of it wins: changes are numbered by a counter that all processes carry
forward, so that no clock is trusted. Processes exchange all they know in one question, whenever something is read or
changed and when a process starts, so that whoever missed a change has it before it next answers for it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

QUESTION = "settings"
Ask: TypeAlias = Callable[[str], Awaitable[Sequence[bytes]]]
Changed: TypeAlias = Callable[[str, Any], None]
"""Told the name and the new value of what has changed, in this process or elsewhere."""


class _Kept(msgspec.Struct, frozen=True):
    """A value, the number of its change, and by which process."""

    number: int
    process: str
    value: Any

    @property
    def stamp(self) -> tuple[int, str]:
        return self.number, self.process


class Registers:
    """The values by name. Without `ask` there is no other process; with it every value must be plain data."""

    def __init__(self, process: str = "", ask: Ask | None = None) -> None:
        self._process = process
        self._ask = ask
        self._kept: dict[str, _Kept] = {}
        self._changed: dict[str, Changed] = {}

    @property
    def alone(self) -> bool:
        """Whether there can be no other process."""
        return self._ask is None

    def on(self, word: str, changed: Changed) -> None:
        """Have `changed` called for the name `word` and those that begin with it and a colon."""
        self._changed[word] = changed

    def get(self, name: str) -> Any:
        """The value of a name as far as it is known here; None if it was never changed."""
        kept = self._kept.get(name)
        return None if kept is None else kept.value

    async def set(self, name: str, value: Any) -> None:
        """Change a value in every process. Raises `GatewayError`, and changes nothing here, when nobody can be told."""
        number = 1 + max((kept.number for kept in self._kept.values()), default=0)
        news = {name: _Kept(number, self._process, value)}
        await self._exchange(self._kept | news)
        self._merge(news)

    async def refresh(self) -> None:
        """Learn what others know. Raises `GatewayError` when nobody can be asked."""
        await self._exchange(self._kept)

    def answer(self, told: str) -> bytes:
        """Answer to the question `settings:<what the other knows>` with what is known now."""
        self._merge(_decode(told.encode()))
        return msgspec.json.encode(self._kept)

    async def _exchange(self, told: Mapping[str, _Kept]) -> None:
        if self._ask is None:
            return
        for answer in await self._ask(f"{QUESTION}:{msgspec.json.encode(told).decode()}"):
            self._merge(_decode(answer))

    def _merge(self, others: Mapping[str, _Kept]) -> None:
        for name, kept in others.items():
            own = self._kept.get(name)
            if own is not None and own.stamp >= kept.stamp:
                continue
            self._kept[name] = kept
            changed = self._changed.get(name.partition(":")[0])
            if changed is not None:
                changed(name, kept.value)
            if kept.value is None and self.alone:
                del self._kept[name]  # clients choose names, and nobody else is to learn that it is gone


def _decode(text: bytes) -> dict[str, _Kept]:
    """What a process said; nothing, if it is of a version that speaks otherwise."""
    try:
        return msgspec.json.decode(text, type=dict[str, _Kept])
    except msgspec.DecodeError:
        return {}

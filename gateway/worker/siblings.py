"""What the instances of one version share: the requests that crash them, and which of them can work.

An instance whose engine is not there leaves its work to the others until it tries again. The last one stays: somebody
must tell the callers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Generic, TypeVar

from gateway.worker.quarantine import Quarantine

T = TypeVar("T")


class Siblings(Generic[T]):
    """`changed` is told who works, whenever that is not who did before."""

    def __init__(self, changed: Callable[[Collection[T]], None] = lambda _: None) -> None:
        self.quarantine = Quarantine()
        self._changed = changed
        self._working: list[T] = []

    def join(self, instance: T) -> None:
        """A new instance, which works, and whose coming is no change."""
        self._working.append(instance)

    def leave(self, instance: T) -> bool:
        """It cannot work. False if it is the only one that is left, and stays."""
        if instance not in self._working:
            return True
        if len(self._working) == 1:
            return False
        self._working.remove(instance)
        self._changed(self._working)
        return True

    def enter(self, instance: T) -> None:
        """It tries again."""
        if instance not in self._working:
            self._working.append(instance)
            self._changed(self._working)

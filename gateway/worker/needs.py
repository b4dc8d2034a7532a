"""Which models the ensembles of a worker need, and whether any of them needs itself. Pure state."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gateway.config.model import ModelConfig
from gateway.errors import InvalidArgument


class Needs:
    """The models of the steps of each ensemble that was read, by name."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[str, ...]] = {}

    def note(self, config: ModelConfig) -> tuple[str, ...]:
        """Remember what a model needs; for most that is nothing."""
        self._of.pop(config.name, None)
        if config.steps:
            self._of[config.name] = tuple(dict.fromkeys(step.model for step in config.steps))
        return self.of(config.name)

    def forget(self, model: str) -> None:
        """The model is unloaded."""
        self._of.pop(model, None)

    def of(self, model: str) -> tuple[str, ...]:
        """What it needs directly."""
        return self._of.get(model, ())

    def users(self, model: str) -> Iterator[str]:
        """The ensembles that need it directly."""
        return (name for name, needs in list(self._of.items()) if model in needs)

    def refuse_cycle(self, model: str, follow: Callable[[str], bool] = lambda _: True) -> None:
        """Raise `InvalidArgument` with the way on which the model needs itself, by models that `follow` says yes to."""
        if found := self._way(model, model, follow, set()):
            raise InvalidArgument(f"circular dependency between ensembles: {' -> '.join((model, *found))}")

    def _way(self, start: str, end: str, follow: Callable[[str], bool], seen: set[str]) -> list[str]:
        for need in self.of(start):
            if need == end:
                return [need]
            if need not in seen and follow(need):
                seen.add(need)
                if rest := self._way(need, end, follow, seen):
                    return [need, *rest]
        return []

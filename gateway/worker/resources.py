"""Triton's rate limiter: what instances must have to run, how much of it there is, and whose turn it is. Pure state.

The rules are those of Triton's core: of a resource there is as much as the instance with the largest need asks for, or what
the operator says, for each device or, where its configuration says `global`, once; a turn costs an instance its priority, and
whoever has paid least is next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeAlias

from gateway.config.model import RateLimiter
from gateway.config.rate_limit import ResourceCounts
from gateway.errors import InvalidArgument

Key: TypeAlias = tuple[str, int | None]
"""A resource of one device, by its number, or of all of them."""


@dataclass(eq=False, slots=True)
class Claim:
    """What one instance needs while it runs, and what it has paid for its turns."""

    needs: Mapping[Key, int]
    priority: int
    paid: int = 0


def claim(limiter: RateLimiter | None, device: str) -> Claim:
    """What an instance on a device asks for; as in Triton a CPU is device 0."""
    if limiter is None:
        return Claim({}, 1)
    number = int(device.partition(":")[2] or 0)
    return Claim(
        {(each.name, None if each.everywhere else number): each.count for each in limiter.resources}, limiter.priority
    )


_paid = attrgetter("paid")


class Resources:
    """What there is, who may claim it and who has it. `given` are the counts of the operator."""

    def __init__(self, given: ResourceCounts) -> None:
        self._given = given
        self._claims: dict[Hashable, Sequence[Claim]] = {}
        self._counts: Mapping[Key, int] = {}
        self._taken: Counter[Key] = Counter()

    def open(self, owner: Hashable, claims: Sequence[Claim]) -> None:
        """These instances are there from now on. Raises `InvalidArgument`, in Triton's words, if one could never run."""
        before = self._counts
        others = [claim for each in self._claims.values() for claim in each]
        for claim in claims:
            # Level with the one that had least: a new instance has not been waiting all the time.
            rivals = [other.paid for other in others if other.needs.keys() & claim.needs.keys()]
            claim.paid = min(rivals, default=0)
        self._claims[owner] = claims
        try:
            self._counts = self._counted()
        except InvalidArgument:
            del self._claims[owner]
            self._counts = before
            raise

    def close(self, owner: Hashable) -> None:
        """They are gone; what they still have they give back."""
        if self._claims.pop(owner, None) is not None:
            self._counts = self._counted()

    def take(self, claim: Claim) -> None:
        """An instance runs."""
        claim.paid += claim.priority
        self._taken.update(claim.needs)

    def give_back(self, claim: Claim) -> None:
        """Its run is over."""
        self._taken.subtract(claim.needs)

    def in_turn(self, waiting: Iterable[Sequence[Claim]]) -> list[Claim]:
        """Who may run now, all at once: at most one of each group, none of which is empty.

        What one waits for in vain is kept for it: those behind may not have it, or many small needs would starve a large.
        """
        left = {key: count - self._taken[key] for key, count in self._counts.items()}
        chosen = []
        for group in sorted((sorted(group, key=_paid) for group in waiting), key=lambda group: group[0].paid):
            found = next((claim for claim in group if all(left[key] >= n for key, n in claim.needs.items())), None)
            if found is not None:
                chosen.append(found)
                for key, count in found.needs.items():
                    left[key] -= count
            else:
                left.update(dict.fromkeys(group[0].needs, 0))
        return chosen

    def _counted(self) -> dict[Key, int]:
        needed: dict[Key, int] = {}
        for claims in self._claims.values():
            for claim in claims:
                for key, count in claim.needs.items():
                    needed[key] = max(count, needed.get(key, 0))
        counts = {key: self._count(key, count) for key, count in needed.items()}
        for name in {name for name, device in counts if device is None} & {
            name for name, device in counts if device is not None
        }:
            raise InvalidArgument(
                f'Resource "{name}" is present as both global and device-specific resource in the model configuration.'
            )
        return counts

    def _count(self, key: Key, needed: int) -> int:
        if not self._given:
            return needed
        name, device = key
        # As in Triton a resource that the operator leaves out is none, once any is given.
        counts = [count for (each, on), count in self._given.items() if each == name and device in (on, None)]
        counts += [self._given.get((name, None), 0)]
        if max(counts) < needed:
            raise InvalidArgument(
                f'Resource count for "{name}" is limited to {max(counts)} which will prevent scheduling of one or more model '
                f"instances, the minimum required count is {needed}"
            )
        return max(counts)

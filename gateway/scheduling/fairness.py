"""Fairness between the tenants of one lane: whose rows fill a batch."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar


class Owned(Protocol):
    """What is shared out: rows that belong to a tenant."""

    rows: int
    tenant: str


O = TypeVar("O", bound=Owned)  # noqa: E741 - a type


class Turns:
    """Deficit round robin (Shreedhar and Varghese, 1995) with a quantum of one row, kept from batch to batch."""

    def __init__(self) -> None:
        self._ahead: dict[str, int] = {}  # rows a tenant got beyond the one that got least

    def order(self, waiting: Iterable[O]) -> Iterator[O]:
        """The head of the line, and then each tenant's next by turns; within a tenant the order is kept."""
        lines: dict[str, deque[O]] = {}
        head = None
        for each in waiting:
            if head is None:
                head = each
                yield head
            else:
                lines.setdefault(each.tenant, deque()).append(each)
        if head is None:
            return
        turns = [
            (self._ahead.get(tenant, 0) + (head.rows if tenant == head.tenant else 0), number, tenant)
            for number, tenant in enumerate(lines)
        ]
        heapq.heapify(turns)
        while turns:
            ahead, number, tenant = turns[0]
            line = lines[tenant]
            each = line.popleft()
            yield each
            if line:
                heapq.heapreplace(turns, (ahead + each.rows, number, tenant))
            else:
                heapq.heappop(turns)

    def charge(self, taken: Iterable[Owned], active: Iterable[str]) -> None:
        """These were taken. Who is not `active` any more is forgotten, so that nobody saves up turns."""
        for each in taken:
            self._ahead[each.tenant] = self._ahead.get(each.tenant, 0) + each.rows
        ahead = {tenant: self._ahead.get(tenant, 0) for tenant in active}
        least = min(ahead.values(), default=0)
        self._ahead = {tenant: rows - least for tenant, rows in ahead.items()}

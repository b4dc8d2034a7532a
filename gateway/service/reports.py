"""Where the figures of `Service.explain` come from: the statistics, and in a fleet each worker's own report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec

from gateway.errors import GatewayError
from gateway.queues.base import InstanceState, PoolState
from gateway.statistics import VersionStatistics

QUESTION = "explain"


class Reports(Protocol):
    """What each worker says of a version, with its name as `worker`."""

    async def __call__(self, model: str, version: str) -> Sequence[Mapping[str, Any]]:
        """Ask them."""


class WorkerReports:
    """`Reports` by asking every other process, and this one by `own` if it is a worker too.

    `ask` puts the question `explain:<model>:<version>`, which `Worker.explain` answers from what follows the first colon.
    """

    def __init__(
        self, ask: Callable[[str], Awaitable[Sequence[bytes]]], own: Callable[[str], bytes] | None = None
    ) -> None:
        self._ask = ask
        self._own = own

    async def __call__(self, model: str, version: str) -> Sequence[Mapping[str, Any]]:
        """See `Reports`. Whoever does not answer, or not in words known here, is left out."""
        target = f"{model}:{version}"
        answers: list[bytes] = []
        if self._own is not None:
            with suppress(GatewayError, KeyError):  # it does not hold the version
                answers.append(self._own(target))
        with suppress(GatewayError):  # nobody can be asked
            answers += await self._ask(f"{QUESTION}:{target}")
        reports = []
        for answer in answers:
            with suppress(msgspec.DecodeError):
                reports.append(msgspec.json.decode(answer, type=dict[str, Any]))
        return reports


def running(instances: Iterable[InstanceState]) -> list[dict[str, Any]]:
    """What instances run on and from what, each different answer once with how many there are of it."""
    return [
        {
            "device": each.device,
            "provider": each.provider,
            "precision": each.precision,
            "artefact": each.artefact,
            **({"link": each.link} if each.link else {}),
            **({"reason": each.reason} if each.reason else {}),
            "count": number,
        }
        for each, number in Counter(instances).items()
    ]


def degraded(pools: Iterable[PoolState]) -> list[dict[str, Any]]:
    """The versions whose instances do not all run on the best of their chains, and those instances."""
    return [
        {"model": pool.model, "version": state.version, "instances": instances}
        for pool in pools
        for state in pool.versions
        if (instances := running(each for each in state.instances if each.reason))
    ]


def count(of: VersionStatistics) -> dict[str, Any]:
    """What the statistics have to say: of requests, and of the batches that ran."""
    batches = of.execution_count
    return {
        "answered": of.success_count,
        "refused": dict(of.refused),
        "admitted": of.admitted,
        "late": of.late,
        "late_share": round(of.late / of.admitted, 6) if of.admitted else 0.0,
        "batches": batches,
        "mean_rows": round(of.row_sizes.total / batches, 3) if batches else 0.0,
        "closed": dict(of.closed),
    }

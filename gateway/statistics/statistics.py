"""`Statistics`: the counters of every model version, of this process or added up over many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from gateway.statistics.counters import VersionStatistics
from gateway.statistics.snapshot import Snapshot, VersionSnapshot, pack, restore, sum_up, take, unpack


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Statistics:
    """The statistics of every model version that was asked for.

    `now_ms` is the wall clock in milliseconds since 1970, for `last_inference` and for epochs that nobody gives.
    `totals` counts by name what belongs to no model; `skipped` is how many snapshots are missing in a sum, because
    they are of another version of the code. What is in `refreshers` is called before anybody reads.
    """

    def __init__(self, now_ms: Callable[[], int] = _wall_clock_ms) -> None:
        self._now_ms = now_ms
        self._versions: dict[tuple[str, str], VersionStatistics] = {}
        self._epochs: dict[tuple[str, str], int] = {}  # when a version was unloaded last
        self.totals: dict[str, int] = {}
        self.refreshers: list[Callable[[], None]] = []
        self.skipped = 0

    def of(self, model: str, version: str, epoch: int = 0) -> VersionStatistics:
        """The counters of one version, all zero when it is new. Keep the object on a hot path.

        They are new, too, when the version was unloaded at an `epoch` that this process has not heard of.
        """
        key = model, version
        if epoch > self._epochs.get(key, 0):
            self.forget(model, version, epoch)
        statistics = self._versions.get(key)
        if statistics is None:
            statistics = self._versions[key] = VersionStatistics(model, version, self._now_ms, self.epoch(*key))
        return statistics

    def epoch(self, model: str, version: str) -> int:
        """When the version was unloaded last, in milliseconds since 1970; 0 for never."""
        return self._epochs.get((model, version), 0)

    def forget(self, model: str, version: str, epoch: int | None = None) -> None:
        """Drop the counters of an unloaded version, so that a later load starts from zero.

        All processes of a fleet give the same `epoch`, that of the command: a sum leaves out what is of an older one.
        """
        self._versions.pop((model, version), None)
        self._epochs[model, version] = max(self._now_ms() if epoch is None else epoch, self.epoch(model, version))

    def catch_up(self, others: Statistics) -> None:
        """Forget each version that these have forgotten later."""
        for (model, version), epoch in others._epochs.items():
            if epoch > self.epoch(model, version):
                self.forget(model, version, epoch)

    def __iter__(self) -> Iterator[VersionStatistics]:
        """Every version's live counters, by model name and then version number."""
        return iter(sorted(self._versions.values(), key=lambda each: (each.model, int(each.version))))

    async def whole(self) -> Statistics:
        """These: in one process they are those of the whole fleet."""
        self._refresh()
        return self

    def _refresh(self) -> None:
        for refresh in self.refreshers:
            refresh()

    # --- over processes

    def snapshot(self) -> bytes:
        """All counters as they are now, for `merge` in any process; see `gateway.statistics.snapshot`."""
        self._refresh()
        unloaded = self._epochs.keys() - self._versions.keys()
        return pack(
            self.totals,
            [
                *map(take, self._versions.values()),
                *(VersionSnapshot(*key, self._epochs[key], False) for key in unloaded),
            ],
        )

    @classmethod
    def merge(cls, snapshots: Iterable[bytes], past: Iterable[bytes] = ()) -> Statistics:
        """The sums over snapshots of live processes and `past` ones of dead processes, which hold no request any more.

        What was counted before a version was unloaded is in no sum, whoever counted it.
        """
        merged = cls()
        total = sum_up(chain(merged._readable(snapshots), map(_settled, merged._readable(past))))
        merged.totals.update(total.totals)
        for each in total.versions:
            merged._epochs[each.model, each.version] = each.epoch
            if each.loaded:  # somewhere
                merged._versions[each.model, each.version] = restore(each, merged._now_ms)
        return merged

    def _readable(self, snapshots: Iterable[bytes]) -> Iterator[Snapshot]:
        for data in snapshots:
            found = unpack(data)
            if found is None:
                self.skipped += 1
            else:
                yield found


def _settled(of: Snapshot) -> Snapshot:
    """Without the gauges."""
    for each in of.versions:
        each.pending = each.executing = 0
        each.predictions = None
    return of

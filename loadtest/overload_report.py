"""The overload test's table for people, and its bars."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loadtest.overload_cells import Cell
from loadtest.overload_figures import SETTLING, SlowDown

POINTS, REFUSAL_MS, LATE, STORM, BACK_SECONDS, LAG_MS = 5.0, 10.0, 1.0, 95.0, 2.0, 5.0
_HEAD = (
    "scenario", "load", "in time %", "simulated", "points", "in time/s", "p99 ms", "late %", "server's %", "shed %", "refused p99 ms", "batch",
    "simulated", "busy %", "server us", "client us", "lag p99 ms", "no connection", "other cores", "answers",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that was wanted, and the one that was measured."""

    name: str
    wanted: str
    measured: str
    passed: bool


def median(cells: Iterable[Cell], figure: Callable[[Cell], float]) -> float:
    """The median over rounds of what is a number; NaN of nothing."""
    values = [value for value in map(figure, cells) if math.isfinite(value)]
    return statistics.median(values) if values else math.nan


def by_scenario(cells: Sequence[Cell]) -> dict[tuple[str, float], list[Cell]]:
    """The rounds of each scenario and load."""
    found: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.spec.name, cell.spec.load), []).append(cell)
    return found


def table(cells: Sequence[Cell]) -> str:
    """One line for each scenario and load: medians over the rounds, in brackets the range."""
    lines = [_HEAD, *(_line(name, load, rounds) for (name, load), rounds in by_scenario(cells).items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def points(cell: Cell) -> float:
    """The real goodput less the simulated one."""
    return 100 * (cell.real.goodput - cell.simulated.goodput)


def _line(name: str, load: float, rounds: Sequence[Cell]) -> tuple[str, ...]:
    def of(figure: Callable[[Cell], float], digits: int = 1, *, ranged: bool = False) -> str:
        values = [value for value in map(figure, rounds) if math.isfinite(value)]
        text = f"{median(rounds, figure):.{digits}f}" if values else "-"
        return f"{text} ({min(values):.{digits}f}-{max(values):.{digits}f})" if ranged and len(values) > 1 else text

    first = rounds[len(rounds) // 2].real
    return (
        name, f"{load:g}", of(lambda cell: 100 * cell.real.goodput, ranged=True), of(lambda cell: 100 * cell.simulated.goodput),
        of(points), of(lambda cell: cell.real.per_second, 0), of(lambda cell: cell.real.p99_ms, 0),
        of(lambda cell: 100 * cell.real.late, 2), of(lambda cell: 100 * cell.server_late, 2), of(lambda cell: 100 * cell.real.shed, 2),
        of(lambda cell: cell.real.refusal_p99_ms, ranged=True), of(lambda cell: cell.mean_batch),
        of(lambda cell: cell.simulated_mean_batch), of(lambda cell: 100 * cell.busy), of(lambda cell: cell.server_us, 0),
        of(lambda cell: cell.client_us, 0), of(lambda cell: cell.real.lag_p99_ms), of(lambda cell: cell.waited, 0), of(lambda cell: cell.other_cores, 2),
        as_counts(first.statuses),
    )  # fmt: skip


def as_counts(counts: Mapping[str, int]) -> str:
    """`429: 3, 504: 1`."""
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def slow_down_text(cells: Sequence[Cell]) -> str:
    """What became of the requests when the device slowed down, one line for each round; empty without such."""
    lines = []
    for cell in cells:
        for where, found in (("real", cell.slow), ("simulated", cell.simulated_slow)):
            if found is not None:
                lines.append(f"slow-down, seed {cell.seed}, {where}: {_told(found)}")
    return "\n".join(lines)


def _told(found: SlowDown) -> str:
    first, settled = found.first_batches, found.settled
    return (
        f"{found.batches} slow batches; of {first.accepted} accepted during the first {SETTLING} ({found.settled_after:.1f} s) "
        f"{100 * first.late:.1f} % late, of {settled.accepted} accepted after {100 * settled.late:.1f} %; "
        f"in time before {100 * found.before.goodput:.1f} %, recovered after {found.recovered_after:.2f} s, "
        f"from then to the end {100 * found.after.goodput:.1f} %"
    )


def bars(cells: Sequence[Cell]) -> list[Bar]:
    """What issue 3 wants of the real processes. Medians over the rounds."""
    found: list[Bar] = []
    groups = by_scenario(cells)
    for (name, load), rounds in groups.items():
        if rounds[0].slow is not None:
            found += _slow_bars(rounds)
            continue
        where = f"{name} at {load:g}"
        gap = median(rounds, points)
        if name == "poisson":
            found.append(
                Bar(f"{where}: points to the simulation", f"within {POINTS:g}", f"{gap:+.1f}", abs(gap) <= POINTS)
            )
        else:
            found.append(_storm_bar(where, rounds, groups.get(("poisson", load), [])))
        if load > 1:
            found.append(
                _below(f"{where}: p99 of refusals, ms", median(rounds, lambda c: c.real.refusal_p99_ms), REFUSAL_MS)
            )
        found.append(_below(f"{where}: accepted and late, %", median(rounds, lambda c: 100 * c.real.late), LATE))
    return [*found, *_sanity(cells)]


def _below(name: str, value: float, most: float) -> Bar:
    return Bar(name, f"< {most:g}", f"{value:.2f}", value < most)


def _storm_bar(where: str, rounds: Sequence[Cell], calm: Sequence[Cell]) -> Bar:
    plain = median(calm, lambda cell: cell.real.per_second)
    share = 100 * median(rounds, lambda cell: cell.real.per_second) / plain if calm else math.nan
    return Bar(f"{where}: % of the goodput without retries", f">= {STORM:g}", f"{share:.1f}", share >= STORM)


def _slow_bars(rounds: Sequence[Cell]) -> list[Bar]:
    late = median(rounds, lambda cell: 100 * cell.slow.settled.late if cell.slow else math.nan)
    back = median(rounds, lambda cell: cell.slow.recovered_after if cell.slow else math.nan)
    return [
        _below(f"slow-down: accepted after {SETTLING} batches and late, %", late, LATE),
        Bar("slow-down: seconds until goodput is back", f"<= {BACK_SECONDS:g}", f"{back:.2f}", back <= BACK_SECONDS),
    ]


def _sanity(cells: Sequence[Cell]) -> list[Bar]:
    """What must hold in every round for the figures to mean anything."""
    broken = sum(cell.real.broken + cell.strays for cell in cells)
    silent = sum(cell.real.without_retry_after for cell in cells)
    apart = sum(len(cell.disagreements) for cell in cells)
    lag = max((cell.real.lag_p99_ms for cell in cells), default=0.0)
    return [
        Bar("answers wrong, missing or not asked for", "0", str(broken), broken == 0),
        Bar("answers with 429 and no Retry-After", "0", str(silent), silent == 0),
        Bar("outcomes that server and client counted apart", "0", str(apart), apart == 0),
        Bar("the generator sent on time: worst p99 of its lag, ms", f"< {LAG_MS:g}", f"{lag:.1f}", lag < LAG_MS),
    ]


def bars_text(found: Sequence[Bar]) -> str:
    """One line for each bar."""
    width = max(len(bar.name) for bar in found)
    return "\n".join(
        f"{'pass' if bar.passed else 'FAIL'}  {bar.name.ljust(width)}  {bar.measured}, wanted {bar.wanted}"
        for bar in found
    )

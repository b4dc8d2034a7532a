"""Results for people: a table of fixed width, and a plot of goodput against load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gateway import errors
from gateway.scheduling.simulator.trials import Trials

_HEAD = (
    "workload", "load", "policy", "in time %", "range", "goodput/s", "worst %", "p50 ms", "p99 ms", "late %", "shed %",
    "no: p99 ms", "batch", "busy %", "/bound", "/best", "refused %",
)  # fmt: skip
_WORDS = 3  # the first columns, and the last, are aligned left

NOTES = """\
in time: calls answered by their deadline, of all offered, median and range over seeds. goodput: those per second. worst: of the models (of the others beside a hot one).
p50, p99: of the answered. late, shed: of the accepted. no: from sending to the refusal. batch: rows. /bound: in time against a fluid
oracle. /best: against the best queue timeout of a grid, searched for this workload and load. refused: of all attempts, by reason."""


def table(results: Sequence[Trials]) -> str:
    """One line for each policy, workload and load, with a blank line between workloads."""
    rows = [_HEAD, *map(_row, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines: list[str] = []
    for index, row in enumerate(rows):
        if index > 1 and (row[0], row[1]) != (rows[index - 1][0], rows[index - 1][1]):
            lines.append("")
        cells = [
            cell.ljust(width) if column < _WORDS or column == len(_HEAD) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(result: Trials) -> tuple[str, ...]:
    share = result.spread(lambda each: each.in_time)
    of_best = result.of_best
    return (
        result.workload,
        f"{result.load:g}",
        result.policy,
        _percent(share.median),
        f"{_percent(share.low)}-{_percent(share.high)}",
        f"{result.spread(lambda each: each.goodput).median:.0f}",
        _percent(result.spread(lambda each: each.worst_model).median),
        _milliseconds(result.spread(lambda each: each.p50).median),
        _milliseconds(result.spread(lambda each: each.p99).median),
        _percent(result.spread(lambda each: each.late).median),
        _percent(result.spread(lambda each: each.shed).median),
        _milliseconds(result.spread(lambda each: each.refusal_p99).median),
        f"{result.spread(lambda each: each.mean_batch).median:.1f}",
        _percent(result.spread(lambda each: each.busy).median),
        f"{result.of_bound:.3f}",
        "-" if of_best is None else f"{of_best:.3f}",
        _reasons(result),
    )


def _reasons(result: Trials) -> str:
    total: Counter[str] = Counter()
    for each in result.measures:
        total.update(each.refused)
    attempts = sum(each.attempts for each in result.measures)
    return ", ".join(f"{reason} {_percent(count / attempts)}" for reason, count in total.most_common())


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def plot(results: Sequence[Trials], file: Path) -> None:
    """Write a PNG: goodput against load, a panel for each workload and a line for each policy, and the fluid bound.

    Raises `Unsupported` when matplotlib is not installed, `OSError` when the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise errors.Unsupported(
            "a plot needs matplotlib, which is not installed: pip install 'lockgate[simulate]'"
        ) from missing
    names = list(dict.fromkeys(result.workload for result in results))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5.5 * columns, 4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, name in zip(panels, names, strict=False):
        _draw(panel, name, [result for result in results if result.workload == name])
    for panel in list(panels)[len(names) :]:
        panel.set_axis_off()
    figure.savefig(file, format="png", dpi=120)


def _draw(panel: Any, name: str, results: Sequence[Trials]) -> None:
    policies = dict.fromkeys(result.policy.split(" ")[0] for result in results)
    for policy in policies:
        own = sorted((each for each in results if each.policy.split(" ")[0] == policy), key=lambda each: each.load)
        spreads = [each.spread(lambda each: each.goodput) for each in own]
        loads = [each.load for each in own]
        panel.plot(loads, [spread.median for spread in spreads], marker="o", markersize=3, label=policy)
        panel.fill_between(loads, [each.low for each in spreads], [each.high for each in spreads], alpha=0.15)
    first = next(iter(policies))
    bound = {
        each.load: median(
            share * measures.offered / measures.seconds
            for share, measures in zip(each.bounds, each.measures, strict=True)
        )
        for each in results
        if each.policy.split(" ")[0] == first
    }
    loads = sorted(bound)
    panel.plot(loads, [bound[load] for load in loads], color="black", linestyle="--", label="fluid bound")
    panel.set(title=name, xlabel="load, times capacity", ylabel="answered in time per second", ylim=(0, None))
    panel.legend(fontsize="x-small")

"""From results to judgement: medians, ratios, the bars and whether they are met; a table for people, JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loadtest.bench.runner import Result, as_json
from loadtest.bench.statistics import Spread, paired_ratio, spread

Rows = Sequence[Result]


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise: the median of a figure at a number of connections, against a limit."""

    name: str
    model: str
    system: str
    connections: int
    figure: str  # rps, p50_us or cpu_us
    against: str  # the system it is divided by, or "" for the figure itself
    limit: float
    at_least: bool


BARS = (
    Bar("add_sub HTTP binary, requests/s against (a)", "add_sub", "binary", 32, "rps", "fastapi", 4.0, at_least=True),
    Bar("add_sub HTTP binary, CPU us per request", "add_sub", "binary", 32, "cpu_us", "", 80.0, at_least=False),
    Bar("add_sub gRPC, CPU us per request", "add_sub", "grpc", 32, "cpu_us", "", 110.0, at_least=False),
    *(
        Bar(f"image classifier {name}, against (b)", "efficientnet_lite0", name, 32, "rps", "ort", low, at_least=True)
        for name, low in (("binary", 0.93), ("grpc", 0.93), ("json", 0.70))
    ),
    Bar(
        "image classifier binary, p50 of one connection against (b) on both cores",
        "efficientnet_lite0", "binary", 1, "p50_us", "ort", 1.15, at_least=False,
    ),
)  # fmt: skip


FIGURES = (
    "rps", "p50_us", "p99_us", "cpu_us", "kilo_instructions", "calibration_ms", "calibration_cpu_ms", "client_cores",
    "other_cores",
)  # fmt: skip


def values(rows: Rows, model: str, connections: int, system: str, figure: str) -> dict[int, float]:
    """A figure by pair; failed cells have none."""
    return {
        row.pair: float(getattr(row, figure))
        for row in rows
        if (row.model, row.connections, row.system) == (model, connections, system) and row.seconds > 0
    }


def measured(rows: Rows, bar: Bar) -> Spread | None:
    """The figure that a bar is about, as the median over pairs."""
    ours = values(rows, bar.model, bar.connections, bar.system, bar.figure)
    if not bar.against:
        return spread(list(ours.values()))
    return paired_ratio(ours, values(rows, bar.model, bar.connections, bar.against, bar.figure))


def judge(rows: Rows) -> list[dict[str, object]]:
    """Every bar with what was measured: pass, FAIL, or not measured."""
    judged: list[dict[str, object]] = []
    for bar in BARS:
        found = measured(rows, bar)
        verdict = "not measured"
        if found is not None:
            verdict = "pass" if (found.median >= bar.limit) == bar.at_least or found.median == bar.limit else "FAIL"
        judged.append({"bar": asdict(bar), "found": asdict(found) if found else None, "verdict": verdict})
    errors = sum(row.errors for row in rows)
    judged.append({"bar": {"name": "errors in all runs", "limit": 0}, "found": errors, "verdict": _none(errors)})
    return judged


def _none(errors: int) -> str:
    return "FAIL" if errors else "pass"


def _unique(items: Iterable[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    return list(dict.fromkeys(items))


def summary(rows: Rows) -> list[dict[str, object]]:
    """One line per model, connections and system: medians with their ranges, and the ratios to both baselines."""
    lines: list[dict[str, object]] = []
    for model, connections, system in _unique((row.model, row.connections, row.system) for row in rows):
        mine = [row for row in rows if (row.model, row.connections, row.system) == (model, connections, system)]
        line: dict[str, object] = {"model": model, "connections": connections, "system": system}
        for figure in FIGURES:
            line[figure] = spread(list(values(rows, model, connections, system, figure).values()))
        rps = values(rows, model, connections, system, "rps")
        for name, baseline in (("vs_a", "fastapi"), ("vs_b", "ort")):
            line[name] = paired_ratio(rps, values(rows, model, connections, baseline, "rps"))
        cpu = values(rows, model, connections, system, "cpu_us")
        line["instructions_vs_a"] = paired_ratio(
            values(rows, model, connections, system, "kilo_instructions"),
            values(rows, model, connections, "fastapi", "kilo_instructions"),
        )
        line["cpu_vs_a"] = paired_ratio(cpu, values(rows, model, connections, "fastapi", "cpu_us"))
        line["errors"] = sum(row.errors for row in mine)
        line["notes"] = sorted({row.note for row in mine if row.note})
        lines.append(line)
    return lines


def _cell(found: object, scale: float = 1.0, digits: int = 0) -> str:
    if not isinstance(found, Spread):
        return "-"
    return f"{found.median / scale:.{digits}f}"


def _ratio(found: object) -> str:
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})" if isinstance(found, Spread) else "-"


COLUMNS: tuple[tuple[str, Callable[[dict[str, object]], str]], ...] = (
    ("model", lambda line: str(line["model"])),
    ("conns", lambda line: str(line["connections"])),
    ("system", lambda line: str(line["system"])),
    ("req/s", lambda line: _cell(line["rps"])),
    ("p50 ms", lambda line: _cell(line["p50_us"], 1e3, 2)),
    ("p99 ms", lambda line: _cell(line["p99_us"], 1e3, 2)),
    ("CPU us/req", lambda line: _cell(line["cpu_us"])),
    ("errors", lambda line: str(line["errors"])),
    ("req/s vs (a)", lambda line: _ratio(line["vs_a"])),
    ("req/s vs (b)", lambda line: _ratio(line["vs_b"])),
    ("CPU vs (a)", lambda line: _ratio(line["cpu_vs_a"])),
    ("k instr/req", lambda line: _cell(line["kilo_instructions"])),
    ("calib ms", lambda line: f"{_cell(line['calibration_ms'])}/{_cell(line['calibration_cpu_ms'])}"),
    ("client cores", lambda line: _cell(line["client_cores"], digits=2)),
    ("other cores", lambda line: _cell(line["other_cores"], digits=2)),
)


def table(rows: Rows) -> str:
    """The summary as a Markdown table, sorted for reading."""
    lines = sorted(summary(rows), key=lambda line: (str(line["model"]), int(str(line["connections"]))))
    cells = [[name for name, _ in COLUMNS], *[[show(line) for _, show in COLUMNS] for line in lines]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def bars(rows: Rows) -> str:
    """The bars, one a line."""
    lines = []
    for entry in judge(rows):
        bar, found = entry["bar"], entry["found"]
        assert isinstance(bar, dict)
        limit = f"{'>=' if bar.get('at_least') else '<='} {bar['limit']:g}"
        figure = f"{found['median']:.3g} ({found['low']:.3g}-{found['high']:.3g})" if isinstance(found, dict) else found
        lines.append(f"{entry['verdict']:12} {bar['name']}: {'-' if figure is None else figure}, wanted {limit}")
    return "\n".join(lines)


def document(rows: Rows, head: dict[str, object]) -> dict[str, object]:
    """The result file."""
    lines = [
        {key: asdict(value) if isinstance(value, Spread) else value for key, value in line.items()}
        for line in summary(rows)
    ]
    return {"kind": "lockgate-bench/1", **head, "bars": judge(rows), "summary": lines, "cells": as_json(list(rows))}


def save(path: Path, rows: Rows, head: dict[str, object]) -> None:
    """Write the result file in one step, so that an interrupted run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document(rows, head), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def load(path: Path) -> list[Result]:
    """The cells of a result file; failed ones are left out, so that they are measured again."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [Result(**cell) for cell in cells if cell["seconds"] > 0]

"""`report.html`: what a build's report says, for people, on one page that needs nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

from gateway import artefacts
from gateway.artefacts import Artefact, Report
from gateway.build import plots
from gateway.build.gate import DEFAULTS
from gateway.build.workshop import Record

# The figure that stands for accuracy in the plot: of the ones there are, the first.
_MAIN = ("accuracy", "top1_agreement", "recall_at_10", "cosine_mean", "mean_error")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } .quiet { color: #666 }
table { border-collapse: collapse; font-size: 14px } th, td { text-align: left; padding: 4px 10px; border-bottom: 1px solid #ddd; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums } .passed { color: #0072b2; font-weight: 600 }
.failed { color: #b34700; font-weight: 600 } .unproven { color: #666; font-weight: 600 } .short { color: #b34700 }
svg { display: block; max-width: 100%; height: auto; margin: 1em 0; font: 13px system-ui, sans-serif } svg .small { font-size: 11px }
svg .axis { stroke: #222 } svg .grid { stroke: #eee } svg .dash { stroke: #b34700; stroke-dasharray: 5 4 }
"""


def page(report: Report, number: int, record: Record) -> str:
    """The page as text."""
    built = datetime.fromtimestamp(report.built, UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"{report.model}, version {report.version}, build {number}"
    basis = f"Built {built} on {report.device}. Judged as {record.kind}. "
    samples = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.samples.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(basis)}Rows: {escape(samples)}; {escape('; '.join(record.notes))}.</p>",
        "<h2>Verdicts</h2>",
        _verdicts(report.artefacts),
        "<h2>Accuracy against speed</h2>",
        _scatter(report.artefacts),
        "<h2>Latency per batch</h2>",
        _latency(report.artefacts),
        "<h2>Figures and thresholds</h2>",
        _figures(report.artefacts),
        "<h2>Error of the worst layers</h2>",
        '<p class="quiet">RMS of the difference over RMS of FP32\'s values, with quantization simulated in floating point.</p>',
        *_layers(report.artefacts, record),
        "<h2>Not made</h2>",
        _table(("recipe", "why"), ([escape(name), escape(why)] for name, why in record.skipped.items())),
        f'<p class="quiet">Made of the file with SHA-256 {report.source_sha256}, by {escape(versions)}.</p>',
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _verdicts(found: Sequence[Artefact]) -> str:
    return _table(
        ("artefact", "precision", "runs by", "device", "size", "speed", "verdict", "why"),
        (
            [
                f"<b>{escape(each.name)}</b>",
                each.precision,
                each.backend,
                escape(each.device or "none here"),
                f"{each.bytes / 1e6:.2f} MB",
                f"x{artefacts.speedup(each):.2f}" if each.speed else "not timed",
                f'<span class="{each.verdict}">{each.verdict}</span>',
                "<br>".join(map(escape, each.reasons)),
            ]
            for each in found
        ),
    )


def _scatter(found: Sequence[Artefact]) -> str:
    timed = [each for each in found if each.speed and each.accuracy]
    main = next((name for name in _MAIN if any(name in each.accuracy for each in timed)), "")
    if not main:
        return "<p>Nothing was timed here.</p>"
    timed = [each for each in timed if main in each.accuracy]
    best = timed[0].accuracy.get(f"reference_{main}", 0.0 if main.endswith("error") else 1.0)
    points = [plots.Point("FP32", 1.0, best, "reference")]
    points += [plots.Point(each.name, artefacts.speedup(each), each.accuracy[main], each.verdict) for each in timed]
    limit = timed[0].thresholds.get(main)
    if main == "accuracy" and "accuracy_loss" in timed[0].thresholds:
        limit = best - timed[0].thresholds["accuracy_loss"]
    return (
        plots.scatter(
            points,
            plots.Axis(
                "times the throughput of FP32 (geometric mean over batch sizes)", timed[0].thresholds.get("speedup")
            ),
            plots.Axis(main.replace("_", " "), limit),
        )
        + '<p class="quiet">Blue passed, orange failed, grey unproven; dashed: what the gate asks for.</p>'
    )


def _latency(found: Sequence[Artefact]) -> str:
    timed = [each for each in found if each.speed]
    if not timed:
        return "<p>Nothing was timed here.</p>"
    sizes = [each.rows for each in timed[0].speed]
    groups = [f"batch {size}" for size in sizes]
    # Each artefact raced FP32 at another time, and the machine may have been slower then: what holds is the ratio.
    base = [
        statistics.median(each.speed[index].reference_seconds for each in timed) / size * 1000
        for index, size in enumerate(sizes)
    ]
    series = {"FP32": base} | {
        artefact.name: [
            ms * each.seconds / each.reference_seconds for ms, each in zip(base, artefact.speed, strict=True)
        ]
        for artefact in timed
    }
    rows = (
        [
            escape(artefact.name),
            *(
                f"{1000 * each.seconds:.4g} ms, FP32 {1000 * each.reference_seconds:.4g} ms "
                f"(x{each.reference_seconds / each.seconds:.2f})"
                for each in artefact.speed
            ),
        ]
        for artefact in timed
    )
    return (
        plots.bars(groups, series, "", "ms a row")
        + _table(("a run of", *groups), rows)
        + '<p class="quiet">The table has the best of runs that alternate with FP32\'s, with the cores that one run has '
        "in a loaded server; in the plot each is scaled by the FP32 of its own turns.</p>"
    )


def _figures(found: Sequence[Artefact]) -> str:
    names = list(dict.fromkeys(name for each in found for name in each.accuracy))
    limits = {name: limit for each in found for name, limit in each.thresholds.items()}
    rows = []
    for name in names:
        cells = [f'<td class="number">{_figure(each, name)}</td>' for each in found]
        meaning = DEFAULTS[name].meaning if name in DEFAULTS else ""
        bound = f"{'&ge;' if DEFAULTS[name].least else '&le;'} {limits[name]:g}" if name in limits else ""
        rows.append(
            f"<tr><td><b>{name}</b><br><span class=quiet>{escape(meaning)}</span></td><td>{bound}</td>{''.join(cells)}</tr>"
        )
    head = "".join(f"<th>{escape(each.name)}</th>" for each in found)
    return f"<table><tr><th>figure</th><th>asked</th>{head}</tr>{''.join(rows)}</table>"


def _figure(artefact: Artefact, name: str) -> str:
    if name not in artefact.accuracy:
        return "-"
    short = any(reason.startswith(f"{name} ") for reason in artefact.reasons)
    text = f"{artefact.accuracy[name]:.4g}"
    return f'<span class="short">{text}</span>' if short else text


def _layers(found: Sequence[Artefact], record: Record) -> list[str]:
    parts = []
    for each in {each.file: each for each in found}.values():
        made = record.made.get(each.file.rpartition("/")[2])
        if made is not None and made.layers:
            parts.append(plots.listed(made.layers, each.name))
    return parts or ["<p>No file shares its layers' names with the model.</p>"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table>" if body else "<p>Nothing.</p>"
    )

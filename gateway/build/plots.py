"""Plots as SVG text, for a page that must need nothing else: points with thresholds, grouped bars, and a list of bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

COLORS = {"passed": "#0072b2", "failed": "#d55e00", "unproven": "#8a8a8a", "reference": "#222222"}
_PALETTE = ("#222222", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8a8a8a")
_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 20, 56


class Point(NamedTuple):
    """One named point; `mark` is a verdict, or `reference`."""

    name: str
    x: float
    y: float
    mark: str


class Axis(NamedTuple):
    """What an axis tells, and the threshold on it, if any."""

    title: str
    threshold: float | None = None


def scatter(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Points with their names, and a dashed line at each threshold."""
    across = _Scale([point.x for point in points], x.threshold, _LEFT, _WIDTH - _RIGHT)
    up = _Scale([point.y for point in points], y.threshold, _HEIGHT - _BOTTOM, _TOP)
    parts = _frame(across, up, x.title, y.title)
    if x.threshold is not None:
        parts.append(_line(across.at(x.threshold), _TOP, across.at(x.threshold), _HEIGHT - _BOTTOM, "dash"))
    if y.threshold is not None:
        parts.append(_line(_LEFT, up.at(y.threshold), _WIDTH - _RIGHT, up.at(y.threshold), "dash"))
    taken: list[tuple[float, float]] = []
    for point in points:
        left, top = across.at(point.x), up.at(point.y)
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="6" fill="{COLORS[point.mark]}"/>')
        # A name that would cover another goes one line lower; one at the right edge goes to the left of its point.
        end = left > 0.75 * _WIDTH
        beside = (left, top + 4)
        while any(abs(beside[0] - x) < 120 and abs(beside[1] - y) < 13 for x, y in taken):
            beside = (beside[0], beside[1] + 14)
        taken.append(beside)
        parts.append(_text(beside[0] + (-10 if end else 10), beside[1], point.name, "end" if end else "start"))
    return _svg(parts, _HEIGHT)


def bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], x: str, y: str) -> str:
    """A group of bars for each of `groups`, one bar a series, from zero."""
    up = _Scale([0.0, *(value for values in series.values() for value in values)], None, _HEIGHT - _BOTTOM, _TOP)
    room = (_WIDTH - _LEFT - _RIGHT) / max(len(groups), 1)
    width = 0.8 * room / max(len(series), 1)
    parts = _frame(None, up, x, y)
    for row, (name, values) in enumerate(series.items()):
        color = _PALETTE[row % len(_PALETTE)]
        for column, value in enumerate(values):
            left, top = _LEFT + column * room + 0.1 * room + row * width, up.at(value)
            tall = _HEIGHT - _BOTTOM - top
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{width * 0.92:.1f}" height="{max(tall, 0):.1f}" '
                f'fill="{color}"><title>{escape(name)}: {value:.4g}</title></rect>'
            )
            parts.append(_text(left + width * 0.46, top - 4, f"{value:.3g}", "middle", "small"))
        parts.append(
            f'<rect x="{_LEFT + row % 4 * 140}" y="{_HEIGHT + row // 4 * 18}" width="11" height="11" fill="{color}"/>'
        )
        parts.append(_text(_LEFT + 16 + row % 4 * 140, _HEIGHT + 10 + row // 4 * 18, name))
    for column, group in enumerate(groups):
        parts.append(_text(_LEFT + (column + 0.5) * room, _HEIGHT - _BOTTOM + 18, group, "middle"))
    return _svg(parts, _HEIGHT + 24 + (len(series) - 1) // 4 * 18)


def listed(values: Sequence[tuple[str, float]], title: str) -> str:
    """A horizontal bar for each named value, as given, from zero."""
    line, name_room = 22, 250
    most = max([value for _, value in values], default=0.0) or 1.0
    parts = [_text(name_room, 14, title)]
    for row, (name, value) in enumerate(values):
        top = 24 + row * line
        long = (_WIDTH - name_room - 90) * value / most
        parts.append(_text(name_room - 8, top + 13, name if len(name) <= 38 else f"...{name[-35:]}", "end", "small"))
        parts.append(
            f'<rect x="{name_room}" y="{top}" width="{long:.1f}" height="{line - 6}" fill="{COLORS["passed"]}"/>'
        )
        parts.append(_text(name_room + long + 6, top + 13, f"{100 * value:.3g} %", "start", "small"))
    return _svg(parts, 30 + len(values) * line)


class _Scale:
    """From values to pixels, with a margin, and round numbers to mark."""

    def __init__(self, values: Sequence[float], threshold: float | None, start: float, end: float) -> None:
        among = [*values, *([] if threshold is None else [threshold])] or [0.0, 1.0]
        least, most = min(among), max(among)
        margin = 0.08 * (most - least) or 0.05 * abs(most) or 1.0
        self._least = least if least == 0 else least - margin
        self._most = most + margin
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        share = (value - self._least) / (self._most - self._least)
        return self._start + share * (self._end - self._start)

    def marks(self) -> list[float]:
        rough = (self._most - self._least) / 5
        power = 10.0 ** (len(f"{int(rough)}") - 1) if rough >= 1 else 10.0 ** -_places(rough)
        step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough)
        first = int(self._least / step)
        return [n * step for n in range(first, first + 12) if self._least <= n * step <= self._most]


def _places(number: float) -> int:
    places = 0
    while number * 10**places < 1:
        places += 1
    return places


def _frame(across: _Scale | None, up: _Scale, x: str, y: str) -> list[str]:
    base = _HEIGHT - _BOTTOM
    parts = [_line(_LEFT, base, _WIDTH - _RIGHT, base, "axis"), _line(_LEFT, _TOP, _LEFT, base, "axis")]
    for mark in up.marks():
        parts.append(_line(_LEFT, up.at(mark), _WIDTH - _RIGHT, up.at(mark), "grid"))
        parts.append(_text(_LEFT - 8, up.at(mark) + 4, f"{mark:.4g}", "end", "small"))
    for mark in across.marks() if across else ():
        parts.append(_line(across.at(mark), _TOP, across.at(mark), base, "grid"))  # type: ignore[union-attr]
        parts.append(_text(across.at(mark), base + 18, f"{mark:.4g}", "middle", "small"))  # type: ignore[union-attr]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14, x, "middle"))
    middle = (_TOP + base) / 2
    parts.append(f'<text transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    return parts


def _line(left: float, top: float, right: float, bottom: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{left:.1f}" y1="{top:.1f}" x2="{right:.1f}" y2="{bottom:.1f}"/>'


def _text(left: float, top: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text class="{kind}" x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: float) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )

"""Tells on standard error how far a build is: a bar on a terminal, else a line for each step."""

from __future__ import annotations

from typing import TextIO

_WIDTH = 24


class Progress:
    """So many files to make, each in steps. `begin` a file, tell each `step`, `tick` within it, `end` it."""

    def __init__(self, stream: TextIO, files: int) -> None:
        self._stream = stream
        self._bar = stream.isatty()
        self._files = files
        self._done = 0
        self._name = self._step = ""

    def begin(self, name: str) -> None:
        """A file is worked on."""
        self._name = name

    def step(self, text: str) -> None:
        """What is done with it now."""
        self._step = text
        if self._bar:
            self._draw(0.0)
        else:
            self._stream.write(f"{self._name}: {text}\n")
            self._stream.flush()

    def tick(self, share: float) -> None:
        """How much of the step is done, 0 to 1."""
        if self._bar:
            self._draw(share)

    def end(self, text: str) -> None:
        """The file is done; `text` is what became of it."""
        self._done += 1
        self._stream.write(f"{self._clear()}{self._name}: {text}\n")
        self._stream.flush()

    def _draw(self, share: float) -> None:
        filled = round(_WIDTH * min((self._done + 0.5 * share) / max(self._files, 1), 1.0))
        bar = "#" * filled + "." * (_WIDTH - filled)
        percent = f" {100 * share:.0f} %" if share else ""
        self._stream.write(f"{self._clear()}[{bar}] {self._done}/{self._files} {self._name}: {self._step}{percent}")
        self._stream.flush()

    def _clear(self) -> str:
        return "\r\x1b[K" if self._bar else ""

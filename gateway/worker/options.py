"""What the application chose for all models of a worker."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.types import Infer


@dataclass(frozen=True, slots=True)
class Options:
    """See the settings of these names, where there are some."""

    load_threads: int = 4  # models loaded side by side
    measures: bool = False  # the batch sizes of each version are timed once it is ready
    persists: bool = False  # what was learned of them is kept in the version's folder
    infer: Infer | None = None  # how models call each other

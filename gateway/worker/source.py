"""What a version of a model is loaded from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gateway.config.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Source:
    """What a version is loaded from; equal fingerprints need no reload."""

    config: ModelConfig
    version: str
    path: Path
    fingerprint: object
    digest: str = ""  # of what all its artefacts are made from, see `Repository`
    leases: list[object] = field(
        default_factory=list, compare=False, repr=False
    )  # keep `path` here while they are held

    def release(self) -> None:
        """Nothing is read from `path` any more."""
        self.leases.clear()  # whoever still refers to this, in cycles too, does not keep it

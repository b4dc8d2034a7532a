"""What a version of a model is loaded from."""

from __future__ import annotations

from dataclasses import dataclass
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
    lease: object = None  # keeps `path` here for as long as anyone holds it

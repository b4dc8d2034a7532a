"""What a version is run from on a device: its model file, or an artefact that the gate passed there.

`artefacts.choose` decides; this asks it for an engine's device and for the precision that the configuration pins
(`parameters { key: "precision" ... }`).
"""

from __future__ import annotations

from dataclasses import replace

from gateway import artefacts
from gateway.engines.base import EngineSpec

_BUILT = ("onnxruntime", "tensorrt")  # the backends that `gateway build` makes files for


def options(spec: EngineSpec) -> list[EngineSpec]:
    """The spec with each file that it may be run from on its device, best first; itself where there is no choice.

    Blocking: hashes files. Raises `Unavailable` when nothing has the precision that is pinned.
    """
    if spec.artefact is not None or spec.config.backend not in _BUILT:
        return [spec]
    chosen = artefacts.choose(
        spec.path,
        artefacts.device_kind(spec.device),
        spec.config.parameters.get("precision", ""),
        model_file=spec.config.default_model_filename or "model.onnx",
        backend=spec.config.backend,
    )
    return [replace(spec, artefact=artefact) for artefact in chosen]

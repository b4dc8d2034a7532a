"""What a version can be run from: the files that `gateway build` made beside its model, and what the gate said of each.

A version folder holds, beside `model.onnx` (the source of truth, which needs no gate):

    artefacts/<build>/            one folder for each build: 1, 2, ...
        report.json               a `Report`: what was built, from what, how it was measured, the verdicts
        report.html               the same for people, with plots
        int8.onnx, ...            the files, each named in the report with its hash
    artefacts/promoted            what was promoted and rolled back, a line each, the newest last

The build promoted last is the one that is served. `folder` keeps the builds, `choice` picks from it for a device,
`hashes` says whether a file is what it was. Everything is replaced by rename. Nothing here loads a model or measures one.
"""

from gateway.artefacts.choice import Candidate, candidates, choose, speedup
from gateway.artefacts.folder import (
    FOLDER,
    build_folder,
    builds,
    history,
    next_build,
    promote,
    promoted,
    read,
    rollback,
    served_files,
    write,
)
from gateway.artefacts.hashes import sha256
from gateway.artefacts.report import Artefact, Measured, Report, Verdict
from gateway.devices.kind import device_kind

__all__ = [
    "FOLDER",
    "Artefact",
    "Candidate",
    "Measured",
    "Report",
    "Verdict",
    "build_folder",
    "builds",
    "candidates",
    "choose",
    "device_kind",
    "history",
    "next_build",
    "promote",
    "promoted",
    "read",
    "rollback",
    "served_files",
    "sha256",
    "speedup",
    "write",
]

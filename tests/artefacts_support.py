"""Versions with builds: artefacts that can be told from each other, and the reports that name them."""

from pathlib import Path
from typing import Any

import msgspec
from onnx import TensorProto, helper

from gateway import artefacts
from gateway.artefacts import Artefact, Measured, Report

AVX2 = "cpu:x86-64:avx2"
VNNI = "cpu:x86-64:avx512_vnni"


def made(
    name: str = "int8", precision: str = "INT8", *, device: str = AVX2, speedup: float = 1.5, **more: Any
) -> Artefact:
    """An artefact that passed, unless said otherwise; `built` gives it a file."""
    speed = (Measured(8, 1.0, speedup), Measured(32, 4.0, 4.0 * speedup))
    more.setdefault("verdict", "passed")
    return Artefact(name, "", "onnxruntime", precision, device=device, speed=speed, **more)


def built(version: Path, *artefacts_: Artefact, files: dict[str, bytes] | None = None) -> int:
    """Write a build of these artefacts, with files of their own; returns its number."""
    number = artefacts.next_build(version)
    folder = artefacts.build_folder(version, number)
    folder.mkdir(parents=True)
    listed = []
    for artefact in artefacts_:
        path = folder / f"{artefact.name}.onnx"
        path.write_bytes((files or {}).get(artefact.name, f"{artefact.name} of build {number}".encode()))
        size, digest = path.stat().st_size, artefacts.sha256(path)
        listed.append(msgspec.structs.replace(artefact, file=str(path.relative_to(version)), sha256=digest, bytes=size))
    source = artefacts.sha256(version / "model.onnx")
    report = Report(version.parent.name, version.name, source, 1.0, AVX2, {}, {}, tuple(listed))
    artefacts.write(version, number, report)
    return number


def adder(value: float) -> bytes:
    """An ONNX model: OUT = IN + value, FP32 [batch, 2]."""
    tensor = helper.make_tensor("value", TensorProto.FLOAT, [1], [value])
    shape = ["batch", 2]
    graph = helper.make_graph(
        [helper.make_node("Add", ["IN", "value"], ["OUT"])],
        "adder",
        [helper.make_tensor_value_info("IN", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("OUT", TensorProto.FLOAT, shape)],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def write_adder(folder: Path, name: str = "adder", *, config: str = "") -> Path:
    """A model that adds 0 in a repository; returns its version folder."""
    version = folder / name / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(adder(0.0))
    (folder / name / "config.pbtxt").write_text(config)
    return version

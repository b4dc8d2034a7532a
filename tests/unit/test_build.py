"""`gateway build` from its command line to the report, with small models: what is made, judged, kept and refused."""

import fcntl
import io
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gateway import artefacts, cli
from gateway.artefacts import Artefact, Report
from gateway.build import builder, measure, workshop
from gateway.build.progress import Progress
from gateway.build.recipes import CATALOGUE
from tests.build_support import classifier, encoder, images, put, source, tokens

CPU = artefacts.device_kind("cpu")
ALL = {"gate_speedup": "0", "gate_top1_agreement": "0.8", "gate_top5_agreement": "0.8", "gate_accuracy_loss": "1"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "_SECONDS", 0.0)
    monkeypatch.setattr(measure, "_BURST", 0.0)
    monkeypatch.setattr(measure, "_SIZES", (1, 8))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A classifier that passes with anything near FP32's answers, and data beside it."""
    folder = put(tmp_path, "cnn", classifier(), labels=True, **ALL)
    np.savez(folder / "calibration.npz", image=images(20))
    np.savez(folder / "held_out.npz", image=images(120, 1), labels=np.zeros(120, int))
    return tmp_path


def build(repository: Path, *arguments: str, model: str = "cnn") -> int:
    return cli.main(["build", model, "--model-repository", str(repository), *arguments])


def version(repository: Path, model: str = "cnn") -> Path:
    return repository / model / "1"


def report(repository: Path, number: int = 1, model: str = "cnn") -> Report:
    found = artefacts.read(version(repository, model), number)
    assert found is not None
    return found


def named(found: Report) -> dict[str, Artefact]:
    return {each.name: each for each in found.artefacts}


def test_a_build_is_made_judged_reported_and_promoted(repository: Path, capsys: pytest.CaptureFixture[str]):
    assert build(repository) == 0
    printed = capsys.readouterr()
    found = report(repository)
    assert found.samples == {"calibration": 20, "held_out": 120, "labelled": 120}
    assert found.source_sha256 == artefacts.sha256(version(repository) / "model.onnx")
    assert set(found.versions) >= {"lockgate", "onnx", "onnxruntime"}
    int8 = named(found)["int8"]
    assert (int8.file, int8.precision, int8.backend) == ("artefacts/1/int8.onnx", "INT8", "onnxruntime")
    assert (int8.verdict, int8.device, int8.reasons) == ("passed", CPU, ())
    assert [each.rows for each in int8.speed] == [1, 8]
    assert int8.accuracy["top1_agreement"] >= 0.8
    assert int8.thresholds["top1_agreement"] == 0.8
    assert "gateway promote cnn --version 1" in printed.out
    assert re.search(r"^int8 +INT8 .* passed", printed.out, re.MULTILINE)
    assert "int8: timing\n" in printed.err  # a line for each step, since this is no terminal
    assert cli.main(["promote", "cnn", "--model-repository", str(repository)]) == 0
    best = artefacts.choose(version(repository), CPU)[0]
    assert best.name in ("int8", "int8-full")


def test_the_page_says_all_of_it_and_needs_nothing_else(repository: Path):
    build(repository)
    page = (version(repository) / "artefacts/1/report.html").read_text()
    for words in ("Verdicts", "Accuracy against speed", "Latency per batch", "Error of the worst layers", "int8-s8s8"):
        assert words in page
    assert page.count("<svg") == 4  # accuracy, latency, and the layers of two files
    assert not re.search(r"(src|href)=|@import|<script", page)


def test_a_bad_artefact_is_refused_with_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = put(tmp_path, "encoder", encoder(), gate_speedup="0", gate_recall_at_10="0.5")
    np.savez(folder / "held_out.npz", tokens=tokens(120))
    assert build(tmp_path, "--recipe", "int8-dynamic", model="encoder") == 1
    (dynamic,) = report(tmp_path, model="encoder").artefacts
    assert dynamic.verdict == "failed"
    assert any(re.match(r"batch_drift [\d.]+, at most 0.001 is asked for", reason) for reason in dynamic.reasons)
    assert "batch_drift" in capsys.readouterr().out
    assert cli.main(["promote", "encoder", "--model-repository", str(tmp_path)]) == 1


def test_rows_of_their_own_scale_pass(tmp_path: Path):
    folder = put(tmp_path, "encoder", encoder(), gate_speedup="0", gate_recall_at_10="0.5", gate_cosine_mean="0.9")
    np.savez(folder / "held_out.npz", tokens=tokens(120))
    assert build(tmp_path, "--recipe", "int8-rowwise", model="encoder") == 0
    (rowwise,) = report(tmp_path, model="encoder").artefacts
    assert rowwise.verdict == "passed"
    assert {"cosine_mean", "cosine_min", "recall_at_10", "batch_drift"} == set(rowwise.accuracy)


def test_what_a_gpu_would_run_is_simulated_and_unproven(repository: Path):
    assert build(repository, "--target", "gpu", "--target", "tensorrt") == 0
    found = named(report(repository))
    assert set(found) == {"fp16", "bf16", "trt-fp16", "trt-int8"}
    assert {each.verdict for each in found.values()} == {"unproven"}
    assert all(each.accuracy["top1_agreement"] > 0.8 and not each.speed and not each.device for each in found.values())
    assert all("gateway build --prove" in each.reasons[0] for each in found.values())
    skipped = json.loads((version(repository) / "artefacts/1/build.json").read_text())["skipped"]
    assert "--modelopt-python" in skipped["trt-fp8"]


def test_a_named_recipe_that_cannot_be_made_is_an_error(repository: Path, capsys: pytest.CaptureFixture[str]):
    assert build(repository, "--recipe", "trt-fp8") == 1
    assert "nvidia-modelopt[onnx]" in capsys.readouterr().err
    assert artefacts.builds(version(repository)) == []


def test_a_killed_build_goes_on_where_it_was(repository: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    made: list[str] = []
    original = CATALOGUE["int8"].make

    def counted(job: Any) -> None:
        made.append(job.file.name)
        original(job)

    def killed(_job: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(CATALOGUE, "int8", replaced("int8", counted))
    monkeypatch.setitem(CATALOGUE, "int8-full", replaced("int8-full", killed))
    with pytest.raises(KeyboardInterrupt):
        build(repository)
    assert artefacts.builds(version(repository)) == []
    monkeypatch.setitem(CATALOGUE, "int8-full", replaced("int8-full", counted))
    assert build(repository) == 0
    assert made == [".int8.onnx", ".int8-full.onnx"]
    assert "int8: made before" in capsys.readouterr().err
    assert sorted(path.name for path in (version(repository) / "artefacts/1").iterdir()) == [
        "build.json", "int8-full.onnx", "int8.onnx", "report.html", "report.json",
    ]  # fmt: skip


def replaced(name: str, make: Any) -> Any:
    from dataclasses import replace

    return replace(CATALOGUE[name], make=make)


def test_files_are_made_again_when_their_inputs_changed_and_only_then(repository: Path, capsys):
    def again() -> str:
        build(repository, "--recipe", "int8")
        return str(capsys.readouterr().err)

    again()
    assert "made before" in again()
    np.savez(repository / "cnn/calibration.npz", image=images(20, 5))
    assert "made before" not in again()
    file = version(repository) / "artefacts/3/int8.onnx"
    file.write_bytes(file.read_bytes() + b"x")
    assert "made before" not in again()
    first, _, third, fourth = (version(repository) / f"artefacts/{number}/int8.onnx" for number in (1, 2, 3, 4))
    assert fourth.read_bytes() == third.read_bytes()[:-1] != first.read_bytes()


def test_one_build_of_a_version_at_a_time(repository: Path, capsys: pytest.CaptureFixture[str]):
    folder = version(repository) / "artefacts"
    folder.mkdir()
    with (folder / ".building.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert build(repository) == 1
    assert "is being built already" in capsys.readouterr().err


def test_a_verdict_of_another_device_is_proven_here(repository: Path):
    build(repository, "--recipe", "int8")
    made = report(repository)
    elsewhere = msgspec.structs.replace(made.artefacts[0], device="cpu:aarch64:i8mm")
    artefacts.write(version(repository), 1, msgspec.structs.replace(made, artefacts=(elsewhere,)))
    assert artefacts.choose(version(repository), CPU)[0].name == "fp32"
    assert build(repository, "--prove") == 0
    assert [each.device for each in report(repository).artefacts] == ["cpu:aarch64:i8mm", CPU]
    assert build(repository, "--prove") == 0
    assert [each.device for each in report(repository).artefacts] == ["cpu:aarch64:i8mm", CPU]
    assert CPU in (version(repository) / "artefacts/1/report.html").read_text()


def test_proving_needs_a_device_the_same_files_and_a_build(repository: Path, capsys: pytest.CaptureFixture[str]):
    assert build(repository, "--prove") == 1
    assert "no build to prove" in capsys.readouterr().err
    build(repository, "--recipe", "fp16")
    assert build(repository, "--prove") == 1
    assert "for a device of this machine" in capsys.readouterr().err
    build(repository, "--recipe", "int8")
    (version(repository) / "artefacts/2/int8.onnx").write_bytes(b"other")
    assert build(repository, "--prove") == 1
    assert "not the file that was built" in capsys.readouterr().err


def test_rows_in_both_sets_end_the_build(repository: Path, capsys: pytest.CaptureFixture[str]):
    assert build(repository, "--held-out", str(repository / "cnn/calibration.npz")) == 1
    assert "20 of 20 held-out rows are in the calibration data too" in capsys.readouterr().err


def test_one_set_of_data_is_divided(repository: Path):
    (repository / "cnn/calibration.npz").unlink()
    build(repository, "--recipe", "int8")
    assert report(repository).samples == {"calibration": 40, "held_out": 80, "labelled": 80}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version", "7"], "has no version 7; there are: 1"),
        (["--recipe", "none"], "there is no recipe 'none'"),
        (["--recipe", "int4-weights"], "nothing can be made of model 'cnn': int4-weights: it has no matrix"),
        (["--held-out", "/nowhere"], "there is no data at '/nowhere'"),
    ],
)
def test_what_cannot_be_is_told(repository: Path, capsys, arguments: list[str], words: str):
    assert build(repository, *arguments) == 1
    assert words in capsys.readouterr().err


def test_without_data_there_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    put(tmp_path, "cnn", classifier())
    assert build(tmp_path) == 1
    assert "has no data to be judged by; give real inputs with --held-out" in capsys.readouterr().err


def test_a_model_that_does_not_batch_takes_its_requests_one_by_one(tmp_path: Path):
    fixed = classifier()
    for tensor in (*fixed.graph.input, *fixed.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    folder = put(tmp_path, "cnn", fixed, batch=0, gate_kind="numeric", gate_mean_error="1", gate_speedup="99")
    for name, seed in (("calibration", 0), ("held_out", 1)):
        (folder / name).mkdir()
        for index in range(12):
            np.save(folder / name / f"{index:02d}.npy", images(1, 100 * seed + index))
    assert build(tmp_path, "--recipe", "int8") == 1  # whatever its speed, twelve requests prove nothing
    (int8,) = report(tmp_path).artefacts
    assert [each.rows for each in int8.speed] == [1]
    assert {"mean_error", "max_error"} == set(int8.accuracy)
    assert report(tmp_path).samples["held_out"] == 12


def test_a_file_that_does_not_run_fails(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(CATALOGUE, "int8", replaced("int8", lambda job: job.file.write_bytes(b"junk")))
    monkeypatch.setattr(builder.layers, "worst", lambda *_: ())
    assert build(repository, "--recipe", "int8") == 1
    (junk,) = report(repository).artefacts
    assert junk.verdict == "failed"
    assert "does not load in ONNX Runtime" in junk.reasons[0]


def test_a_graph_that_a_quantizer_does_not_know_is_left_out(repository: Path, monkeypatch, capsys):
    def confused(_job: Any) -> None:
        raise ValueError("what is this?")

    monkeypatch.setitem(CATALOGUE, "int8", replaced("int8", confused))
    assert build(repository) == 0
    assert [each.name for each in report(repository).artefacts] == ["int8-full"]
    assert "not made: int8: it could not be made: ValueError: what is this?" in capsys.readouterr().out


class Watched:
    """A session that says when it ran."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def run(self, _outputs: Any, _inputs: Any) -> list[Any]:
        self._log.append(self._name)
        return []


def test_two_models_are_timed_in_turns(tmp_path: Path):
    log: list[str] = []
    runners = [measure.Runner(Watched(name, log), "", ()) for name in "AB"]
    put(tmp_path, "cnn", classifier())
    row = builder.Row({"image": images(1)})
    (one, eight) = measure.turns(*runners, [row], source(tmp_path, "cnn").config.max_batch_size)
    assert (one.rows, eight.rows) == (1, 8)
    half = len(log) // 2
    timed = log[8:half]  # after four runs of each to warm up and see how long they take
    assert timed == ["A", "B"] * (len(timed) // 2)
    assert len(timed) >= 14


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar():
    stream = Terminal()
    bar = Progress(stream, 2)
    bar.begin("int8")
    bar.step("making")
    bar.tick(0.5)
    bar.end("passed")
    drawn = stream.getvalue().replace("\x1b[K", "").split("\r")
    assert drawn[2] == "[###.....................] 0/2 int8: making 50 %"
    assert drawn[-1] == "int8: passed\n"


def test_a_record_that_cannot_be_read_is_none(tmp_path: Path):
    (tmp_path / "build.json").write_text("{")
    assert workshop.read_record(tmp_path).made == {}


class OnCpu:
    """Stands for what TensorRT loads: computes on the CPU."""

    provider = "TensorRT"
    widest = 1
    warnings: tuple[str, ...] = ()

    def __init__(self, spec: Any) -> None:
        assert spec.artefact is not None
        self._runner = measure.load(spec.path / spec.artefact.file, simulated=True)

    def compute(self, inputs: Any, batch: Any) -> dict[str, Any]:
        return dict(zip(batch.outputs, self._runner.session.run(batch.outputs, inputs), strict=True))


def test_tensorrt_files_are_proven_by_the_engine_that_serves_them(repository: Path, monkeypatch, capsys):
    """The compiling is left out: this is about who judges, and what is written. No TensorRT is involved."""
    from gateway.engines.tensorrt import backend
    from gateway.engines.tensorrt.plan import PlanMissing

    assert build(repository, "--recipe", "trt-int8") == 0
    (simulated,) = report(repository).artefacts
    assert (simulated.verdict, simulated.device) == ("unproven", "")
    kinds = {"cpu": CPU, "gpu:0": "gpu:sm90"}
    monkeypatch.setattr(artefacts, "device_kind", lambda name: kinds[name])

    def missing(_spec: Any, _count: int) -> Any:
        raise PlanMissing("no plan yet")

    monkeypatch.setattr(backend, "load", missing)
    assert build(repository, "--prove") == 0
    (waiting,) = report(repository).artefacts
    assert (waiting.verdict, waiting.device, waiting.speed) == ("unproven", "gpu:sm90", ())
    monkeypatch.setattr(backend, "load", lambda spec, _count: [OnCpu(spec)])
    assert build(repository, "--prove") == 0
    (proven,) = report(repository).artefacts
    assert (proven.verdict, proven.device, len(proven.speed)) == ("passed", "gpu:sm90", 2)
    assert artefacts.choose(version(repository), "gpu:sm90")[0].name == "fp32"
    artefacts.promote(version(repository))
    assert artefacts.choose(version(repository), "gpu:sm90")[0].name == "trt-int8"

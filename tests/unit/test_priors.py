"""What was learned of batch times, from one start to the next."""

import json
import logging
import os
from dataclasses import replace
from itertools import product

import pytest
from msgspec import structs

from gateway.artefacts import Artefact
from gateway.placement import Device
from gateway.repository.fingerprint import fingerprint
from gateway.worker.priors import NAME, Priors, key

CPU = Device("cpu", "cpu", 2)
PRIOR = {"a": 0.004, "b": 0.00025, "tail": 1.2, "largest": 64}
OTHER = PRIOR | {"a": 0.008}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "m" / "1"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def events(caplog):
    caplog.set_level(logging.INFO, "gateway")
    return lambda: [(record.msg.name, record.msg.fields["model"]) for record in caplog.records]


async def test_what_was_kept_is_read_again(folder):
    await Priors(folder, {"cpu": "k", "gpu:0": "g"}).keep({"cpu": PRIOR, "gpu:0": OTHER})
    assert await Priors(folder, {"cpu": "k", "gpu:0": "g"}).read() == {"cpu": PRIOR, "gpu:0": OTHER}
    assert await Priors(folder, {"cpu": "another machine"}).read() == {}
    assert [path.name for path in folder.iterdir()] == [NAME]


async def test_others_entries_stay_and_ones_own_is_replaced(folder, events):
    await Priors(folder, {"cpu": "theirs"}).keep({"cpu": PRIOR})
    await Priors(folder, {"cpu": "ours"}).keep({"cpu": PRIOR})
    await Priors(folder, {"cpu": "ours"}).keep({"cpu": OTHER})
    assert await Priors(folder, {"a": "theirs", "b": "ours"}).read() == {"a": PRIOR, "b": OTHER}
    assert events() == []


async def test_the_file_holds_the_newest_only(folder):
    for number in range(40):
        await Priors(folder, {"cpu": f"k{number}"}).keep({"cpu": PRIOR})
    assert list(json.loads((folder / NAME).read_text())["priors"]) == [f"k{number}" for number in range(24, 40)]


async def test_nothing_learned_writes_nothing(folder):
    await Priors(folder, {"cpu": "k"}).keep({})
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"{",
        b"[]",
        b'{"priors": 1}',
        b'{"priors": {"k": 1}}',
        b'{"priors": {"k": {}}}',
        b'{"priors": {"k": {"a": 0, "b": "1", "tail": 1, "largest": 1}}}',
        b'{"priors": {"k": {"a": 0, "b": true, "tail": 1, "largest": 1}}}',
        b'{"priors": {"k": {"a": 0, "b": NaN, "tail": 1, "largest": 1}}}',
        b'{"priors": {"k": {"a": 0, "b": 1, "tail": 1, "largest": 1e300}}}',
        b'{"priors": {"k": {"a": 0, "b": 1e-200, "tail": 1, "largest": 1}}}',
        b'{"priors": {"k": {"a": 1' + b"0" * 5000 + b', "b": 1, "tail": 1, "largest": 1}}}',
        b"[" * 60_000,
        b" " * 70_000 + b"{}",
    ],
)
async def test_what_is_no_file_of_ours_is_ignored_with_one_line_and_replaced(folder, events, text):
    (folder / NAME).write_bytes(text)
    priors = Priors(folder, {"cpu": "k"})
    assert await priors.read() == {}
    await priors.keep({"cpu": PRIOR})
    assert events() == [("latency_prior_ignored", "m")]
    assert await priors.read() == {"cpu": PRIOR}


async def test_a_folder_that_cannot_be_written_costs_one_line(folder, events):
    (folder / NAME).mkdir()  # permissions do not keep root from writing
    priors = Priors(folder, {"cpu": "k"})
    for _ in range(3):
        await priors.keep({"cpu": PRIOR})
    assert events() == [("latency_not_kept", "m")]
    assert [path.name for path in folder.iterdir()] == [NAME]


async def test_a_folder_that_is_gone_is_not_made_again(folder, events):
    folder.rmdir()
    await Priors(folder, {"cpu": "k"}).keep({"cpu": PRIOR})
    assert events() == []
    assert not folder.exists()


async def test_a_write_that_ends_in_the_middle_leaves_what_was_there(folder, monkeypatch):
    priors = Priors(folder, {"cpu": "k"})
    await priors.keep({"cpu": PRIOR})

    def full(document, file, **more):
        file.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    await priors.keep({"cpu": OTHER})
    assert await priors.read() == {"cpu": PRIOR}
    assert [path.name for path in folder.iterdir()] == [NAME]


async def test_the_file_does_not_change_the_models_fingerprint(folder):
    (folder / "model.onnx").write_bytes(b"x")
    before = fingerprint(folder.parent, {1: folder})
    await Priors(folder, {"cpu": "k"}).keep({"cpu": PRIOR})
    assert fingerprint(folder.parent, {1: folder}) == before


def test_the_key_has_all_that_the_times_depend_on():
    devices = [CPU, replace(CPU, cores=4), replace(CPU, name="gpu:0")]
    given = product(devices, ["CPUExecutionProvider", "CUDA"], ["onnxruntime 1.20", "onnxruntime 1.21"], ["f1", "f2"])
    keys = [key(*each) for each in given]
    assert len(set(keys)) == 24
    assert "cpu" in keys[0]
    assert "2 cores, CPUExecutionProvider, onnxruntime 1.20, lockgate " in keys[0]


def test_the_key_has_the_artefact_that_is_run():
    source = Artefact("fp32", "model.onnx", "onnxruntime", "FP32")
    made = [structs.replace(source, name="int8", sha256=sha256) for sha256 in ("a" * 64, "b" * 64)]
    keys = [key(CPU, "p", "", "f", artefact) for artefact in (None, *made)]
    assert len(set(keys)) == 3
    assert "int8 aaaaaaaaaaaa" in keys[1]
    assert key(CPU, "p", "", "f", source) == keys[0]


def test_the_key_of_names_that_are_no_text():
    assert key(CPU, "p", "", os.fsdecode(b"\xff")) != key(CPU, "p", "", "")

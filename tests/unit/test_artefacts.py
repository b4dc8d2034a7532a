"""The builds of a version: reports, promotion, and the choice of what a device runs."""

import logging
import os
import threading
from pathlib import Path

import msgspec
import pytest

from gateway import artefacts, errors
from gateway.artefacts import Measured
from gateway.devices.kind import cpu_kind
from tests.artefacts_support import AVX2, VNNI, built, made


@pytest.fixture
def version(tmp_path):
    """A version folder with a model file."""
    folder = tmp_path / "classifier" / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"the model")
    return folder


def names(version, device=AVX2, precision=""):
    return [artefact.name for artefact in artefacts.choose(version, device, precision)]


def events(caplog):
    return [record.msg.fields | {"event": record.msg.name} for record in caplog.records]


# --- what is kept


def test_a_version_without_builds_is_the_model_itself(version):
    assert artefacts.read(version) is None
    assert artefacts.promoted(version) == 0
    (only,) = artefacts.choose(version, AVX2, model_file="other.onnx", backend="onnxruntime")
    assert (only.name, only.file, only.precision, only.verdict) == ("fp32", "other.onnx", "FP32", "passed")


def test_a_report_is_read_as_it_was_written(version):
    number = built(version, made())
    assert artefacts.builds(version) == [number] == [1]
    assert artefacts.read(version) is None  # not promoted
    report = artefacts.read(version, number)
    assert report.artefacts[0].speed[1] == Measured(32, 4.0, 6.0)
    assert artefacts.promote(version) == number
    assert artefacts.read(version) == report


def test_unfinished_builds_are_no_builds_and_keep_their_number(version):
    built(version, made())
    artefacts.build_folder(version, 7).mkdir()
    (version / artefacts.FOLDER / "_cache").mkdir()
    assert artefacts.builds(version) == [1]
    assert artefacts.next_build(version) == 8


@pytest.mark.parametrize("text", ["", "{", '{"model": 1}', "[" * 100_000], ids=["empty", "cut", "other", "deep"])
def test_a_broken_report_costs_the_artefacts_and_not_the_model(version, caplog, text):
    artefacts.promote(version, built(version, made()))
    (artefacts.build_folder(version, 1) / "report.json").write_text(text)
    with pytest.raises(
        errors.Unavailable, match="the report of build 1 of model 'classifier' version 1 cannot be read"
    ):
        artefacts.read(version)
    assert names(version) == ["fp32"]
    assert [event["event"] for event in events(caplog)] == ["artefacts_unreadable"]


def test_a_promoted_build_that_is_gone_costs_the_artefacts_and_not_the_model(version):
    artefacts.promote(version, built(version, made()))
    (artefacts.build_folder(version, 1) / "report.json").unlink()
    assert names(version) == ["fp32"]
    with pytest.raises(errors.Unavailable, match=r"INT8.*is not there; there are builds: none"):
        names(version, precision="INT8")


def test_a_record_that_is_none_is_refused_and_the_model_served(version):
    artefacts.promote(version, built(version, made()))
    (version / "artefacts" / "promoted").write_text("3\n")
    assert names(version) == ["fp32"]
    with pytest.raises(errors.Unavailable, match=r"'artefacts/promoted'.*Remove it"):
        artefacts.promote(version)


# --- promotion


def test_promotions_are_gone_back_through_and_all_of_it_is_remembered(version):
    for _ in range(3):
        built(version, made())
    assert [artefacts.promote(version, number) for number in (1, 3, 2)] == [1, 3, 2]
    assert artefacts.promote(version, 2) == 2  # served already
    assert [artefacts.rollback(version) for _ in range(3)] == [3, 1, 0]
    assert artefacts.promoted(version) == 0
    with pytest.raises(errors.InvalidArgument, match="nothing to roll back"):
        artefacts.rollback(version)
    assert artefacts.promote(version) == 3
    assert [(step.done, step.build) for step in artefacts.history(version)] == [
        ("promote", 1), ("promote", 3), ("promote", 2), ("rollback", 3), ("rollback", 1), ("rollback", 0), ("promote", 3),
    ]  # fmt: skip
    assert artefacts.rollback(version) == 0


def test_what_does_not_exist_is_not_promoted(version):
    with pytest.raises(errors.InvalidArgument, match=r"has no build yet; there are: none\. Run `gateway build`"):
        artefacts.promote(version)
    built(version, made())
    with pytest.raises(errors.InvalidArgument, match="has no build 4; there are: 1"):
        artefacts.promote(version, 4)


def test_a_build_of_failures_is_refused_with_their_numbers(version):
    built(version, made("s8s8", verdict="failed", reasons=("top1_agreement is 0.645, at least 0.94 is wanted",)))
    with pytest.raises(errors.InvalidArgument, match=r"passed none.*s8s8: top1_agreement is 0\.645, at least 0\.94"):
        artefacts.promote(version)
    assert artefacts.promoted(version) == 0


def test_a_build_of_another_model_file_is_not_promoted(version):
    built(version, made())
    (version / "model.onnx").write_bytes(b"another model")
    with pytest.raises(errors.InvalidArgument, match=r"built from another model file .*run `gateway build` again"):
        artefacts.promote(version)


def test_a_changed_artefact_is_not_promoted(version):
    built(version, made())
    (artefacts.build_folder(version, 1) / "int8.onnx").write_bytes(b"tampered with")
    with pytest.raises(errors.InvalidArgument, match="artefact 'int8': its file was changed after the gate saw it"):
        artefacts.promote(version)


def test_an_unproven_build_may_be_promoted_and_is_not_chosen(version):
    artefacts.promote(version, built(version, made("trt", "FP16", device="gpu:sm90", verdict="unproven")))
    assert names(version, "gpu:sm90") == ["fp32"]


def test_commands_at_once_lose_nothing(version):
    count = 8
    for _ in range(count):
        built(version, made())
    threads = [threading.Thread(target=artefacts.promote, args=(version, n + 1)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(step.build for step in artefacts.history(version)) == list(range(1, count + 1))


def test_a_crash_before_the_rename_leaves_what_was(version, monkeypatch):
    artefacts.promote(version, built(version, made()))
    built(version, made())

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            artefacts.promote(version, 2)
    assert artefacts.promoted(version) == 1
    assert artefacts.promote(version, 2) == 2


def test_a_folder_that_cannot_be_written_is_said_so(version):
    (version / "artefacts").write_text("a file")
    with pytest.raises(
        errors.Unavailable, match="the folder 'artefacts' of model 'classifier' version 1 cannot be written"
    ):
        artefacts.rollback(version)


# --- the choice


def test_the_fastest_that_passed_here_comes_first_and_the_model_last(version):
    artefacts.promote(
        version, built(version, made("slow", speedup=1.2), made("fast", speedup=2.0), made("untimed", speedup=0))
    )
    assert names(version) == ["fast", "slow", "untimed", "fp32"]


def test_each_that_is_left_out_has_its_reason(version, caplog):
    caplog.set_level(logging.INFO, "gateway")
    number = built(
        version,
        made("good"),
        made("bad", verdict="failed", reasons=("top1_agreement is 0.645, at least 0.94 is wanted",)),
        made("elsewhere", device=VNNI),
        made("unproven", "FP16", device="gpu:sm90", verdict="unproven"),
        made("changed"),
    )
    artefacts.promote(version, number)
    (artefacts.build_folder(version, number) / "changed.onnx").write_bytes(b"tampered with")
    assert names(version) == ["good", "fp32"]
    said = {event["artefact"]: event for event in events(caplog)}
    assert said["bad"]["reason"] == "the gate failed it: top1_agreement is 0.645, at least 0.94 is wanted"
    assert said["elsewhere"]["reason"].startswith(f"it was proven on {VNNI} and this is {AVX2}")
    assert "gateway build --prove" in said["unproven"]["reason"]
    assert "changed after the gate saw it" in said["changed"]["reason"]
    assert {event["event"] for event in said.values()} == {"artefact_not_chosen", "artefact_refused"}
    assert said["changed"]["event"] == "artefact_refused"
    assert not any(str(version) in event["reason"] for event in said.values())


def test_a_file_that_passed_on_two_kinds_of_device_is_chosen_on_both(version):
    artefacts.promote(version, built(version, made("int8"), made("int8-vnni", device=VNNI)))
    assert names(version, AVX2) == ["int8", "fp32"]
    assert names(version, VNNI) == ["int8-vnni", "fp32"]


def test_on_a_device_that_nobody_knows_nothing_is_proven(version):
    artefacts.promote(version, built(version, made(device="gpu:unknown")))
    assert names(version, "gpu:unknown") == ["fp32"]
    (candidate,) = artefacts.candidates(version, "gpu:unknown")
    assert "cannot be found out" in candidate.reason


def test_artefacts_of_a_model_that_was_replaced_are_stale(version, caplog):
    artefacts.promote(version, built(version, made()))
    (version / "model.onnx").write_bytes(b"a better model")
    assert names(version) == ["fp32"]
    (event,) = events(caplog)
    assert event["event"] == "artefact_refused"
    assert "built from another model file" in event["reason"]


def test_weights_beside_a_model_are_part_of_it(version):
    alone = artefacts.sha256(version / "model.onnx")
    (version / "model.onnx.data").write_bytes(b"weights")
    artefacts.promote(version, built(version, made()))
    assert artefacts.sha256(version / "model.onnx") != alone
    assert names(version) == ["int8", "fp32"]
    (version / "model.onnx.data").write_bytes(b"other weights")
    assert names(version) == ["fp32"]


@pytest.mark.parametrize("file", ["../2/model.onnx", "/etc/hostname", "artefacts/1/link.onnx", ""])
def test_no_artefact_leads_out_of_the_version(version, tmp_path, file):
    outside = tmp_path / "outside.onnx"
    outside.write_bytes(b"outside")
    number = built(version, made())
    (artefacts.build_folder(version, number) / "link.onnx").symlink_to(outside)
    report = artefacts.read(version, number)
    moved = msgspec.structs.replace(report.artefacts[0], file=file, sha256=artefacts.sha256(outside))
    artefacts.promote(version, number)
    artefacts.write(version, number, msgspec.structs.replace(report, artefacts=(moved,)))
    (candidate,) = artefacts.candidates(version, AVX2)
    assert "leads out of the version's folder" in candidate.reason
    artefacts.rollback(version)
    with pytest.raises(errors.InvalidArgument, match="leads out of the version's folder"):
        artefacts.promote(version)


def test_a_precision_is_pinned(version):
    artefacts.promote(version, built(version, made("int8"), made("int8-other", speedup=3.0), made("bf16", "BF16")))
    assert names(version, precision="INT8") == ["int8-other", "int8"]
    assert names(version, precision="bf16") == ["bf16"]
    assert names(version, precision="FP32") == ["fp32"]


def test_a_pin_that_nothing_meets_says_what_there_is_and_what_to_do(version):
    artefacts.promote(version, built(version, made("bf16", "BF16"), made("fp16", "FP16", device=VNNI)))
    with pytest.raises(errors.Unavailable) as refused:
        names(version, precision="FP16")
    text = refused.value.message
    assert text.startswith(
        f"model 'classifier' version 1 is pinned to precision FP16, and nothing of that may be run on {AVX2}"
    )
    assert f"fp16 (FP16): it was proven on {VNNI}" in text
    assert "bf16 (BF16): it may be run" in text
    assert "remove the parameter 'precision'" in text


def test_files_are_hashed_again_only_when_they_change(version, monkeypatch):
    path = version / "model.onnx"
    before = artefacts.sha256(path)
    opened = []
    monkeypatch.setattr(Path, "open", lambda self, *_, **__: opened.append(self))
    assert artefacts.sha256(path) == before
    assert opened == []
    monkeypatch.undo()
    path.write_bytes(b"the MODEL")
    os.utime(path, ns=(1, 1))
    assert artefacts.sha256(path) != before


# --- what a watcher of the folder sees


def test_only_what_is_promoted_counts_as_served(version):
    assert artefacts.served_files(version) == []
    built(version, made())
    assert artefacts.served_files(version) == []
    artefacts.promote(version, 1)
    built(version, made("other"))
    assert [str(path.relative_to(version)) for path in artefacts.served_files(version)] == [
        "artefacts/promoted", "artefacts/1/int8.onnx", "artefacts/1/report.json",
    ]  # fmt: skip
    artefacts.rollback(version)
    assert [path.name for path in artefacts.served_files(version)] == ["promoted"]


# --- kinds of device


@pytest.mark.parametrize(
    ("machine", "flags", "kind"),
    [
        ("x86_64", "sse4_1 avx avx2 fma", "cpu:x86-64:avx2"),
        ("AMD64", "sse4_1 avx avx2 fma avx_vnni", "cpu:x86-64:avx_vnni"),
        ("x86_64", "avx avx2 fma avx512f avx512bw avx512dq avx512vl", "cpu:x86-64:avx512"),
        ("x86_64", "avx avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni", "cpu:x86-64:avx512_vnni"),
        ("x86_64", "avx avx2 fma avx512f avx512_vnni amx_tile amx_int8", "cpu:x86-64:amx_int8"),
        ("x86_64", "sse2 sse4_1", "cpu:x86-64:sse4_1"),
        ("x86_64", "", "cpu:x86-64:unknown"),
        ("riscv64", "", "cpu:riscv64:unknown"),
        ("", "", "cpu:unknown:unknown"),
    ],
)
def test_the_kind_of_a_cpu_is_its_best_integer_kernels(machine, flags, kind):
    assert cpu_kind(machine, f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: x\n") == kind


@pytest.mark.parametrize(
    ("features", "kind"),
    [("fp asimd", "neon"), ("fp asimd asimddp", "dotprod"), ("fp asimd asimddp sve i8mm", "i8mm")],
)
def test_the_kind_of_an_arm_cpu(features, kind):
    assert cpu_kind("aarch64", f"processor\t: 0\nFeatures\t: {features}\n") == f"cpu:aarch64:{kind}"


def test_a_processor_is_what_all_its_cores_are():
    assert cpu_kind("aarch64", "Features : asimd asimddp\nFeatures : asimd\n") == "cpu:aarch64:neon"


def test_this_machine_has_a_kind():
    assert artefacts.device_kind("cpu").startswith("cpu:")

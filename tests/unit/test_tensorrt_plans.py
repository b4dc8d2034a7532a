"""Which plan a version is run from, and for which shapes one is built."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from gateway import errors
from gateway.artefacts import Artefact
from gateway.engines.tensorrt import packages, plan
from gateway.engines.tensorrt.plan import PlanInfo, PlanMissing
from gateway.engines.tensorrt.profiles import Range, profile, shortfall
from tests.tensorrt_support import add_sub, spec

SHAPES = (
    "parameters { key: 'trt_profile_min_shapes' value { string_value: 'A:1x1,B:1x1' } }"
    "parameters { key: 'trt_profile_opt_shapes' value { string_value: 'A:4x8,B:4x8' } }"
    "parameters { key: 'trt_profile_max_shapes' value { string_value: 'A:8x16,B:8x16' } }"
)
BOTH = {name: Range((1, 1), (4, 8), (8, 16)) for name in ("A", "B")}
REMEDY = "Build one here: gateway build m --plan"


def write(place: Path, name: str = "a.plan", **changes) -> Path:
    """A plan of the version's model.onnx, as if it had been built on this device, but for the changes."""
    folder = place / plan.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_bytes(b"plan of " + name.encode())
    info = PlanInfo(
        "fake", "10.0", "90", "model.onnx", plan.fingerprint(place / "model.onnx"), "FP32", (BOTH,),
        plan.digest(file), 10, 100.0,
    )  # fmt: skip
    plan.described_by(file).write_bytes(msgspec.json.encode(msgspec.structs.replace(info, **changes)))
    return file


@pytest.fixture
def version(tmp_path: Path) -> Path:
    add_sub(tmp_path / "model.onnx")
    return tmp_path


def find(version: Path, text: str = "", **changes):
    return plan.find(spec(version, text, "model.onnx", **changes), "90")


def test_the_newest_plan_that_fits_is_taken(version: Path) -> None:
    write(version, "old.plan", built=1.0)
    newest = write(version, "new.plan", built=3.0)
    write(version, "stale.plan", built=4.0, sm="80")
    found = find(version)
    assert (found.path, found.package) == (newest, "fake")
    assert found.info is not None
    assert found.info.profiles == (BOTH,)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"package": "tensorrt"}, "one is of tensorrt, and fake is installed"),
        ({"version": "9.1"}, "one is of fake 9.1, and 10.0 is installed"),
        ({"sm": "89"}, "one is for compute capability 8.9, and this GPU has 9.0"),
        ({"sm": "120"}, "one is for compute capability 12.0, and this GPU has 9.0"),
        ({"source_sha256": "0"}, "one was built from another model file"),
        ({"sha256": "0"}, "one is damaged"),
        ({"profiles": ()}, "it has no input 'A'"),
        (
            {"profiles": ({name: Range((1, 1), (1, 8), (4, 16)) for name in "AB"},)},
            "it takes at most 4 rows and max_batch_size is 8",
        ),
    ],
)
def test_a_stale_plan_is_not_run(version: Path, changes: dict, reason: str) -> None:
    write(version, **changes)
    with pytest.raises(PlanMissing) as caught:
        find(version)
    assert caught.value.message == f"m/1/model.onnx has no TensorRT plan for this device: {reason}. {REMEDY}"


def test_a_plan_for_other_shapes_than_the_configuration_demands(version: Path) -> None:
    write(version, profiles=({"A": Range((1, 1), (4, 8), (8, 12)), "B": BOTH["B"]},))
    find(version)
    with pytest.raises(PlanMissing, match=r"its input 'A' takes \[1, 1\] to \[8, 12\] and the configuration demands"):
        find(version, SHAPES)


def test_without_any_plan(version: Path) -> None:
    with pytest.raises(PlanMissing) as caught:
        find(version)
    assert caught.value.message == f"m/1/model.onnx has no TensorRT plan for this device. {REMEDY}"


def test_what_is_written_of_a_plan_may_be_damaged(version: Path) -> None:
    plan.described_by(write(version)).write_text("{")
    with pytest.raises(PlanMissing):
        find(version)


def test_weights_beside_the_model_are_part_of_it(version: Path) -> None:
    write(version)
    (version / "model.onnx.data").write_bytes(b"weights")
    with pytest.raises(PlanMissing, match="another model file"):
        find(version)


def test_an_artefacts_plan_is_of_the_artefact(version: Path) -> None:
    write(version)
    add_sub(version / "artefacts/1/int8.onnx")
    artefact = Artefact("trt-int8", "artefacts/1/int8.onnx", "tensorrt", "INT8")
    with pytest.raises(PlanMissing, match=r"m/1/artefacts/1/int8\.onnx has no TensorRT plan"):
        find(version, artefact=artefact)
    write(version, "b.plan", source=artefact.file, source_sha256=plan.fingerprint(version / artefact.file))
    assert find(version, artefact=artefact).path.name == "b.plan"


def test_a_plan_in_the_models_place_is_run_as_it_is_unless_it_says_that_it_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "model.plan"
    file.write_bytes(b"plan")
    given = spec(tmp_path)
    assert plan.find(given, "90") == plan.Plan(file, "fake", None)
    info = PlanInfo("fake", "10.0", "90", "model.onnx", "0", "FP32", (BOTH,), plan.digest(file), 4, 1.0)
    plan.described_by(file).write_bytes(msgspec.json.encode(info))
    assert plan.find(given, "90").info == info
    with pytest.raises(errors.Unavailable) as caught:
        plan.find(given, "80")
    assert caught.value.message == (
        f"m/1/model.plan does not fit: one is for compute capability 9.0, and this GPU has 8.0. {REMEDY}"
    )


# --- packages


def test_what_is_installed_is_taken_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"tensorrt-rtx-cu13": "1.7"}

    def version(name: str) -> str:
        if name not in there:
            raise packages.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(packages.metadata, "version", version)
    assert packages.installed() is packages.RTX
    there["tensorrt-cu12"] = "10.9"
    assert packages.installed() is packages.TENSORRT
    assert packages.TENSORRT.version() == "10.9"
    there.clear()
    with pytest.raises(errors.Unavailable, match=r"TensorRT is not installed; .* 'lockgate\[trtrtx\]'"):
        packages.installed()


def test_a_package_that_is_missing_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(packages.TENSORRT, module="no_such_module", runtime="no_such_runtime")
    with pytest.raises(errors.Unavailable, match="the package 'tensorrt' is missing or broken: No module named"):
        broken.api()
    with pytest.raises(errors.Unavailable, match="the package 'cuda-bindings' is missing or broken"):
        broken.cuda()
    with pytest.raises(errors.Unavailable, match="a plan of 'magic' cannot be run here"):
        packages.named("magic")


# --- profiles


def config(text: str):
    return spec(Path("/m/1"), text).config


def warmup(size: int) -> str:
    each = "".join(
        f"inputs {{ key: '{name}' value {{ data_type: TYPE_FP32 dims: [{size}] zero_data: true }} }}" for name in "AB"
    )
    return f"model_warmup {{ name: 's{size}' {each} }}"


def test_the_batch_is_from_the_configuration_and_open_dimensions_from_what_was_seen() -> None:
    observed = {"A": [(1, 5), (3, 9), (2, 6)], "B": [(4, 7)]}
    assert profile(config(""), observed) == {"A": Range((1, 5), (8, 6), (8, 9)), "B": Range((1, 7), (8, 7), (8, 7))}
    preferred = config("dynamic_batching { preferred_batch_size: [2, 4] }")
    assert profile(preferred, observed)["A"] == Range((1, 5), (4, 6), (8, 9))


def test_warm_up_samples_tell_open_dimensions() -> None:
    assert profile(config(warmup(3) + warmup(12)))["B"] == Range((1, 3), (8, 12), (8, 12))


def test_parameters_go_first() -> None:
    assert profile(config(SHAPES), {"A": [(1, 99)]}) == BOTH
    accelerator = (
        "optimization { execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' "
        "parameters { key: 'trt_profile_min_shapes' value: 'A:1x1,B:1x1' }"
        "parameters { key: 'trt_profile_opt_shapes' value: 'A:4x8,B:4x8' }"
        "parameters { key: 'trt_profile_max_shapes' value: 'A:8x16,B:8x16' } } } }"
    )
    assert profile(config(accelerator)) == BOTH


def test_without_batches_and_with_fixed_dimensions_nothing_is_open() -> None:
    text = "max_batch_size: 0"
    fixed = dataclasses.replace(
        config(text), inputs=tuple(dataclasses.replace(each, dims=(3, 4)) for each in config(text).inputs)
    )
    assert profile(fixed) == {"A": Range((3, 4), (3, 4), (3, 4)), "B": Range((3, 4), (3, 4), (3, 4))}


def parameters(least: str, best: str, greatest: str) -> str:
    keys = zip(("min", "opt", "max"), (least, best, greatest), strict=True)
    return "".join(
        f"parameters {{ key: 'trt_profile_{key}_shapes' value {{ string_value: '{value}' }} }}"
        for key, value in keys
        if value
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "input 'A' of model 'm' has an open dimension (1), and TensorRT must know its range. Give it in the"),
        (parameters("A:1x1", "", "A:8x8"), "must give all three of trt_profile_min_shapes, "),
        (parameters("A:1x1", "A:1x1", "B:8x8"), "must name the same inputs"),
        (parameters("A=1", "A:1x1", "A:8x8"), "trt_profile_min_shapes of model 'm' must be like \"ids:1x8,mask:1x8\", got 'A=1'"),
        (parameters("A:1", "A:1", "A:8"), "must have 2 dimensions, each least <= best <= greatest"),
        (parameters("A:4x1", "A:2x1", "A:8x8"), "each least <= best <= greatest; got [4, 1], [2, 1], [8, 8]"),
    ],
)  # fmt: skip
def test_ranges_that_nobody_tells_or_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        profile(config(text))
    assert message in caught.value.message


def test_a_fixed_dimension_stays_as_the_model_has_it() -> None:
    text = parameters("A:1x2", "A:4x2", "A:8x2")
    fixed = dataclasses.replace(
        config(text), inputs=tuple(dataclasses.replace(each, dims=(3,)) for each in config(text).inputs)
    )
    with pytest.raises(errors.InvalidArgument, match="must have 3 as dimension 1, which the model fixes"):
        profile(fixed)


def test_any_of_several_profiles_will_do() -> None:
    small = {name: Range((1, 1), (1, 1), (1, 1)) for name in "AB"}
    assert shortfall(config(SHAPES), (small, BOTH)) == ""
    assert shortfall(config(SHAPES), (small,)).startswith("it takes at most 1 rows")

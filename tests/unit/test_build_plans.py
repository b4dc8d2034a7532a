"""Building plans with the fake TensorRT: what it is asked for, what is kept, and what becomes of failures."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gateway import errors
from gateway.artefacts import Artefact
from gateway.build import plans, qdq
from gateway.build.plans import Order, Target, build, target
from gateway.engines.tensorrt import packages, plan
from gateway.engines.tensorrt.fakes import api, builder
from gateway.engines.tensorrt.fakes.cuda import GPU
from tests.tensorrt_support import add_sub, opened, pair, right, run, spec

SHAPES = "".join(
    f"parameters {{ key: 'trt_profile_{key}_shapes' value {{ string_value: 'A:{shape},B:{shape}' }} }}"
    for key, shape in (("min", "1x1"), ("opt", "4x8"), ("max", "8x16"))
)
HERE = Target(packages.FAKE, "")


def quiet(_what: str, _share: float) -> None:
    """Progress nobody looks at."""


@pytest.fixture
def order(tmp_path: Path) -> Order:
    add_sub(tmp_path / "model.onnx")
    GPU.reset()
    return Order(spec(tmp_path, SHAPES, "model.onnx"))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The network and the configuration of every build."""
    seen: list[tuple] = []
    original = builder.Builder.build_serialized_network

    def build_serialized_network(self, network, config):
        seen.append((network, config))
        return original(self, network, config)

    monkeypatch.setattr(builder.Builder, "build_serialized_network", build_serialized_network)
    return seen


async def test_a_plan_that_was_built_is_found_and_served(order: Order) -> None:
    with pytest.raises(plan.PlanMissing):
        plan.find(order.spec, "")
    made = build(order, HERE, quiet)
    assert plan.find(order.spec, "") == made
    assert made.info is not None
    assert (made.info.package, made.info.version, made.info.precision, made.info.executed) == (
        "fake",
        "10.0",
        "FP32",
        False,
    )
    async with opened(order.spec) as (engine,):
        assert engine.provider == "TensorRT-fake"
        assert right(pair(3, 5), await run(engine, **pair(3, 5)))


def test_the_shapes_of_the_configuration_are_the_profile(order: Order, built) -> None:
    build(order, HERE, quiet)
    ((_, config),) = built
    (profile,) = config.profiles
    assert profile.shapes == {name: [(1, 1), (4, 8), (8, 16)] for name in ("A", "B")}


def test_observed_shapes_fill_open_dimensions_and_are_remembered(order: Order, built) -> None:
    given = spec(order.spec.path, "", "model.onnx")
    with pytest.raises(errors.InvalidArgument, match="'A' of model 'm' has an open dimension"):
        build(Order(given), HERE, quiet)
    build(Order(given, observed={name: [(1, 3), (1, 9)] for name in ("A", "B")}), HERE, quiet)
    build(Order(given, again=True), HERE, quiet)  # as the server does, which has seen nothing
    for _, config in built:
        assert config.profiles[0].shapes["A"] == [(1, 3), (8, 9), (8, 9)]


@pytest.mark.parametrize(("version", "flags"), [("10.13.3.9", 2), ("11.4.0", 0)])
def test_a_network_is_strongly_typed_by_a_flag_on_10_and_always_after(
    order: Order, built, monkeypatch: pytest.MonkeyPatch, version: str, flags: int
) -> None:
    monkeypatch.setattr(api, "__version__", version)
    if version.startswith("11"):
        monkeypatch.delattr(api, "NetworkDefinitionCreationFlag")
    build(order, HERE, quiet)
    assert built[0][0].flags == flags


def test_the_workspace_is_as_tritons_parameter_says(order: Order, built) -> None:
    def accelerator(size: str) -> str:
        return (
            "optimization { execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' parameters { key: "
            f"'max_workspace_size_bytes' value: '{size}' }} }} }} }}"
        )

    build(Order(spec(order.spec.path, SHAPES + accelerator("4096"), "model.onnx")), HERE, quiet)
    assert built[0][1].pools == {builder.MemoryPoolType.WORKSPACE: 4096}
    with pytest.raises(errors.InvalidArgument, match="must be a whole number, got 'much'"):
        build(Order(spec(order.spec.path, SHAPES + accelerator("much"), "model.onnx"), again=True), HERE, quiet)


def test_kernel_times_are_kept_and_those_of_another_gpu_are_not_used(order: Order, built) -> None:
    made = build(order, HERE, quiet)
    times = made.path.parent / "fake-10.0-sm.timing"
    assert times.read_bytes() == b"timed;"
    again = Order(order.spec, again=True)
    build(again, HERE, quiet)
    assert times.read_bytes() == b"timed;timed;"
    times.write_bytes(b"other")
    build(again, HERE, quiet)
    assert times.read_bytes() == b"timed;"


def test_nothing_is_built_twice_unless_that_is_asked_for(order: Order, built) -> None:
    first = build(order, HERE, quiet)
    told = []
    assert build(order, HERE, lambda what, share: told.append((what, share))) == first
    assert len(built) == 1
    assert told == [("there is a plan already", 1.0)]
    build(Order(order.spec, again=True), HERE, quiet)
    assert len(built) == 2


def test_builders_of_one_version_wait_for_each_other(order: Order, built) -> None:
    together = threading.Barrier(3)
    made = []

    def one() -> None:
        together.wait()
        made.append(build(order, HERE, quiet))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert {each.path for each in made} == {made[0].path}


def test_progress_is_told_from_the_check_to_the_end(order: Order) -> None:
    told = []
    build(order, HERE, lambda what, share: told.append((what, share)))
    assert told == [
        ("checking the file", 0.0), ("parsing", 0.0), ("Building", 0.0), ("Building", 0.5), ("Building", 1.0), ("Building", 1.0),
    ]  # fmt: skip


def test_a_new_model_file_makes_the_plan_stale_and_the_next_build_drops_it(order: Order) -> None:
    old = build(order, HERE, quiet)
    other = build(order, Target(packages.FAKE, "80"), quiet)
    assert other.path != old.path or other.info == old.info
    model = onnx.load(order.spec.path / "model.onnx")
    model.doc_string = "changed"
    onnx.save(model, order.spec.path / "model.onnx")
    with pytest.raises(plan.PlanMissing, match="another model file"):
        plan.find(order.spec, "")
    new = build(order, HERE, quiet)
    assert plan.find(order.spec, "") == new
    assert not old.path.exists()
    assert {path.suffix for path in new.path.parent.iterdir()} == {".plan", ".json", ".timing", ""}


def test_plans_for_other_devices_stay(order: Order) -> None:
    made = build(order, Target(packages.FAKE, "80"), quiet)
    build(Order(order.spec, again=True), Target(packages.FAKE, "90"), quiet)
    assert {info.sm for _, info in plan.kept(order.spec.path)} == {"80", "90"}
    assert made.path.exists()


def test_an_artefact_is_built_from_beside_the_model(order: Order) -> None:
    add_sub(order.spec.path / "artefacts/1/trt-int8.onnx")
    artefact = Artefact("trt-int8", "artefacts/1/trt-int8.onnx", "tensorrt", "INT8")
    given = spec(order.spec.path, SHAPES, "model.onnx", artefact=artefact)
    made = build(Order(given, "INT8"), HERE, quiet)
    assert made.path.name.startswith("trt-int8-")
    assert (plan.find(given, "").path, made.info.precision) == (made.path, "INT8")
    with pytest.raises(plan.PlanMissing):
        plan.find(order.spec, "")


# --- failures


def test_the_rules_are_checked_before_tensorrt_sees_the_file(order: Order, built) -> None:
    nodes = [helper.make_node("DynamicQuantizeLinear", ["A"], ["q", "s", "z"], name="n")]
    model = onnx.load(order.spec.path / "model.onnx")
    model.graph.node.extend(nodes)
    onnx.save(model, order.spec.path / "model.onnx")
    with pytest.raises(
        errors.InvalidArgument, match=r"TensorRT does not take 'model\.onnx': 'n': is dynamic quantization"
    ):
        build(order, HERE, quiet)
    assert built == []


def test_what_the_parser_says_is_told(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdq, "require", lambda _file: None)
    model = onnx.load(order.spec.path / "model.onnx")
    model.graph.initializer.append(numpy_helper.from_array(np.int32([1]), "bias"))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["bias", "A"], ["b"]))
    onnx.save(model, order.spec.path / "model.onnx")
    with pytest.raises(errors.InvalidArgument) as caught:
        build(order, HERE, quiet)
    assert caught.value.message == (
        "TensorRT does not take 'model.onnx': DequantizeLinear 'node': input has type Int32 but must have type Int8"
    )


def test_a_build_that_fails_leaves_the_old_plan_in_place(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(order, HERE, quiet)
    before = sorted(path.name for path in made.path.parent.iterdir())

    def fail(self, _network, _config) -> None:
        self._logger.log(builder.ILogger.ERROR, "no kernel in /usr/lib/x.so (In build at /_src/a.cpp:7)")

    monkeypatch.setattr(builder.Builder, "build_serialized_network", fail)
    with pytest.raises(errors.Unavailable) as caught:
        build(Order(order.spec, again=True), HERE, quiet)
    assert caught.value.message == "TensorRT could not build a plan of 'model.onnx': no kernel in <path>"
    assert sorted(path.name for path in made.path.parent.iterdir()) == before
    assert plan.find(order.spec, "") == made


def test_only_onnx_files_are_built_from(order: Order) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"'model\.plan' is no ONNX file of m/1; name one"):
        build(Order(spec(order.spec.path, SHAPES, "model.plan")), HERE, quiet)


# --- what to build with


def no_driver() -> None:
    raise errors.Unavailable("no NVIDIA driver")


class FakeRtx:
    """The module tensorrt_rtx, as far as it says what it builds for."""

    class ComputeCapability:
        SM80 = SM89 = SM120 = NONE = 1


def test_tensorrt_rtx_builds_for_any_gpu_that_it_knows(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans.packages, "chosen", lambda _config: packages.RTX)
    monkeypatch.setattr(packages.Package, "api", lambda _self: FakeRtx)
    monkeypatch.setattr(plans.driver, "probe", no_driver)
    assert target(order.spec, "120") == Target(packages.RTX, "120", executes=False)
    assert target(order.spec) == Target(packages.RTX, plans.COMMON_SM, executes=False)
    here = plans.driver.Driver("13.0", (plans.driver.Gpu(0, "RTX A6000", "80", 1 << 36),))
    monkeypatch.setattr(plans.driver, "probe", lambda: here)
    assert target(order.spec) == Target(packages.RTX, "80", executes=True)
    with pytest.raises(errors.InvalidArgument) as caught:
        target(order.spec, "90")
    assert caught.value.message == (
        "TensorRT-RTX does not build for compute capability 90; it does for: 80, 89, 120. Other GPUs need TensorRT, on "
        "the GPU itself"
    )


def test_tensorrt_builds_for_the_gpu_that_is_there(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    here = plans.driver.Driver("13.0", (plans.driver.Gpu(0, "H100", "90", 1 << 36),))
    monkeypatch.setattr(plans.packages, "chosen", lambda _config: packages.TENSORRT)
    monkeypatch.setattr(plans.driver, "probe", lambda: here)
    assert target(order.spec) == target(order.spec, "90") == Target(packages.TENSORRT, "90")
    with pytest.raises(errors.InvalidArgument, match="that has compute capability 90, not 89; build on such a machine"):
        target(order.spec, "89")


def test_what_is_written_can_be_read_by_people(order: Order) -> None:
    made = build(order, HERE, quiet)
    text = plan.described_by(made.path).read_text()
    assert "\n" in text
    assert msgspec.json.decode(text)["profiles"][0]["A"] == {"least": [1, 1], "best": [4, 8], "greatest": [8, 16]}

"""Where instances go, and how many cores there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway import errors
from gateway.config.build import build
from gateway.config.model import InstanceGroup, ModelConfig
from gateway.config.parse import Source, parse_text
from gateway.placement import Device, Placement, cpu_cores, devices, plan

PYTHON = """
backend: "python"
input { name: "IN" data_type: TYPE_FP32 dims: 1 }
output { name: "OUT" data_type: TYPE_FP32 dims: 1 }
"""
CPU = Device("cpu", "cpu", 4)
GPUS = [Device("gpu:0", "gpu", 1), Device("gpu:1", "gpu", 1)]


def config(*groups: InstanceGroup, backend: str = "fake", **parameters: str) -> ModelConfig:
    return ModelConfig(
        name="m", backend=backend, platform="", max_batch_size=8, inputs=(), outputs=(), instance_groups=groups,
        batching=None, warmup=(), default_model_filename="", parameters=parameters, execution_providers=(),
        decoupled=False, proto=None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["cpu", "auto"])
@pytest.mark.parametrize(
    ("count", "instances", "threads"), [(0, 4, 1), (1, 1, 4), (2, 2, 2), (3, 3, 1), (4, 4, 1), (9, 9, 1)]
)
def test_cpu_instances_divide_the_cores(kind: str, count: int, instances: int, threads: int) -> None:
    assert plan(config(InstanceGroup(kind, count)), [CPU]) == [Placement(CPU, instances, threads, 4, threads)]


def test_no_group_at_all_is_one_of_kind_auto() -> None:
    assert plan(config(), [CPU]) == [Placement(CPU, 4, 1, 4, 1)]


def test_groups_on_one_device_share_it() -> None:
    groups = (InstanceGroup("cpu", 1), InstanceGroup("cpu", 1))
    assert plan(config(*groups), [CPU]) == [Placement(CPU, 2, 2, 4, 2)]


@pytest.mark.parametrize("kind", ["gpu", "auto"])
def test_gpu_groups_go_on_every_gpu_or_on_those_named(kind: str) -> None:
    assert plan(config(InstanceGroup(kind)), [CPU, *GPUS]) == [Placement(gpu, 1, 1, 1, 4) for gpu in GPUS]
    assert plan(config(InstanceGroup(kind, 2, (1,))), [CPU, *GPUS]) == [Placement(GPUS[1], 2, 1, 1, 2)]


def test_auto_falls_to_the_cpu_where_a_named_gpu_is_missing() -> None:
    assert plan(config(InstanceGroup("auto", 1, (7,))), [CPU, *GPUS]) == [Placement(CPU, 1, 4, 4, 4)]


@pytest.mark.parametrize(
    ("group", "available", "words"),
    [
        (InstanceGroup("gpu"), [CPU], "gpu id any. GPUs this gateway can use: none"),
        (InstanceGroup("gpu", 1, (0, 7)), [CPU, *GPUS], "gpu id 7. GPUs this gateway can use: gpu:0, gpu:1"),
    ],
)
def test_a_gpu_that_is_not_there_is_unavailable_with_a_remedy(group, available, words) -> None:
    with pytest.raises(errors.Unavailable) as caught:
        plan(config(group), available)
    assert words in caught.value.message
    assert "KIND_CPU" in caught.value.message


@pytest.mark.parametrize(
    ("backend", "fallback", "moves"),
    [
        ("onnxruntime", "", True), ("onnxruntime", "none", False), ("tensorrt", "", False), ("tensorrt", "cpu", True),
    ],
)  # fmt: skip
def test_the_cpu_stands_in_for_a_missing_gpu_where_the_model_may_fall_back(
    backend: str, fallback: str, moves: bool
) -> None:
    asked = config(InstanceGroup("gpu", 2, (1, 7)), backend=backend, fallback=fallback)
    if moves:
        assert plan(asked, [CPU, *GPUS]) == [Placement(GPUS[1], 2, 1, 1, 2), Placement(CPU, 2, 2, 4, 2, "gpu:7")]
        assert plan(config(InstanceGroup("gpu"), backend=backend, fallback=fallback), [CPU]) == [
            Placement(CPU, 1, 4, 4, 4, "gpu:0")
        ]
    else:
        with pytest.raises(errors.Unavailable):
            plan(asked, [CPU, *GPUS])


AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/", {}, AFFINITY),
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, AFFINITY),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "100000000 100000"}, AFFINITY),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "199000 100000"}, 1),
        ("0::/not/here", {"cpu.max": "100000 100000"}, 1),
        ("0::/../x", {"cpu.max": "100000 100000"}, 1),
        ("4:cpu,cpuacct:/d\n3:memory:/", {
            "cpu,cpuacct/d/cpu.cfs_quota_us": "100000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"}, 1),
        ("9:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, AFFINITY),
        ("8:cpuacct:/\n7:cpuset:/", {"cpuacct/cpu.cfs_quota_us": "1", "cpuacct/cpu.cfs_period_us": "1"}, AFFINITY),
    ],
)  # fmt: skip
def test_cores_come_from_the_quota_and_the_affinity(tmp_path: Path, cgroup: str, files, cores: int) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup + "\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert cpu_cores(tmp_path) == cores


def test_a_quota_of_some_cores_counts_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("250000 100000\n")
    assert cpu_cores(tmp_path) == 2


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert cpu_cores(tmp_path) == AFFINITY


def test_the_cpu_is_one_device() -> None:
    (cpu,) = devices()
    assert (cpu.name, cpu.kind) == ("cpu", "cpu")
    assert 1 <= cpu.cores <= AFFINITY
    assert devices(3)[0].cores == 3  # as the operator says, whatever is there


def test_code_is_there_once_and_its_runs_have_one_core() -> None:
    proto = parse_text(Source("config.pbtxt", PYTHON))
    proto.name = "m"
    assert plan(build(proto, Source("config.pbtxt")), [CPU]) == [Placement(CPU, 1, 1, 4)]
    proto.instance_group.add(count=2)
    assert plan(build(proto, Source("config.pbtxt")), [CPU]) == [Placement(CPU, 2, 1, 4)]

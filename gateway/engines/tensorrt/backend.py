"""The TensorRT backend: runs plans on NVIDIA GPUs by TensorRT's own interface, 10 and 11, and TensorRT-RTX's.

All engines of a version on a device share the deserialized plan; each has a stream, buffers and contexts of its own,
so that with `instance_group { count: 2 }` one copies while the other computes. The precision is the artefact's. With
`optimization { cuda { graphs: true } }` shapes that come again run as CUDA graphs. Asks the driver, in a child, before
TensorRT is touched. Builds no plan: see `PlanMissing`.
"""

from __future__ import annotations

import numpy as np

from gateway import errors
from gateway.config.fit import check_fit
from gateway.engines import driver
from gateway.engines.base import EngineCrashed, EngineSpec
from gateway.engines.tensorrt import packages, plan, profiles
from gateway.engines.tensorrt.cuda import Cuda
from gateway.engines.tensorrt.execution import Execution
from gateway.engines.tensorrt.loaded import LoadedPlan
from gateway.engines.tensorrt.packages import Package
from gateway.types import Array, Batch

RUNTIME = f"tensorrt {packages.TENSORRT.version() or packages.RTX.version()}".strip()


def load(spec: EngineSpec, count: int) -> list[PlanModel]:
    """Load a version's plan and return one model for each of `count` engines. Blocking.

    Raises `PlanMissing` when a plan must be built first, `Unavailable` without a driver, a GPU, the packages or a plan
    that fits, `Unsupported` for a plan that cannot be run here and `DeviceOutOfMemory` when there is not the memory.
    """
    index = _gpu(spec)
    found = plan.find(spec, _capability(packages.chosen(spec.config), index))
    package = packages.named(found.package)
    _capability(package, index)
    cuda = Cuda(package.cuda(), index)
    cuda.select()
    loaded = LoadedPlan(package, found.path.read_bytes(), _label(spec))
    check_fit(spec.config, loaded.io)
    if missing := profiles.shortfall(spec.config, loaded.profiles):
        raise errors.Unavailable(f"{_label(spec)}: the plan does not fit: {missing}; build it again")
    graphs = spec.config.proto.optimization.cuda.graphs
    return [PlanModel(spec, package, loaded, Execution(cuda, loaded, graphs=graphs)) for _ in range(count)]


class PlanModel:
    """One engine's use of a plan."""

    widest = 1
    warnings: tuple[str, ...] = ()

    def __init__(self, spec: EngineSpec, package: Package, loaded: LoadedPlan, execution: Execution) -> None:
        self.provider = package.provider
        self.execution = execution
        self._name = spec.config.name
        self._outputs = [tensor.name for tensor in spec.config.outputs]
        # A configuration has no word for a scalar: clients see dims [1], and the dimension goes and comes here.
        self._scalars = {tensor.name for tensor in (*loaded.io.inputs, *loaded.io.outputs) if not tensor.shape}
        self._lost: EngineCrashed | None = None

    def compute(self, inputs: dict[str, Array], batch: Batch) -> dict[str, Array]:
        """See `Loaded.compute`. Raises what `Execution.run` does; after `EngineCrashed`, only that."""
        if self._lost is not None:
            raise EngineCrashed(f"model '{self._name}': {self._lost}; this process can use the GPU no more", sure=False)
        names = list(batch.outputs) or self._outputs
        feed = {name: array.reshape(()) if name in self._scalars else array for name, array in inputs.items()}
        try:
            outputs = self.execution.run(feed, names)
        except EngineCrashed as problem:
            self._lost = problem
            raise
        return {name: np.atleast_1d(array) if name in self._scalars else array for name, array in outputs.items()}

    def interrupt(self) -> None:
        """Nothing: a run on a GPU cannot be interrupted, and is over soon."""


def _gpu(spec: EngineSpec) -> int:
    if spec.device.startswith("gpu:"):
        return int(spec.device.removeprefix("gpu:"))
    if packages.chosen(spec.config).builtin:
        return 0
    driver.probe()  # whose reason, if it has one, says more
    raise errors.Unavailable(
        f"{_label(spec)} runs on a GPU, and this instance is placed on the CPU; remove KIND_CPU from its instance_group"
    )


def _capability(package: Package, index: int) -> str:
    """The compute capability of a GPU, by the driver, which is thereby known to work."""
    return "" if package.builtin else driver.probe().gpu(index).sm


def _label(spec: EngineSpec) -> str:
    return f"{spec.config.name}/{spec.version}/{plan.source(spec)}"

"""The ONNX Runtime backend: sessions, and arrays in and out of them.

One version on one device has one narrow session (`spec.threads`) and, when a lone run may use more cores, a
wide one; all engines of the version share both, since a session may be run from many threads. A run with
`batch.cores` of the whole device takes the wide one. Options a Triton `config.pbtxt` gives its onnxruntime
backend are honoured. It promises errors without paths, and that no session changes its execution provider in silence:
what runs elsewhere than it was asked to is refused (`spec.provider`) or warned of. It does not batch, check shapes or
choose devices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument as OrtInvalidArgument

from gateway import errors
from gateway.config.fit import check_fit
from gateway.config.model import ModelConfig, TensorConfig
from gateway.devices.cpu import core_cache
from gateway.engines import cores, cuda_faults, depth_first, driver, providers, tensors
from gateway.engines.base import EngineSpec
from gateway.engines.isolated.golden import alike
from gateway.types import Array, Batch, DataType, ModelIO, TensorSpec

Session: TypeAlias = Any  # onnxruntime.InferenceSession, which has no stubs

RUNTIME = f"onnxruntime {ort.__version__}"

_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_LEVELS = {  # Triton's optimization.graph.level
    "-1": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "1": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "2": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_AFFINITIES = "session.intra_op_thread_affinities"
_FEW = 64  # sizes of batches
_IMAGE = 1 << 14  # numbers: smaller inputs have no activations that leave a cache
_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_SOURCE = re.compile(r"\S+\.(?:cc|cpp|cu|h):\d+ (?:[^()\n]*::[^()\n]*\([^()\n]*\)(?: const)? )?")
_PATH = re.compile(r"(?<![\w.])(?:/[\w.+-]+){2,}")


def load(spec: EngineSpec, count: int) -> list[OnnxModel]:
    """Load a version and return one model for each of `count` engines, sharing sessions. Blocking.

    Raises `Unavailable` for a file that is missing or does not load and for a `spec.provider` that does not start
    here, `InvalidArgument` for a configuration that does not fit the file.
    """
    _prepare()
    name = spec.artefact.file if spec.artefact else spec.config.default_model_filename or "model.onnx"
    label = f"{spec.config.name}/{spec.version}/{name}"
    asked = _startable(spec, label)
    fixed = _whole(spec.config, "intra_op_thread_count")
    threads = fixed or spec.threads
    elastic = not fixed and spec.cores > spec.threads
    narrow = _session(spec.path / name, label, _options(spec.config, threads), asked)
    _require(spec, label, narrow)
    io = _describe(narrow, label)
    check_fit(spec.config, io)
    warnings = _fallback(spec, narrow.get_providers()[0])
    if threads == 1 and _may_be_depth_first(spec, narrow):
        narrow, more = _depth_first(spec, spec.path / name, narrow)
        warnings += more
    wide = None
    if elastic:
        options = _options(spec.config, spec.cores, alone=True)
        wide = _session(spec.path / name, label, options, asked)
    return [OnnxModel(spec, io, narrow, wide, warnings) for _ in range(count)]


def describe(path: Path) -> ModelIO:
    """What an ONNX file takes and gives, batch dimension included; -1 for each named or unknown dimension.

    ONNX Runtime tells a tensor of unknown rank and a scalar alike: both have the shape (). Blocking. Raises
    `Unavailable` when the file does not load, `Unsupported` for an input or output that is not a tensor.
    """
    _prepare()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    return _describe(_session(path, path.name, options, [(providers.CPU, {})]), path.name)


class OnnxModel:
    """One engine's use of the sessions of a version."""

    def __init__(
        self, spec: EngineSpec, io: ModelIO, narrow: Session, wide: Session | None, warnings: tuple[str, ...]
    ) -> None:
        self.provider: str = narrow.get_providers()[0]
        self.warnings = warnings
        self.widest = spec.threads if wide is None else spec.cores
        self.wide_runs = 0  # runs that had every core
        self._cores = spec.cores
        self._config = spec.config
        self._narrow = narrow
        self._wide = wide
        places = () if _AFFINITIES in spec.config.parameters else cores.places(spec.cores)
        self._home = places[0] if places else None  # of the thread that calls for a run on all cores
        self._outputs = [tensor.name for tensor in spec.config.outputs]
        self._text = _named(spec.config.inputs, DataType.BYTES)
        self._bf16 = _named(spec.config.inputs, DataType.BF16)
        # A configuration has no word for a scalar: clients see dims [1], and the dimension goes and comes here.
        self._scalars = {tensor.name for tensor in (*io.inputs, *io.outputs) if not tensor.shape}
        # Only OrtValues carry BF16, and they cost more, so only a model that has any pays for them.
        self._by_value = bool(self._bf16 or _named(spec.config.outputs, DataType.BF16))
        if self._by_value and self._text:
            raise errors.Unsupported(
                f"model '{spec.config.name}' has BYTES inputs and BF16 tensors, which ONNX Runtime's Python interface "
                "cannot pass together; cast BF16 to FP32 at the model's edge"
            )
        self._options = _run_options(spec.config)

    def compute(self, inputs: dict[str, Array], batch: Batch) -> dict[str, Array]:
        """See `Loaded.compute`. Raises `InvalidArgument` or `Internal` in ONNX Runtime's words, without paths."""
        names = list(batch.outputs) or self._outputs
        session = self._pick(batch.cores)
        feed = {name: self._encode(name, array) for name, array in inputs.items()}
        try:
            with cores.stay(self._home if session is self._wide else None):
                arrays = self._run(session, names, feed)
        except Exception as problem:  # ONNX Runtime's exceptions have no other common base
            raise self._explain(problem) from problem
        return {name: self._decode(name, array) for name, array in zip(names, arrays, strict=True)}

    def interrupt(self) -> None:
        """Have a run in progress end before its next operator."""
        self._options.terminate = True

    def _run(self, session: Session, names: list[str], feed: dict[str, Any]) -> list[Array]:
        if not self._by_value:
            return session.run(names, feed, self._options)  # type: ignore[no-any-return]
        values = session.run_with_ort_values(names, tensors.to_values(feed, self._bf16), self._options)
        return [tensors.from_value(value) for value in values]

    def _pick(self, cores: int) -> Session:
        if self._wide is None or cores < self._cores:
            return self._narrow
        self.wide_runs += 1
        return self._wide

    def _encode(self, name: str, array: Array) -> Array:
        if name in self._scalars:
            array = array.reshape(())
        if name not in self._text:
            return tensors.aligned(array)
        try:
            return tensors.to_text(array)
        except UnicodeDecodeError:
            raise errors.InvalidArgument(
                f"input '{name}' of model '{self._config.name}' holds a string that is not UTF-8, and an ONNX model "
                "takes no other; send UTF-8, or binary data as base64"
            ) from None

    def _decode(self, name: str, array: Array) -> Array:
        array = tensors.to_bytes(array)
        return array.reshape(1) if name in self._scalars and not array.shape else array

    def _explain(self, problem: Exception) -> Exception:
        if self._options.terminate:
            return errors.Unavailable(
                f"model '{self._config.name}' was unloaded during the run; send the request again"
            )
        text = f"model '{self._config.name}' failed: {_plain(str(problem))}"
        if isinstance(problem, OrtInvalidArgument):
            return errors.InvalidArgument(text)
        return cuda_faults.from_text(text) or errors.Internal(text)


def _named(tensor_configs: Sequence[TensorConfig], datatype: DataType) -> set[str]:
    return {tensor.name for tensor in tensor_configs if tensor.datatype is datatype}


def _prepare() -> None:
    """What holds for the process: one onnxruntime, no telemetry, quiet unless something is wrong."""
    installed = [name for name in _DISTRIBUTIONS if _installed(name)]
    if len(installed) > 1:
        raise errors.Unavailable(
            f"{' and '.join(installed)} are installed together and overwrite each other's files; run "
            f"`pip uninstall -y {' '.join(installed)}`, then install one: 'lockgate[cpu]' or 'lockgate[gpu]'"
        )
    ort.disable_telemetry_events()
    ort.set_default_logger_severity(3)


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _startable(spec: EngineSpec, label: str) -> list[providers.Asked]:
    """The wanted providers that this build has. Raises `Unavailable` where one that must be is known not to start."""
    available = ort.get_available_providers()
    if spec.provider not in ("", *available):
        raise _refusal(spec, label, providers.CPU)
    asked = [each for each in providers.wanted(spec) if each[0] in available]
    if not any(name in providers.NVIDIA for name, _ in asked):
        return asked
    try:
        driver.probe()
    except errors.Unavailable as problem:
        if spec.provider in providers.NVIDIA:  # before a big model is loaded onto the CPU for nothing
            raise _refusal(spec, label, providers.CPU) from problem
        return [each for each in asked if each[0] not in providers.NVIDIA]
    ort.preload_dlls()  # the CUDA libraries that pip installs are where no linker looks
    return asked


def _session(path: Path, label: str, options: Any, asked: Sequence[providers.Asked]) -> Session:
    """A session with these providers, or with those that are left when the first does not start."""
    if not path.is_file():
        raise errors.Unavailable(f"{label} is missing; put the model there, or set default_model_filename")
    try:
        # ONNX Runtime's own fallback would print, go on, and do so again in the middle of a run.
        return ort.InferenceSession(path, options, providers=asked, enable_fallback=0)
    except Exception as problem:  # ONNX Runtime's exceptions have no other common base
        if len(asked) > 1:
            return _session(path, label, options, asked[1:])
        reason = _plain(str(problem).replace(str(path), label))
        raise errors.Unavailable(
            f"{label} does not load in ONNX Runtime {ort.__version__}: {reason}. Check that the file is whole, "
            "or export it again for this version"
        ) from problem


def _may_be_depth_first(spec: EngineSpec, session: Session) -> bool:
    """Whether the operator leaves the graph to us, and it could be a convolutional network in FP32 that has batches."""
    inputs = session.get_inputs()
    return (
        session.get_providers() == [providers.CPU]
        and spec.config.max_batch_size > 1
        and spec.config.parameters.get("depth_first") != "0"
        and not spec.config.proto.optimization.HasField("graph")
        and (spec.artefact is None or spec.artefact.precision == "FP32")
        # Memory that runs out in the middle would end the process: protobuf does not ask whether there is some.
        and spec.config.parameters.get("memory_limit_mb", "0") == "0"
        and all(tensor.type != "tensor(bfloat16)" for tensor in session.get_outputs())
        and len(inputs) == 1
        and len(inputs[0].shape) == 4
        and all(isinstance(size, int) for size in inputs[0].shape[1:])
        and math.prod(inputs[0].shape[1:]) >= _IMAGE
    )


def _depth_first(spec: EngineSpec, path: Path, plain: Session) -> tuple[Session, tuple[str, ...]]:
    """A session that takes a batch's first layers row by row, where that pays; else `plain`, and a warning if it should."""
    try:
        cache = core_cache()
        model = depth_first.rewritten(path, spec.config.max_batch_size, cache) if cache else None
        if model is None:
            return plain, ()
        session = ort.InferenceSession(model, _options(spec.config, 1), providers=[providers.CPU], enable_fallback=0)
        session._model_bytes = None  # noqa: SLF001 - kept for the fallback, which is off
        expected = _answers_to_noise(plain)
        if all(map(alike, expected, _answers_to_noise(session))):
            return session, ()
        steady = all(map(alike, expected, _answers_to_noise(plain)))
    except ImportError:
        return plain, ()  # onnx comes with 'lockgate[cpu]'; without it models run as they are
    except Exception as problem:  # noqa: BLE001 - whatever went wrong, the model works as it is
        why = _plain(str(problem)) or type(problem).__name__
        return plain, (f"runs without depth-first batches: {why}",)
    if not steady:
        return plain, ()  # nobody can tell: it answers differently each time
    return plain, ("runs without depth-first batches, with which its answers differ; report this with the model",)


def _answers_to_noise(session: Session) -> list[Array]:
    tensor = session.get_inputs()[0]
    noise = np.random.default_rng(0).standard_normal((2, *tensor.shape[1:])).astype("<f4")
    answers: list[Array] = session.run(None, {tensor.name: noise})
    return answers


def _require(spec: EngineSpec, label: str, session: Session) -> None:
    if spec.provider not in ("", session.get_providers()[0]):
        raise _refusal(spec, label, session.get_providers()[0])


def _refusal(spec: EngineSpec, label: str, got: str) -> errors.Unavailable:
    return errors.Unavailable(
        f"{label} must run on {spec.provider}, and ONNX Runtime would run it on {got}: {_why_not(spec.provider)}"
    )


def _why_not(provider: str) -> str:
    return providers.why_not(provider, ort.get_available_providers(), Path(ort.__file__).parent / "capi")


def _options(config: ModelConfig, threads: int, *, alone: bool = False) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = _whole(config, "inter_op_thread_count") or 1
    if config.parameters.get("execution_mode") == "1":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.graph_optimization_level = _LEVELS.get(
        str(config.proto.optimization.graph.level), ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    options.enable_cpu_mem_arena = config.parameters.get("enable_mem_arena") != "0"
    # A pattern is kept for every shape ever seen. Where they are few, runs take 2 % less (EfficientNet); with open
    # dimensions memory grows, and nothing gets quicker (200 runs of MiniLM: 67 MB of growth, 46 without, in the same time).
    kept = "1" if _has_few_shapes(config) else "0"
    options.enable_mem_pattern = config.parameters.get("enable_mem_pattern", kept) == "1"
    # Spinning threads take the cores of other sessions and of the event loop. A run that has every core has nobody
    # to take them from while it lasts (EfficientNet alone: 11.6 ms spinning, 15.2 not).
    spins = "1" if alone else "0"
    entries = {
        "session.intra_op.allow_spinning": spins,
        "session.force_spinning_stop": spins,  # when the run ends
        "session.inter_op.allow_spinning": "0",
    }
    if alone and (places := cores.places(threads)):
        entries[_AFFINITIES] = ";".join(str(core + 1) for core in places[1:])  # but the caller's; counted from 1
    entries |= {key: value for key, value in config.parameters.items() if key.startswith("session.")}
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def _has_few_shapes(config: ModelConfig) -> bool:
    """Whether runs differ by the size of their batch alone, and there are not many of those."""
    return config.max_batch_size <= _FEW and not any(tensor.ragged or -1 in tensor.dims for tensor in config.inputs)


def _run_options(config: ModelConfig) -> Any:
    options = ort.RunOptions()
    options.log_severity_level = 4  # a failed run raises; logging it too would let clients fill the log
    shrinkage = "memory.enable_memory_arena_shrinkage"
    if shrinkage in config.parameters:
        options.add_run_config_entry(shrinkage, config.parameters[shrinkage])
    return options


def _whole(config: ModelConfig, key: str) -> int:
    """A parameter that is a count; 0, Triton's word for "you choose", when it is absent."""
    text = config.parameters.get(key, "0")
    if not text.isdecimal():
        raise errors.InvalidArgument(
            f"parameter '{key}' of model '{config.name}' must be a whole number, got '{text}'; correct it in config.pbtxt"
        )
    return int(text)


def _fallback(spec: EngineSpec, provider: str) -> tuple[str, ...]:
    best = providers.wanted(spec)[0][0]
    return () if best == provider else (f"runs on {provider} and not on {best}: {_why_not(best)}",)


def _describe(session: Session, label: str) -> ModelIO:
    return ModelIO(
        (
            *(_spec(node, "input", label) for node in session.get_inputs()),
            *(replace(_spec(node, "input", label), optional=True) for node in session.get_overridable_initializers()),
        ),
        tuple(_spec(node, "output", label) for node in session.get_outputs()),
    )


def _spec(node: Any, kind: str, label: str) -> TensorSpec:
    if node.type not in tensors.DATATYPES:
        raise errors.Unsupported(
            f"{label}: {kind} '{node.name}' is a {node.type}, which the protocol cannot carry; export the model with "
            "tensors of its types (for a scikit-learn classifier: without ZipMap)"
        )
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    return TensorSpec(node.name, tensors.DATATYPES[node.type], shape)


def _plain(text: str) -> str:
    """ONNX Runtime's message without its error code, C++ source places, and paths."""
    return " ".join(_PATH.sub("<path>", _SOURCE.sub("", _PREFIX.sub("", text))).split())[:500]

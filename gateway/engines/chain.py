"""Which engines a version can run on, best first: the links of its chain, from its configuration and its artefacts.

Without a word in the configuration the chain is, as far as its links exist for the version and the device: TensorRT,
the accelerators that it names (CUDA if none), the CPU's best artefact, the model file on the CPU. The parameter `fallback`
says otherwise: "none" leaves the first link alone, a list such as "remote,cpu-int8,cpu" names them. A parameter
"LINK.KEY" is KEY for that link only. `links` is pure; `read` looks up the artefacts first. Nothing is loaded or tried.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from gateway import errors
from gateway.artefacts import Artefact
from gateway.engines.base import EngineSpec
from gateway.engines.choice import options

FILES = ("onnxruntime", "tensorrt")
"""The backends that run files which `gateway build` makes."""

CPU = "CPUExecutionProvider"

PRELOAD = "fallback.preload"
"""The parameter: "true" loads every link at once in the background, "false" each when it is needed. Without it links are
loaded as soon as the one before shows trouble, and at once behind a remote one, whose trouble is expected."""

_NATIVE = "tensorrt"
_ON_GPU = {"TensorrtExecutionProvider": "tensorrt-ep", "CUDAExecutionProvider": "cuda"}
_ON_CPU = {"OpenVINOExecutionProvider": "openvino", CPU: "cpu"}
_GPU_PLACES = (_NATIVE, *_ON_GPU.values())
_PLACES = (*_GPU_PLACES, *_ON_CPU.values())


@dataclass(frozen=True, slots=True)
class Link:
    """One way to run the version. Its engine is asked for exactly one backend, file and execution provider."""

    name: str  # "cuda", "cpu-int8", "remote", ...
    spec: EngineSpec


class Chain(NamedTuple):
    """The links, best first, at least one; and what the operator should know of those left out."""

    links: tuple[Link, ...]
    warnings: tuple[str, ...] = ()


def read(spec: EngineSpec, backends: Collection[str]) -> Chain:
    """The chain of a version, by the artefacts that are there. Blocking. Raises as `links`."""
    names = _named(spec)
    if spec.config.backend not in FILES and not any(_place(name) for name in names):
        return links(spec, (), (), backends)
    gpu = spec.device.startswith("gpu:") or any(_place(name) in _GPU_PLACES for name in names)
    chosen: dict[str, Sequence[Artefact]] = {"gpu": (), "cpu": ()}
    problem: errors.Unavailable | None = None
    for kind, device in (("gpu", _gpu(spec)), ("cpu", "cpu")) if gpu else (("cpu", "cpu"),):
        try:
            chosen[kind] = _artefacts(spec, device)
        except errors.Unavailable as nothing:  # of the precision that is pinned
            problem = problem or nothing
    if problem is not None and not any(chosen.values()):
        raise problem
    beside = _beside(spec)
    on_cpu = [*chosen["cpu"], *(each for each in beside if not _quantized(spec.path / each.file))]
    return links(spec, [*chosen["gpu"], *beside], on_cpu, backends)


def _beside(spec: EngineSpec) -> list[Artefact]:
    """The ONNX file of a model for TensorRT, which ONNX Runtime can run while there is no plan."""
    given = spec.config.default_model_filename
    name = given if given.endswith(".onnx") else "model.onnx"
    if spec.config.backend != _NATIVE or not (spec.path / name).is_file():
        return []
    return [Artefact("fp32", name, "onnxruntime", "FP32", verdict="passed")]


def _quantized(file: Path) -> bool:
    """Whether an ONNX file is in INT8: one made for TensorRT has other answers from a CPU's integer kernels."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"QuantizeLinear") >= 0


def _artefacts(spec: EngineSpec, device: str) -> list[Artefact]:
    backend = spec.config.backend if spec.config.backend in FILES else "onnxruntime"
    found = options(replace(spec, device=device, config=replace(spec.config, backend=backend)))
    return [each.artefact for each in found if each.artefact is not None]


def links(spec: EngineSpec, on_gpu: Sequence[Artefact], on_cpu: Sequence[Artefact], backends: Collection[str]) -> Chain:
    """The chain of a version. `on_gpu` and `on_cpu` are what may be run there, best first (`artefacts.choose`).

    Raises `InvalidArgument` for a parameter that means nothing, `Unavailable` when nothing is left to run.
    """
    if (preload := spec.config.parameters.get(PRELOAD, "true")) not in ("true", "false"):
        raise errors.InvalidArgument(
            f"parameter '{PRELOAD}' of model '{spec.config.name}' must be true or false, got '{preload}'; correct it in "
            "config.pbtxt, or leave it out"
        )
    known = _known(spec, on_gpu, on_cpu)
    names = _named(spec)
    if not names or names == ["none"]:
        found = tuple(_default(spec, known))
        return Chain(found[:1] if names else found) if found else _nothing(spec, "")
    chosen: list[Link] = []
    warnings: list[str] = []
    flat: dict[str, Link] = {}
    for link in chain.from_iterable(known.values()):
        flat.setdefault(link.name, link)  # of two artefacts of one precision the better
    for name in names:
        backend = name.partition(":")[0]
        if name in flat:
            chosen.append(flat[name])
        elif backend in backends and backend not in FILES:
            chosen.append(_link(name, spec, backend))
        elif _place(name):
            warnings.append(f"link '{name}' of parameter 'fallback' is left out: no such artefact may be run here")
        else:
            raise _meaningless(name, spec, [*flat, *(each for each in backends if each not in FILES)])
    return Chain(tuple(chosen), tuple(warnings)) if chosen else _nothing(spec, "; ".join(warnings))


def _named(spec: EngineSpec) -> list[str]:
    names = [name.strip() for name in spec.config.parameters.get("fallback", "").split(",")]
    return [*dict.fromkeys(name for name in names if name)]


def _place(name: str) -> str:
    """Where a link of this name runs files; empty for one that runs none."""
    return next(
        (place for place in sorted(_PLACES, key=len)[::-1] if name == place or name.startswith(f"{place}-")), ""
    )


def _gpu(spec: EngineSpec) -> str:
    return spec.device if spec.device.startswith("gpu:") else "gpu:0"


def _meaningless(name: str, spec: EngineSpec, there: list[str]) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"parameter 'fallback' of model '{spec.config.name}' names '{name}', which is no engine; there are here: "
        f"{', '.join(dict.fromkeys(there))}, and 'none'. Correct it in config.pbtxt"
    )


def _nothing(spec: EngineSpec, why: str) -> Chain:
    raise errors.Unavailable(
        f"model '{spec.config.name}' has nothing to run on {spec.device}{': ' * bool(why)}{why}; build an artefact for it "
        "with `gateway build`, or change instance_group or the parameter 'fallback' in config.pbtxt"
    )


def _known(spec: EngineSpec, on_gpu: Sequence[Artefact], on_cpu: Sequence[Artefact]) -> dict[str, list[Link]]:
    """Every link that there could be, by where it runs, best first."""
    own = spec.config.backend
    known = {} if own in FILES else {own: [_link(own, spec, own)]}
    there = replace(spec, device=_gpu(spec))
    here = spec
    if spec.device != "cpu":
        here = replace(spec, device="cpu", threads=spec.cpu_cores, cores=spec.cpu_cores)
    plans = [each for each in (*on_gpu, *on_cpu) if each.backend == "tensorrt"]
    known[_NATIVE] = [
        *_files(_NATIVE, spec if own == _NATIVE else there, "", plans)
    ]  # a model's own stays where it is put
    for providers, where, artefacts in ((_ON_GPU, there, on_gpu), (_ON_CPU, here, on_cpu)):
        for provider, place in providers.items():
            ran = [each for each in artefacts if each.backend == "onnxruntime"]
            known[place] = [*_files(place, where, provider, ran)]
    return known


def _files(place: str, spec: EngineSpec, provider: str, artefacts: Sequence[Artefact]) -> Iterator[Link]:
    given = spec.config.default_model_filename or "model.onnx"
    for artefact in artefacts:
        name = place if artefact.file == given else f"{place}-{artefact.precision.lower()}"
        own = replace(spec, artefact=artefact, provider=provider)
        yield _link(name, own, artefact.backend)


def _link(name: str, spec: EngineSpec, backend: str) -> Link:
    own = f"{name}."
    mine = {key.removeprefix(own): value for key, value in spec.config.parameters.items() if key.startswith(own)}
    config = replace(spec.config, backend=backend, parameters={**spec.config.parameters, **mine})
    return Link(name, replace(spec, config=config))


def _default(spec: EngineSpec, known: dict[str, list[Link]]) -> Iterator[Link]:
    if spec.config.backend not in FILES:
        yield from known[spec.config.backend]
        return
    asked = [_ON_GPU.get(provider) or _ON_CPU[provider] for provider in spec.config.execution_providers]
    if spec.device.startswith("gpu:") or spec.config.backend == _NATIVE:
        yield from known[_NATIVE][:1]
    if spec.device.startswith("gpu:"):
        for place in (place for place in asked if place in _ON_GPU.values()):
            yield from known[place][:1]
    for place in asked:
        if place == "openvino":
            yield from known[place][:1]
    on_cpu = known["cpu"]
    yield from on_cpu[:1]
    yield from (link for link in on_cpu[1:] if link.name == "cpu")

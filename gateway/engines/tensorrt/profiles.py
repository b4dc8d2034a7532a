"""The shapes that a plan is built for: for each input a least, a best and a greatest, from a model's configuration.

The batch goes from 1 to `max_batch_size` and is best at the largest preferred batch. A dimension that the
configuration leaves open has its range from the parameters `trt_profile_min_shapes`, `trt_profile_opt_shapes` and
`trt_profile_max_shapes` ("ids:1x8,mask:1x8", batch included, as ONNX Runtime has them), from the samples of
`model_warmup`, and from shapes that were observed. Pure functions.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec

from gateway import errors
from gateway.config.model import ModelConfig, TensorConfig
from gateway.engines.providers import TENSORRT

Shape: TypeAlias = tuple[int, ...]


class Range(msgspec.Struct, frozen=True):
    """The shapes of one input, batch dimension included, between two, and the one that matters most."""

    least: Shape
    best: Shape
    greatest: Shape

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether a shape lies in it."""
        return len(shape) == len(self.least) and all(
            low <= size <= high for low, size, high in zip(self.least, shape, self.greatest, strict=True)
        )

    def __str__(self) -> str:
        return f"{list(self.least)} to {list(self.greatest)}"


Profile: TypeAlias = Mapping[str, Range]
"""The range of each input."""

_KEYS = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")


def profile(config: ModelConfig, observed: Mapping[str, Sequence[Shape]] | None = None) -> Profile:
    """What a plan of this model is to be built for; `observed` are shapes of inputs that were seen, batch included.

    Raises `InvalidArgument` for a range that nothing tells, or that the configuration tells wrongly.
    """
    given = _given(config)
    return {
        tensor.name: _whole(config, tensor, given.get(tensor.name), (observed or {}).get(tensor.name, ()))
        for tensor in config.inputs
    }


def shortfall(config: ModelConfig, profiles: Sequence[Profile]) -> str:
    """What a plan with these profiles cannot do of what the configuration demands, in words; empty for nothing."""
    demands = _given(config)
    for tensor in config.inputs:
        ranges = [profile[tensor.name] for profile in profiles if tensor.name in profile]
        if not ranges:
            return f"it has no input '{tensor.name}'"
        widest = max(each.greatest[0] if each.greatest else 1 for each in ranges)
        if config.max_batch_size > widest:
            return f"it takes at most {widest} rows and max_batch_size is {config.max_batch_size}"
        demand = demands.get(tensor.name)
        if demand is not None and not any(each.holds(demand.least) and each.holds(demand.greatest) for each in ranges):
            return f"its input '{tensor.name}' takes {ranges[0]} and the configuration demands {demand}"
    return ""


def _whole(config: ModelConfig, tensor: TensorConfig, given: Range | None, observed: Sequence[Shape]) -> Range:
    dims = _dims(config, tensor)
    if given is not None:
        return _checked(config, tensor, given, dims)
    seen = [shape for shape in (*observed, *_warmups(config, tensor)) if len(shape) == len(dims)]
    axes = [_axis(config, tensor, axis, size, [shape[axis] for shape in seen]) for axis, size in enumerate(dims)]
    return Range(*(tuple(axis[place] for axis in axes) for place in range(3)))


def _axis(config: ModelConfig, tensor: TensorConfig, axis: int, size: int, seen: Sequence[int]) -> Shape:
    if size != -1:
        return size, size, size
    if axis == 0 and config.max_batch_size:
        preferred = config.batching.preferred_batch_sizes if config.batching else ()
        return 1, max(preferred, default=config.max_batch_size), config.max_batch_size
    if not seen:
        raise errors.InvalidArgument(
            f"input '{tensor.name}' of model '{config.name}' has an open dimension ({axis}), and TensorRT must know its "
            f'range. Give it in the parameters {", ".join(_KEYS)}, e.g. "{tensor.name}:'
            f'{"x".join("1" if size == -1 else str(size) for size in _dims(config, tensor))}", or add model_warmup '
            "samples of the smallest and the largest shape"
        )
    return min(seen), int(statistics.median_high(seen)), max(seen)


def _dims(config: ModelConfig, tensor: TensorConfig) -> Shape:
    dims = tensor.dims if tensor.reshape is None else tensor.reshape
    return (-1, *dims) if config.max_batch_size else dims


def _warmups(config: ModelConfig, tensor: TensorConfig) -> list[Shape]:
    batch = (1,) if config.max_batch_size else ()
    return [(*batch, *sample.inputs[tensor.name].dims) for sample in config.warmup if tensor.name in sample.inputs]


def _given(config: ModelConfig) -> dict[str, Range]:
    """The ranges that parameters give, of the model itself or of its TensorRT accelerator."""
    accelerator = config.accelerators.get(TENSORRT, {})
    texts = [config.parameters.get(key) or accelerator.get(key, "") for key in _KEYS]
    if not any(texts):
        return {}
    if not all(texts):
        raise errors.InvalidArgument(
            f"model '{config.name}' must give all three of {', '.join(_KEYS)}, or none; correct its config.pbtxt"
        )
    least, best, greatest = (_parse(config, key, text) for key, text in zip(_KEYS, texts, strict=True))
    if not least.keys() == best.keys() == greatest.keys():
        raise errors.InvalidArgument(
            f"{', '.join(_KEYS)} of model '{config.name}' must name the same inputs; correct its config.pbtxt"
        )
    return {name: Range(least[name], best[name], greatest[name]) for name in least}


def _parse(config: ModelConfig, key: str, text: str) -> dict[str, Shape]:
    shapes = {}
    for part in text.split(","):
        name, _, sizes = part.strip().rpartition(":")
        numbers = sizes.split("x")
        if not name or not all(number.isdecimal() for number in numbers):
            raise errors.InvalidArgument(
                f"{key} of model '{config.name}' must be like \"ids:1x8,mask:1x8\", got '{part.strip()}'; correct its "
                "config.pbtxt"
            )
        shapes[name] = tuple(int(number) for number in numbers)
    return shapes


def _checked(config: ModelConfig, tensor: TensorConfig, given: Range, dims: Shape) -> Range:
    head = f"the profile of input '{tensor.name}' of model '{config.name}'"
    if len(given.least) != len(dims) or not (given.holds(given.best) and given.holds(given.greatest)):
        raise errors.InvalidArgument(
            f"{head} must have {len(dims)} dimensions, each least <= best <= greatest; got {list(given.least)}, "
            f"{list(given.best)}, {list(given.greatest)}"
        )
    for axis, size in enumerate(dims):
        if size != -1 and {given.least[axis], given.best[axis], given.greatest[axis]} != {size}:
            raise errors.InvalidArgument(f"{head} must have {size} as dimension {axis}, which the model fixes")
    return given

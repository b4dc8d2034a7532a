"""From a photograph to a model's input, as the model's `preprocess` parameter says: for calibration and the gate.

    parameters { key: "preprocess" value { string_value: "crop=0.875 resize=bicubic mean=127 std=128" } }

- `crop`: the side of the middle square that is kept, as a share of the shorter side (1); `crop=none` squeezes the whole picture
- `resize`: nearest, bilinear (the default), bicubic or lanczos
- `mean`, `std`: of bytes 0 to 255, one number or one for each channel: (byte - mean) / std; 0 and 1 when left out
- `color`: RGB (the default), BGR or L (grey)

Size and order of the axes come from the input: `dims` and `format` (FORMAT_NCHW, FORMAT_NHWC), else the axis of 1 or 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gateway import errors
from gateway.config.model import ModelConfig
from gateway.types import Array

KINDS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_COLORS = {"RGB": 3, "BGR": 3, "L": 1}
_FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")
_KEYS = ("crop", "resize", "mean", "std", "color")


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes one row of the input `name`, without the batch dimension: `height` x `width`, channels first or last."""

    name: str
    dtype: np.dtype[Any]
    height: int
    width: int
    channels_first: bool
    crop: float | None
    resize: str
    mean: Array
    std: Array
    color: str

    def read(self, file: Path) -> dict[str, Array]:
        """The model's inputs for a picture, one row. Raises `InvalidArgument` for a file that is not a picture."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file) as opened:
                picture = opened.convert("L" if self.color == "L" else "RGB")
        except (OSError, UnidentifiedImageError) as problem:
            raise errors.InvalidArgument(f"'{file.name}' cannot be read as a picture: {problem}") from None
        pixels: Array = np.asarray(self._resized(picture), dtype=np.float32)
        pixels = pixels.reshape(self.height, self.width, -1)
        if self.color == "BGR":
            pixels = pixels[:, :, ::-1]
        pixels = (pixels - self.mean) / self.std
        if self.channels_first:
            pixels = pixels.transpose(2, 0, 1)
        return {self.name: np.ascontiguousarray(pixels[None].astype(self.dtype))}

    def _resized(self, picture: Any) -> Any:
        from PIL import Image

        box = (0.0, 0.0, float(picture.width), float(picture.height))
        if self.crop is not None:
            side = min(picture.size) * self.crop
            left, top = (picture.width - side) / 2, (picture.height - side) / 2
            box = (left, top, left + side, top + side)
        return picture.resize((self.width, self.height), Image.Resampling[self.resize.upper()], box=box)


def preprocess(config: ModelConfig) -> Preprocess:
    """Read a model's `preprocess` parameter. Raises `InvalidArgument` when it is missing, wrong or does not fit the input."""
    if "preprocess" not in config.parameters:
        raise _wrong(config, "has no parameter 'preprocess', so nobody knows how a picture becomes its input")
    words = _words(config)
    color = words.get("color", "RGB")
    if color not in _COLORS:
        raise _wrong(config, f"has color={color} in 'preprocess'; there are: {', '.join(_COLORS)}")
    resize = words.get("resize", "bilinear")
    if resize not in _FILTERS:
        raise _wrong(config, f"has resize={resize} in 'preprocess'; there are: {', '.join(_FILTERS)}")
    height, width, channels_first = _shape(config, _COLORS[color])
    crop = None if words.get("crop") == "none" else float(_numbers(config, words, "crop", "1", 1)[0])
    if crop is not None and not 0 < crop <= 1:
        raise _wrong(config, f"has crop={words['crop']} in 'preprocess'; it is a share above 0, up to 1, or none")
    return Preprocess(
        name=config.inputs[0].name,
        dtype=config.inputs[0].datatype.dtype,
        height=height,
        width=width,
        channels_first=channels_first,
        crop=crop,
        resize=resize,
        mean=_numbers(config, words, "mean", "0", _COLORS[color]),
        std=_numbers(config, words, "std", "1", _COLORS[color]),
        color=color,
    )


def _words(config: ModelConfig) -> Mapping[str, str]:
    pairs = [word.partition("=") for word in config.parameters["preprocess"].split()]
    unknown = [key for key, _, value in pairs if key not in _KEYS or not value]
    if unknown:
        raise _wrong(config, f"has '{unknown[0]}' in 'preprocess'; it takes key=value pairs of: {', '.join(_KEYS)}")
    return {key: value for key, _, value in pairs}


def _shape(config: ModelConfig, channels: int) -> tuple[int, int, bool]:
    dims = config.inputs[0].dims
    dims = dims if config.max_batch_size > 0 else dims[1:]
    if len(config.inputs) != 1 or len(dims) != 3:
        raise _wrong(config, "takes no single input of three dimensions, which is what a picture can become")
    first = dims[0] == channels
    if not first and dims[2] != channels:
        raise _wrong(config, f"has an input of dims {list(dims)}, which has no axis of {channels} channels")
    height, width = (dims[1], dims[2]) if first else (dims[0], dims[1])
    if height < 1 or width < 1:
        raise _wrong(config, "has an input of open height or width; give data as .npy or .npz")
    return height, width, first


def _numbers(config: ModelConfig, words: Mapping[str, str], key: str, default: str, most: int) -> Array:
    try:
        numbers = np.array([float(part) for part in words.get(key, default).split(",")], np.float32)
    except ValueError:
        numbers = np.empty(0, np.float32)
    if len(numbers) not in (1, most) or (key == "std" and not numbers.all()):
        raise _wrong(config, f"has {key}={words[key]} in 'preprocess'; it is a number, or {most} with commas between")
    return numbers


def _wrong(config: ModelConfig, what: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"model '{config.name}' {what}. For example: parameters {{ key: \"preprocess\" value {{ string_value: "
        '"crop=0.875 resize=bicubic mean=127 std=128" } }; or give data as .npy or .npz'
    )

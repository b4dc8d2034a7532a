"""Owns the real data that the models of `model_repo/` are quantized with and judged on: `python -m gateway.build.zoo.samples`.

    python -m gateway.build.zoo.samples crops OUT       96 + 200 photographs for efficientnet_lite0
    python -m gateway.build.zoo.samples sentences OUT   200 + 400 tokenized sentences for minilm

Each writes `OUT/calibration` and `OUT/held_out`, which share nothing, for `gateway build --calibration --held-out`. The
photographs come from installed packages and are not shipped: calibration takes what scikit-image, scikit-learn and
matplotlib bring, held out are ten seeded random crops of each of the twenty ImageNet pictures of `foolbox`
(`pip install --no-deps foolbox`; that spares torch's many friends). The same packages give the same files.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gateway.build.zoo import minilm
from gateway.build.zoo.files import BuildError, package_file

SEED = 0
SIDE = 256  # of which the preprocessing keeps the middle 224
CALIBRATION_CROPS = 96
HELD_OUT_CROPS = 10  # of each picture
LEAST_AREA = 0.35  # of the picture's square, as in the training of such networks, but not down to a twelfth
PHOTOGRAPHS = (
    (
        "skimage", "data",
        ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
         "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg",
         "rocket.jpg"),
    ),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    ("matplotlib", "mpl-data/sample_data", ("grace_hopper.jpg",)),
)  # fmt: skip
_INSTALL = "pip install scikit-image scikit-learn matplotlib; pip install --no-deps foolbox"
CALIBRATION_MODULES = ("linear_model", "cluster", "ensemble", "svm", "metrics", "preprocessing", "decomposition")
BATCH = 16


def crops(out: Path) -> str:
    """Write random crops as PNG, those of `held_out` in a folder for each label, and say how many."""
    random = np.random.default_rng(SEED)
    pictures = list(_photographs())
    folder = _folder(out / "calibration")
    for index in range(CALIBRATION_CROPS):
        _crop(pictures[index % len(pictures)], random).save(folder / f"{index:03d}.png")
    count = 0
    for file in _imagenet():
        folder = _folder(out / "held_out" / file.stem.rpartition("_")[2])
        for index in range(HELD_OUT_CROPS):
            _crop(_open(file), random).save(folder / f"{file.stem}-{index}.png")
            count += 1
    return f"{CALIBRATION_CROPS} calibration crops of {len(pictures)} photographs, {count} held-out crops"


def sentences(out: Path) -> str:
    """Write tokenized sentences, batches of equal length, and say how many."""
    tokenizer = package_file(minilm.PACKAGE, "model/tokenizer.json", minilm.TOKENIZER_SHA)
    held_out = minilm.sentences()
    calibration = [text for text in _first_lines("sklearn", CALIBRATION_MODULES) if text not in set(held_out)][:200]
    for name, texts in (("calibration", calibration), ("held_out", list(held_out))):
        folder = _folder(out / name)
        for start in range(0, len(texts), BATCH):
            tokens: dict[str, Any] = dict(minilm.tokens(tokenizer, tuple(texts[start : start + BATCH])))
            np.savez(folder / f"{start:04d}.npz", allow_pickle=False, **tokens)
    return f"{len(calibration)} calibration sentences, {len(held_out)} held-out sentences"


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _first_lines(package: str, modules: tuple[str, ...]) -> Iterator[str]:
    for name in modules:
        module = importlib.import_module(f"{package}.{name}")
        for item in sorted(module.__all__):
            line = (inspect.getdoc(getattr(module, item)) or "").partition("\n")[0].strip()
            if len(line) >= 30 and line.endswith("."):
                yield line


def _photographs() -> Iterator[Any]:
    # By path, not by the packages' functions: for a picture that is not there those would go to the network.
    for package, folder, names in PHOTOGRAPHS:
        for name in names:
            yield _open(_installed(package) / folder / name)


def _imagenet() -> list[Path]:
    files = sorted((_installed("foolbox") / "data").glob("imagenet_*.jpg"))
    if not files:
        raise BuildError("this version of package 'foolbox' has no data/imagenet_*.jpg; 3.3.4 has 20")
    return files


def _installed(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise BuildError(f"package '{package}' is not installed: {_INSTALL}")
    return Path(found.origin).parent


def _open(file: Path) -> Any:
    from PIL import Image

    with Image.open(file) as opened:
        return opened.convert("RGB")


def _crop(picture: Any, random: np.random.Generator) -> Any:
    """A random square of the picture, scaled to SIDE."""
    from PIL import Image

    side = min(picture.size) * float(np.sqrt(random.uniform(LEAST_AREA, 1)))
    left, top = random.uniform(0, picture.width - side), random.uniform(0, picture.height - side)
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


DATA = {"crops": crops, "sentences": sentences}


def main(arguments: list[str] | None = None) -> int:
    """Write one model's data; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gateway.build.zoo.samples", description="Write a model's data.")
    parser.add_argument("kind", choices=DATA)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write calibration/ and held_out/ into")
    options = parser.parse_args(arguments)
    try:
        sys.stdout.write(f"{options.out}: {DATA[options.kind](options.out)}\n")
    except ModuleNotFoundError as error:
        sys.stderr.write(f"module {error.name!r} is not installed: pip install 'lockgate[build,models]'\n")
        return 2
    except BuildError as error:
        sys.stderr.write(f"not written: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

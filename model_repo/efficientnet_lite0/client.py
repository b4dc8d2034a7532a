"""Classify a photograph over the V2 protocol; needs numpy, Pillow and tritonclient, and works against any Triton.

python client.py [PHOTO] [--protocol http|grpc] [--url localhost:8000]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
MODEL = "efficientnet_lite0"
SIDE = 224
PORTS = {"http": 8000, "grpc": 8001}


def preprocess(photo: Path) -> NDArray[np.float32]:
    """Cut out the middle 7/8 square, scale it to 224 x 224 and map bytes to -1..1, as in the model's training."""
    from PIL import Image

    with Image.open(photo) as opened:
        picture = opened.convert("RGB")
    side = min(picture.size) * SIDE / (SIDE + 32)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    square = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = (np.asarray(square, dtype=np.float32) - 127) / 128
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def top1(logits: NDArray[np.float32]) -> tuple[str, float]:
    """Return the best label of one row of logits and its softmax probability."""
    labels = (HERE / "labels.txt").read_text(encoding="utf-8").splitlines()
    odds = np.exp(logits - logits.max())
    best = int(odds.argmax())
    return labels[best], float(odds[best] / odds.sum())


def ask(protocol: str, url: str, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Send one image and return its row of logits."""
    triton = importlib.import_module(f"tritonclient.{protocol}")
    tensor = triton.InferInput("image", list(image.shape), "FP32")
    tensor.set_data_from_numpy(image)
    client = triton.InferenceServerClient(url)
    try:
        answer = client.infer(MODEL, [tensor], outputs=[triton.InferRequestedOutput("logits")])
        logits: NDArray[np.float32] = answer.as_numpy("logits")[0]
    finally:
        client.close()
    return logits


def main() -> None:
    """Print the label of a photograph and how sure the model is."""
    parser = argparse.ArgumentParser(description="Classify a photograph.")
    parser.add_argument("photo", nargs="?", type=Path, default=HERE / "sample.jpg")
    parser.add_argument("--protocol", choices=sorted(PORTS), default="http")
    parser.add_argument("--url", help="host:port, without a scheme; by default this machine and Triton's port")
    options = parser.parse_args()
    url = options.url or f"localhost:{PORTS[options.protocol]}"
    label, probability = top1(ask(options.protocol, url, preprocess(options.photo)))
    print(f"{label} {probability:.2f}")


if __name__ == "__main__":
    main()

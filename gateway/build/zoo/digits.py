"""Owns `digits`: a small convolutional network trained here, in seconds, on scikit-learn's 1797 real handwritten digits.

The 540 held-out digits are written beside the model with their true labels, so that anyone can measure its accuracy.
Training is seeded and single-threaded: the same machine and package versions give the same bytes; another kind of
processor may round differently in the last place and so give other weights.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from gateway.build.zoo import export
from gateway.build.zoo.files import BuildError, Model, infer_body

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "digits"
HELD_OUT = 540
CALIBRATION = 128  # training digits that `gateway build` may learn ranges from
SAMPLE_ROWS = 10
SEED = 0
EPOCHS = 25
WORST_ACCURACY = 0.985
CONFIG = f"""\
name: "{NAME}"
backend: "onnxruntime"
max_batch_size: 256
input [ {{ name: "image" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 1, 8, 8 ] }} ]
output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" }} ]
dynamic_batching {{ }}
"""


def build() -> tuple[list[Model], str]:
    """Train, measure on the held-out digits, export; say what was measured."""
    (images, labels), (held_images, held_labels) = _data()
    network = _train(images, labels)
    pixels = held_images.astype(np.float32)
    proto = export.to_onnx(network, {"image": pixels[:2]}, {0: ("batch", 4096)}, "logits")
    content = export.to_bytes(export.tidy(proto, "trained on scikit-learn's load_digits()"))
    difference = export.worst_difference(network, content, [{"image": pixels[:1]}, {"image": pixels[:77]}], 1e-4)
    right = int((export.runner(content)({"image": pixels}).argmax(1) == held_labels).sum())
    if right < WORST_ACCURACY * HELD_OUT:
        raise BuildError(f"only {right} of {HELD_OUT} held-out digits are right")
    beside = {
        "labels.txt": "".join(f"{digit}\n" for digit in range(10)).encode(),
        "sample_request.json": infer_body("digits sample", {"image": pixels[:SAMPLE_ROWS]}, ["logits"]),
        "held_out.npz": _npz(images=held_images, labels=held_labels),
        "calibration.npz": _npz(images=images[:CALIBRATION]),
    }
    report = f"{right}/{HELD_OUT} held-out digits right ({right / HELD_OUT:.4f}), ONNX = torch to {difference:.1g}"
    return [Model(NAME, content, CONFIG, beside)], report


def _data() -> tuple[tuple[NDArray[np.uint8], NDArray[np.uint8]], tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, labels = data.images.astype(np.uint8)[:, None], data.target.astype(np.uint8)
    split = train_test_split(images, labels, test_size=HELD_OUT, stratify=labels, random_state=SEED)
    return (split[0], split[2]), (split[1], split[3])


def _network() -> Any:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _train(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Any:
    import torch
    from torch.nn import functional

    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of a threaded sum is not fixed
    torch.use_deterministic_algorithms(mode=True)
    network = _network()
    pixels, truth = torch.from_numpy(images.astype(np.float32)) / 16, torch.from_numpy(labels.astype(np.int64))
    steps = EPOCHS * -(-len(pixels) // 64)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
    for _ in range(EPOCHS):
        order: Any = torch.randperm(len(pixels))
        for rows in order.split(64):
            # Each batch is moved by up to one pixel: 1257 pictures are few, and a digit's place is not its meaning.
            down, right = torch.randint(0, 3, (2,)).tolist()
            moved = functional.pad(pixels[rows], (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]
            optimizer.zero_grad()
            loss: Any = functional.cross_entropy(network(moved), truth[rows], label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        network[0].weight /= 16  # the model takes pixels 0..16 as they are; a division by 16 is exact
    return network.eval()


def _npz(**arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()

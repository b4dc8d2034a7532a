"""The bytes of a JPEG photograph to its five likeliest labels: decode, scale, and ask the classifier (BLS).

A Triton python-backend model, which runs on Triton too. It needs Pillow.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from PIL import Image

SIDE = 224
MARGIN = 32  # of a picture scaled to SIDE + MARGIN the middle SIDE is looked at
MOST_PIXELS = 50_000_000
BEST = 5


class TritonPythonModel:
    """Input `photo`, one JPEG a row; outputs `label` and `score`, the likeliest first."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the labels of the classifier that config.pbtxt names."""
        config = json.loads(args["model_config"])
        parameters = config["parameters"]
        self.classifier = parameters["classifier"]["string_value"]
        labels = Path(args["model_repository"], parameters["labels"]["string_value"])
        self.labels = np.array(labels.read_text(encoding="utf-8").splitlines(), dtype=object)
        # Written anew for each batch: fresh memory costs as much as the arithmetic.
        self.pictures = np.empty((config["max_batch_size"], 3, SIDE, SIDE), np.float32)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the photographs of a batch with one call of the classifier; what is no photograph is refused alone."""
        responses: list[Any] = [None] * len(requests)
        parts: list[tuple[int, slice]] = []
        count = 0
        for index, request in enumerate(requests):
            photos = pb_utils.get_input_tensor_by_name(request, "photo").as_numpy().reshape(-1)
            try:
                for row, photo in enumerate(photos, start=count):
                    draw(photo, self.pictures[row])
            except (OSError, ValueError, SyntaxError) as problem:
                responses[index] = refusal(f"photo: {problem}; send the bytes of a JPEG file")
                continue
            parts.append((index, slice(count, count + len(photos))))
            count += len(photos)
        if count:
            answer = self.classify(self.pictures[:count])
            for index, rows in parts:
                responses[index] = answer if answer.has_error() else self.best(answer, rows)
        return responses

    def classify(self, pictures: NDArray[np.float32]) -> Any:
        """Ask the classifier."""
        request = pb_utils.InferenceRequest(
            model_name=self.classifier,
            requested_output_names=["logits"],
            inputs=[pb_utils.Tensor("image", pictures)],
        )
        return request.exec()

    def best(self, answer: Any, rows: slice) -> Any:
        """Return the response for these rows of the classifier's answer."""
        logits = pb_utils.get_output_tensor_by_name(answer, "logits").as_numpy()[rows]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        odds /= odds.sum(axis=1, keepdims=True)
        order = np.argsort(odds, axis=1)[:, : -BEST - 1 : -1]
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("label", self.labels[order]),
                pb_utils.Tensor("score", np.take_along_axis(odds, order, axis=1)),
            ]
        )


def draw(photo: bytes, picture: NDArray[np.float32]) -> None:
    """Write a JPEG as the classifier wants it: the middle square, 3 x 224 x 224, from -1 to 1."""
    with Image.open(io.BytesIO(photo), formats=["JPEG"]) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} is too large")
        # The decoder leaves out what would be scaled away: a half, a quarter or an eighth of the size is enough.
        image.draft("RGB", (SIDE, SIDE))
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        side = min(rgb.size) * SIDE / (SIDE + MARGIN)
        left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
        square = rgb.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    np.subtract(np.asarray(square).transpose(2, 0, 1), np.float32(127), out=picture)
    picture /= 128


def refusal(text: str) -> Any:
    """Return the response to a request that cannot be answered."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.INVALID_ARG))

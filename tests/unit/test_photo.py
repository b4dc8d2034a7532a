"""The model `photo_labels` and what `loadtest.photo` judges it with."""

from __future__ import annotations

import importlib.util
import io
import sys

import numpy as np
import pytest

from gateway import errors
from gateway.config.build import build
from gateway.config.parse import Source, parse_text
from gateway.engines.base import EngineSpec
from gateway.engines.python.model import load
from gateway.types import InferResponse, Tensor
from loadtest.photo import ROOT, first_label, photograph, summary
from tests.python_support import FakeChannel, one, texts
from tests.support import request, tensor

Image = pytest.importorskip("PIL.Image")

FOLDER = ROOT / "model_repo" / "_python" / "photo_labels"
LABELS = (ROOT / "model_repo" / "efficientnet_lite0" / "labels.txt").read_text().splitlines()


class Classifier(FakeChannel):
    """Says of the n-th picture that it is of class n."""

    def infer(self, asked):
        self.asked.append(asked)
        images = asked.inputs["image"].array
        yield InferResponse(asked.model_name, "1", {"logits": tensor(10 * np.eye(1000)[: len(images)])})


@pytest.fixture
def classifier():
    return Classifier()


@pytest.fixture
def model(classifier, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = Source("config.pbtxt", (FOLDER / "config.pbtxt").read_text())
    proto = parse_text(source)
    proto.default_model_filename = "model.py"
    (loaded,) = load(EngineSpec(build(proto, source), "1", FOLDER / "1", "cpu", channel=classifier), 1)
    return loaded


def jpeg(size=(300, 260), mode="RGB", **more) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1] // 10, size[0] // 10, 3), np.uint8)
    Image.fromarray(noise).resize(size).convert(mode).save(buffer, "JPEG", **more)
    return buffer.getvalue()


def asked(*photos: bytes):
    return request(rows=len(photos), inputs={"photo": texts(photos, (len(photos), 1))})


def test_photographs_of_a_batch_are_classified_together(model, classifier):
    two, one_more = one(model, asked(jpeg(), jpeg(mode="L")), asked(jpeg(mode="CMYK")))
    (call,) = classifier.asked
    assert call.inputs["image"].shape == (3, 3, 224, 224)
    assert [row[0] for row in two.outputs["label"]] == [LABELS[0].encode(), LABELS[1].encode()]
    assert one_more.outputs["label"][0, 0] == LABELS[2].encode()
    assert two.outputs["label"].shape == two.outputs["score"].shape == (2, 5)
    assert (np.diff(two.outputs["score"]) <= 0).all()


@pytest.mark.parametrize("photo", [b"", b"no picture", jpeg()[:200], jpeg()[:-3000]])
def test_what_is_no_photograph_is_refused_alone(model, photo):
    bad, good = one(model, asked(jpeg(), photo), asked(jpeg()))
    assert type(bad.error) is errors.InvalidArgument
    assert "send the bytes of a JPEG file" in bad.error.message
    assert good.outputs["label"].shape == (1, 5)


def test_a_picture_is_not_decoded_whose_pixels_would_fill_the_memory(model, monkeypatch):
    monkeypatch.setattr(sys.modules[type(model._model).__module__], "MOST_PIXELS", 300 * 260 - 1)
    (bad,) = one(model, asked(jpeg()))
    assert "300 x 260 is too large" in bad.error.message


def test_it_looks_at_what_the_classifiers_own_client_looks_at(model, classifier, tmp_path):
    path = ROOT / "model_repo" / "efficientnet_lite0" / "client.py"
    spec = importlib.util.spec_from_file_location("efficientnet_client", path)
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    for size, most in (((300, 260), 0.0), ((640, 480), 0.05)):  # decoded as it is, and at half its size
        (tmp_path / "photo.jpg").write_bytes(jpeg(size))
        one(model, asked((tmp_path / "photo.jpg").read_bytes()))
        image: Tensor = classifier.asked[-1].inputs["image"]
        assert np.abs(image.array - client.preprocess(tmp_path / "photo.jpg")).mean() <= most


def test_the_photograph_of_the_benchmark_is_what_it_says():
    photo = photograph()
    assert 95_000 < len(photo) < 105_000
    assert Image.open(io.BytesIO(photo)).size == (640, 480)


def test_what_it_reads_and_counts():
    assert first_label(b"\x08\0\0\0espresso\x01\0\0\0x") == "espresso"
    assert summary([1.0, 2.0, 3.0]) == {"min": 1.0, "p10": 1.2, "p50": 2.0, "p90": 2.8, "p99": 2.98}

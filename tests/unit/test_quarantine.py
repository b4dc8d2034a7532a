"""Requests that crashed an engine are known again, for ten minutes, and others are not taken for them."""

import numpy as np
import pytest

from gateway.types import DataType, Tensor
from gateway.worker import quarantine as module
from gateway.worker.quarantine import SECONDS, Quarantine
from tests.support import request, tensor


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def image(value: float):
    pixels = np.zeros((1, 3, 64, 64), "<f4")
    pixels[0, 0, 0, 1] = value  # where no sample is taken
    return request(inputs={"IN": tensor(pixels)})


def test_the_same_inputs_are_kept_out_until_ten_minutes_are_over(clock):
    quarantine = Quarantine(clock)
    assert not quarantine
    quarantine.add(request(13.0, id="first"))
    assert quarantine
    assert quarantine.left(request(13.0, id="second", tenant="other")) == SECONDS == 600.0
    assert quarantine.left(request(14.0)) is None
    clock.now += SECONDS - 1
    assert quarantine.left(request(13.0)) == 1.0
    clock.now += 1
    assert quarantine.left(request(13.0)) is None
    assert not quarantine


@pytest.mark.parametrize(
    "other",
    [
        request(13.0, rows=2),
        request(inputs={"IN": tensor([[13.0, 13.0]], DataType.FP64)}),
        request(inputs={"IN": tensor([[[13.0], [13.0]]])}),
        request(inputs={"IN": tensor([13.0, 13.0])}),
        request(inputs={"OTHER": tensor([[13.0, 13.0]])}),
        request(inputs={"IN": tensor([[13.0, 13.0]]), "MORE": tensor([1.0])}),
        request(inputs={"IN": Tensor(DataType.INT32, (1, 2), np.full((1, 2), 13.0, "<f4").tobytes())}),
    ],
)
def test_requests_that_differ_in_anything_but_what_they_are_called_are_not_taken_for_each_other(other):
    quarantine = Quarantine()
    quarantine.add(request(13.0))
    assert quarantine.left(other) is None


def test_the_order_of_inputs_says_nothing():
    first = {"A": tensor([1.0]), "B": tensor([2.0])}
    quarantine = Quarantine()
    quarantine.add(request(inputs=first))
    assert quarantine.left(request(inputs=dict(reversed(first.items())))) is not None
    assert quarantine.left(request(inputs={"A": tensor([2.0]), "B": tensor([1.0])})) is None


def test_text_is_kept_as_any_other_type():
    def text(*words):
        return request(inputs={"IN": Tensor.from_array(DataType.BYTES, np.array([words], dtype=object))})

    quarantine = Quarantine()
    quarantine.add(text(b"bad", b"one"))
    assert quarantine.left(text(b"bad", b"one")) is not None
    assert quarantine.left(text(b"bado", b"ne")) is None


def test_images_that_agree_in_every_byte_that_is_sampled_are_told_apart():
    quarantine = Quarantine()
    quarantine.add(image(1.0))
    assert quarantine.left(image(1.0)) is not None
    assert quarantine.left(image(2.0)) is None


def test_nothing_is_hashed_while_the_sampled_bytes_differ(monkeypatch):
    quarantine = Quarantine()
    quarantine.add(request(13.0))
    hashed = []
    real = module._digest
    monkeypatch.setattr(module, "_digest", lambda asked: hashed.append(asked) or real(asked))
    assert [quarantine.left(request(float(value))) for value in range(5)] == [None] * 5
    assert hashed == []
    assert quarantine.left(request(13.0)) is not None
    assert len(hashed) == 1


def test_a_thousand_are_kept_the_latest(clock):
    quarantine = Quarantine(clock)
    for value in range(1005):
        clock.now += 0.001
        quarantine.add(request(float(value)))
    assert len(quarantine) == 1000
    assert quarantine.left(request(4.0)) is None
    assert quarantine.left(request(5.0)) is not None


def test_one_that_comes_in_again_stays_as_long_as_a_new_one(clock):
    quarantine = Quarantine(clock)
    first = quarantine.add(request(1.0))
    quarantine.add(request(2.0))
    clock.now += 500
    assert quarantine.add(request(1.0)) == first
    clock.now += 200
    assert quarantine.left(request(2.0)) is None
    assert quarantine.left(request(1.0)) == 400.0
    assert len(quarantine) == 1

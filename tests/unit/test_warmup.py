"""Warm-up: what is run before an instance is ready, and what a sample that cannot run says."""

import time
from dataclasses import replace

import numpy as np
import pytest

from gateway import errors
from gateway.config.model import BatchInput, Warmup, WarmupInput
from gateway.types import Answer, BatchResult, DataType, Tensor
from gateway.worker.warmup import measurable, warm_up
from tests.support import model_config, tensor_config

FP32, INT64, BYTES = DataType.FP32, DataType.INT64, DataType.BYTES


class Recorder:
    """An engine that remembers what it was asked to run."""

    provider = "Recorder"
    warnings = ()
    concurrency = 1
    ahead = False

    def __init__(self, *, fails=False):
        self.fails = fails
        self.runs = []

    async def run(self, batch):
        inputs = batch.stack()
        self.runs.append((inputs, batch.rows, batch.cores))
        if self.fails:
            raise RuntimeError("index out of range")
        yield BatchResult({}, *[time.monotonic_ns()] * 3)

    async def close(self):
        pass


def sample(source, *, datatype=FP32, dims=(2,), batch_size=1, count=1):
    return Warmup("s", batch_size, count, {"IN": WarmupInput(datatype, dims, source)})


async def test_without_samples_one_row_of_zeros_is_run_on_each_number_of_cores(tmp_path):
    engine = Recorder()
    config = model_config(
        inputs=(
            tensor_config("A", FP32, (2, 3)),
            tensor_config("B", BYTES, (2,)),
            tensor_config("C", INT64, (1,), reshape=()),
            tensor_config("D", FP32, (1,), optional=True),
        )
    )
    await warm_up(engine, config, tmp_path, (1, 4))
    assert [(rows, cores) for _, rows, cores in engine.runs] == [(1, 1), (1, 4)]
    inputs = engine.runs[0][0]
    assert {name: (array.shape, array.dtype) for name, array in inputs.items()} == {
        "A": ((1, 2, 3), np.dtype("f4")),
        "B": ((1, 2), np.dtype(object)),
        "C": ((1,), np.dtype("i8")),
    }
    assert inputs["B"].tolist() == [[b"", b""]]


async def test_a_model_without_a_batch_dimension_gets_none(tmp_path):
    engine = Recorder()
    await warm_up(engine, model_config(max_batch_size=0, batching=None), tmp_path, (1,))
    assert engine.runs[0][0]["IN"].shape == (2,)


async def test_open_shapes_are_not_guessed(tmp_path):
    engine = Recorder()
    await warm_up(engine, model_config(inputs=(tensor_config("IN", FP32, (-1,)),)), tmp_path, (1,))
    assert engine.runs == []


async def test_a_model_that_refuses_zeros_is_loaded_all_the_same(tmp_path):
    engine = Recorder(fails=True)
    await warm_up(engine, model_config(), tmp_path, (1,))
    assert len(engine.runs) == 1


async def test_every_sample_runs_as_often_as_it_says(tmp_path):
    engine = Recorder()
    config = model_config(warmup=(sample("zero", batch_size=4, count=3), sample("random", batch_size=2)))
    await warm_up(engine, config, tmp_path, (1, 2))
    assert [(rows, cores) for _, rows, cores in engine.runs] == [(4, 1), (4, 2)] * 3 + [(2, 1), (2, 2)]
    zeros, random = engine.runs[0][0]["IN"], engine.runs[-1][0]["IN"]
    assert np.array_equal(zeros, np.zeros((4, 2), np.float32))
    assert random.shape == (2, 2)
    assert random.any()
    assert np.array_equal(random[0], random[1]), "the same row, batch_size times"


@pytest.mark.parametrize("datatype", list(DataType))
async def test_random_data_of_every_type(tmp_path, datatype):
    engine = Recorder()
    config = model_config(
        inputs=(tensor_config("IN", datatype, (3,)),), warmup=(sample("random", datatype=datatype, dims=(3,)),)
    )
    await warm_up(engine, config, tmp_path, (1,))
    array = engine.runs[0][0]["IN"]
    assert (array.shape, array.dtype) == ((1, 3), datatype.dtype)


async def test_a_sample_is_reshaped_as_a_request_would_be(tmp_path):
    engine = Recorder()
    config = model_config(
        inputs=(tensor_config("IN", FP32, (6,), reshape=(2, 3)),), warmup=(sample("zero", dims=(6,), batch_size=2),)
    )
    await warm_up(engine, config, tmp_path, (1,))
    assert engine.runs[0][0]["IN"].shape == (2, 2, 3)


@pytest.mark.parametrize(("datatype", "values"), [(FP32, [1.5, -2.0]), (BYTES, [b"hello", b""])])
async def test_a_sample_from_a_file(tmp_path, datatype, values):
    array = np.array(values, datatype.dtype)
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "data").write_bytes(Tensor.from_array(datatype, array).wire)
    engine = Recorder()
    config = model_config(
        inputs=(tensor_config("IN", datatype, (2,)),), warmup=(sample("data", datatype=datatype, batch_size=2),)
    )
    await warm_up(engine, config, tmp_path, (1,))
    assert engine.runs[0][0]["IN"].tolist() == [values, values]


@pytest.mark.parametrize(
    ("name", "content", "datatype", "text"),
    [
        ("gone", None, FP32, "cannot be read (No such file or directory); put it in the model's folder"),
        ("short", bytes(7), FP32, "holds 7 bytes, its dims [2] need 8"),
        ("bad", b"\1\0\0\0", BYTES, ": expected 2 string elements, got at most 1"),
    ],
)
async def test_a_sample_file_that_cannot_be_used_says_why(tmp_path, name, content, datatype, text):
    if content is not None:
        (tmp_path / "warmup").mkdir()
        (tmp_path / "warmup" / name).write_bytes(content)
    config = model_config(inputs=(tensor_config("IN", datatype, (2,)),), warmup=(sample(name, datatype=datatype),))
    with pytest.raises(errors.InvalidArgument) as caught:
        await warm_up(Recorder(), config, tmp_path, (1,))
    assert caught.value.message.startswith(f"model_warmup sample 's' input 'IN': file 'warmup/{name}'")
    assert caught.value.message.endswith(text)
    assert str(tmp_path) not in caught.value.message


async def test_a_sample_that_fails_fails_the_load(tmp_path):
    with pytest.raises(errors.Internal) as caught:
        await warm_up(Recorder(fails=True), model_config(warmup=(sample("zero"),)), tmp_path, (1,))
    assert caught.value.message == "model_warmup sample 's' failed: index out of range"


async def test_code_is_run_on_its_own_samples_only_and_one_that_it_refuses_is_an_error(tmp_path):
    class Refusing(Recorder):
        async def run(self, batch):
            self.runs.append(batch.requests)
            yield BatchResult({}, *[time.monotonic_ns()] * 3, [Answer(0, None, errors.InvalidArgument("not this"))])

    engine = Refusing()
    config = replace(model_config(), backend="python")
    assert not measurable(config)
    assert await warm_up(engine, config, tmp_path, (1,)) is None
    assert engine.runs == []
    with pytest.raises(errors.Internal, match="sample 's' failed: not this"):
        await warm_up(engine, replace(config, warmup=(sample("zero"),)), tmp_path, (1,))
    assert len(engine.runs[0]) == 1


async def test_a_file_may_hold_more_than_a_sample_needs(tmp_path):
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "data").write_bytes(np.arange(5, dtype=np.float32).tobytes())
    engine = Recorder()
    await warm_up(engine, model_config(warmup=(sample("data"),)), tmp_path, (1,))
    assert engine.runs[0][0]["IN"].tolist() == [[0.0, 1.0]]


async def test_a_sample_of_several_rows_is_as_many_requests(tmp_path):
    engine = Recorder()
    inputs = (tensor_config("IN", dims=(-1,), ragged=True), tensor_config("SHAPE", dims=(2,), whole=True))
    counts = BatchInput("element_count", ("COUNTS",), DataType.INT32, "IN")
    spec = WarmupInput(FP32, (2,), "zero")
    config = model_config(inputs=inputs, warmup=(Warmup("s", 3, 1, {"IN": spec, "SHAPE": spec}),))
    await warm_up(engine, replace(config, batch_inputs=(counts,)), tmp_path, (1,))
    ((stacked, rows, _),) = engine.runs
    assert rows == 3
    assert {name: array.tolist() for name, array in stacked.items()} == {
        "IN": [0.0] * 6,
        "SHAPE": [0.0] * 2,
        "COUNTS": [2, 2, 2],
    }


async def test_a_shape_is_not_guessed(tmp_path):
    engine = Recorder()
    config = model_config(inputs=(tensor_config("SHAPE", whole=True),))
    assert await warm_up(engine, config, tmp_path, (1,)) is None
    assert engine.runs == []

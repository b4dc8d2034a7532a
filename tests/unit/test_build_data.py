"""What `gateway build` reads: arrays, pictures and recorded requests become rows, and nothing is in both sets."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gateway import errors
from gateway.build import data, images
from gateway.middleware.record import Recorder, RecordOptions
from gateway.types import DataType, InferRequest, Tensor
from tests.support import model_config, tensor_config

PICTURE = {"preprocess": "crop=0.5 resize=nearest mean=10,20,30 std=2 color=BGR"}


def config(datatype: DataType = DataType.FP32, dims: tuple[int, ...] = (2,), **more):
    return model_config(inputs=(tensor_config("IN", datatype, dims),), **more)


def read(path: Path, of=None, most: int = 100):
    return data.read(path, of or config(), most)


def test_an_npz_file_has_rows_and_labels(tmp_path: Path):
    np.savez(tmp_path / "a.npz", IN=np.array([[1, 2], [3, 4]], np.float32), labels=np.array([7, 8]))
    first, second = read(tmp_path / "a.npz")
    assert (first.label, second.label) == (7, 8)
    assert second.inputs["IN"].tolist() == [[3, 4]]


def test_a_folder_is_read_in_the_order_of_names_and_integers_become_floats(tmp_path: Path):
    np.save(tmp_path / "b.npy", np.array([[3, 4]], np.uint8))
    np.save(tmp_path / "a.npy", np.array([[1, 2]], np.uint8))
    (tmp_path / "notes.txt").write_text("not data")
    rows = read(tmp_path)
    assert [row.inputs["IN"].tolist() for row in rows] == [[[1, 2]], [[3, 4]]]
    assert rows[0].inputs["IN"].dtype == np.float32


def test_of_many_files_some_are_taken_from_everywhere(tmp_path: Path):
    for index in range(40):
        np.save(tmp_path / f"{index:02d}.npy", np.array([[index, 0]], np.float32))
    taken = [int(row.inputs["IN"][0, 0]) for row in read(tmp_path, most=10)]
    assert len(taken) == 10
    assert taken == sorted(taken)
    assert taken != list(range(10))
    assert taken == [int(row.inputs["IN"][0, 0]) for row in read(tmp_path, most=10)]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"IN": np.zeros((1, 3), np.float32)}, r"shape \[1, 3\].*takes \[-1, 2\]"),
        ({"IN": np.array([["a", "b"]])}, "takes FP32"),
        ({"OTHER": np.zeros((1, 2)), "MORE": np.zeros((1, 2))}, "no array 'IN'"),
        ({"IN": np.zeros((2, 2)), "labels": np.zeros(3)}, "different numbers of rows"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, arrays, words: str):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(errors.InvalidArgument, match=words) as refused:
        read(tmp_path / "a.npz")
    assert "'a.npz'" in str(refused.value)


def test_no_data_is_an_error_with_a_remedy(tmp_path: Path):
    with pytest.raises(errors.InvalidArgument, match="holds no data"):
        read(tmp_path)
    with pytest.raises(errors.InvalidArgument, match="there is no data at"):
        read(tmp_path / "absent")


def test_a_file_of_junk_is_an_error(tmp_path: Path):
    (tmp_path / "a.npy").write_bytes(b"junk")
    with pytest.raises(errors.InvalidArgument, match=r"'a.npy' cannot be read"):
        read(tmp_path)


def test_a_model_that_does_not_batch_takes_a_file_as_one_request(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    (row,) = read(tmp_path, config(dims=(-1, 3), max_batch_size=0))
    assert row.inputs["IN"].shape == (2, 3)


def test_pictures_are_cropped_scaled_and_labelled_by_their_folder(tmp_path: Path):
    (tmp_path / "3").mkdir()
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[2:6, 4:8] = (100, 150, 200)  # the middle square of half the shorter side
    Image.fromarray(pixels).save(tmp_path / "3" / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.png")
    labelled, plain = read(tmp_path, config(dims=(3, 2, 2), parameters=PICTURE))
    assert (labelled.label, plain.label) == (3, -1)
    expected = [(200 - 10) / 2, (150 - 20) / 2, (100 - 30) / 2]
    assert labelled.inputs["IN"].shape == (1, 3, 2, 2)
    assert labelled.inputs["IN"][0, :, 0, 0].tolist() == expected


def test_channels_may_be_last_and_one(tmp_path: Path):
    Image.fromarray(np.full((4, 4), 50, np.uint8)).save(tmp_path / "a.png")
    (row,) = read(tmp_path, config(dims=(2, 3, 1), parameters={"preprocess": "crop=none color=L"}))
    assert row.inputs["IN"].shape == (1, 2, 3, 1)
    assert (row.inputs["IN"] == 50).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no parameter 'preprocess'"),
        ("crop=2", "crop=2"),
        ("size=3", "'size'"),
        ("mean=1,2", "mean=1,2"),
        ("std=0", "std=0"),
        ("color=CMYK", "color=CMYK"),
        ("resize=magic", "resize=magic"),
        ("color=L", "no axis of 1 channels"),
    ],
)
def test_a_wrong_preprocess_is_refused_with_an_example(text: str | None, words: str):
    parameters = {} if text is None else {"preprocess": text}
    with pytest.raises(errors.InvalidArgument, match=words) as refused:
        images.preprocess(config(dims=(3, 2, 2), parameters=parameters))
    assert "crop=0.875" in str(refused.value)


def test_a_recording_that_was_cut_off_is_read_to_there(tmp_path: Path):
    np.savez(tmp_path / "inputs-0.npz", IN=np.array([[1, 2]], np.float32))
    line = json.dumps({"t": 0.5, "model": "m", "inputs": "inputs-0.npz", "strings": {}})
    (tmp_path / "arrivals-x.jsonl").write_text('{"lockgate_recording": 1}\n' + line + "\n" + line[:30])
    (row,) = read(tmp_path)
    assert row.inputs["IN"].tolist() == [[1, 2]]


async def test_recorded_requests_are_rows(tmp_path: Path):
    texts = np.array([[b"a", b"\xff"], [b"", b"bc"]], object)
    of = config(DataType.BYTES)
    async with Recorder(RecordOptions(tmp_path, inputs=True)) as recorder:
        for name, rows in (("m", texts), ("other", texts[:1])):
            tensor = Tensor.from_array(DataType.BYTES, rows)
            recorder.note(InferRequest(name, {"IN": tensor}, rows=len(rows), size=tensor.nbytes), 0.0)
    rows = read(tmp_path, of)
    assert [row.inputs["IN"].tolist() for row in rows] == [[[b"a", b"\xff"]], [[b"", b"bc"]]]
    assert rows[0].digest != rows[1].digest


def test_a_recording_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "arrivals-x.jsonl").write_text(json.dumps({"lockgate_recording": 1}) + "\n[1]\n")
    with pytest.raises(errors.InvalidArgument, match="not a recording"):
        read(tmp_path)


def row(*values: float) -> data.Row:
    return data.Row({"IN": np.array([values], np.float32)})


def test_a_row_in_both_sets_is_refused_with_the_count():
    data.apart([row(1, 2)], [row(2, 1)])
    with pytest.raises(errors.InvalidArgument, match="1 of 2 held-out rows"):
        data.apart([row(1, 2), row(5, 6)], [row(1, 2), row(3, 4)])


def test_one_set_is_divided_without_overlap_whatever_its_order():
    rows = [row(index, 0) for index in range(30)]
    calibration, held_out = data.split([*rows, *rows[:5]], 8)
    data.apart(calibration, held_out)
    assert (len(calibration), len(held_out)) == (8, 22)
    again, _ = data.split(rows[::-1], 8)
    assert {each.digest for each in again} == {each.digest for each in calibration}
    assert len(data.split(rows, 100)[0]) == 10


def test_batches_hold_rows_of_equal_shapes_in_order():
    short, long = row(1, 2), data.Row({"IN": np.zeros((1, 3), np.float32)})
    found = list(data.batches([short, short, short, long, short], 2))
    assert [batch["IN"].shape for batch in found] == [(2, 2), (1, 2), (1, 3), (1, 2)]

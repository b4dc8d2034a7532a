"""Long JSON arrays read by compiled code: what it accepts is what the parser finds, and all else is left to that."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.transport.http import arrays
from gateway.transport.http.codec import Codec
from gateway.transport.http.document import DocumentReader
from gateway.transport.http.limits import HttpLimits
from gateway.types import DataType
from tests.support import model_config, tensor_config

ROOT = Path(__file__).resolve().parents[2]
LIMITS = HttpLimits(max_input_size=1 << 20, max_request_tensors=8, max_tensor_elements=1 << 20)
CONFIG = model_config(inputs=(tensor_config("IN", DataType.FP32, (-1,)),))
NOISE = np.random.default_rng(7).standard_normal(4000)
TYPES = {"FP32": "f4", "FP64": "f8", "INT8": "i1", "INT32": "i4", "INT64": "i8", "UINT8": "u1", "UINT64": "u8"}

compiled = pytest.mark.skipif(not arrays.available(), reason="arrays.c is not compiled: no C compiler at installation")


@pytest.fixture(autouse=True, scope="module")
def _short():
    """Texts need not be as long as those that are worth it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "_LONG", 1 << 12)
        yield


def body(data: str, shape: object, datatype: str = "FP32", more: str = "") -> bytes:
    return f'{{"inputs":[{{"name":"IN","shape":{shape},"datatype":"{datatype}","data":{data}}}]{more}}}'.encode()


def read(text: bytes) -> tuple[object, ...]:
    """All that a client could see of how the text was read."""
    try:
        request, _ = Codec(LIMITS).decode(text, None, "m", "", CONFIG)
    except GatewayError as problem:
        return type(problem), problem.message
    arrays_ = {
        name: (each.array.dtype, each.array.shape, each.array.tobytes()) for name, each in request.inputs.items()
    }
    return arrays_, request.id, request.parameters


@pytest.fixture
def no_parser(monkeypatch):
    """The parser is not asked for whole texts."""

    def refuse(self, text):
        pytest.fail(f"left to the parser: {text[:80]!r}")

    monkeypatch.setattr(DocumentReader, "read", refuse)


def same_as_the_parser(text: bytes) -> None:
    found = read(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "available", lambda: False)
        assert found == read(text)


# --- what it reads itself


@compiled
@pytest.mark.usefixtures("no_parser")
@pytest.mark.parametrize(
    "separators", [(",", ":"), (", ", ": "), (" ,\n\t", " :\r\n ")], ids=["dense", "spaced", "wild"]
)
@pytest.mark.parametrize("shape", [(4000,), (1, 4, 1000), (2000, 2), (2, 2, 2, 500)], ids=str)
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_decimals(datatype, shape, separators):
    # float32 written as Python writes them, with 17 digits, can be read as float32 only.
    wanted = NOISE.astype("f4") if datatype == "FP32" else NOISE.round(9)
    text = json.dumps(wanted.reshape(shape).tolist(), separators=separators)
    ((dtype, got, numbers),) = read(body(text, list(shape), datatype))[0].values()
    assert (dtype, got) == (TYPES[datatype], shape)
    assert numbers == wanted.astype(TYPES[datatype]).tobytes()


@compiled
@pytest.mark.usefixtures("no_parser")
@pytest.mark.parametrize("datatype", ["FP32", "INT8", "INT32", "INT64", "UINT8", "UINT64"])
def test_whole_numbers(datatype):
    wanted = np.arange(-2000 if datatype[0] == "I" else 0, 2000)
    text = json.dumps(wanted.tolist())
    ((_, _, numbers),) = read(body(text, [len(wanted)], datatype))[0].values()
    assert numbers == wanted.astype(TYPES[datatype]).tobytes()


@compiled
@pytest.mark.usefixtures("no_parser")
def test_shortest_float32_and_exponents():
    wanted = (NOISE * 10.0 ** np.arange(-20, 20).repeat(100)).astype("f4")
    text = ",".join(map(str, wanted))
    assert "e-" in text
    assert "e+" in text
    ((_, _, numbers),) = read(body(f"[{text}]", [4000]))[0].values()
    assert numbers == wanted.tobytes()


@compiled
@pytest.mark.usefixtures("no_parser")
def test_several_inputs_and_what_stands_around_them():
    one, two = NOISE.astype("f4"), np.arange(3000)
    document = {
        "id": 'a "data":[1,2] in a string',
        "inputs": [
            {"name": "A", "data": one.tolist(), "shape": [4000], "datatype": "FP32"},
            {"name": "B", "shape": [3], "datatype": "BYTES", "data": ["x", "data", ":["]},
            {"name": "C", "datatype": "INT64", "shape": [3000], "data": two.tolist(), "parameters": {}},
        ],
        "parameters": {"sequence_id": 3},
    }
    inputs, id_, _ = read(json.dumps(document).encode())
    assert id_ == document["id"]
    assert inputs["A"][2] == one.tobytes()
    assert inputs["B"][2] is not None
    assert inputs["C"][2] == two.tobytes()


# --- what it leaves to the parser

PLAIN, WHOLE = ",0.5" * 2000, ",7" * 3000


@pytest.mark.parametrize(
    "number",
    [
        "NaN", "Infinity", "-Infinity", "null", "true", '"1"', "{}", "[1]", "[]", "", " ", "01", "-01", "1.", ".5", "+1", "-",
        "1e", "1e+", "1.e1", "0x1", "1_0", "1 2", "1e400", "1e-400", "1e39", "-1e39", "3.4028235e38", "3.4028236e38", "1e-46",
        "123456789012345678901234567890", "0." + "1" * 40, "-0", "-0.0", "-0e5", "0.1e-30", "1.00000005960464477539062",
        "1.000000059604644775390625", "1.00000005960464477539063", "9007199254740993", "18446744073709551615", "9223372036854775807", "9223372036854775808", "-9223372036854775808", "-1", "1E5", "1\x00",
        "1\xe9", "]", "[", "}", "1]", "1],[1", "1]]", "1}]", "\x0b1",
        # Halfway between two float32, but for what the second rounding to a double loses.
        "3.245803475379944105", "2256.843627929687226", "5.421405553817748982", "114.4152488708496048",
    ],
)  # fmt: skip
@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT64", "UINT64", "BOOL", "BYTES", "FP16", "WHAT"])
def test_odd_numbers_are_read_as_ever(datatype, number):
    plain = PLAIN if datatype[0] == "F" else WHOLE
    for data in (f"[{number}{plain}]", f"[1{plain},{number}{plain}]", f"[1{plain},{number}]"):
        same_as_the_parser(body(data, [data.count(",") + 1], datatype))


@pytest.mark.parametrize(
    "text",
    [
        body(f"[1{PLAIN}]", [2000]),
        body(f"[1{PLAIN}]", [2001, -1]),
        body(f"[1{PLAIN}]", "null"),
        body(f"[1{PLAIN}]", [2001], more=',"id":NaN'),
        body(f"[1{PLAIN}]", [2001], more=',"id":"' + "x" * 9000 + '"'),
        body(f"[1{PLAIN}]", [2001], more=',"x"' * 400),
        body(f"[1{PLAIN}]", [2001], more=f',"parameters":{{"data":[1{PLAIN}]}}'),
        body(f"[1{PLAIN}]", [2001], more=f',"data":[1{PLAIN}]'),
        body(f'[1],"data":[1{PLAIN}]', [2001]),
        body(f'[1{PLAIN}],"data":[1{PLAIN}]', [2001]),
        body(f"[1{PLAIN}]" + " " * 1000, [2001]),
        body(f"[1{PLAIN}]" + "]" * 600, [2001]),
        body("[" * 9 + f"1{PLAIN}" + "]" * 9, [2001]),
        body("[" * 8 + f"1{PLAIN}" + "]" * 8, [2001]),
        body("[" * 2 + f"1{PLAIN}" + "]" * 3, [2001]),
        body("[" * 3 + f"1{PLAIN}" + "]" * 2, [2001]),
        body(f"[[1{PLAIN}],1{PLAIN}]", [4002]),
        body(f"[1{PLAIN},[1{PLAIN}]]", [4002]),
        body(f"[[1{PLAIN}],[[1{PLAIN}]]]", [4002]),
        body(f"[1{PLAIN}]", [2001]).replace(b'"data"', b'\\"data"'),
        body(f"[1{PLAIN}]", [2001]).replace(b'"data"', b'"\\"data"'),
        body(f"[1{PLAIN}]", [2001]).replace(b'"data"', b'"x"data"'),
        body(f"[1{PLAIN}]", [2001]).replace(b'"data"', b'"\\u0064ata"'),
        body(f"[1{PLAIN}]", [2001]).replace(b'"data":', b'"data" \n:\t'),
        body(f"[1{PLAIN}]", [2001]).replace(b"inputs", b"outputs"),
        body(f"[1{PLAIN}]", [2001])[:-1],
        body(f"[1{PLAIN}]", [2001])[:-4],
        b"[" + body(f"[1{PLAIN}]", [2001]) + b"]",
        body(f"[-9223372036854775809{PLAIN}]", [2001]).replace(b'"shape"', b'"shape":[3,667],"shape"'),
        body(f"[18446744073709551615{PLAIN}]", [2001]).replace(b'"shape"', b'"shape":[3,667],"shape"'),
        body(f"[1{PLAIN}]", [2001]).replace(b'"name"', b'"name":"OTHER","name"'),
        body(f"[1{PLAIN}]", [2001]).replace(b'"data"', b'"data":[1],"data"'),
        body(f"[1{PLAIN}]", [2001]).replace(b'"data"', b'"data"' + b" " * 70),
        body(f"[1{PLAIN}]", [2001], more=',"outputs":[' + ",".join(['{"name":"O"}'] * 100) + "]"),
        b'"data":[1' + PLAIN.encode() + b"]",
    ],
)  # fmt: skip
def test_odd_documents_are_read_as_ever(text):
    same_as_the_parser(text)


@pytest.mark.slow
def test_arrays_longer_than_simdjson_can_count_do_not_end_the_process():
    """In a process of its own: where one is made a list, it writes beyond that."""
    program = (
        "from gateway.transport.http.document import DocumentReader\n"
        "text = b'{\"inputs\":[],\"x\":[1' + b',1' * (1 << 24) + b']}'\n"
        "print(len(DocumentReader(1 << 30, 100).read(text)['x']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str((1 << 24) + 1), done.stderr


NUMBERS = st.one_of(
    st.floats(allow_nan=False).map(repr),
    st.floats(width=32, allow_nan=False).map(repr),
    st.floats(-10, 10).map(lambda value: f"{value:.7f}"),
    st.integers(-(2**65), 2**65).map(str),
    st.decimals(-1000, 1000, places=20).map(str),
    st.text("0123456789.eE+-[], ", max_size=6),
)


@pytest.mark.slow
@settings(deadline=None, max_examples=400)
@given(
    st.lists(NUMBERS, min_size=1, max_size=12),
    st.sampled_from(["FP32", "FP64", "INT32", "UINT64"]),
    st.integers(1, 3),
    st.sampled_from([",", ", ", "],["]),
)
def test_arbitrary_numbers_are_read_as_ever(numbers, datatype, depth, separator):
    filled = separator.join([*numbers, *["1"] * 2100, *numbers])
    same_as_the_parser(body("[" * depth + filled + "]" * depth, [2100 + 2 * len(numbers)], datatype))


@compiled
@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.booleans())
def test_float32_are_what_they_were(values, shortest):
    wanted = np.array(values * (2200 // len(values)), "f4")
    text = ",".join(map(str, wanted)) if shortest else json.dumps(wanted.tolist())[1:-1]
    ((_, _, numbers),) = read(body(f"[{text}]", [len(wanted)]))[0].values()
    assert numbers == wanted.tobytes()


# --- how it gets there


def test_code_that_is_missing_is_not_used(monkeypatch, tmp_path, caplog):
    fresh = arrays._functions.__wrapped__
    with caplog.at_level("INFO"):
        monkeypatch.setattr(arrays, "LIBRARY", tmp_path / "_arrays.so")
        assert fresh() == {}
    assert "json_not_compiled" in caplog.text
    assert "where cc, gcc or clang is installed" in caplog.text


@compiled
def test_code_of_another_source_is_not_used(monkeypatch, tmp_path, caplog):
    other = tmp_path / "arrays.c"
    other.write_bytes(arrays.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(arrays, "SOURCE", other)
    with caplog.at_level("INFO"):
        assert arrays._functions.__wrapped__() == {}
    assert "compiled from another arrays.c" in caplog.text


@pytest.fixture
def source(tmp_path):
    """The project, as far as a wheel needs it, where it can be built without touching what is installed."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "deploy/native.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("__init__.py", "transport/http/arrays.c", "transport/http/arrays.py"):
        target = tmp_path / "gateway" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "gateway" / name, target)
    return tmp_path


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(source / "dist")],
        cwd=source, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@compiled
@pytest.mark.slow
def test_a_wheel_with_compiled_code_is_for_a_platform(source, monkeypatch):
    done = build(source, PATH="/usr/bin:/bin", LOCKGATE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").iterdir()
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as file:
        assert "gateway/transport/http/arrays.c" in file.namelist()
        file.extract("gateway/transport/http/_arrays.so", source / "wheel")
    monkeypatch.setattr(arrays, "LIBRARY", source / "wheel/gateway/transport/http/_arrays.so")
    assert len(arrays._functions.__wrapped__()) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "without", [{"PATH": ""}, {"PATH": "/usr/bin:/bin", "LOCKGATE_NATIVE": "0"}, {"CC": "false"}, {"CC": 'cc "'}]
)
def test_a_wheel_without_compiled_code_is_for_all(source, without):
    (source / "gateway/transport/http/_arrays.so").write_bytes(b"somebody's")
    done = build(source, **{"PATH": "/usr/bin:/bin", **without})
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "_arrays.so" not in "".join(zipfile.ZipFile(wheel).namelist())
    assert ("JSON will be read slower" in done.stdout + done.stderr) == ("LOCKGATE_NATIVE" not in without)


@compiled
@pytest.mark.slow
def test_a_wheel_is_built_without_writing_to_the_source(source):
    (source / "gateway/transport/http/_arrays.so").write_bytes(b"somebody's")
    assert build(source, PATH="/usr/bin:/bin").returncode == 0
    assert (source / "gateway/transport/http/_arrays.so").read_bytes() == b"somebody's"
    (wheel,) = (source / "dist").iterdir()
    with zipfile.ZipFile(wheel) as file:
        (library,) = [name for name in file.namelist() if name.endswith(".so")]
        assert file.read(library) != b"somebody's"


@pytest.mark.slow
def test_compiled_code_that_is_demanded_and_cannot_be_made_is_an_error(source):
    done = build(source, PATH="", LOCKGATE_NATIVE="1")
    assert done.returncode != 0
    assert "no C compiler (cc, gcc, clang)" in done.stderr

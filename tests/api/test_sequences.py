"""Sequences as their clients see them: unmodified tritonclient over HTTP, gRPC and a gRPC stream, real ONNX models."""

from __future__ import annotations

import queue
import struct
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.python_support import write
from tests.sequence_support import FLEET, accumulator, controls, named, wait_served
from tests.system.process import GatewayProcess, started

ONE = "instance_group { kind: KIND_CPU count: 1 }"
OLDEST = "oldest { max_candidate_sequences: 2 }"
FROM_FILE = 'initial_state: { data_type: TYPE_FP32 dims: [ 1 ] data_file: "hundred" name: "hundred" }'


CODE = """
def initialize(self, args):
    self.sums = {}

def execute(self, requests):
    responses = []
    for request in requests:
        ready = pb_utils.get_input_tensor_by_name(request, "READY").as_numpy().all()
        value = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
        of = request.correlation_id()
        if request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            self.sums[of] = 0
        if ready:
            self.sums[of] += value
        total = pb_utils.Tensor("OUT", self.sums.get(of, value).astype(np.float32))
        responses.append(pb_utils.InferenceResponse([total]))
    return responses
"""
CODE_CONFIG = """
backend: "python" max_batch_size: 4
input { name: "IN" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "OUT" data_type: TYPE_FP32 dims: [ 1 ] }
sequence_batching { direct {} control_input [ {
  name: "READY" control [ { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } ]
} ] }
"""


MODELS = (
    "code",
    "direct",
    "oldest",
    "plain",
    "alone",
    "hundred",
    "hasty",
    "told_int32",
    "told_fp32",
    "told_bool",
    "named",
)


def repository(folder: Path) -> None:
    write(folder / "code", CODE, CODE_CONFIG)
    accumulator(folder, "direct", "direct {}", more=ONE)
    accumulator(folder, "oldest", OLDEST, more="instance_group { kind: KIND_CPU count: 2 }")
    accumulator(folder, "plain", "", more=ONE)
    accumulator(folder, "alone", "direct {}", rows=0, more=ONE)
    accumulator(folder, "hundred", "direct {}", initial=FROM_FILE, more=ONE)
    (folder / "hundred" / "initial_state").mkdir()
    (folder / "hundred" / "initial_state" / "hundred").write_bytes(struct.pack("<f", 100))
    accumulator(folder, "lost", "direct {}", initial=FROM_FILE, more=ONE)
    accumulator(folder, "hasty", "direct {} max_sequence_idle_microseconds: 1000", rows=1, more=ONE)
    controls(folder, "told_int32", "direct {}", "int32", "0, 1")
    controls(folder, "told_fp32", OLDEST, "fp32", "0, 1")
    controls(folder, "told_bool", "direct {}", "bool", "false, true")
    named(folder, "named")


@pytest.fixture(
    scope="module", params=["memory", pytest.param("fleet", marks=[pytest.mark.slow, pytest.mark.timeout(90)])]
)
def gateway(request: pytest.FixtureRequest) -> Iterator[GatewayProcess]:
    """One process, or two gateways and two workers over a Redis of their own."""
    with tempfile.TemporaryDirectory(prefix="gw") as folder:
        repository(Path(folder))
        more = FLEET if request.param == "fleet" else ()
        with started("--model-repository", folder, "--allow-python-models", *more) as process:
            if request.param == "fleet":
                wait_served(process, *MODELS)
            else:
                process.wait_ready()
            yield process


@pytest.fixture(params=["http", "grpc"])
def wire(request: pytest.FixtureRequest, gateway: GatewayProcess) -> Iterator[tuple[Any, Any]]:
    """The client library and a client."""
    library = tritonclient.http if request.param == "http" else tritonclient.grpc
    with library.InferenceServerClient(f"127.0.0.1:{gateway.ports[request.param]}") as client:
        yield library, client


def inputs(library: Any, values: Any, dtype: Any = np.float32) -> list:
    array = np.array(values, dtype)
    given = library.InferInput("IN", list(array.shape), np_to_triton_dtype(dtype))
    given.set_data_from_numpy(array)
    return [given]


def ask(wire: tuple[Any, Any], model: str, value: float, of: int | str, **flags: bool) -> Any:
    library, client = wire
    shape = [value] if model == "alone" else [[value]]
    dtype = np.int32 if model.startswith("told") else np.float32
    return client.infer(model, inputs(library, shape, dtype), sequence_id=of, **flags).as_numpy("OUT").tolist()


START, END = {"sequence_start": True}, {"sequence_end": True}


@pytest.mark.parametrize("model", ["direct", "oldest", "plain", "code"])
def test_each_sequence_has_its_own_state(wire, model):
    for value, of in ((1, 7), (10, 8), (100, "a"), (1000, "7")):
        if model == "oldest" or of in (7, 8):
            assert ask(wire, model, value, of, **START) == [[value]]
    assert ask(wire, model, 2, 7) == [[3]]
    assert ask(wire, model, 20, 8) == [[30]]
    assert ask(wire, model, 3, 7, **END) == [[6]]
    assert ask(wire, model, 30, 8, **END) == [[60]]
    if model == "oldest":
        assert ask(wire, model, 1, "7", **END) == [[1001]]
        assert ask(wire, model, 1, "a", **END) == [[101]]


def test_a_sequence_may_be_one_request_and_begin_anew(wire):
    assert ask(wire, "direct", 5, 21, **START, **END) == [[5]]
    assert ask(wire, "direct", 6, 21, **START) == [[6]]
    assert ask(wire, "direct", 7, 21, **START) == [[7]]  # the one before ends early, as in Triton
    assert ask(wire, "direct", 1, 21, **END) == [[8]]


def test_a_model_without_batches_has_one_sequence_at_a_time(wire):
    assert ask(wire, "alone", 5, 21, **START) == [5]
    with ThreadPoolExecutor() as pool:
        other = pool.submit(ask, wire, "alone", 50, 22, **START, **END) if wire[0] is tritonclient.grpc else None
        assert ask(wire, "alone", 6, 21, **END) == [11]
        assert other is None or other.result(10) == [50]


def test_a_state_begins_as_its_file_says(wire):
    assert ask(wire, "hundred", 5, 21, **START) == [[105]]
    assert ask(wire, "hundred", 5, 21, **END) == [[110]]


def test_a_model_whose_initial_state_is_missing_is_unavailable(gateway):
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{gateway.ports['http']}") as client:
        (entry,) = [each for each in client.get_model_repository_index() if each["name"] == "lost"]
    assert entry["state"] == "UNAVAILABLE"
    assert entry["reason"].startswith("initial_state 'hundred' of state 'STATE_IN' cannot be read")


@pytest.mark.parametrize("model", ["told_int32", "told_fp32", "told_bool"])
def test_a_model_is_told_where_in_its_sequence_a_request_stands(wire, model):
    assert ask(wire, model, 9, 5, **START) == [[9, 1, 0, 1, 5]]
    assert ask(wire, model, 9, 5) == [[9, 0, 0, 1, 5]]
    assert ask(wire, model, 9, 6, **START, **END) == [[9, 1, 1, 1, 6]]
    assert ask(wire, model, 9, 5, **END) == [[9, 0, 1, 1, 5]]


def test_an_id_may_be_a_string(wire):
    assert ask(wire, "named", 1, "über/1", **START) == [["über/1".encode()]]
    assert ask(wire, "named", 1, "über/1", **END) == [["über/1".encode()]]


@pytest.mark.parametrize(
    ("model", "of", "flags", "text"),
    [
        ("direct", 0, START, "inference request to model 'direct' must specify a non-zero or non-empty correlation ID"),
        ("direct", "", START, "inference request to model 'direct' must specify a non-zero or non-empty correlation ID"),
        (
            "direct", 77, END,
            ("inference request for sequence 77 to model 'direct' must specify the START flag on the first request of "
            "the sequence"),
        ),
        (
            "direct", "x", {},
            ("inference request for sequence x to model 'direct' must specify the START flag on the first request of the "
            "sequence"),
        ),
        ("told_int32", "x", START, "sequence batching control 'ID' data-type is 'BYTES', but model 'told_int32' expects 'UINT64'"),
        ("named", 1, START, "sequence batching control 'ID' data-type is 'UINT64', but model 'named' expects 'BYTES'"),
    ],
)  # fmt: skip
def test_refusals_are_in_tritons_words(wire, model, of, flags, text):
    with pytest.raises(InferenceServerException) as caught:
        ask(wire, model, 1, of, **flags)
    assert caught.value.message() == text
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


def test_parameters_of_a_wrong_kind_are_refused_on_http(gateway):
    url = gateway.url("/v2/models/direct/infer")
    body = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}
    for parameters, text in (
        ({"sequence_id": 1.5}, "Unable to parse 'sequence_id': it must be a number or a string"),
        ({"sequence_id": 1, "sequence_start": 1}, "Unable to parse 'sequence_start': it must be true or false"),
    ):
        answer = requests.post(url, json={**body, "parameters": parameters}, timeout=20)
        assert (answer.status_code, answer.json()) == (400, {"error": text})


def test_a_request_of_several_rows_is_refused(wire):
    library, client = wire
    with pytest.raises(InferenceServerException) as caught:
        client.infer("direct", inputs(library, [[1], [2]]), sequence_id=1, sequence_start=True)
    assert caught.value.message() == (
        "inference request to model 'direct' must specify batch-size 1 due to requirements of sequence batcher"
    )


def test_an_idle_sequence_ends_and_gives_its_place_to_the_next(wire):
    assert ask(wire, "hasty", 1, 1, **START) == [[1]]
    assert ask(wire, "hasty", 5, 2, **START, **END) == [[5]]  # waits until the other is idle for too long
    with pytest.raises(InferenceServerException, match="sequence 1 to model 'hasty' must specify the START flag"):
        ask(wire, "hasty", 1, 1)


def test_a_stream_keeps_the_order_of_each_of_its_sequences(gateway):
    answers: queue.Queue = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as client:
        client.start_stream(lambda result, error: answers.put(error or result))
        steps = 25
        for step in range(1, steps + 1):
            for of in (1, 2, 3):
                client.async_stream_infer(
                    "oldest", inputs(tritonclient.grpc, [[step * 1000**of]]), request_id=f"{of}/{step}", sequence_id=of,
                    sequence_start=step == 1, sequence_end=step == steps,
                )  # fmt: skip
        found: dict[str, list[float]] = {"1": [], "2": [], "3": []}
        for _ in range(3 * steps):
            answer = answers.get(timeout=20)
            assert not isinstance(answer, Exception), answer
            found[answer.get_response().id.split("/")[0]].append(float(answer.as_numpy("OUT")[0][0]))
        client.stop_stream()
    for of in (1, 2, 3):
        total = np.cumsum([np.float32(step * 1000**of) for step in range(1, steps + 1)], dtype=np.float32)
        assert found[str(of)] == total.tolist()


@pytest.mark.parametrize("model", ["direct", "oldest", "code"])
def test_sequences_share_batches(gateway, model):
    """Twelve clients at once: more than there are slots, so that some wait for a place."""

    def client(of: int) -> list[float]:
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{gateway.ports['grpc']}") as each:
            barrier.wait()
            wire = (tritonclient.grpc, each)
            return [
                ask(wire, model, of, of, sequence_start=step == 0, sequence_end=step == 4)[0][0] for step in range(5)
            ]

    barrier = threading.Barrier(12)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(client, range(1, 13)))
    assert found == [[of * (step + 1) for step in range(5)] for of in range(1, 13)]


def test_the_configuration_and_the_metadata_are_tritons(gateway):
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{gateway.ports['http']}") as client:
        config = client.get_model_config("oldest")
        assert config["sequence_batching"]["max_sequence_idle_microseconds"] == 1_000_000
        assert config["sequence_batching"]["oldest"]["preferred_batch_size"] == [4]
        assert [each["name"] for each in client.get_model_metadata("oldest")["inputs"]] == ["IN"]
        assert [each["name"] for each in client.get_model_metadata("oldest")["outputs"]] == ["OUT"]
        assert "sequence" in client.get_server_metadata()["extensions"]

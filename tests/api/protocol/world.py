"""The gateways that facts are asked of, and the models that they serve.

`main` has all that can be allowed, in explicit mode, and some models that are broken; `strict` allows nothing that has
to be, wants tokens, restricts two groups of APIs, and has good models only; `lenient` polls and is ready in spite of a
broken model; `empty` has no models.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from onnx import TensorProto, helper

from gateway.types import DataType
from tests import ragged_support
from tests.python_support import code
from tests.sequence_support import accumulator, controls, named
from tests.system.process import GatewayProcess, ending

TOKEN = "t" * 16
FORWARD = "^(forward-|priority|sequence_id)"
LIMIT = 5000  # bytes, strict's --http-max-input-size
REST = 10  # dims of the labelled model's output
FAKE = 'backend: "fake" max_batch_size: 8 instance_group { kind: KIND_CPU count: 1 }\n'
ALONE = 'backend: "fake" instance_group { kind: KIND_CPU count: 1 }\n'
ONE = "instance_group { kind: KIND_CPU count: 1 }"
PYTHON = 'backend: "python" max_batch_size: 8\n'


def io(datatype: str = "FP32", dims: str = "2", out: str = "") -> str:
    """One input IN and one output OUT of the same type."""
    word = "STRING" if datatype == "BYTES" else datatype
    return (
        f'input {{ name: "IN" data_type: TYPE_{word} dims: [ {dims} ] }}\n'
        f'output {{ name: "OUT" data_type: TYPE_{word} dims: [ {out or dims} ] }}\n'
    )


def parameter(key: str, value: object) -> str:
    """A parameter of a configuration."""
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


STEP = 'input_map { key: "IN" value: "IN" } output_map { key: "OUT" value: "OUT" }'
PAIR = "".join(f'input {{ name: "{name}" data_type: TYPE_FP32 dims: 2 }}\n' for name in ("A", "B"))
WARMUP = """model_warmup {
    name: "w" batch_size: 2 inputs { key: "IN" value { data_type: TYPE_FP32 dims: 2 zero_data: true } } }
"""
FIELDS = {  # by the row of PROTOCOL.md's table: what counts of a configuration field is that its model serves
    "instance_group": 'backend: "fake" max_batch_size: 8 instance_group [ { count: 2 kind: KIND_CPU } ]\n' + io(),
    "dynamic_batching": FAKE + "dynamic_batching { }\n" + io(),
    "parameters": FAKE + parameter("any", "thing") + io(),
    "optional": FAKE + io().replace("\noutput", '\ninput { name: "MORE" data_type: TYPE_FP32 dims: 2 optional: true }\noutput', 1),
    "delay": FAKE + "dynamic_batching { max_queue_delay_microseconds: 100 }\n" + io(),
    "preferred": FAKE + "dynamic_batching { preferred_batch_size: [ 4, 8 ] }\n" + io(),
    "optimization": FAKE + 'optimization { execution_accelerators { cpu_execution_accelerator : [ { name : "openvino" } ] } }\n' + io(),
    "format": FAKE + io(dims="3, 2, 2").replace("dims", "format: FORMAT_NCHW dims", 1),
    "queue_policy": FAKE + "dynamic_batching { priority_levels: 2 default_priority_level: 1 default_queue_policy { "
    "timeout_action: DELAY default_timeout_microseconds: 100000 allow_timeout_override: true max_queue_size: 9 } }\n" + io(),
    "warmup": FAKE + WARMUP + io(),
    "rate_limiter": FAKE.replace("count: 1", 'count: 1 rate_limiter { resources [ { name: "R" count: 1 } ] priority: 1 }') + io(),
    "reshape": FAKE + 'input { name: "IN" data_type: TYPE_FP32 dims: 2 reshape { shape: [ 1, 2 ] } }\n'
    'output { name: "OUT" data_type: TYPE_FP32 dims: 2 reshape { shape: [ 1, 2 ] } }',
}  # fmt: skip
FAKES = {
    "m": FAKE + "dynamic_batching {}\n" + io(),
    "pair": FAKE + PAIR + 'output { name: "OUT" data_type: TYPE_FP32 dims: 2 }',
    "two_outputs": FAKE + 'input { name: "IN" data_type: TYPE_FP32 dims: 2 }\n'
    + "".join(f'output {{ name: "{name}" data_type: TYPE_FP32 dims: 2 }}\n' for name in ("OUT", "MORE")),
    "slow": FAKE.replace("8", "1") + parameter("a_us", 150_000) + io(),
    "open": FAKE + io(dims="-1"),
    "raw": ALONE + io(dims="2, -1"),
    "raw_batched": FAKE + io(dims="-1"),
    "raw_two": ALONE + io(dims="-1, -1"),
    "raw_text": ALONE + io("BYTES", dims="1"),
    "raw_texts": ALONE + io("BYTES", dims="2"),
    "labels": FAKE + io(dims=str(REST)).replace('name: "OUT"', 'name: "OUT" label_filename: "labels.txt"'),
    "flat_labels": ALONE + io(dims=str(REST)),
    "levels": FAKE + "dynamic_batching { priority_levels: 2 default_priority_level: 2 "
    "priority_queue_policy { key: 1 value { max_queue_size: 99 } } default_queue_policy { max_queue_size: 98 } }\n" + io(),
    "timed": FAKE.replace("8", "1") + parameter("a_us", 150_000)
    + "dynamic_batching { default_queue_policy { default_timeout_microseconds: 1000 } }\n" + io(),
    "reshaped": FAKE + 'input { name: "IN" data_type: TYPE_FP32 dims: 1 reshape { shape: [] } }\n'
    'output { name: "OUT" data_type: TYPE_FP32 dims: 1 reshape { shape: [] } }',
    "platform": FAKE + 'platform: "any_platform"\n' + io(),
    "cached": FAKE + "response_cache { enable: true }\n" + io(),
    "reload": FAKE + io(),
    "brief": FAKE + io(),
    "specific": FAKE + "version_policy { specific { versions: 1 } }\n" + io(),
    "latest": FAKE + "version_policy { latest { num_versions: 2 } }\n" + io(),
    "newest": FAKE + io(),
    "every": FAKE + "version_policy { all {} }\n" + io(),
    "gone": 'backend: "nonesuch"',
    "misnamed": 'name: "other"\n' + FAKE + io(),
    "ensemble": f'platform: "ensemble" max_batch_size: 8 {io()} ensemble_scheduling {{ step {{ model_name: "m" '
    f'model_version: -1 {STEP} }} }}',
    "dependent": f'platform: "ensemble" max_batch_size: 8 {io()} ensemble_scheduling {{ step {{ model_name: "brief" '
    f'model_version: -1 {STEP} }} }}',
    "needy": f'platform: "ensemble" max_batch_size: 8 {io()} ensemble_scheduling {{ step {{ model_name: "gone" '
    f'model_version: -1 {STEP} }} }}',
    "patient": FAKE + "dynamic_batching { preferred_batch_size: [ 2 ] max_queue_delay_microseconds: 10000000 }\n" + io(),
    "delayed": FAKE + "dynamic_batching { max_queue_delay_microseconds: 200000 }\n" + io(),
    "together": FAKE + parameter("a_us", 30_000) + "dynamic_batching {}\n" + io(),
    "open_together": FAKE + parameter("a_us", 10_000) + "dynamic_batching {}\n" + io(dims="-1"),
    "named_well": 'name: "named_well"\n' + FAKE + io(),
    "commented": "# a comment\n" + FAKE.replace('"fake"', "'fake'")
    + "input [ { name: 'IN' data_type: TYPE_FP32 dims: 2 } ]\noutput [ { name: 'OUT', data_type: TYPE_FP32, dims: 2, } ]",
    "quoted": FAKE.replace('"fake"', "\u201cfake\u201d") + io(),
    "typed": FAKE + io().replace("data_type", "type"),
    "as_json": json.dumps({"backend": "fake"}),
    "as_python": "import os\nbackend = 'fake'",
    "rankless": FAKE + 'input { name: "IN" data_type: TYPE_FP32 }\noutput { name: "OUT" data_type: TYPE_FP32 dims: 2 }',
    "template": "max_batch_size: ${triton_max_batch_size}\n" + FAKE + io(),
    **{f"of_{backend}": f'backend: "{backend}"\n' + io()
       for backend in ("pytorch", "tensorflow", "dali", "vllm", "fil", "fastertransformer")},
    **{f"field_{name}": config for name, config in FIELDS.items()},
    **{f"echo_{kind.value}": FAKE + io(kind.value, dims="-1") for kind in DataType},
    **{f"{kind}_labels": FAKE + io(kind, dims="-1") for kind in ("FP16", "BF16", "BOOL", "BYTES", "INT32", "UINT8")},
}  # fmt: skip
"""Configurations of models without a file, by name."""

GOOD = ("m", "pair", "slow", "echo_BYTES", "raw")  # that `strict` serves
UNLOADED = ("unloaded", "implied", "implying")  # are in main's repository, and not asked for at the start

REPEAT = """def execute(self, requests):
    for request in requests:
        sender = request.get_response_sender()
        count = int(request.parameters() and __import__("json").loads(request.parameters()).get("count", 1) or 0)
        value = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
        for index in range(count):
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", value + np.float32(index))]))
        if value.flat[0] == 13:
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("thirteen")),
                        flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        else:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
ECHO_PARAMETERS = """def execute(self, requests):
    import json
    return [
        pb_utils.InferenceResponse(
            [pb_utils.Tensor("OUT", np.array([request.parameters()], dtype=object).reshape(-1, 1))],
            parameters={"text": "a", "number": 7, "yes": True},
        )
        for request in requests
    ]
"""
EMPTY = """def execute(self, requests):
    return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.zeros((1, 0), np.float32))]) for _ in requests]
"""
BAD_TEXT = """def execute(self, requests):
    out = np.empty((1, 1), dtype=object)
    out[0, 0] = b"\\xff"
    return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", out)]) for _ in requests]
"""
ODD = """def execute(self, requests):
    out = np.array([[np.nan, np.inf, -np.inf, 0.1]], np.float32)
    return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", out)]) for _ in requests]
"""
TEXT_OUT = (
    'input { name: "IN" data_type: TYPE_FP32 dims: -1 }\noutput { name: "OUT" data_type: TYPE_STRING dims: -1 }\n'
)
CODE = {
    "repeat": (REPEAT, 'backend: "python"\nmodel_transaction_policy { decoupled: true }\n' + io(dims="-1")),
    "parameters": (ECHO_PARAMETERS, PYTHON + TEXT_OUT),
    "empty": (EMPTY, PYTHON + io(dims="-1")),
    "bad_text": (BAD_TEXT, PYTHON + TEXT_OUT),
    "odd": (ODD, PYTHON + io(dims="-1")),
}
"""The code and the configuration of Python models, by name."""


def fake(folder: Path, name: str, config: str, *versions: str) -> None:
    """A model without a file."""
    for version in versions or ("1",):
        (folder / name / version).mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(config)


def identity(shape: list[int | str]) -> bytes:
    """An ONNX model that gives its input IN as OUT."""
    kind = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["IN"], ["OUT"])], "identity",
        [kind("IN", TensorProto.FLOAT, shape)], [kind("OUT", TensorProto.FLOAT, shape)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def add(folder: Path, name: str, shape: list[int | str], config: str | None) -> None:
    """A folder with that model."""
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "1" / "model.onnx").write_bytes(identity(shape))
    if config is not None:
        (folder / name / "config.pbtxt").write_text(config)


def onnx_models(folder: Path) -> None:
    """What is filled in from a file, and sequences."""
    add(folder, "auto", ["rows", 3], None)
    add(folder, "auto_fixed", [1, 3], None)
    add(folder, "auto_scalar", ["rows"], None)
    add(folder, "auto_wants", [1, 3], "max_batch_size: 8")
    add(folder, "auto_one", ["rows", 3], "max_batch_size: 1")
    add(folder, "auto_platform", ["rows", 3], 'platform: "onnxruntime_onnx"')
    add(folder, "auto_not", ["rows", 3], 'backend: "onnxruntime"\n' + io(dims="3").replace("[ 3 ]", "[ -1, 3 ]"))
    add(folder, "named_file", ["rows", 3], 'default_model_filename: "model.onnx"')
    (folder / "auto" / "two").mkdir()
    (folder / "wrong" / "1").mkdir(parents=True)
    (folder / "wrong" / "1" / "model.onnx").write_bytes(b"no model")
    (folder / "wrong" / "config.pbtxt").write_text('backend: "onnxruntime"\n' + io())
    ragged_support.identity(folder, "ragged")
    ragged_support.sums(folder, "sums")
    accumulator(folder, "direct", "direct {}", more=ONE)
    accumulator(folder, "oldest", "oldest { max_candidate_sequences: 2 }", more=ONE)
    controls(folder, "told", "direct {}", "int32", "0, 1")
    named(folder, "named")
    first = 'initial_state: { data_type: TYPE_FP32 dims: [ 1 ] data_file: "hundred" name: "hundred" }'
    accumulator(folder, "hundred", "direct {}", initial=first, more=ONE)
    (folder / "hundred" / "initial_state").mkdir()
    (folder / "hundred" / "initial_state" / "hundred").write_bytes(struct.pack("<f", 100))


def repositories(folder: Path) -> None:
    """`main` and, of good models only, `strict`; `twice` has a model of main's name."""
    main, strict, twice = folder / "main", folder / "strict", folder / "twice"
    for name, config in FAKES.items():
        versions = ("1", "2", "3") if name in ("specific", "latest", "newest", "every") else ("1",)
        fake(main, name, config, *versions)
    for name in GOOD:
        fake(strict, name, FAKES[name])
    fake(main, "leaving", FAKE + parameter("gate", folder / "gate") + io())
    fake(main, "unloaded", FAKES["m"])
    fake(main, "implied", FAKES["m"])
    fake(main, "implying", FAKES["ensemble"].replace('"m"', '"implied"'))
    fake(folder / "lenient", "good", FAKES["m"])
    fake(folder / "lenient", "bad", FAKES["gone"])
    (folder / "empty").mkdir()
    fake(main, "double", FAKES["m"])
    fake(twice, "double", FAKES["m"])
    (main / "labels" / "labels.txt").write_text("\n".join(f"l{number}" for number in range(REST - 1)))
    (main / "every" / "configs").mkdir()
    (main / "newest" / "configs").mkdir()
    (main / "newest" / "configs" / "custom.pbtxt").write_text(FAKES["every"])
    for name, (body, config) in CODE.items():
        fake(main, name, config)
        (main / name / "1" / "model.py").write_text(code(body))
    onnx_models(main)
    (folder / "tokens").write_text(f"someone:{TOKEN}\n")
    (folder / "tokens").chmod(0o600)


@contextmanager
def serving(queue: str) -> Iterator[dict[str, GatewayProcess]]:
    """The gateways over a queue, by name."""
    with tempfile.TemporaryDirectory(prefix="gw") as name, ExitStack() as stack:
        folder = Path(name)
        repositories(folder)
        loaded = sorted(each.name for each in (folder / "main").iterdir() if each.name not in UNLOADED)
        flags = {
            "main": (
                "--model-repository", str(folder / "main"), "--model-repository", str(folder / "twice"),
                "--model-control-mode", "explicit", *(word for each in loaded for word in ("--load-model", each)),
                "--allow-python-models", "--allow-client-shm", "true", "--response-cache-bytes", str(1 << 20),
                "--model-config-name", "custom",
                "--http-header-forward-pattern", FORWARD, "--grpc-header-forward-pattern", FORWARD,
            ),
            "strict": (
                "--model-repository", str(folder / "strict"), "--token-file", str(folder / "tokens"),
                "--http-max-input-size", str(LIMIT),
                "--http-restricted-api", "statistics,logging:key=word",
                "--grpc-restricted-protocol", "statistics,logging:key=word",
            ),
            "lenient": (
                "--model-repository", str(folder / "lenient"), "--strict-readiness", "false",
                "--model-control-mode", "poll",
            ),
            "empty": ("--model-repository", str(folder / "empty")),
        }  # fmt: skip
        common = ("--queue", queue, "--persist-latency", "false")
        gateways = {
            name: stack.enter_context(ending(GatewayProcess(*common, *given))) for name, given in flags.items()
        }  # all of them begin before the first is waited for
        for gateway in gateways.values():
            gateway.wait_listening()
            gateway.wait_ready()
        yield gateways

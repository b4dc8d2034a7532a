"""From a parsed config.pbtxt to a ModelConfig: completion, defaults, every check with its line, and fit."""

import pytest

from gateway.config.build import build
from gateway.config.complete import complete, fill_backend, normalise
from gateway.config.fit import check_fit
from gateway.config.model import (
    Batching,
    InstanceGroup,
    ModelConfig,
    QueuePolicy,
    ResponseCache,
    TensorConfig,
    WarmupInput,
)
from gateway.config.parse import Source, empty, parse_text
from gateway.config.support import require_supported, warnings
from gateway.errors import InvalidArgument
from gateway.types import DataType, ModelIO, TensorSpec

IO_TEXT = """
input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 2 ] }
"""


NO_FALLBACK = "parameters { key: 'fallback' value { string_value: 'none' } }"


def io(
    inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]], kind: DataType = DataType.FP32
) -> ModelIO:
    return ModelIO(
        tuple(TensorSpec(name, kind, shape) for name, shape in inputs.items()),
        tuple(TensorSpec(name, kind, shape) for name, shape in outputs.items()),
    )


def made(text: str, gpus: tuple[int, ...] = ()) -> ModelConfig:
    source = Source("m/config.pbtxt", text)
    return build(fill_backend(parse_text(source), "m", ["model.onnx"]), source, gpus=gpus)


def refusal(text: str, gpus: tuple[int, ...] = ()) -> str:
    with pytest.raises(InvalidArgument) as caught:
        made(text, gpus)
    return caught.value.message


# --- backend


@pytest.mark.parametrize(
    ("text", "files", "expected"),
    [
        ("", ["model.onnx"], ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ('backend: "onnxruntime"', [], ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ('platform: "onnxruntime_onnx"', ["model.py"], ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ('backend: "onnxruntime" default_model_filename: "a.onnx"', [], ("onnxruntime", "onnxruntime_onnx", "a.onnx")),
        ('default_model_filename: "model.plan"', ["model.onnx"], ("tensorrt", "tensorrt_plan", "model.plan")),
        ("", ["model.plan", "model.onnx"], ("tensorrt", "tensorrt_plan", "model.plan")),
        ("", ["model.py"], ("python", "", "model.py")),
        ("", ["readme.txt"], ("", "", "")),
        ('platform: "ensemble"', ["model.onnx"], ("", "ensemble", "")),
        ('backend: "fake"', ["model.onnx"], ("fake", "", "")),
    ],
)
def test_backend_platform_and_file_follow_from_each_other(
    text: str, files: list[str], expected: tuple[str, ...]
) -> None:
    proto = fill_backend(parse_text(Source("f", text)), "m", files)
    assert (proto.backend, proto.platform, proto.default_model_filename) == expected
    assert proto.name == "m"


# --- auto-complete


def completed(text: str, model: ModelIO):
    source = Source("m/config.pbtxt", text)
    return complete(fill_backend(parse_text(source), "m", ["model.onnx"]), model, 4, source)


def test_a_batching_model_without_configuration_gets_everything() -> None:
    proto = completed("", io({"x": (-1, 3, -1)}, {"y": (-1, 10)}))
    assert proto.max_batch_size == 4
    assert proto.HasField("dynamic_batching")
    assert [(t.name, t.data_type, list(t.dims)) for t in proto.input] == [("x", 11, [3, -1])]
    assert [(t.name, list(t.dims)) for t in proto.output] == [("y", [10])]


def test_a_given_max_batch_size_stays_and_one_needs_no_batching() -> None:
    model = io({"x": (-1, 3)}, {"y": (-1, 10)})
    assert completed("max_batch_size: 32", model).max_batch_size == 32
    one = completed("max_batch_size: 1", model)
    assert one.max_batch_size == 1
    assert not one.HasField("dynamic_batching")


@pytest.mark.parametrize("first", [1, 8])
def test_one_fixed_first_dimension_means_no_batching_and_full_shapes(first: int) -> None:
    proto = completed("", io({"x": (-1, 3)}, {"y": (first, 10)}))
    assert proto.max_batch_size == 0
    assert not proto.HasField("dynamic_batching")
    assert list(proto.input[0].dims) == [-1, 3]
    assert list(proto.output[0].dims) == [first, 10]


def test_batches_asked_of_a_model_that_cannot() -> None:
    with pytest.raises(InvalidArgument) as caught:
        completed('name: "m"\nmax_batch_size: 8', io({"x": (1, 3)}, {"y": (-1, 10)}))
    assert caught.value.message.startswith(
        "m/config.pbtxt line 2: autofill failed for model 'm': model does not support batching while non-zero "
        "max_batch_size is specified"
    )


def test_one_number_per_row_becomes_dims_1_with_an_empty_reshape() -> None:
    proto = completed("", io({"x": (-1,)}, {"y": (-1, 2)}))
    assert list(proto.input[0].dims) == [1]
    assert proto.input[0].HasField("reshape")
    assert list(proto.input[0].reshape.shape) == []
    config = build(proto, Source("f"))
    assert config.inputs[0] == TensorConfig("x", DataType.FP32, (1,), reshape=())


def test_a_scalar_without_batch_becomes_dims_1_without_reshape() -> None:
    proto = completed("", io({"x": ()}, {"y": (2,)}))
    assert list(proto.input[0].dims) == [1]
    assert not proto.input[0].HasField("reshape")


def test_nothing_is_completed_when_both_are_given() -> None:
    proto = completed(IO_TEXT, io({"other": (-1, 3)}, {"another": (-1, 10)}))
    assert proto.max_batch_size == 0
    assert [tensor.name for tensor in proto.input] == ["x"]


def test_what_is_given_of_the_two_stays() -> None:
    proto = completed('input { name: "x" data_type: TYPE_FP32 dims: [ 7 ] }', io({"x": (-1, -1)}, {"y": (-1, 10)}))
    assert list(proto.input[0].dims) == [7]
    assert list(proto.output[0].dims) == [10]


@pytest.mark.parametrize("kind", list(DataType))
def test_every_element_type_survives_completion(kind: DataType) -> None:
    config = build(completed("", io({"x": (-1, 1)}, {"y": (-1, 1)}, kind)), Source("f"))
    assert (config.inputs[0].datatype, config.outputs[0].datatype) == (kind, kind)


# --- defaults


def test_defaults_are_tritons() -> None:
    proto = normalise(
        fill_backend(parse_text(Source("f", IO_TEXT + "max_batch_size: 8 dynamic_batching {}")), "m", ["model.onnx"]),
        (),
    )
    assert proto.version_policy.latest.num_versions == 1
    assert list(proto.dynamic_batching.preferred_batch_size) == [8]
    assert proto.optimization.input_pinned_memory.enable
    assert proto.optimization.output_pinned_memory.enable
    assert [(g.name, g.kind, g.count) for g in proto.instance_group] == [("m", 2, 2)]


def test_instance_groups_follow_the_gpus_there_are() -> None:
    text = IO_TEXT + 'instance_group [ { count: 3 }, { name: "c" kind: KIND_CPU }, { kind: KIND_AUTO gpus: [ 1 ] } ]'
    with_gpus = made(text, gpus=(0, 1))
    assert with_gpus.instance_groups == (
        InstanceGroup("gpu", 3, (0, 1)),
        InstanceGroup("cpu", 0),
        InstanceGroup("gpu", 0, (1,)),
    )
    assert [group.name for group in with_gpus.proto.instance_group] == ["m_0", "c", "m_2"]
    assert with_gpus.execution_providers == ("CUDAExecutionProvider", "CPUExecutionProvider")
    elsewhere = normalise(parse_text(Source("f", IO_TEXT + "instance_group { gpus: [ 7 ] }")), (0, 1))
    assert elsewhere.instance_group[0].kind == elsewhere.instance_group[0].KIND_CPU
    on_cpu = made(IO_TEXT)
    assert on_cpu.instance_groups == (InstanceGroup("cpu", 0),)
    assert on_cpu.execution_providers == ("CPUExecutionProvider",)


def test_the_whole_of_a_model_config() -> None:
    config = made(
        """
        max_batch_size: 8
        input { name: "x" data_type: TYPE_STRING dims: [ 1 ] reshape { shape: [ ] } }
        input { name: "o" data_type: TYPE_BF16 dims: [ -1 ] optional: true }
        output { name: "y" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" }
        dynamic_batching { max_queue_delay_microseconds: 100 preferred_batch_size: [ 4, 8 ] }
        optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }
        parameters { key: "k" value { string_value: "v" } }
        model_warmup {
          name: "w"
          inputs { key: "x" value { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "x.raw" } }
          inputs { key: "o" value { data_type: TYPE_BF16 dims: [ 3 ] random_data: true } }
        }
        """
    )
    assert (config.name, config.backend, config.platform) == ("m", "onnxruntime", "onnxruntime_onnx")
    assert config.inputs == (
        TensorConfig("x", DataType.BYTES, (1,), reshape=()),
        TensorConfig("o", DataType.BF16, (-1,), optional=True),
    )
    assert config.outputs == (TensorConfig("y", DataType.FP32, (10,), label_filename="labels.txt"),)
    assert config.batching == Batching(100, (4, 8))
    assert config.execution_providers == ("OpenVINOExecutionProvider", "CPUExecutionProvider")
    assert config.parameters == {"k": "v"}
    assert config.default_model_filename == "model.onnx"
    assert not config.decoupled
    (warmup,) = config.warmup
    assert (warmup.name, warmup.batch_size, warmup.count) == ("w", 1, 1)
    assert warmup.inputs == {
        "x": WarmupInput(DataType.BYTES, (1,), "x.raw"),
        "o": WarmupInput(DataType.BF16, (3,), "random"),
    }


def test_queue_policies_are_read() -> None:
    config = made(
        IO_TEXT
        + """max_batch_size: 8
        dynamic_batching {
          priority_levels: 3 default_priority_level: 2
          default_queue_policy { max_queue_size: 10 default_timeout_microseconds: 500 allow_timeout_override: true }
          priority_queue_policy { key: 3 value { timeout_action: DELAY } }
          priority_queue_policy { key: 1 value { timeout_action: REJECT max_queue_size: 1 } }
        }
        """
    )
    assert config.batching == Batching(
        preferred_batch_sizes=(8,),
        queue_policy=QueuePolicy(10, 500, delays=False, allow_timeout_override=True),
        priority_levels=3,
        default_priority_level=2,
        priority_queue_policies={1: QueuePolicy(1), 3: QueuePolicy(delays=True)},
    )


def test_ordering_may_be_preserved_with_one_priority() -> None:
    text = "dynamic_batching { preserve_ordering: true priority_levels: 1 default_priority_level: 1 }"
    batching = made(IO_TEXT + text).batching
    assert batching is not None
    assert batching.preserve_ordering


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("", None),
        ('parameters { key: "default_deadline_ms" value { string_value: "0" } }', 0.0),
        ('parameters { key: "default_deadline_ms" value { string_value: "12.5" } }', 12.5),
    ],
)
def test_a_model_may_have_a_default_deadline(text: str, milliseconds: float | None) -> None:
    assert made(IO_TEXT + text).default_deadline_ms == milliseconds


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("", None),
        ("response_cache { }", None),
        ("response_cache { enable: true }", ResponseCache()),
        ("response_cache { enable: true } model_transaction_policy { decoupled: true }", None),
        ("response_cache { enable: true } sequence_batching { }", None),
        ('response_cache { enable: true } parameters { key: "response_cache_public" value { string_value: "true" } }',
         ResponseCache(public=True)),
        ('parameters { key: "response_cache_public" value { string_value: "true" } }', None),
    ],
)  # fmt: skip
def test_responses_are_cached_only_when_asked_and_where_there_is_one(text: str, cache: ResponseCache | None) -> None:
    assert made(IO_TEXT + text).response_cache == cache


def test_requests_are_joined_only_when_asked() -> None:
    assert made(IO_TEXT + "max_batch_size: 8").batching is None
    assert made(IO_TEXT + "max_batch_size: 1 dynamic_batching {}").batching == Batching(0, (1,))
    assert made(IO_TEXT + "dynamic_batching {}").batching == Batching()
    assert made(IO_TEXT + "max_batch_size: 8 dynamic_batching {}").batching == Batching(0, (8,))


# --- checks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m/config.pbtxt: model 'm' must specify 'input'"),
        ("\ninput { data_type: TYPE_FP32 }", "line 2: model input must specify 'name'"),
        ('input {\n name: "a"\n dims: 1 }', "line 2: model input 'a' must specify 'data_type'"),
        ('input {\n name: "a"\n data_type: TYPE_FP32 }', "line 2: model input 'a' must specify 'dims'"),
        (
            'input {\n name: "a" data_type: TYPE_FP32 dims: 0 }',
            "line 2: model input 'a' dimension must be integer >= 1",
        ),
        ('input { name: "a" data_type: TYPE_FP32 dims: -2 }', "dimension must be integer >= 1"),
        ('input { name: "a" data_type: TYPE_FP32 dims: 1 reshape {} }', "cannot have empty reshape for non-batching"),
        (
            'input { name: "a" data_type: TYPE_FP32 dims: 4 reshape { shape: [ 2, 3 ] } }',
            "different size for dims and re",
        ),
        ('input { name: "a" data_type: TYPE_FP32 dims: [2,-1] reshape { shape: [-1,2] } }', "different size for dims"),
        ('input { name: "a" data_type: TYPE_FP32 dims: 4 format: FORMAT_NCHW }', "NHWC/NCHW, which require 3 dims"),
        (
            'input { name: "a" data_type: TYPE_FP32 dims: 4 is_non_linear_format_io: true }',
            "only supported for TensorRT",
        ),
        (
            'input { name: "a" data_type: TYPE_FP32 dims: 4 is_shape_tensor: true allow_ragged_batch: true }',
            "the same for all requests of a batch",
        ),
        (IO_TEXT + 'input { name: "x" data_type: TYPE_FP32 dims: 4 }', "line 2: model input 'x' is given twice"),
        (IO_TEXT + "max_batch_size: -1", "line 4: 'max_batch_size' must be non-negative"),
        (
            IO_TEXT + "dynamic_batching { preferred_batch_size: 4 }",
            "line 4: dynamic batching preferred size must be <=",
        ),
        (IO_TEXT + "max_batch_size: 2 dynamic_batching { preferred_batch_size: 0 }", "must be positive"),
        (
            IO_TEXT + "dynamic_batching {\n priority_levels: 3 }",
            "line 5: default priority level must be in range [1, 3] for m. Set default_priority_level",
        ),
        (
            IO_TEXT + "dynamic_batching { priority_levels: 3\n default_priority_level: 4 }",
            "line 5: default priority level must be in range [1, 3] for m.",
        ),
        (
            IO_TEXT + "dynamic_batching {\n priority_levels: 901 default_priority_level: 1 }",
            "line 5: priority_levels of m is 901, and the most is 900. Use fewer levels",
        ),
        (
            IO_TEXT + "dynamic_batching { priority_levels: 1 default_priority_level: 1\n"
            "priority_queue_policy { key: 1 value { } }\n priority_queue_policy {\n key: 2 value { } } }",
            "line 7: priority queue policy must have priority level in range [1, 1] for m, got 2.",
        ),
        (
            IO_TEXT + "dynamic_batching { priority_levels: 1 default_priority_level: 1\n"
            "priority_queue_policy { key: 0 value { } } }",
            "must have priority level in range [1, 1] for m, got 0.",
        ),
        (
            IO_TEXT + "dynamic_batching {\n preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
            "line 5: Only one priority level is allowed when 'preserve_ordering' is true for m.",
        ),
        (
            IO_TEXT + "dynamic_batching { preserve_ordering: true default_queue_policy { timeout_action: DELAY "
            "default_timeout_microseconds: 5 } }",
            "line 4: Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for m.",
        ),
        (
            IO_TEXT + "dynamic_batching { preserve_ordering: true priority_levels: 1 default_priority_level: 1 "
            "priority_queue_policy { key: 1 value { timeout_action: DELAY default_timeout_microseconds: 5 } } }",
            "Queue policy can not have DELAY as timeout action",
        ),
        (
            IO_TEXT + 'parameters {\n key: "default_deadline_ms" value { string_value: "soon" } }',
            "line 5: parameter default_deadline_ms must be a number of milliseconds, 0 for no deadline, got 'soon'",
        ),
        (IO_TEXT + 'parameters { key: "default_deadline_ms" value { string_value: "-1" } }', "got '-1'"),
        (IO_TEXT + 'parameters { key: "default_deadline_ms" value { string_value: "nan" } }', "got 'nan'"),
        (
            IO_TEXT + 'parameters { key: "response_cache_public" value { string_value: "yes" } }',
            "line 4: parameter response_cache_public must be true, to give responses to other tenants",
        ),
        (
            IO_TEXT + 'platform: "tensorrt_plan" backend: "onnxruntime"',
            "line 4: unexpected 'platform' and 'backend' pair",
        ),
        (
            IO_TEXT + "instance_group [ {\n kind: KIND_GPU } ]" + NO_FALLBACK,
            "line 5: instance group m_0 has kind KIND_GPU but no GPUs",
        ),
        (IO_TEXT + "instance_group { gpus: [ 0 ] }", "line 4: instance group m_0 lists gpus [0] and runs on the CPU"),
        (IO_TEXT + "instance_group { count: -1 }", "negative count"),
        (IO_TEXT + 'instance_group { profile: "1" }', "only supported for TensorRT models"),
        (
            IO_TEXT + 'optimization { execution_accelerators { cpu_execution_accelerator { name: "magic" } } }',
            "line 4: unknown Execution Accelerator 'magic' is requested; there are: tensorrt, cuda, openvino",
        ),
        (IO_TEXT + 'model_warmup { name: "w" }', "line 4: model_warmup 'w' lacks the input 'x'"),
        (IO_TEXT + 'model_warmup { name: "w" batch_size: 2 }', "batch_size 2, more than max_batch_size 0"),
        (
            IO_TEXT + 'model_warmup {\n name: "w"\n inputs { key: "z" value { } } }',
            "line 6: model_warmup 'w' has an input 'z', which the model has not; it has: x",
        ),
        (
            IO_TEXT + 'model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_INT8 } } }',
            "another data_type",
        ),
        (
            IO_TEXT + 'model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: -1 } } }',
            "open dimension",
        ),
        (
            IO_TEXT + 'model_warmup { name: "w" inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 } } }',
            "set zero_data, random_data or input_data_file",
        ),
    ],
)
def test_checks_name_the_line(text: str, message: str) -> None:
    refused = refusal(text)
    assert message in refused
    assert refused.startswith("m/config.pbtxt")


def test_gpus_must_exist() -> None:
    text = IO_TEXT + "instance_group { kind: KIND_GPU gpus: [ 0, 7 ] }"
    refused = refusal(text + NO_FALLBACK, gpus=(0, 1))
    assert "invalid or unsupported gpu id 7; there are: [0, 1]" in refused
    (group,) = made(text, gpus=(0, 1)).instance_groups  # which may fall back
    assert (group.kind, group.gpus) == ("gpu", (0, 7))


# --- what is not done


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("sequence_batching { iterative_sequence: true }", "iterative_sequence"),
        ("sequence_batching { oldest { preserve_ordering: true } }", "preserve_ordering"),
        ('sequence_batching { } backend: "remote"', "sequence_batching"),
        ('sequence_batching { state { input_name: "a" } } backend: "python"', "state"),
        ("model_transaction_policy { decoupled: true }", "decoupled"),
        ('batch_input { } backend: "remote"', "batch_input"),
        ('input { allow_ragged_batch: true } backend: "remote"', "allow_ragged_batch"),
        ("sequence_batching { direct { } } input { allow_ragged_batch: true }", "sequence_batching"),
        ("sequence_batching { } output { is_shape_tensor: true }", "sequence_batching"),
        ('platform: "tensorrt_plan" input { is_shape_tensor: true }', "is_shape_tensor"),
        ('model_operations { op_library_filename: "lib.so" }', "model_operations"),
        ('model_repository_agents { agents { name: "checksum" } }', "model_repository_agents"),
        ('cc_model_filenames { key: "7.0" value: "model7" }', "cc_model_filenames"),
        ('backend: "python"', "backend 'python'"),
        ('platform: "tensorrt_plan"', "backend 'tensorrt'"),
        ('platform: "caffe2_netdef"', "platform 'caffe2_netdef' is not known"),
        ("", "the configuration names no backend"),
    ],
)
def test_what_would_change_answers_is_refused(text: str, field: str) -> None:
    source = Source("m/config.pbtxt", f"\n{text}")
    proto = fill_backend(parse_text(source), "m", [])
    with pytest.raises(InvalidArgument) as caught:
        require_supported(proto, {"onnxruntime", "fake"}, source)
    assert field in caught.value.message
    if text:
        assert caught.value.message.startswith("m/config.pbtxt line 2: ")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("dynamic_batching { default_priority_level: 1 }", "priority_levels"),
        ("dynamic_batching { priority_queue_policy { key: 1 value { max_queue_size: 1 } } }", "priority_levels"),
        ('instance_group { host_policy: "a" }', "instance_group"),
        ("instance_group { kind: KIND_MODEL }", "KIND_MODEL"),
        ("optimization { graph { level: 1 } }", "optimization"),
        ("optimization { cuda { graphs: true } }", "optimization"),
        (
            'optimization { execution_accelerators { cpu_execution_accelerator { parameters { key: "a" value: "b" } } } }',
            "parameters",
        ),
        ('metric_tags { key: "a" value: "b" }', "metric_tags"),
        ("model_metrics { }", "model_metrics"),
        ('runtime: "x"', "runtime"),
    ],
)
def test_what_only_tunes_is_accepted_with_a_warning(text: str, field: str) -> None:
    source = Source("m/config.pbtxt", f"\n{text}{IO_TEXT}")
    proto = fill_backend(parse_text(source), "m", ["model.onnx"])
    require_supported(proto, {"onnxruntime"}, source)
    (warning,) = warnings(proto, source)
    assert warning.startswith(f"m/config.pbtxt line 2: {field} has no effect in this version. ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimization { cuda { graphs: true } }", ()),
        ("optimization { cuda { graphs: true busy_wait_events: true } }", ("cuda",)),
        ("optimization { cuda { graph_spec { batch_size: 1 } } }", ("cuda",)),
        ('instance_group { profile: "1" }', ("profile",)),
        ("optimization { graph { level: 1 } cuda { graphs: true } }", ("optimization",)),
    ],
)
def test_what_only_tunes_a_tensorrt_model(text: str, expected: tuple[str, ...]) -> None:
    source = Source("m/config.pbtxt", f"\n{text}{IO_TEXT}")
    proto = fill_backend(parse_text(source), "m", ["model.plan"])
    require_supported(proto, {"tensorrt"}, source)
    found = warnings(proto, source)
    assert tuple(each.partition(": ")[2].partition(" has no effect")[0] for each in found) == expected
    assert build(proto, source).backend == "tensorrt"


def test_every_field_of_the_schema_is_done_refused_or_warned_of() -> None:
    done = {
        "name", "platform", "backend", "version_policy", "max_batch_size", "input", "output", "instance_group",
        "dynamic_batching", "optimization", "default_model_filename", "parameters", "model_warmup", "response_cache",
        "ensemble_scheduling", "batch_input", "batch_output",
    }  # fmt: skip
    gaps = {
        "sequence_batching", "model_transaction_policy",
        "model_operations", "model_repository_agents", "cc_model_filenames", "metric_tags", "model_metrics",
        "runtime",
    }  # fmt: skip
    assert {field.name for field in empty().DESCRIPTOR.fields} == done | gaps


def test_an_ordinary_configuration_has_no_warnings() -> None:
    source = Source("f", IO_TEXT + "max_batch_size: 4 dynamic_batching { } instance_group { kind: KIND_CPU count: 2 }")
    assert warnings(parse_text(source), source) == ()


# --- fit


FIT = io({"x": (-1, 3)}, {"y": (-1, 10)})


def configured(text: str) -> ModelConfig:
    return made(f'output {{ name: "y" data_type: TYPE_FP32 dims: [ 10 ] }} max_batch_size: 4 {text}')


@pytest.mark.parametrize("dims", ["[ 3 ]", "[ 1, 3 ] reshape { shape: [ 3 ] }"])
def test_a_configuration_that_fits(dims: str) -> None:
    check_fit(configured(f'input {{ name: "x" data_type: TYPE_FP32 dims: {dims} }}'), FIT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('input { name: "z" data_type: TYPE_FP32 dims: 3 }', "unexpected inference input 'z', allowed inputs are: x."),
        ('input { name: "x" data_type: TYPE_FP16 dims: 3 }', "data type FP32 and the configuration FP16"),
        ('input { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] }', "dims exclude the batch dimension: remove"),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] }',
            "expects shape [-1,3] and the configuration gives [-1,4]",
        ),
        ('input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] }', "expects shape [-1,3]"),
    ],
)
def test_a_configuration_that_does_not_fit(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_fit(configured(text), FIT)
    assert message in caught.value.message


def test_an_input_left_out_and_batches_of_a_model_that_cannot() -> None:
    config = configured('input { name: "x" data_type: TYPE_FP32 dims: 3 }')
    with pytest.raises(InvalidArgument, match="wants the input 'mask'"):
        check_fit(config, io({"x": (-1, 3), "mask": (-1, 3)}, {"y": (-1, 10)}))
    with pytest.raises(InvalidArgument, match="Set max_batch_size: 0"):
        check_fit(config, io({"x": (1, 3)}, {"y": (1, 10)}))


def test_dims_without_the_batch_and_no_batching() -> None:
    config = made('input { name: "x" data_type: TYPE_FP32 dims: 3 } output { name: "y" data_type: TYPE_FP32 dims: 10 }')
    with pytest.raises(InvalidArgument, match="dims include the batch dimension"):
        check_fit(config, io({"x": (1, 3)}, {"y": (1, 10)}))


def with_default(shape: tuple[int, ...]) -> ModelIO:
    """A model whose input `more` has a value of its own."""
    more = TensorSpec("more", DataType.FP32, shape, optional=True)
    return ModelIO((*io({"x": (-1, 3)}, {}).inputs, more), io({}, {"y": (-1, 10)}).outputs)


def test_an_optional_input_of_the_file_may_be_left_out_or_given() -> None:
    one = 'input { name: "x" data_type: TYPE_FP32 dims: 3 }'
    model = with_default((-1, 3))
    check_fit(configured(one), model)
    check_fit(configured(one + 'input { name: "more" data_type: TYPE_FP32 dims: 3 optional: true }'), model)
    with pytest.raises(
        InvalidArgument, match="tensor 'x': the configuration says optional: true, and the model has no"
    ):
        check_fit(configured(one.replace("dims", "optional: true dims")), model)


def test_an_optional_input_of_the_file_is_not_filled_in() -> None:
    proto = completed("", with_default((3,)))
    assert [tensor.name for tensor in proto.input] == ["x"]
    assert proto.max_batch_size == 4  # as the others take batches


def test_an_auto_completed_scalar_fits() -> None:
    for model in (io({"x": ()}, {"y": (2,)}), io({"x": (-1,)}, {"y": (-1,)})):
        check_fit(build(completed("", model), Source("f")), model)

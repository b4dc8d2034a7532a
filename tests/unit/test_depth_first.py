"""Depth-first batches: what of a network runs row by row, and that its answers stay what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from gateway.devices.cpu import core_cache
from gateway.engines import depth_first

FLOAT = TensorProto.FLOAT
CACHE = 1 << 20  # bytes


class Net:
    """A network under construction, from `image` on: 1 MB of activations a row at 64 channels."""

    def __init__(self, seed: int = 0, size: int = 64) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes, self.weights, self.value, self.channels = [], [], "image", 3
        self.size = size

    def weight(self, *shape: int, name: str = "") -> str:
        name = name or f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(self.random.normal(0, 0.3, shape).astype("<f4"), name))
        return name

    def add(self, op: str, *more: str, outputs=1, **attributes) -> Net:
        made = [f"{op}_{len(self.nodes)}" + ("" if not i else f"_{i}") for i in range(outputs)]
        self.nodes.append(helper.make_node(op, [self.value, *more], made, **attributes))
        self.value = made[0]
        return self

    def conv(self, channels: int, kernel: int = 1, groups: int = 1, stride: int = 1) -> Net:
        weight = self.weight(channels, self.channels // groups, kernel, kernel)
        self.channels = channels
        strides = [stride, stride]
        return self.add("Conv", weight, self.weight(channels), group=groups, pads=[kernel // 2] * 4, strides=strides)

    def wide(self) -> Net:
        """Layers whose activations leave the cache: 9 MB a row."""
        self.conv(64, 3).add("Relu")
        for _ in range(4):
            self.conv(64, 3, groups=64).add("Relu")
        return self

    def narrow(self) -> Net:
        """Layers whose activations stay in it and whose weights are larger, and the end."""
        self.conv(8, stride=4).conv(256, 3, stride=2).add("GlobalAveragePool").add("Flatten")
        self.nodes.append(helper.make_node("Gemm", [self.value, self.weight(256, 4)], ["answer"]))
        return self

    def model(self, *outputs, rows="rows", opset=17, ir=8, kind=FLOAT):
        shape = [rows, 3, self.size, self.size]
        answers = [
            helper.make_tensor_value_info(name, kind, ["rows", 4] if name == "answer" else ["rows", *[64] * 3])
            for name in outputs or ("answer",)
        ]
        inputs = [helper.make_tensor_value_info("image", kind, shape)]
        graph = helper.make_graph(self.nodes, "net", inputs, answers, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def saved(folder: Path, model) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def rewritten(folder: Path, model, rows: int = 8, cache: int = CACHE) -> onnx.ModelProto | None:
    made = depth_first.rewritten(saved(folder, model), rows, cache)
    if made is None:
        return None
    new = onnx.load_model_from_string(made)
    onnx.checker.check_model(new, full_check=True)
    return new


def answers(model, rows: int):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shape = [rows, *session.get_inputs()[0].shape[1:]]
    return session.run(None, {"image": np.random.default_rng(rows).normal(size=shape).astype("<f4")})


def ops(nodes) -> list[str]:
    return [node.op_type for node in nodes]


def head(model) -> list[str]:
    """The operators inside the Scan, without the two that give a row its batch dimension and take it."""
    scan = model.graph.node[0]
    assert scan.op_type == "Scan"
    inside = ops(scan.attribute[0].g.node if scan.attribute[0].name == "body" else scan.attribute[1].g.node)
    assert inside[0] == inside[-1] == "Reshape"
    return inside[1:-1]


def test_layers_whose_activations_leave_the_cache_run_row_by_row_and_the_others_do_not(tmp_path):
    model = Net().wide().narrow().model()
    new = rewritten(tmp_path, model)
    assert head(new) == ["Conv", "Relu"] * 5 + ["Conv"]  # the last one takes 1 MB, and gives a little
    assert ops(new.graph.node) == ["Scan", "Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    for rows in (1, 2, 7):
        for one, other in zip(answers(model, rows), answers(new, rows), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_what_fits_the_cache_is_left_alone(tmp_path):
    model = Net().wide().narrow().model()
    assert rewritten(tmp_path, model, cache=64 << 20) is None
    assert rewritten(tmp_path, model, rows=2, cache=5 << 20) is None
    assert rewritten(tmp_path, model, rows=32, cache=17 << 20) is None  # a usual batch has eight rows


def test_weights_that_every_row_would_read_again_are_weighed_against_what_is_saved(tmp_path):
    net = Net(size=16).conv(64, 3)
    for _ in range(40):
        net.conv(64, 7)  # 128 KiB of activations a row, 784 KiB of weights
    assert rewritten(tmp_path, net.narrow().model(), cache=1 << 16) is None


def test_weights_used_in_the_head_and_after_it_are_in_both(tmp_path):
    net = Net().wide()
    low, high = net.weight(name="low"), net.weight(name="high")
    net.add("Clip", low, high).conv(8, stride=4).conv(256, 3, stride=2).add("GlobalAveragePool").add(
        "Clip", low, high
    ).add("Flatten")
    net.nodes.append(helper.make_node("Gemm", [net.value, net.weight(256, 4)], ["answer"]))
    model = net.model()
    new = rewritten(tmp_path, model)
    assert "Clip" in head(new)
    assert "Clip" in ops(new.graph.node)
    np.testing.assert_allclose(answers(model, 3)[0], answers(new, 3)[0], rtol=1e-5, atol=1e-5)


def test_images_whose_channels_come_last_and_joined_layers_run_row_by_row(tmp_path):
    net = Net()
    net.nodes.append(helper.make_node("Transpose", ["image"], ["channels first"], perm=[0, 3, 1, 2]))
    net.value = "channels first"
    net.wide()
    early = net.nodes[-3].output[0]
    net.add("Concat", early, axis=1)
    net.channels *= 2
    model = net.narrow().model()
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[1].dim_value, dims[3].dim_value = 64, 3
    new = rewritten(tmp_path, model)
    assert {"Transpose", "Concat"} <= {*head(new)}
    assert not {"Transpose", "Concat"} & {*ops(new.graph.node)}
    for rows in (1, 3):
        np.testing.assert_allclose(answers(model, rows)[0], answers(new, rows)[0], rtol=1e-5, atol=1e-5)


def test_constants_that_are_nodes_are_weights(tmp_path):
    net = Net().wide()
    for name, number in (("low", 0.0), ("high", 6.0)):
        tensor = numpy_helper.from_array(np.array(number, "<f4"))
        net.nodes.insert(0, helper.make_node("Constant", [], [name], value=tensor))
    model = net.add("Clip", "low", "high").narrow().model()
    new = rewritten(tmp_path, model)
    assert "Clip" in head(new)
    np.testing.assert_allclose(answers(model, 3)[0], answers(new, 3)[0], rtol=1e-5, atol=1e-5)


def test_a_value_that_is_needed_later_keeps_the_head_from_ending_in_between(tmp_path):
    net = Net().wide()
    early = net.value
    model = net.conv(64, 3, groups=64).add("Add", early).narrow().model()
    new = rewritten(tmp_path, model)
    assert head(new)[-3:] == ["Conv", "Add", "Conv"]
    np.testing.assert_allclose(answers(model, 5)[0], answers(new, 5)[0], rtol=1e-5, atol=1e-5)


def test_a_value_of_the_head_that_is_an_output_too_is_not_lost(tmp_path):
    net = Net().wide()
    early = net.value
    model = net.add("Tanh").narrow().model("answer", early)
    new = rewritten(tmp_path, model)
    for one, other in zip(answers(model, 3), answers(new, 3), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def mixing_rows(net: Net) -> Net:
    return net.add("ReduceMean", axes=[0], keepdims=1).add("Relu")


def with_indices(net: Net) -> Net:
    return net.add("MaxPool", outputs=2, kernel_shape=[2, 2])


def normalized_in_training(net: Net) -> Net:
    weights = [net.weight(net.channels) for _ in range(4)]
    return net.add("BatchNormalization", *weights, outputs=3, training_mode=1)


def of_another_domain(net: Net) -> Net:
    net.add("Relu")
    net.nodes[-1].domain = "com.example"
    return net


def turning_rows(net: Net) -> Net:
    return net.add("Transpose", perm=[1, 0, 2, 3]).add("Transpose", perm=[1, 0, 2, 3])


def turning_all(net: Net) -> Net:
    return net.add("Transpose").add("Transpose")


def joining_rows(net: Net) -> Net:
    return net.add("Concat", net.value, axis=0)


def by_slopes_of_rows(net: Net) -> Net:
    return net.add("PRelu", net.weight(2, net.channels, 1, 1))


def by_a_made_weight(net: Net) -> Net:
    net.nodes.append(helper.make_node("Neg", [net.weight(1)], ["negative"]))
    return net.add("Add", "negative")


@pytest.mark.parametrize(
    "change",
    [mixing_rows, with_indices, normalized_in_training, of_another_domain, by_a_made_weight, by_slopes_of_rows],
)
def test_the_head_ends_before_what_may_not_run_row_by_row(tmp_path, change):
    net = change(Net().wide())
    first = next(i for i, node in enumerate(net.nodes) if i >= 10)
    model = net.narrow().model()
    if change is of_another_domain:
        model.opset_import.append(helper.make_opsetid("com.example", 1))
    made = depth_first.rewritten(saved(tmp_path, model), 8, CACHE)
    new = onnx.load_model_from_string(made)
    assert head(new) == ops(model.graph.node[:first])


def with_external_data(model, folder: Path) -> None:
    onnx.external_data_helper.convert_model_to_external_data(model, location="weights", size_threshold=0)


def with_weights_that_may_be_fed(model, _: Path) -> None:
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, FLOAT, tensor.dims))


def with_a_fixed_batch(model, _: Path) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def with_open_sizes(model, _: Path) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def of_an_old_opset(model, _: Path) -> None:
    model.opset_import[0].version = 8


def of_an_old_format(model, _: Path) -> None:
    model.ir_version = 3


def with_something_else_first(model, _: Path) -> None:
    model.graph.node[0].input[0] = "turned"
    model.graph.node.insert(0, helper.make_node("Softmax", ["image"], ["turned"]))


@pytest.mark.parametrize(
    "change",
    [
        with_external_data, with_weights_that_may_be_fed, with_a_fixed_batch, with_open_sizes, of_an_old_opset,
        of_an_old_format, with_something_else_first,
    ],
)  # fmt: skip
def test_what_is_left_alone(tmp_path, change):
    model = Net().wide().narrow().model()
    assert rewritten(tmp_path, model) is not None
    change(model, tmp_path)
    assert depth_first.rewritten(saved(tmp_path, model), 8, CACHE) is None


def test_files_of_another_format_are_not_read(tmp_path):
    path = saved(tmp_path, Net().wide().narrow().model())
    assert depth_first.rewritten(path.rename(tmp_path / "model.ort"), 8, CACHE) is None


def branching(net: Net, captured: str):
    """A network whose last step is one of two graphs, both of which take a value from outside."""
    net.narrow()
    net.nodes[-1].output[0] = "scores"
    branches = [
        helper.make_graph(
            [
                helper.make_node("ReduceMean", [captured], [f"{op} mean"], keepdims=0),
                helper.make_node(op, ["scores", f"{op} mean"], [f"{op} out"]),
            ],
            op,
            [],
            [helper.make_tensor_value_info(f"{op} out", FLOAT, ["rows", 4])],
        )
        for op in ("Add", "Mul")
    ]
    net.nodes.append(helper.make_node("ReduceMax", ["scores"], ["most"], keepdims=0))
    net.nodes.append(helper.make_node("Greater", ["most", net.weight(name="zero")], ["positive"]))
    net.nodes.append(helper.make_node("If", ["positive"], ["answer"], then_branch=branches[0], else_branch=branches[1]))
    return net.model()


def test_weights_that_only_an_inner_graph_takes_stay(tmp_path):
    net = Net().wide()
    model = branching(net, net.weight(4, name="only inside"))
    new = rewritten(tmp_path, model)
    np.testing.assert_allclose(answers(model, 3)[0], answers(new, 3)[0], rtol=1e-5, atol=1e-5)


def test_a_value_that_an_inner_graph_takes_is_needed_later(tmp_path):
    net = Net().wide()
    early = net.nodes[3].output[0]
    assert rewritten(tmp_path, branching(net, early)) is None


def test_shapes_of_a_time_before_the_input_was_edited_are_not_believed(tmp_path):
    model = Net().wide().narrow().model()
    early = model.graph.node[1].output[0]
    model.graph.value_info.append(helper.make_tensor_value_info(early, FLOAT, [1, 64, 64, 64]))
    new = rewritten(tmp_path, model)
    np.testing.assert_allclose(answers(model, 3)[0], answers(new, 3)[0], rtol=1e-5, atol=1e-5)


def test_a_file_too_large_is_not_even_read(tmp_path, monkeypatch):
    monkeypatch.setattr(depth_first, "_LARGEST", 10)
    assert depth_first.rewritten(saved(tmp_path, Net().wide().narrow().model()), 8, CACHE) is None


LAYERS = st.sampled_from(
    ["conv", "depthwise", "relu", "clip", "sigmoid gate", "squeeze", "add", "pool", "norm", "concat", "mul"]
)


def grow(net: Net, layer: str, earlier: dict[int, str]) -> None:
    """One layer more; `earlier` has a value for a number of channels."""
    if layer == "conv":
        net.conv(64, 1)
    elif layer == "depthwise":
        net.conv(net.channels, 3, groups=net.channels)
    elif layer == "relu":
        net.add("Relu")
    elif layer == "clip":
        net.add("Clip", net.weight(), "")
    elif layer == "sigmoid gate":
        before = net.value
        net.add("Sigmoid").add("Mul", before)
    elif layer == "squeeze":
        before = net.value
        net.add("GlobalAveragePool").conv(net.channels).add("HardSigmoid").add("Mul", before)
    elif layer == "add" and net.channels in earlier:
        net.add("Add", earlier[net.channels])
    elif layer == "pool":
        net.add("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    elif layer == "norm":
        weights = [net.weight(net.channels) for _ in range(3)]
        net.weights.append(numpy_helper.from_array(np.ones(net.channels, "<f4"), f"variance{len(net.nodes)}"))
        net.add("BatchNormalization", *weights, f"variance{len(net.nodes)}")
    elif layer == "concat" and net.channels in earlier:
        net.add("Concat", earlier[net.channels], axis=1)
        net.channels *= 2
    elif layer == "mul":
        net.add("Mul", net.weight(net.channels, 1, 1))


@given(layers=st.lists(LAYERS, min_size=3, max_size=14), seed=st.integers(0, 99), rows=st.integers(1, 4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_network_gives_the_answers_it_gave(tmp_path, monkeypatch, layers, seed, rows):
    monkeypatch.setattr(depth_first, "_LEAST", 0)
    net = Net(seed, size=16)
    net.conv(64, 3)
    earlier = {64: net.value}
    for layer in layers:
        if net.channels <= 128:
            grow(net, layer, earlier)
            if net.random.random() < 0.5:
                earlier[net.channels] = net.value
    model = net.narrow().model()
    new = rewritten(tmp_path, model, cache=1 << 14)
    if new is not None:
        for one, other in zip(answers(model, rows), answers(new, rows), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(one).max())


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_the_cache_of_a_core_is_its_part_of_the_second_level(tmp_path):
    cpu = tmp_path / "sys/devices/system/cpu/cpu0/cache"
    write(cpu / "index0", level="1\n", size="32K\n", shared_cpu_map="00000001\n")
    write(cpu / "index3", level="3\n", size="32768K\n", shared_cpu_map="00000000,0000ff00\n")
    assert core_cache(tmp_path) == (32 << 20) // 8  # there is no second one
    write(cpu / "index2", level="2\n", size="1024K\n", shared_cpu_map="3\n")
    assert core_cache(tmp_path) == 512 << 10


def test_a_processor_that_does_not_tell_is_passed_over(tmp_path):
    write(tmp_path / "sys/devices/system/cpu/cpu0/cache/index3", level="3\n", size="0K\n", shared_cpu_map="3\n")
    write(tmp_path / "sys/devices/system/cpu/cpu1/cache/index3", level="3\n", size="64K\n", shared_cpu_map="3\n")
    assert core_cache(tmp_path) == 32 << 10


def test_a_cache_nobody_tells_of_is_none(tmp_path):
    assert core_cache(tmp_path) == 0
    write(tmp_path / "sys/devices/system/cpu/cpu0/cache/index0", level="?")
    assert core_cache(tmp_path) == 0

"""Recipes for CPUs. Which of them is best differs between processors, so all that suit a model are made and measured.

- `int8` (convolutions): static QDQ, activations unsigned, weights signed and per channel, 7 bits where the kernel adds
  products in 16 bits. Without VNNI those sums saturate with 8; the kernels of depthwise convolutions do not, and keep 8.
- `int8-full`: the same with 8 bits everywhere, for processors with VNNI or their like.
- `int8-rowwise` (transformers): weights per channel, each row of activations with a scale of its own
  (`gateway.build.zoo.rowwise`), so that a row's answer does not depend on its batch-mates.
- `int8-dynamic` (transformers): ONNX Runtime's own, with one scale for the batch. The gate fails it for models that batch.
- `int8-s8s8`: signed activations, which TensorRT wants and a CPU without VNNI gets wrong. Made only when named.
- `int4-weights`, `int8-weights`: large matrices kept in few bits and multiplied so (MatMulNBits); saves memory above all.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from gateway.build.recipes import static
from gateway.build.recipes.base import Job, Recipe, current, quiet
from gateway.build.source import OPSET, Source, save
from gateway.build.zoo import rowwise

_BLOCK = 32  # weights that share a scale


def _convolutions(source: Source) -> str:
    if source.attends:
        return "it has attention, whose activations no fixed range fits (recall@10 of MiniLM: .13)"
    if not {"Conv", "Gemm", "MatMul"} & set(source.operators):
        return "it has no convolution and no matrix multiplication"
    return ""


def _transformer(source: Source) -> str:
    if not source.matrices:
        return "it has no multiplication by a constant matrix"
    if "Conv" in source.operators and not source.attends:
        return "it is a convolutional network, which is quicker with fixed ranges"
    return ""


def _big_matrices(source: Source) -> str:
    return "" if source.big_matrices else "it has no matrix of 262,144 weights or more"


def _int8(job: Job) -> None:
    from onnxruntime.quantization import QuantType

    wide = [{"axis": 0, "quant_type": QuantType.QInt8, "symmetric": True, "reduce_range": False}]
    options = {"TensorQuantOverrides": dict.fromkeys(job.source.depthwise, wide)}
    static.quantize(job, activations="QUInt8", reduce_range=True, options=options)


def _int8_full(job: Job) -> None:
    static.quantize(job, activations="QUInt8")


def _s8s8(job: Job) -> None:
    static.quantize(job, activations="QInt8", options={"ActivationSymmetric": True, "WeightSymmetric": True})


def _rowwise(job: Job) -> None:
    save(rowwise.quantize(current(job.source.load(), OPSET)), job.file)


def _dynamic(job: Job) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet(), tempfile.TemporaryDirectory(dir=job.folder, prefix=".") as scratch:
        prepared, written = Path(scratch) / "prepared.onnx", Path(scratch) / "quantized.onnx"
        onnx.save(current(job.source.load(), OPSET), prepared)
        quantize_dynamic(prepared, written, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)
        save(onnx.load(written), job.file)


def _weights(job: Job, bits: int) -> None:
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        config = DefaultWeightOnlyQuantConfig(
            block_size=_BLOCK, is_symmetric=False, accuracy_level=4, bits=bits, op_types_to_quantize=("MatMul",)
        )
        big = set(job.source.big_matrices)
        model = job.source.load()
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"node_{index}"  # what is left out is told by its name
        small = [node.name for node in model.graph.node if node.op_type == "MatMul" and not set(node.input) & big]
        quantizer = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=small)
        quantizer.process()
        save(quantizer.model.model, job.file)


RECIPES = (
    Recipe("int8", "INT8", "cpu", _int8, _convolutions, calibrated=True),
    Recipe("int8-full", "INT8", "cpu", _int8_full, _convolutions, calibrated=True),
    Recipe("int8-s8s8", "INT8", "cpu", _s8s8, _convolutions, calibrated=True, on_request=True),
    Recipe("int8-rowwise", "INT8", "cpu", _rowwise, _transformer),
    Recipe("int8-dynamic", "INT8", "cpu", _dynamic, _transformer),
    Recipe("int8-weights", "INT8", "cpu", partial(_weights, bits=8), _big_matrices),
    Recipe("int4-weights", "INT4", "cpu", partial(_weights, bits=4), _big_matrices),
)

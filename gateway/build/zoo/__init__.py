"""Rebuilds the models of `model_repo/` from weights and data inside installed packages: `python -m gateway.build.zoo`.

Owns the list of recipes. A recipe is a function without arguments that returns the folders to write and one line about
what it measured; it raises rather than return a model that fails its own check. Heavy packages (torch, onnx,
transformers, scikit-learn: `pip install 'lockgate[models]'`) are imported inside recipes only, and nothing is ever
downloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.build.zoo import add_sub, digits, efficientnet, minilm
from gateway.build.zoo.files import BuildError, Model

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RECIPES", "BuildError", "Model"]

RECIPES: dict[str, Callable[[], tuple[list[Model], str]]] = {
    add_sub.NAME: add_sub.build,
    digits.NAME: digits.build,
    efficientnet.NAME: efficientnet.build,
    minilm.NAME: minilm.build,
}

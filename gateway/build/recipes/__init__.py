"""What can be made of an FP32 model, in the order in which it is tried.

A recipe says whether it suits a model, and writes one file. It measures nothing and decides nothing: each file goes
through the gate, and the fastest that passed on a device is served there.
"""

from __future__ import annotations

from gateway.build.recipes import cpu, gpu, modelopt
from gateway.build.recipes.base import Job, Recipe

__all__ = ["CATALOGUE", "TARGETS", "Job", "Recipe"]

TARGETS = ("cpu", "gpu", "tensorrt")
CATALOGUE: dict[str, Recipe] = {recipe.name: recipe for recipe in (*cpu.RECIPES, *gpu.RECIPES, *modelopt.RECIPES)}

"""The `python` backend: a Triton `model.py`, in a child process of its own. `load` is what the registry calls.

It runs whatever code the repository holds, and so only where the operator allows it (`--allow-python-models`).
"""

from gateway.engines.python.model import load

__all__ = ["load"]

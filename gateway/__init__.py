"""Lockgate: a model-serving gateway that speaks the KServe V2 / NVIDIA Triton protocol."""

__version__ = "0.1.0"

"""Fakes of TensorRT and of CUDA's runtime, in Python on the CPU: they test what we call, in what order, and with what
memory. What works with them has not been tested with TensorRT.
"""

"""The TensorRT backend: plans, how they are found and run, and fakes of NVIDIA's packages to test that with."""

"""Load tests and benchmarks: what drives a running gateway from outside and judges what it answers."""

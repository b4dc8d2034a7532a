"""Servers that the benchmark compares the gateway with."""

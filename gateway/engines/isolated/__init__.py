"""Instances in child processes, their tensors in shared memory. `engine.start` is the entry, `children.Children` the owner."""

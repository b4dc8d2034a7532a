"""Which requests run when, where and together, and which not at all: `DeadlineScheduler` is the entry.

`base` is what the worker and the simulator see; `batch` joins and splits the tensors of a batch.
"""

"""kdtrain's distillation loss beside other implementations of the same quantity: `python -m tests.benchmarks`."""

"""The parts of `benchmarks/train_throughput.py`: the work, the two contenders, what is measured and how it is shown."""

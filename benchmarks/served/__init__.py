"""What `benchmarks/serving.py` starts, asks and breaks."""

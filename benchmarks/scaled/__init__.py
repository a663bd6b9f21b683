"""What `benchmarks/scaling.py` measures, and with what."""

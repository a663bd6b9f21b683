"""Parts of `time_to_quality.py`: what is compared, training with evaluations in between, reading the curves."""

"""Evaluation: samples against gold responses, win rates, and the report of a run."""

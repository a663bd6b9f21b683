"""Feedback: annotators, and judgments made of their answers."""

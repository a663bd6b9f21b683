"""Serving a run's models behind one OpenAI-compatible endpoint on Ray Serve."""

"""jpo-ray: align language models with joint preferences (arXiv 2404.00530) on Ray."""

__version__ = "0.1.0"

"""Data: from files and datasets to items."""

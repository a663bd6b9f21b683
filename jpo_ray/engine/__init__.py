"""The item-graph engine: scores items once, learns from any number of edges between them. Needs no Ray."""

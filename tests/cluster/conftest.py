"""Fixtures of the cluster's tests."""

from cluster.running import ray_cluster  # noqa: F401

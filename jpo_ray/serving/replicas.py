"""How many replicas of each engine there are, what each takes of the cluster, and how much it holds."""

import os
from typing import Any

from jpo_ray.config_serve import ServeConfig
from jpo_ray.serving.plan import Plan

QUEUE_FACTOR = 16  # connections a replica holds for each request that it may answer: the rest gets its 429 there
LOGGING = {"encoding": "JSON", "enable_access_log": False}  # the guard logs each request itself


def serve_options(config: ServeConfig) -> dict[str, Any]:
    """Serve's options of an engine's deployment."""
    held = QUEUE_FACTOR * config.limits.max_requests
    most = config.max_replicas or config.replicas
    scaling = {
        "min_replicas": config.replicas,
        "max_replicas": most,
        "target_ongoing_requests": config.target_requests,
    }
    return {
        **({"autoscaling_config": scaling} if most > config.replicas else {"num_replicas": config.replicas}),
        "max_ongoing_requests": held,
        "max_queued_requests": held,
        "backpressure_config": {"status_code": 429, "retry_after_s": config.limits.retry_after_s},
        "graceful_shutdown_timeout_s": config.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": 2,  # what fails once mostly fails again; the default tries for half an hour
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "logging_config": LOGGING,
    }


def bundles(plan: Plan, config: ServeConfig) -> list[dict[str, float]]:
    """What the cluster must have room for at start."""
    found = [bundle for _ in plan.engines for _ in range(config.replicas) for bundle in engine_bundles(config)]
    if config.scoring is not None:
        one = {"CPU": config.scoring.cpus_per_replica, "GPU": config.scoring.gpus_per_replica}
        found += [{kind: amount for kind, amount in one.items() if amount}] * config.scoring.replicas
    return [bundle for bundle in found if bundle]


def engine_bundles(config: ServeConfig) -> list[dict[str, float]]:
    one = {"CPU": config.cpus_per_replica}
    if config.gpus_per_replica:
        one["GPU"] = config.gpus_per_replica
    return [one] * config.tensor_parallel_size


def cores_for_each(config: ServeConfig) -> int:
    """CPU cores for each engine: those of the node, shared."""
    return max(1, int((os.cpu_count() or 1) // max(1, config.replicas)))

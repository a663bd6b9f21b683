"""The Ray Serve application of a config."""

import os
from typing import Any

from ray import serve
from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from jpo_ray.config_serve import ScoringConfig, ServeConfig
from jpo_ray.serving.plan import EnginePlan, Plan, engine_environment, engine_options
from jpo_ray.serving.scores import Scorer
from jpo_ray.serving.server import FrontServer, ModelServer

APPLICATION = "jpo"
QUEUE_FACTOR = 16  # connections a replica holds for each request that it may answer: the rest gets its 429 there


def build_application(plan: Plan, config: ServeConfig, cores: int) -> Any:
    """Front, further engines and scorer, bound together. `cores` are those an engine may use."""
    from ray.serve.llm import build_llm_deployment

    scorer = _scorer(plan, config, config.scoring, cores) if config.scoring else None
    front, *more = plan.engines
    options = _options(config)
    others = {
        engine.name: build_llm_deployment(
            _llm_config(plan, config, engine, cores), deployment_cls=ModelServer, override_serve_options=options
        )
        for engine in more
    }
    return build_llm_deployment(
        _llm_config(plan, config, front, cores),
        deployment_cls=serve.ingress()(FrontServer),
        override_serve_options=options,
        bind_kwargs={"plan": plan, "config": config, "others": others, "scorer": scorer},
    )


def bundles(plan: Plan, config: ServeConfig) -> list[dict[str, float]]:
    """What the cluster must have room for at start."""
    found = [bundle for _ in plan.engines for _ in range(config.replicas) for bundle in _engine_bundles(config)]
    if config.scoring is not None:
        one = {"CPU": config.scoring.cpus_per_replica, "GPU": config.scoring.gpus_per_replica}
        found += [{kind: amount for kind, amount in one.items() if amount}] * config.scoring.replicas
    return [bundle for bundle in found if bundle]


def _llm_config(plan: Plan, config: ServeConfig, engine: EnginePlan, cores: int) -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": engine.name, "model_source": engine.folder},
        engine_kwargs=engine_options(plan, config, engine),
        placement_group_config={"bundles": _engine_bundles(config)},
        runtime_env={"env_vars": engine_environment(config, cores)},
        deployment_config={"ray_actor_options": {"num_cpus": 0}},
    )


def _engine_bundles(config: ServeConfig) -> list[dict[str, float]]:
    one = {"CPU": config.cpus_per_replica}
    if config.gpus_per_replica:
        one["GPU"] = config.gpus_per_replica
    return [one] * config.tensor_parallel_size


def _options(config: ServeConfig) -> dict[str, Any]:
    """Serve's options of an engine's deployment."""
    held = QUEUE_FACTOR * config.limits.max_requests
    most = config.max_replicas or config.replicas
    scaling = AutoscalingConfig(
        min_replicas=config.replicas, max_replicas=most, target_ongoing_requests=config.target_requests
    )
    return {
        **({"autoscaling_config": scaling} if most > config.replicas else {"num_replicas": config.replicas}),
        "max_ongoing_requests": held,
        "max_queued_requests": held,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=config.limits.retry_after_s),
        "graceful_shutdown_timeout_s": config.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": 2,  # what fails once mostly fails again; the default tries for half an hour
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "logging_config": LoggingConfig(encoding="JSON", enable_access_log=False),
    }


def _scorer(plan: Plan, config: ServeConfig, scoring: ScoringConfig, cores: int) -> Any:
    deployment = serve.deployment(
        name="Scorer",
        num_replicas=scoring.replicas,
        max_ongoing_requests=config.limits.max_requests,
        max_queued_requests=config.limits.max_requests,
        ray_actor_options={"num_cpus": scoring.cpus_per_replica, "num_gpus": scoring.gpus_per_replica},
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        logging_config=LoggingConfig(encoding="JSON", enable_access_log=False),
    )(Scorer)
    return deployment.bind(plan, scoring, cores)


def cores_for_each(config: ServeConfig) -> int:
    """CPU cores for each engine: those of the node, shared."""
    return max(1, int((os.cpu_count() or 1) // max(1, config.replicas)))

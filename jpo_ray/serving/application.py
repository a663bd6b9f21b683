"""The Ray Serve application of a config."""

from typing import Any

from ray import serve
from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

from jpo_ray.config_serve import ScoringConfig, ServeConfig
from jpo_ray.serving.plan import EnginePlan, Plan, engine_environment, engine_options
from jpo_ray.serving.replicas import LOGGING, engine_bundles, serve_options
from jpo_ray.serving.scores import Scorer
from jpo_ray.serving.server import FrontServer, ModelServer

APPLICATION = "jpo"


def build_application(plan: Plan, config: ServeConfig, cores: int) -> Any:
    """Front, further engines and scorer, bound together. `cores` are those an engine may use."""
    from ray.serve.llm import build_llm_deployment

    scorer = _scorer(plan, config, config.scoring, cores) if config.scoring else None
    front, *more = plan.engines
    options = serve_options(config)
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


def _llm_config(plan: Plan, config: ServeConfig, engine: EnginePlan, cores: int) -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": engine.name, "model_source": engine.folder},
        engine_kwargs=engine_options(plan, config, engine),
        placement_group_config={"bundles": engine_bundles(config)},
        runtime_env={"env_vars": engine_environment(config, cores)},
        deployment_config={"ray_actor_options": {"num_cpus": 0}},
    )


def _scorer(plan: Plan, config: ServeConfig, scoring: ScoringConfig, cores: int) -> Any:
    deployment = serve.deployment(
        name="Scorer",
        num_replicas=scoring.replicas,
        max_ongoing_requests=config.limits.max_requests,
        max_queued_requests=config.limits.max_requests,
        ray_actor_options={"num_cpus": scoring.cpus_per_replica, "num_gpus": scoring.gpus_per_replica},
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        logging_config=LOGGING,
    )(Scorer)
    return deployment.bind(plan, scoring, cores)

"""The Serve application from the `args` of a deploy file."""

from pathlib import Path
from typing import Any

from jpo_ray.config_file import validated
from jpo_ray.config_serve import ServeConfig
from jpo_ray.serving.keys import read_keys
from jpo_ray.serving.plan import begun, make_plan

DEPLOYED = "deployed"  # folder of a deployed application's adapters: no `jpo serve` has it


def build(args: dict[str, Any]) -> Any:
    """A Ray Serve application. Raises `InputError`.

    Where its proxies listen is written in the deploy file, outside of `args`, so that keys are needed unless
    `args.host` says that it is a loopback address.
    """
    config = validated(ServeConfig, args, "args")
    if "host" not in args:
        config = config.model_copy(update={"host": "0.0.0.0"})
    keys_required = not config.loopback or bool(read_keys(config))
    plan = make_plan(config, keys_required=keys_required)
    plan = begun(plan, Path(plan.state_dir) / DEPLOYED)
    from jpo_ray.serving.application import build_application
    from jpo_ray.serving.replicas import cores_for_each

    return build_application(plan, config, cores_for_each(config))

"""The Serve application from the `args` of a deploy file."""

from pathlib import Path
from typing import Any

from jpo_ray.config_file import validated
from jpo_ray.config_serve import ServeConfig
from jpo_ray.serving.keys import read_keys, require_keys
from jpo_ray.serving.listening import host_served_at
from jpo_ray.serving.plan import begun, make_plan

DEPLOYED = "deployed"  # folder of a deployed application's adapters: no `jpo serve` has it


def build(args: dict[str, Any]) -> Any:
    """A Ray Serve application. Raises `InputError`.

    Where its proxies listen is written in the deploy file, outside of `args`: where that is beyond the machine, or
    `args.host` is, there must be keys.
    """
    config = validated(ServeConfig, args, "args")
    keys = read_keys(config)
    require_keys(keys, host_served_at(), config.host)
    plan = make_plan(config, keys_required=bool(keys))
    plan = begun(plan, Path(plan.state_dir) / DEPLOYED)
    from jpo_ray.serving.application import build_application
    from jpo_ray.serving.replicas import cores_for_each

    return build_application(plan, config, cores_for_each(config))

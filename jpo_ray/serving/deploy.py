"""The Serve application from the `args` of a deploy file."""

from typing import Any

from jpo_ray.config_file import validated
from jpo_ray.config_serve import ServeConfig
from jpo_ray.serving.keys import read_keys
from jpo_ray.serving.plan import make_plan


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
    from jpo_ray.serving.application import build_application
    from jpo_ray.serving.replicas import cores_for_each

    return build_application(plan, config, cores_for_each(config))

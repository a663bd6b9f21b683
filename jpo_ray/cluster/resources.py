"""What stages ask of the cluster: shares of its nodes, refused or waited for before anything starts."""

import math
import time
from typing import Any

from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.errors import InputError

Bundle = dict[str, float]  # resource -> amount, of one worker or actor

ROUNDING = 1e-6  # of shares of a GPU
LOOK_S = 5  # between looks at which nodes live
LESS = (
    "lower cluster.num_workers, num_actors, cpus_per_worker or gpus_per_worker, for this stage alone under "
    "cluster.stages"
)


def cpus_for_each(ray: Any, config: ClusterConfig, count: int) -> int:
    """CPUs of each of `count` equal workers: as configured, or a node's fair share."""
    if config.cpus_per_worker:
        return config.cpus_per_worker
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    hosts = [amount for amount in cpus if amount] or [1]  # a cluster's head may have none to give
    return max(1, int(min(hosts) // -(-count // len(hosts))))


def worker_resources(ray: Any, config: ClusterConfig, count: int) -> Bundle:
    """What each of `count` equal workers or actors takes."""
    wanted = {"CPU": float(cpus_for_each(ray, config, count))}
    return wanted | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}) | config.custom_resources


def task_resources(config: ClusterConfig) -> Bundle:
    """What each task, and each actor that only sends requests, takes."""
    return {"CPU": 1.0} | config.custom_resources


def as_options(wanted: Bundle) -> dict[str, Any]:
    """The options that Ray's actors and tasks have for it."""
    custom = {kind: amount for kind, amount in wanted.items() if kind not in ("CPU", "GPU")}
    return {"num_cpus": wanted.get("CPU", 0), "num_gpus": wanted.get("GPU", 0), "resources": custom}


def on_this_node(ray: Any) -> Any:
    """Where an actor is to be that must not be lost with another node than the driver's."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def await_resources(ray: Any, config: ClusterConfig, stage: str, bundles: list[Bundle]) -> None:
    """Return when the cluster has room for all `bundles` at once.

    Actors of an earlier stage may still be about to end, and other jobs may hold what this one needs. Raises
    `InputError` as soon as the nodes that live can never hold them (with `config.autoscaling`, more nodes may come),
    and `TimeoutError` after `config.wait_s`.
    """
    # A placement group and not a look at what is free: it is demand, which is what autoscalers act on.
    group = ray.util.placement_group(bundles, strategy="PACK")
    deadline = time.monotonic() + config.wait_s
    try:
        while True:
            if not config.autoscaling:
                require_resources(ray, stage, bundles)  # each time: a lost node counts as alive for a while
            if group.wait(_seconds_to_next_look(config)):
                return
            if time.monotonic() > deadline:
                raise _no_room(ray, config, stage, bundles)
    finally:
        ray.util.remove_placement_group(group)


def await_most(ray: Any, config: ClusterConfig, stage: str, bundle: Bundle, count: int) -> int:
    """`count`, when the cluster has room for so many of `bundle`; fewer, once the nodes that live hold no more.

    A node that lost its power counts as alive for about a minute. Raises `TimeoutError` after `config.wait_s`.
    """
    bundles = [bundle] * count
    group = ray.util.placement_group(bundles, strategy="PACK")
    deadline = time.monotonic() + config.wait_s
    try:
        while (left := count_fitting(ray, bundle, count)) == count:
            if group.wait(_seconds_to_next_look(config)):
                return count
            if time.monotonic() > deadline:
                raise _no_room(ray, config, stage, bundles)
        return left
    finally:
        ray.util.remove_placement_group(group)


def _seconds_to_next_look(config: ClusterConfig) -> int:
    return min(LOOK_S, math.ceil(config.wait_s))  # Ray counts whole seconds


def _no_room(ray: Any, config: ClusterConfig, stage: str, bundles: list[Bundle]) -> TimeoutError:
    free = _describe_total(ray.available_resources(), bundles)
    return TimeoutError(
        f"{stage}: waited {config.wait_s:g} s (cluster.wait_s) for {len(bundles)} x {_describe(bundles[0])}; the "
        f"cluster has {_describe_total(ray.cluster_resources(), bundles)}, of which {free} are free"
    )


def require_resources(ray: Any, stage: str, bundles: list[Bundle], mend: str = LESS) -> None:
    """Raise `InputError` at once where the cluster can never place `bundles`; Ray itself would wait for ever."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    for bundle in sorted(bundles, key=lambda wanted: -sum(wanted.values())):
        if not _place(bundle, nodes):
            raise InputError(
                f"{stage}: asks for {len(bundles)} x {_describe(bundle)}, but the cluster has "
                f"{_describe_total(ray.cluster_resources(), bundles)} on {len(nodes)} node(s); {mend}"
            )


def tasks_at_once(ray: Any, config: ClusterConfig) -> int:
    """How many tasks the nodes that live run at a time, at least one: more may come."""
    return max(1, count_fitting(ray, task_resources(config), int(ray.cluster_resources().get("CPU", 1))))


def count_fitting(ray: Any, bundle: Bundle, most: int) -> int:
    """How many of `bundle` fit on the nodes that live, at most `most`."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return sum(_place(bundle, nodes) for _ in range(most))


def _place(bundle: Bundle, nodes: list[Bundle]) -> bool:
    """Take `bundle` from the first of the nodes that has it; whether one has."""
    node = next((node for node in nodes if _fits(bundle, node)), None)
    if node is not None:
        node |= {kind: node.get(kind, 0) - amount for kind, amount in bundle.items()}
    return node is not None


def _fits(bundle: Bundle, node: Bundle) -> bool:
    return all(node.get(kind, 0) >= amount - ROUNDING for kind, amount in bundle.items())


def _describe(bundle: Bundle) -> str:
    return " + ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())


def _describe_total(resources: Bundle, bundles: list[Bundle]) -> str:
    """CPUs, GPUs and whatever else the bundles ask for."""
    kinds = dict.fromkeys(["CPU", "GPU", *(kind for bundle in bundles for kind in bundle)])
    return ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in kinds)

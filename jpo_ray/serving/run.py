"""`jpo serve`: start the endpoint, wait until it is told to stop, and let streams finish."""

import os
import socket
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.config_serve import LOOPBACK, ServeConfig
from jpo_ray.errors import InputError
from jpo_ray.serving.keys import read_keys, require_keys
from jpo_ray.serving.plan import Plan, begun, make_plan, server_folder
from jpo_ray.stopping import sigterm_ignored, sigterm_stops

ENDING_S = 15.0  # for an application without requests to end


def serve_run(config: ServeConfig, console: Console) -> None:
    """Serve until SIGINT or SIGTERM. Must be called in the main thread. Raises `InputError`."""
    keys = read_keys(config)
    require_keys(keys, config.host)
    local = config.address is None and not os.environ.get("RAY_ADDRESS")
    place = (config.host, _free_port(config) if local else config.port)
    plan = make_plan(config, keys_required=bool(keys))
    for warning in plan.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray gives way to all else on the machine otherwise
    direct = local and config.direct and config.replicas == (config.max_replicas or 1) == 1
    if direct:
        os.environ |= _direct_environment(place[1])
    from jpo_ray.cluster.session import ray_session
    from jpo_ray.serving.listening import served_at

    with server_folder(plan) as folder, ray_session(ClusterConfig(address=config.address)) as ray, sigterm_stops():
        _require_room(ray, plan, config)
        if (running := served_at()) is not None:  # a cluster's, which goes on listening where it does
            place = running
            require_keys(keys, place[0])
            _require_free_name()
        elif not local:
            place = (config.host, _free_port(config))
        plan = begun(plan, folder)
        try:
            _start(plan, config, _free_port(config.model_copy(update={"port": 0})) if direct else place[1])
            _announce(plan, place, len(keys), console)
            _announce_watching(ray, console)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
            console.print("stopping: answers under way are finished first; Ctrl-C cuts them off")
        finally:
            with sigterm_ignored():  # told once is enough
                _stop(config, local=local)


def _direct_environment(port: int) -> dict[str, str]:
    """Serve's settings, for its processes to come, that let the one replica listen on the port itself.

    Serve's proxy still starts, on a port of its own that nobody is told; what comes through it meets the same guard.
    """
    return {
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),  # the first one outside
        "RAY_SERVE_PORT_QUARANTINE_S": "0",  # a replica that takes the place of a dead one listens there again
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # for load balancers, of which there are none
    }


def _require_room(ray: Any, plan: Plan, config: ServeConfig) -> None:
    from jpo_ray.cluster.resources import require_resources
    from jpo_ray.serving.replicas import bundles

    require_resources(ray, "serve", bundles(plan, config), "lower replicas, cpus_per_replica or gpus_per_replica")


def _require_free_name() -> None:
    from ray import serve

    from jpo_ray.serving.application import APPLICATION

    if APPLICATION in serve.status().applications:
        raise InputError(
            f"address: this cluster serves an application `{APPLICATION}` already; end that first (`serve shutdown`), "
            "or change what it serves by `serve deploy`"
        )


def _start(plan: Plan, config: ServeConfig, port: int) -> None:
    from ray import serve

    from jpo_ray.serving.application import APPLICATION, build_application
    from jpo_ray.serving.replicas import cores_for_each

    serve.start(http_options={"host": config.host, "port": port, "location": "EveryNode"})
    application = build_application(plan, config, cores_for_each(config))
    serve.run(application, name=APPLICATION, route_prefix="/")


def _stop(config: ServeConfig, *, local: bool) -> None:
    """Replicas finish what they have; then Serve ends, unless it has other applications on a shared cluster."""
    from ray import serve

    from jpo_ray.serving.application import APPLICATION

    serve.delete(APPLICATION, _blocking=False)  # which would wait for a minute, whatever drain_timeout_s is
    deadline = time.monotonic() + config.drain_timeout_s + ENDING_S
    while APPLICATION in serve.status().applications and time.monotonic() < deadline:
        time.sleep(0.1)
    if not local and not serve.status().applications:  # a local cluster ends with all that is on it
        serve.shutdown()


def _free_port(config: ServeConfig) -> int:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise InputError(f"host {config.host} port {config.port}: cannot listen there ({error.strerror})") from error


def _announce_watching(ray: Any, console: Console) -> None:
    """Where metrics and logs are, on this node or the first of the cluster."""
    node = next(node for node in ray.nodes() if node["Alive"])
    session = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / ray.get_runtime_context().get_session_name()
    say = [
        f"  metrics: http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics",
        f"  logs: {session / 'logs' / 'serve'}",
        "Ctrl-C stops",
    ]
    for line in say:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _announce(plan: Plan, place: tuple[str, int], keys: int, console: Console) -> None:
    host = f"[{place[0]}]" if ":" in place[0] else place[0]
    names = [engine.name for engine in plan.engines] + [entry.name for entry in plan.adapters]
    guarded = f"{keys} API key{'s' if keys > 1 else ''}" if keys else "no API keys: this machine alone is answered"
    say = [
        f"serving {', '.join(names)}",
        f"  http://{host}:{place[1]}/v1  for OpenAI clients ({guarded})",
        f"  http://{host}:{place[1]}/    to compare two models in a browser",
    ]
    if place[0] not in LOOPBACK:
        say.append("plain http: put TLS in front for more than a trusted network")
    for line in say:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

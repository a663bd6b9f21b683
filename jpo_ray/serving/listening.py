"""Where Serve's proxies listen, whatever the config says: a cluster's Serve may have been started before."""

from jpo_ray.config_serve import LOOPBACK


def served_at() -> tuple[str, int] | None:
    """Host and port of the running Serve; None where there is none, or none that speaks HTTP."""
    import ray
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if client is None or client.http_config.host is None:
        return None
    return str(client.http_config.host), int(client.http_config.port)


def host_served_at() -> str:
    """Of the running Serve, else a loopback address."""
    place = served_at()
    return place[0] if place is not None else LOOPBACK[0]

"""Where Serve's proxies listen, whatever the config says: a cluster's Serve may have been started before."""

from jpo_ray.config_serve import LOOPBACK


def served_at() -> str:
    """The host of the running Serve; the loopback address where there is none, or none that speaks HTTP."""
    import ray
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    return (client.http_config.host if client is not None else None) or LOOPBACK[0]

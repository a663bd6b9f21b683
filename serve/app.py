"""The application for Ray Serve: `serve deploy configs/serve/FILE.yaml` imports `serve.app:build`."""

from jpo_ray.serving.deploy import build

__all__ = ["build"]

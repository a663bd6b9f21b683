"""Prometheus metrics of the endpoint, exported by Ray beside Serve's and vLLM's own."""

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
PATHS = {"/", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/compare", "/v1/adapters"}


class Telemetry:
    def __init__(self) -> None:
        self._requests = Counter("jpo_serve_requests", "answered requests", ("path", "status"))
        self._seconds = Histogram("jpo_serve_seconds", "time to the last byte", SECONDS, ("path",))
        self._first = Histogram("jpo_serve_first_token_seconds", "time to the first token", SECONDS, ("model",))
        self._under_way = Gauge("jpo_serve_under_way", "requests that were let in and are not answered yet")

    def under_way(self, requests: int) -> None:
        self._under_way.set(requests)

    def end(self, path: str, status: int, seconds: float) -> None:
        path = path if path in PATHS else "other"
        self._requests.inc(1, {"path": path, "status": str(status)})
        self._seconds.observe(seconds, {"path": path})

    def first_token(self, model: str, seconds: float) -> None:
        self._first.observe(max(seconds, 1e-6), {"model": model})

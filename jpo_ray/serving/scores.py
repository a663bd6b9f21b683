"""The deployment that scores: several requests go through the model together."""

import asyncio

from ray import serve

from jpo_ray.config_serve import ScoringConfig
from jpo_ray.serving.plan import Plan
from jpo_ray.serving.policies import Asked, Policies, Scores


def batch_size(asked: list[Asked]) -> int:
    """Items of the requests together; 1 for a request alone, however many it has, since Serve refuses what is larger
    than a batch.
    """
    return sum(len(items) for _, items in asked) if len(asked) > 1 else 1


class Scorer:
    """Scores under every model of the endpoint. A Serve deployment."""

    def __init__(self, plan: Plan, config: ScoringConfig, threads: int) -> None:
        import torch

        if not config.gpus_per_replica:
            torch.set_num_threads(max(1, threads))
        self._policies = Policies(plan, plan.store(config.beta), "cuda" if config.gpus_per_replica else "cpu")
        self._at_once.set_max_batch_size(config.max_batch_items)
        self._at_once.set_batch_wait_timeout_s(config.batch_wait_s)

    async def score(self, model: str, items: list[tuple[str, str]]) -> Scores:
        """Of each item: parts of its implicit reward, their token counts, and the beta in them.

        `GONE` where the model was removed meanwhile, `FAILED` where it cannot be had; the log says why.
        """
        return await self._at_once((model, items))  # type: ignore[no-any-return]

    @serve.batch(batch_size_fn=batch_size)  # type: ignore[untyped-decorator]
    async def _at_once(self, asked: list[Asked]) -> list[Scores]:
        return await asyncio.to_thread(self._policies.score, asked)

    async def check_health(self) -> None:
        return

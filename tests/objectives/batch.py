"""Items and edges that the tests of the losses share."""

from dataclasses import replace

import torch
from torch import Tensor

from jpo_ray.objectives import Edges, Items, ItemScores

# The two items of most values derived by hand: log-ratios 1 and 0.5 of the instructions, 1 and -1 of the responses.
POLICY = ItemScores(torch.tensor([-10.0, -12.0]).double(), torch.tensor([-5.0, -8.0]).double())
REFERENCE = ItemScores(torch.tensor([-11.0, -12.5]).double(), torch.tensor([-6.0, -7.0]).double())


def two_items() -> Items:
    """Five and four tokens of instruction, five and ten of response; two instructions."""
    return Items(POLICY, REFERENCE, torch.tensor([5, 4]), torch.tensor([5, 10]), torch.tensor([0, 1]))


def edge(*, joint: bool, probability: float = 1.0, gap: float = float("nan"), back: bool = False) -> Edges:
    """Of the first item over the second, or `back`: of the second over the first."""
    ends = torch.tensor([[0], [1]])
    chosen, rejected = ends.flip(0) if back else ends
    label = torch.tensor([[probability], [gap]], dtype=torch.float64)
    return Edges(chosen, rejected, torch.tensor([joint]), *label)


def random_items(count: int = 8, *, per_list: int = 4, seed: int = 0) -> Items:
    """Float64; log-probs per token of -2 to 0, log-ratios of some nats, lists of `per_list` items."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    instruction_tokens, response_tokens = torch.randint(3, 12, (2, count), generator=generator)
    policy = ItemScores(instruction_tokens * uniform(-2, 0, count), response_tokens * uniform(-2, 0, count))
    reference = ItemScores(policy.instruction_N + uniform(-2, 2, count), policy.response_N + uniform(-2, 2, count))
    embedding = torch.nn.functional.normalize(uniform(-1, 1, count, 3), dim=1)
    return Items(
        policy, reference, instruction_tokens, response_tokens, torch.arange(count) // per_list,
        embedding_ND=embedding, mismatched_K=uniform(-1, 3, count),
    )  # fmt: skip


def random_edges(items: Items, count: int = 12, *, joint: bool = True, seed: int = 0) -> Edges:
    """Soft labels and gaps; ends of one list, or where `joint` any two items."""
    generator = torch.Generator().manual_seed(seed + 1)
    n = len(items.group_N)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j and (joint or items.group_N[i] == items.group_N[j])]
    chosen, rejected = torch.tensor([pairs[i] for i in torch.randperm(len(pairs), generator=generator)[:count]]).T
    kinds = items.group_N[chosen] != items.group_N[rejected]
    probability, gap = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return Edges(chosen, rejected, kinds, probability, 2 * gap + 0.1)


def hard(edges: Edges) -> Edges:
    return replace(edges, probability_E=torch.ones_like(edges.probability_E))


def with_scores(items: Items, instruction: Tensor, response: Tensor) -> Items:
    return replace(items, policy=ItemScores(instruction, response))

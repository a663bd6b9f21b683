"""On-policy rounds: each is a run of its own, whose training items are fresh samples."""

from dataclasses import replace

from jpo_ray.config import RunConfig
from jpo_ray.planning.counts import Counts, Split, expected_preferences
from jpo_ray.planning.lengths import product, whole

EACH = "each round"


def counts_of_a_round(config: RunConfig, counts: Counts) -> Counts:
    """What every round has; its responses are taken to be as long as the data's."""
    rounds = config.rounds
    assert rounds is not None
    there, responses = counts.splits["train"].instructions, rounds.samples_per_instruction
    instructions = there if there is None or rounds.instructions is None else min(there, rounds.instructions)
    short = config.plan.short_items if config.pairs.max_item_characters else 1.0
    both = responses * (responses - 1) // 2 if config.pairs.conditional else 0
    joint = config.pairs.joint
    wished = whole(product(instructions, short)) if joint and joint.budget is None else joint.budget if joint else 0
    train = Split(
        EACH,
        instructions,
        whole(product(instructions, responses)),
        whole(product(instructions, both, short)),
        wished,
        short=whole(product(instructions, responses, short)),
    )
    preferences, origin = expected_preferences(config, train)
    means = counts.tokens
    each = None if means.instruction is None or means.response is None else means.instruction + means.response
    splits = {"train": train, "validation": counts.splits["validation"]}
    return replace(
        counts,
        splits=splits,
        preferences=preferences,
        preferences_origin=f"{origin}, in each round",
        tokens=replace(means, compared=each),
    )

"""What each stage that runs a model takes: items, tokens, steps, memory of a worker, time at a stated speed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jpo_ray.config import RunConfig, SampleConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.engine.batches import total_steps
from jpo_ray.planning.batching import Shared, read_items, shared_items
from jpo_ray.planning.counts import Counts, total
from jpo_ray.planning.lengths import Number, product, whole
from jpo_ray.planning.memory import reference_gib, sampling_gib, training_gib
from jpo_ray.planning.shapes import ModelShapes

# Flops per weight and token: a forward pass, and backward through a weight, and to it. The head counts for every token,
# also where instructions are not scored or layers run twice.
FORWARD, THROUGH, TO = 2, 2, 2

Speeds = Mapping[str, float]  # stage -> flops per second of all its workers


@dataclass(frozen=True)
class StageCost:
    name: str
    items: int | None = None  # that go through the model, or are answered
    tokens: int | None = None  # in all epochs
    steps: int | None = None
    trained: int | None = None  # parameters
    memory_gib: float | None = None  # of a worker
    seconds: float | None = None

    @property
    def stage(self) -> str:
        """Of the config: the section that says what its workers have."""
        name = self.name.partition(" ")[0].partition("/")[0]
        return "sample" if name == "draw" else name


def stage_costs(
    config: RunConfig, counts: Counts, shapes: ModelShapes | None, speed: Speeds, a_round: Counts | None = None
) -> list[StageCost]:
    """In the order of the run. Without `shapes` memory and time are not known. `a_round` is what each round has."""
    found = [] if config.sft is None else [_sft(config, counts, shapes, speed)]
    evaluate, rounds = config.evaluate, len(config.trained) if a_round else 1
    if a_round:
        found.append(times(rounds, _drawn(config, a_round, shapes, speed)))
    if any("reference" in entry.reads for entry in config.train) or (evaluate and evaluate.policies):
        found.append(times(rounds, _reference(config, a_round or counts, shapes, speed)))
    found += [_train(config, entry, a_round or counts, shapes, speed) for entry in config.trained]
    return found if config.sample is None else [*found, _sample(config, counts, shapes, speed)]


def times(number: int, cost: StageCost) -> StageCost:
    """Of several that take the same."""
    return replace(
        cost,
        name=cost.name if number == 1 else f"{cost.name} x{number}",
        items=whole(product(cost.items, number)),
        tokens=whole(product(cost.tokens, number)),
        seconds=product(cost.seconds, number),
    )


def _sft(config: RunConfig, counts: Counts, shapes: ModelShapes | None, speed: Speeds) -> StageCost:
    sft = config.sft
    assert sft is not None
    tokens = whole(product(counts.tokens.fine_tuning, sft.num_train_epochs))
    passes = FORWARD + THROUGH + TO + (FORWARD if sft.gradient_checkpointing else 0)
    return StageCost(
        "sft",
        items=whole(product(counts.fine_tuning, sft.num_train_epochs)),
        tokens=tokens,
        steps=_steps(counts.fine_tuning, sft.items_per_step, sft.num_train_epochs),
        trained=shapes.parameters if shapes else None,
        memory_gib=training_gib(config, sft, shapes) if shapes else None,
        seconds=_seconds(tokens, shapes.multiplied * passes if shapes else None, speed["sft"]),
    )


def _reference(config: RunConfig, counts: Counts, shapes: ModelShapes | None, speed: Speeds) -> StageCost:
    comparing = [entry for entry in config.train if "reference" in entry.reads]
    matching = [entry for entry in comparing if "mismatched" in entry.reads]
    items = total([_read(config, counts, comparing), _read(config, counts, matching) if matching else 0])
    tokens = whole(product(counts.tokens.compared, items))
    return StageCost(
        "reference",
        items=items,
        tokens=tokens,
        memory_gib=reference_gib(config, shapes) if shapes else None,
        seconds=_seconds(tokens, shapes.multiplied * FORWARD if shapes else None, speed["reference"]),
    )


def _read(config: RunConfig, counts: Counts, entries: Sequence[TrainConfig]) -> int | None:
    """Items in decisive comparisons: of the training ones those that the entries read, of the held-out ones all."""
    train, held_out, how = counts.splits["train"], counts.splits["validation"], config.pairs.joint
    conditional, joint = counts.preferences["conditional"], counts.preferences["joint"]
    if conditional is None or joint is None or train.instructions is None or held_out.instructions is None:
        return None
    trained = read_items(entries, train.instructions, conditional, joint, how)
    own, across = _like(held_out.conditional, conditional, train.conditional), _like(held_out.joint, joint, train.joint)
    validated = read_items([TrainConfig()], held_out.instructions, own, across, how)
    return min(trained, train.short or 0) + min(validated, held_out.short or 0)


def _like(pairs: int | None, decisive: int, of: int | None) -> int:
    """Decisive ones of so many pairs, where there are so many of others."""
    return round((pairs or 0) * min(1.0, decisive / of)) if of else 0


def train_comparisons(entry: TrainConfig, counts: Counts) -> int | None:
    """Decisive training comparisons that the entry takes."""
    count = total([counts.preferences[protocol] for protocol in entry.protocols])
    return count if count is None else min(count, entry.max_train_comparisons or count)


def _train(
    config: RunConfig, entry: TrainConfig, counts: Counts, shapes: ModelShapes | None, speed: Speeds
) -> StageCost:
    count = train_comparisons(entry, counts)
    like = config.train_entry(entry.steps_like) if entry.steps_like else entry
    steps = _steps(train_comparisons(like, counts), like.comparisons_per_step, like.num_train_epochs)
    epochs: float | None = entry.num_train_epochs
    if like is not entry:
        epochs = steps / math.ceil(count / entry.comparisons_per_step) if steps and count else None
    shared, means = _shared(config, entry, counts, count), counts.tokens
    items = whole(product(count, epochs, shared.items if shared else None))
    prompts = product(count, epochs, shared.instructions if shared else None, means.instruction)
    tokens = total([whole(prompts), whole(product(items, means.response))])
    found = StageCost(f"train/{entry.name}", items, tokens, steps)
    if shapes is None:
        return found
    adapters = shapes.lora_parameters(entry.lora_target_modules, entry.lora_r) if entry.use_peft else 0
    passes = FORWARD + THROUGH + (FORWARD if entry.gradient_checkpointing else 0)
    each = shapes.multiplied * passes + (adapters * (passes + TO) if adapters else shapes.multiplied * TO)
    seconds = _seconds(tokens, each, speed["train"])
    if "mismatched" in entry.reads and seconds is not None:  # as many others with the same instructions, no gradient
        seconds += _seconds(tokens, (shapes.multiplied + adapters) * FORWARD, speed["train"]) or 0.0
    return replace(
        found,
        trained=adapters or shapes.parameters,
        memory_gib=training_gib(config, entry, shapes),
        seconds=seconds,
    )


def _shared(config: RunConfig, entry: TrainConfig, counts: Counts, count: int | None) -> Shared | None:
    instructions = counts.splits["train"].instructions
    every = total([counts.preferences[protocol] for protocol in entry.protocols])
    if not count or not every or instructions is None:
        return None
    conditional, joint = (
        round((counts.preferences[protocol] or 0) * count / every) if protocol in entry.protocols else 0
        for protocol in ("conditional", "joint")
    )
    return shared_items(entry, instructions, conditional, joint, config.pairs.joint)


def responses_asked(config: RunConfig, counts: Counts) -> int | None:
    """How many responses are sampled, of all models."""
    sample = config.sample
    if sample is None:
        return 0
    there = counts.splits[sample.split]
    instructions = there.golds or there.instructions
    if instructions is None:
        return None
    models = len(sample.models or ["sft", *config.trained])
    some = min(instructions, sample.max_instructions or instructions)
    return some * models * len(sample.temperatures) * sample.samples_per_instruction


def _drawn(config: RunConfig, a_round: Counts, shapes: ModelShapes | None, speed: Speeds) -> StageCost:
    """The samples that a round trains on."""
    return _generated("draw", a_round.splits["train"].items, config, a_round, shapes, speed)


def _sample(config: RunConfig, counts: Counts, shapes: ModelShapes | None, speed: Speeds) -> StageCost:
    return _generated("sample", responses_asked(config, counts), config, counts, shapes, speed)


def _generated(
    name: str, responses: int | None, config: RunConfig, counts: Counts, shapes: ModelShapes | None, speed: Speeds
) -> StageCost:
    """Prompts, and responses as long as the data's own are, or as is allowed."""
    most, means = (config.sample or SampleConfig()).max_new_tokens, counts.tokens
    each = None if means.instruction is None else means.instruction + min(means.response or most, most)
    tokens = whole(product(responses, each))
    return StageCost(
        name,
        responses,
        tokens,
        memory_gib=sampling_gib(config, shapes) if shapes else None,
        seconds=_seconds(tokens, shapes.multiplied * FORWARD if shapes else None, speed["sample"]),
    )


def _steps(count: int | None, per_step: int, epochs: float) -> int | None:
    return None if count is None else total_steps(math.ceil(count / per_step), epochs)


def _seconds(tokens: Number, flops_per_token: float | None, speed: float) -> float | None:
    flops = product(tokens, flops_per_token)
    return None if flops is None else flops / speed

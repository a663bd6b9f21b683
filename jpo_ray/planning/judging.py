"""What judging takes: comparisons, requests to a language model, tokens and US dollars; memory of judges' models."""

from dataclasses import dataclass

from jpo_ray.config import RunConfig
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.errors import InputError
from jpo_ray.feedback.endpoint import CHARACTERS_PER_TOKEN, TOKENS_PER_MESSAGE
from jpo_ray.feedback.meter import Prices
from jpo_ray.feedback.prompts import Prompts, load_prompts
from jpo_ray.planning.costs import StageCost, responses_asked
from jpo_ray.planning.counts import Counts, total
from jpo_ray.planning.lengths import Number, product, whole
from jpo_ray.planning.memory import judge_gib, policies_gib
from jpo_ray.planning.shapes import ModelShapes, model_shapes
from jpo_ray.planning.workers import judge_models, reads_policies

ASKED = ("openai", "vllm")  # annotators that are asked in words, in both orders


@dataclass(frozen=True)
class JudgeCost:
    stage: str  # judge, evaluate or tournament
    annotator: str
    comparisons: int | None
    requests: int | None  # to a language model, repairs apart
    tokens: int | None
    cost: float | None  # US dollars; None: prices or tokens are not known
    hours: float | None  # the least, by the requests a minute that the config allows


def judge_costs(
    config: RunConfig, counts: Counts, evaluation: AnnotatorConfig | None, a_round: Counts | None = None
) -> list[JudgeCost]:
    """Of every annotator of the pairs, then of the samples' judge (`evaluation`; None: nobody judges them).

    `a_round` is what each round has, where there are any.
    """
    rounds = len(config.trained) if a_round else 1
    conditional, joint = (whole(product(pairs, rounds)) for pairs in judged_pairs(config, a_round or counts))
    found = [_cost("judge", annotator, conditional, joint, counts) for annotator in (config.judge, *config.judge.also)]
    if evaluation is None:
        return found
    found.append(_cost("evaluate", evaluation, responses_asked(config, counts), 0, counts))
    tournament = config.evaluate.tournament if config.evaluate else None
    if tournament and config.sample:
        models = len(config.sample.models or ["sft", *config.trained])
        couples, each = models * (models - 1) // 2, counts.splits[config.sample.split]
        there = each.golds or each.instructions
        limits = (there, config.sample.max_instructions, tournament.instructions)
        some = None if there is None else min(limit for limit in limits if limit is not None)
        equal = whole(product(couples, len(config.sample.temperatures), some))
        found.append(_cost("tournament", evaluation, equal, couples * tournament.joint_per_pair, counts))
    return found


def judged_pairs(config: RunConfig, counts: Counts) -> tuple[int | None, int | None]:
    """Conditional and joint pairs that are judged; of the joint training pairs a selection's budget."""
    train, validation = (counts.splits[name] for name in ("train", "validation"))
    selection = config.judge.selection
    of_train = train.joint if selection is None or train.joint is None else min(selection.budget, train.joint)
    return total([train.conditional, validation.conditional]), total([of_train, validation.joint])


def _cost(
    stage: str, annotator: AnnotatorConfig, conditional: int | None, joint: int | None, counts: Counts
) -> JudgeCost:
    comparisons = total([conditional, joint])
    if annotator.annotator not in ASKED:
        return JudgeCost(stage, annotator.called, comparisons, 0, 0, 0.0, None)
    try:
        prompts = load_prompts(annotator.prompts)
    except InputError:  # said where all that is missing is said
        return JudgeCost(stage, annotator.called, comparisons, whole(product(comparisons, 2)), None, None, None)
    asked = total(
        [
            whole(product(conditional, 2, _request_tokens(prompts, "conditional", counts))),
            whole(product(joint, 2, _request_tokens(prompts, "joint", counts))) if joint else 0,
        ]
    )
    requests = whole(product(comparisons, 2))
    said = whole(product(requests, annotator.max_answer_tokens))
    prices, cost = Prices(annotator.prompt_price, annotator.completion_price), None
    if annotator.annotator == "vllm":
        cost = 0.0
    elif asked is not None and said is not None and (prices.prompt or prices.completion):
        cost = prices.cost(asked, said)
    rate = annotator.requests_per_minute
    return JudgeCost(
        stage, annotator.called, comparisons, requests, total([asked, said]), cost,
        None if rate is None or requests is None else requests / rate / 60,
    )  # fmt: skip


def _request_tokens(prompts: Prompts, protocol: str, counts: Counts) -> Number:
    """As `--dry-run` counts them: four characters a token, and some for each message."""
    instruction, response = counts.tokens.instruction_characters, counts.tokens.response_characters
    if instruction is None or response is None:
        return None
    template = prompts.joint if protocol == "joint" else prompts.conditional
    shown = (2 if protocol == "joint" else 1) * instruction + 2 * response
    return (len(prompts.system) + len(template) + shown) / CHARACTERS_PER_TOKEN + 2 * TOKENS_PER_MESSAGE


def judging_stage(config: RunConfig, stage: str, shapes: ModelShapes | None) -> tuple[list[StageCost], list[str]]:
    """The row of `judge` or `evaluate`, where it holds models on the cluster, with the memory of the largest whose size
    is known; and the names of the judges whose size is not. `shapes` are the policy's.
    """
    found: list[float] = []
    unknown: list[str] = []
    for judge in judge_models(config, stage):
        own = model_shapes(judge.model)
        if isinstance(own, ModelShapes):
            found.append(judge_gib(config, stage, judge, own))
        else:
            unknown.append(judge.model)
    if reads_policies(config, stage) and shapes:
        found.append(policies_gib(config, stage, shapes))
    rows = [StageCost(stage, memory_gib=max(found, default=None))] if found or unknown else []
    return rows, unknown

"""The `judge` section: who compares pairs, which of them, and what follows from the verdicts."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jpo_ray.config_base import NAME_PATTERN, Count, NonNegative, Positive, Section, Share

GPT = "gpt-3.5-turbo-0125"  # the paper's
PEOPLE = "people"  # the annotator that people make together


class AnnotatorConfig(Section):
    # Labels that came with the data. A language model that compares: behind any OpenAI-compatible endpoint
    # (OPENAI_API_KEY), or on the cluster with vLLM. Scores of each item, which decide every comparison: a reward
    # model's, ratings that came with the data, the sandbox's oracle.
    annotator: Literal["labels", "openai", "vllm", "reward_model", "ratings", "sandbox"] = "labels"
    # In the judgments; default: the model's, or as above.
    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    model: str = GPT  # the endpoint's name of it; a folder or Hugging Face id for vllm and reward_model

    # Scores.
    noise: NonNegative = 0.0  # standard deviation of an error on the difference of two scores, per order
    tie_band: NonNegative = 0.05  # differences up to this are ties
    max_length: Count | None = None  # reward_model, vllm: tokens of a text, its answer included; default: the model's

    # Language models.
    # openai; default: OPENAI_BASE_URL, else OpenAI's. Named here, another address means judging again.
    base_url: str | None = None
    prompts: str = "paper"  # or hardened (judged texts between marks), or a YAML file
    temperature: NonNegative | None = None  # default: the provider's; 0 for vllm
    max_answer_tokens: Count = 16
    soft: bool = False  # labels with probabilities, from log-probs, where the endpoint gives them
    tensor_parallel_size: Count = 1  # vllm: GPUs of one node (without GPUs: cores) that each engine is split over
    concurrency: Count = 64  # requests in flight, in all
    actors: Count | None = None  # openai: Ray actors that send the requests, under one limit; default: this process
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    timeout_s: Positive = 60.0  # openai: of one request; an engine's answers have cluster.actor_timeout_s
    max_attempts: Count = 6  # at one request, with growing pauses
    max_unanswered: Share = 0.01  # of the requests: with more, judging ends with an error, and can be gone on with
    prompt_price: NonNegative = 0.0  # US dollars for a million tokens
    completion_price: NonNegative = 0.0
    # US dollars: judging stops before these comparisons have cost more, however often it is begun again.
    max_cost: Positive | None = None
    max_tokens: Count | None = None  # the same in tokens

    @model_validator(mode="after")
    def _a_cap_has_prices(self) -> "AnnotatorConfig":
        if self.max_cost is not None and not (self.prompt_price or self.completion_price):
            raise ValueError("max_cost needs prompt_price and completion_price (US dollars for a million tokens)")
        return self

    @model_validator(mode="after")
    def _people_are_no_judge(self) -> "AnnotatorConfig":
        if self.called == PEOPLE:
            raise ValueError(f"`{PEOPLE}` is what annotators who are people say together; choose another name")
        return self

    @model_validator(mode="after")
    def _a_model_of_ones_own_is_named(self) -> "AnnotatorConfig":
        if self.annotator in ("vllm", "reward_model") and self.model == GPT:
            raise ValueError(f"annotator {self.annotator} needs model (a folder or a Hugging Face id)")
        return self

    @property
    def called(self) -> str:
        """The annotator's name in the judgments."""
        has_model = self.annotator in ("openai", "vllm", "reward_model")
        return self.name or (self.model.rstrip("/").rsplit("/")[-1] if has_model else self.annotator)

    def decisive(self) -> dict[str, Any]:
        """The keys that verdicts depend on: the others may change without judging again."""
        return self.model_dump(exclude=_HOW_TO_ASK)


# Of an annotator: how requests are sent, and what they may cost.
_HOW_TO_ASK = {
    "concurrency", "actors", "requests_per_minute", "tokens_per_minute", "timeout_s", "max_attempts", "max_unanswered",
    "prompt_price", "completion_price", "max_cost", "max_tokens", "tensor_parallel_size",
}  # fmt: skip


class ClosureConfig(Section):
    """Training comparisons that nobody judged, with soft labels: the judgments imply them (a Bradley-Terry fit)."""

    per_item: Count = 8  # of each item, at most
    min_probability: Annotated[float, Field(gt=0.5, lt=1)] = 0.75  # that a judgment would say so


class SelectionConfig(Section):
    """Judge only some of the joint training pairs, chosen in rounds by what is known when each begins."""

    budget: Count  # joint training pairs to judge, of those that `pairs` has
    strategy: Literal["random", "uncertainty", "margin", "ches"] = "uncertainty"
    rounds: Count = 8
    policy: str | None = None  # margin, ches: folder of the adapter whose rewards or hidden states decide

    @model_validator(mode="after")
    def _policy_is_given_where_it_is_asked(self) -> "SelectionConfig":
        needed = self.strategy in ("margin", "ches")
        if needed != (self.policy is not None):
            raise ValueError(f"{self.strategy} {'needs' if needed else 'takes no'} policy (the folder of an adapter)")
        return self


class JudgeConfig(AnnotatorConfig):
    also: list[AnnotatorConfig] = []  # others who judge the same pairs, to compare them; preferences are the first's
    selection: SelectionConfig | None = None
    closure: ClosureConfig | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> "JudgeConfig":
        names = [annotator.called for annotator in (self, *self.also)]
        if len(set(names)) < len(names):
            raise ValueError(f"also: annotators need distinct names (`name`), got {', '.join(names)}")
        return self

    def decisive(self) -> dict[str, Any]:
        return super().decisive() | {"also": [annotator.decisive() for annotator in self.also]}

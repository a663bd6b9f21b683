"""The configuration of trainings: SFT, and each entry of `train`, under TRL's names where they mean the same."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jpo_ray.config_base import NAME_PATTERN, Count, NonNegative, Positive, Section, Seed, Steps
from jpo_ray.config_objective import OBJECTIVES, LossConfig, Reads


class OptimizerConfig(Section):
    """What SFT and preference training share."""

    learning_rate: Positive = 5e-5
    num_train_epochs: Positive = 1
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Steps = 100  # or, below 1, a share of all steps
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw_torch"
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    max_skipped_steps: Count = 5  # in a row, for a loss or gradient that is no finite number: then training stops
    max_micro_batch_tokens: Count = 2048  # that go through the model at a time, per worker; a GPU is filled by more
    # Memory of a worker for activations between forward and backward; default: half of what is free. What does not fit
    # is computed twice (the two-phase step).
    activation_memory_gib: NonNegative | None = None
    # At least so many micro-batches per worker and step; the result is the same.
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    # ddp: every worker holds the whole model; fsdp2: a slice of it, for models too large for one
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    eval_steps: Count | None = None  # default: at the end of each epoch
    save_steps: Count | None = None  # default: as eval_steps
    seed: Seed | None = None  # default: the run's

    @model_validator(mode="after")
    def _optimizer_shards(self) -> "OptimizerConfig":
        if self.sharding == "fsdp2" and self.optim != "adamw_torch":
            raise ValueError(f"{self.optim} does not work on sharded weights; set optim: adamw_torch or sharding: ddp")
        return self


class SFTConfig(OptimizerConfig):
    learning_rate: Positive = 2e-5
    num_train_epochs: Positive = 3
    items_per_step: Count = 12  # global batch size, whatever the number of workers


class CurriculumConfig(Section):
    """Easy comparisons first (Curry-DPO, arXiv 2403.07230): each epoch goes through phases of growing difficulty."""

    phases: Annotated[int, Field(ge=2)] = 3  # of as many comparisons each, shuffled within
    # Easy is a wide gap between the judge's scores; or a chosen response that the reference finds likelier per token.
    easy: Literal["gap", "reference"] = "gap"


class TrainConfig(OptimizerConfig, LossConfig):
    name: Annotated[str, Field(pattern=NAME_PATTERN)] = ""
    curriculum: CurriculumConfig | None = None
    comparisons_per_step: Count = 32  # global, whatever the number of workers
    max_batch_tokens: Count | None = None  # a step ends before its distinct items have more tokens than this
    # graph: comparisons that share items together; pairs: independent ones
    batching: Literal["graph", "pairs"] = "graph"
    steps_like: str | None = None  # train for as many steps as the entry of this name (instead of num_train_epochs)
    max_train_comparisons: Count | None = None  # use only the first so many, after a seeded shuffle
    use_peft: bool = True
    lora_r: Count = 8
    lora_alpha: Count = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    # Of a mixture of experts `all-linear` means attention's; experts are taken by the names of their layers.
    lora_target_modules: list[str] | Literal["all-linear"] = "all-linear"
    # Folder of an adapter (without use_peft: of a model) to go on from; the reference stays the SFT model.
    continue_from: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_is_the_objective_by_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("name"):
            values = {**values, "name": values.get("objective", "jpo")}
        return values

    @property
    def reads(self) -> frozenset[Reads]:
        found = super().reads
        return found | {self.curriculum.easy} if self.curriculum else found

    @property
    def counts_steps(self) -> bool:
        """Whether an epoch's number of steps follows from the number of comparisons alone."""
        return self.max_batch_tokens is None and self.joins != "lists" and self.curriculum is None

    @model_validator(mode="after")
    def _batches_hold_what_the_objective_joins(self) -> "TrainConfig":
        if self.joins == "lists" and (self.batching == "pairs" or self.curriculum):
            listwise = next(term.objective for term in self.terms if OBJECTIVES[term.objective].joins == "lists")
            other = "batching: pairs" if self.batching == "pairs" else "a curriculum"
            raise ValueError(f"{listwise} takes all comparisons of an instruction together, {other} would part them")
        if self.name == "sft":
            raise ValueError("the name `sft` is the SFT model's; choose another")
        return self

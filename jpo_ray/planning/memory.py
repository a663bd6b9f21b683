"""Memory of a worker, by the engine's own rules (`engine/model.py`, `engine/memory.py`).

Whole models are trained in float32, adapters on frozen weights in the model's dtype or in 4 bits. Of activations one
micro-batch at a time must fit; what more there is room for saves a forward pass. What autograd keeps of a token was
fitted to what the engine counts on small Llamas; `tests/planning/test_memory.py` compares.
"""

import math

from jpo_ray.config import RunConfig
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.config_training import OptimizerConfig, TrainConfig
from jpo_ray.planning.shapes import ModelShapes
from jpo_ray.planning.workers import has_gpus, workers_of

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
NF4 = 0.516  # bytes of a weight: 4 bits, and its block's scale, itself quantised
OPTIMIZER_BYTES = {"adamw_torch": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
GPU_GIB, CPU_GIB = 1.5, 0.7  # of a GPU: context, kernels, chunks of logits; of a CPU worker: its libraries
SCORED_AT_ONCE = 8192  # tokens of the reference pass
REWARDED_AT_ONCE = 16  # items (`BATCH` of cluster/rewards.py)
CACHE_GIB = 1.0  # of keys and values, a small one; vLLM takes what more there is for a larger one


def frozen_bytes(config: RunConfig, shapes: ModelShapes) -> float:
    """Of weights that are not trained: linear layers in 4 bits where asked for, the rest in the model's dtype."""
    linear = sum(map(math.prod, shapes.projections.values()))
    each = BYTES[config.model.dtype]
    return linear * (NF4 if config.model.load_in_4bit else each) + (shapes.parameters - linear) * each


def resident_gib(config: RunConfig, stage: str) -> float:
    return GPU_GIB if has_gpus(config, stage) else CPU_GIB


def reference_gib(config: RunConfig, shapes: ModelShapes) -> float:
    """Weights, and what one layer makes of a micro-batch."""
    passing = SCORED_AT_ONCE * BYTES[config.model.dtype] * _layer_widths(shapes)
    return (frozen_bytes(config, shapes) + passing) / GIB + resident_gib(config, "reference")


def _layer_widths(shapes: ModelShapes) -> int:
    """Elements of a token that a layer holds at a time, where nothing is kept for backward."""
    return 4 * shapes.width + 3 * shapes.inner_width


def sampling_gib(config: RunConfig, shapes: ModelShapes) -> float:
    """Weights and a cache."""
    parts = config.sample.tensor_parallel_size if config.sample else 1
    return shapes.parameters * BYTES[config.model.dtype] / parts / GIB + resident_gib(config, "sample") + CACHE_GIB


def judge_gib(config: RunConfig, stage: str, judge: AnnotatorConfig, shapes: ModelShapes) -> float:
    """Of a judge's own model: in 16 bits with a cache under vLLM; of a reward model float32, and a batch of texts as
    long as the run's may be."""
    if judge.annotator == "vllm":
        return shapes.parameters * 2 / judge.tensor_parallel_size / GIB + resident_gib(config, stage) + CACHE_GIB
    tokens = REWARDED_AT_ONCE * min(config.model.max_length, judge.max_length or config.model.max_length)
    return 4 * (shapes.parameters + tokens * _layer_widths(shapes)) / GIB + resident_gib(config, stage)


def policies_gib(config: RunConfig, stage: str, shapes: ModelShapes) -> float:
    """Of items scored under trained models: one that is no adapter has its reference beside it."""
    both = stage == "evaluate" and not all(entry.use_peft for entry in config.trained)
    passing = SCORED_AT_ONCE * BYTES[config.model.dtype] * _layer_widths(shapes)
    return ((2 if both else 1) * frozen_bytes(config, shapes) + passing) / GIB + resident_gib(config, stage)


def training_gib(config: RunConfig, trainer: OptimizerConfig, shapes: ModelShapes) -> float:
    """The least that a worker needs: weights, gradients, optimizer, the activations of one micro-batch."""
    stage = "train" if isinstance(trainer, TrainConfig) else "sft"
    workers = workers_of(config, stage) if trainer.sharding == "fsdp2" else 1
    layer = shapes.parameters / max(1, shapes.layers)
    state = 4 + 4 + OPTIMIZER_BYTES[trainer.optim]
    if isinstance(trainer, TrainConfig) and trainer.use_peft:
        trained = shapes.lora_parameters(trainer.lora_target_modules, trainer.lora_r)
        held = (frozen_bytes(config, shapes) + trained * state) / workers
    else:
        held = shapes.parameters * state / workers
        if (
            config.model.dtype == "bfloat16"
        ):  # products take a copy, which lives until backward, or as long as its layer
            held += 2 * (layer if trainer.gradient_checkpointing else shapes.parameters)
    if workers > 1:  # a layer, or the embeddings, gathered whole
        held += 4 * max(layer, *map(math.prod, shapes.tensors.values()))
    kept = trainer.max_micro_batch_tokens * activation_bytes(config, trainer, shapes)
    return (held + kept) / GIB + resident_gib(config, stage)


def activation_bytes(config: RunConfig, trainer: OptimizerConfig, shapes: ModelShapes) -> float:
    """What autograd keeps of a token: of each layer widths of the stream h, the MLP i, keys and values k."""
    h, i, k = shapes.width, shapes.inner_width, shapes.key_value_width
    half = config.model.dtype == "bfloat16"
    if isinstance(trainer, TrainConfig) and trainer.use_peft:
        each, layer = BYTES[config.model.dtype], _adapted_layer(trainer, shapes, half)
    elif half:
        each, layer = 4, (5.5 * i + 5 * k + 33 * h) / 4
    else:
        each, layer = 4, 2 * i + 2 * k + 9 * h
    if trainer.gradient_checkpointing:  # the input of each layer, and one layer whole
        return each * (h * shapes.layers + layer + 3 * h)
    return each * (layer * shapes.layers + 3 * h)


def _adapted_layer(train: TrainConfig, shapes: ModelShapes, half: bool) -> float:
    """Elements that a layer with adapters keeps of a token."""
    adapted = shapes.adapted(train.lora_target_modules)
    names = {name.split(".")[-2] for name in adapted}
    after_attention = bool(names & {"o_proj", "c_proj"})
    in_mlp = bool(names & {"gate_proj", "up_proj", "c_fc"})
    widths = 5 + 2 * half + after_attention + in_mlp
    found: float = 2 * shapes.inner_width + 2 * shapes.key_value_width + widths * shapes.width
    if train.lora_dropout:  # each adapter keeps its own masked input
        found += 1.7 * sum(shape[1] for shape in adapted.values()) / max(1, shapes.layers)
    return found

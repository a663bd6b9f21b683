"""TRL's DPOTrainer on the same tokens, comparisons and updates."""

import tempfile
from pathlib import Path
from typing import Any

from jpo_ray.config_training import TrainConfig
from jpo_ray.engine.dataset import EdgeList
from throughput.job import BETA, LEARNING_RATE, Job, Trace
from throughput.measure import MatrixFlops, PeakMemory, matrix_parameters, now
from throughput.model import SHAPES, base_model, set_lora_b
from throughput.work import SEED, Work, train_config


def run_trl(job: Job, work: Work, batches: list[EdgeList]) -> Trace:
    """DPOTrainer, given the tokens themselves. For a joint comparison the prompt is BOS and the completions are the
    rest of both sequences, so that its log-ratios cover instruction and response.
    """
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from jpo_ray.sandbox.model import make_tokenizer

    class PretokenizedTrainer(DPOTrainer):  # type: ignore[misc]
        reference_s = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            started = now(job.device)
            dataset = super()._precompute_ref_logps(*arguments)
            self.reference_s = now(job.device) - started
            return dataset

    config = train_config(work, learning_rate=LEARNING_RATE, beta=BETA, max_micro_batch_tokens=1)
    base = base_model(Path(job.model), SHAPES[job.shape], job.device, job.dtype)
    parameters = matrix_parameters(base)
    stamps = _stamps(job.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PretokenizedTrainer(
            model=base,
            args=DPOConfig(**_trl_options(job, work, config, len(batches), folder)),
            train_dataset=_trl_dataset(work, batches),
            processing_class=make_tokenizer(["."], 259),  # only its padding id is used: 0, as in the data's tokenizer
            peft_config=LoraConfig(
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=0.0,
                target_modules=config.lora_target_modules,
                task_type="CAUSAL_LM",
            ),
            callbacks=[stamps],
        )
        trainer.remove_callback(PrinterCallback)
        set_lora_b(trainer.model)
        memory = PeakMemory(job.device)
        memory.start()
        trainer.train()
        above = memory.above()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return Trace(
        [entry["loss"] for entry in logged],
        [entry["grad_norm"] for entry in logged],
        stamps.seconds,
        trainer.reference_s,
        sum(len(batch) for batch in batches),
        stamps.counter.flops,
        memory.base,
        above,
        parameters,
    )


def _stamps(device: str) -> Any:
    """A callback that keeps the seconds of each update and counts the matrix products of the first."""
    from transformers import TrainerCallback

    class Stamps(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.started = 0.0
            self.counter = MatrixFlops()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = now(device)
            if not self.seconds:
                self.counter.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not self.seconds:
                self.counter.__exit__(None, None, None)
            self.seconds.append(now(device) - self.started)

    return Stamps()


def _trl_options(job: Job, work: Work, config: TrainConfig, updates: int, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": work.per_update // job.micro_batch,
        "max_steps": updates,
        "train_sampling_strategy": "sequential",  # the comparisons of each update are those of this engine
        "precompute_ref_log_probs": True,
        "beta": config.beta,
        "max_length": None,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": SEED,
        "use_cpu": job.device == "cpu",
        "bf16": job.dtype != "float32",
        "gradient_checkpointing": job.gradient_checkpointing,
        "dataloader_pin_memory": job.device == "cuda",
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
    }


def _trl_dataset(work: Work, batches: list[EdgeList]) -> Any:
    from datasets import Dataset

    rows = []
    for batch in batches:
        for chosen, rejected, joint in zip(batch.chosen, batch.rejected, batch.joint, strict=True):
            prompt = 1 if joint else int(work.tokens.prompt_lengths[chosen])
            left, right = (work.tokens.item(int(row)).tolist() for row in (chosen, rejected))
            rows.append({"prompt_ids": left[:prompt], "chosen_ids": left[prompt:], "rejected_ids": right[prompt:]})
    return Dataset.from_list(rows)

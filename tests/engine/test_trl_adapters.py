"""Adapters go both ways between this engine and TRL: what it trains TRL goes on from, what TRL saves it loads."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.tiny import World, config, policy_scorer
from jpo_ray.engine.adapters import base_of, load_adapter
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.engine.scoring import make_scorer
from jpo_ray.engine.step import score_all

trl = pytest.importorskip("trl", reason="trl is not installed (pip install -e '.[dev]')")


def test_trl_goes_on_from_an_adapter_and_its_own_is_loaded_here(world: World, tmp_path: Path) -> None:
    """TRL's log-probs before its first update are this engine's of the adapter, and after it ours are those of TRL's
    model: one DPO step at the conditional edges of the world.
    """
    scorer = policy_scorer(world.model, config(lora_dropout=0.0))
    scorer.model.save_pretrained(tmp_path / "ours")
    edges, tokens = world.data.train[0].take(np.flatnonzero(~world.data.train[0].joint)), world.tokens
    scores = score_all(scorer, tokens, np.arange(12), max_tokens=4096)
    trainer = dpo_trainer(world, tmp_path, edges.chosen, edges.rejected)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged["logps/chosen"] == pytest.approx(float(scores[edges.chosen, 1].mean()), abs=1e-3)
    assert logged["logps/rejected"] == pytest.approx(float(scores[edges.rejected, 1].mean()), abs=1e-3)

    trainer.save_model(str(tmp_path / "theirs"))
    loaded = load_adapter(tmp_path / "theirs", base_of(tmp_path / "theirs", "here"), dtype="float32")
    after = score_all(make_scorer(loaded), tokens, np.arange(12), max_tokens=4096)
    trained = score_all(make_scorer(trainer.model.eval()), tokens, np.arange(12), max_tokens=4096)
    assert (after - trained).abs().max() < 1e-4
    assert (after - scores).abs().max() > 1e-2


def dpo_trainer(world: World, folder: Path, chosen: np.ndarray, rejected: np.ndarray) -> "trl.DPOTrainer":
    """TRL's trainer of the adapter `ours`, given the world's own tokens."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, PrinterCallback

    class Pretokenized(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset

    tokens, rows = world.tokens, []
    for left, right in zip(chosen.tolist(), rejected.tolist(), strict=True):
        prompt, (one, other) = int(tokens.prompt_lengths[left]), (tokens.item(row).tolist() for row in (left, right))
        rows.append({"prompt_ids": one[:prompt], "chosen_ids": one[prompt:], "rejected_ids": other[prompt:]})
    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    options = trl.DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=len(rows), max_steps=1, learning_rate=1e-2,
        warmup_steps=0, lr_scheduler_type="constant", use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True,
        save_strategy="no", report_to="none", max_length=None, gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Pretokenized(
            model=PeftModel.from_pretrained(base, folder / "ours", is_trainable=True),
            args=options,
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(world.model),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer

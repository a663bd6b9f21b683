"""Tiny Llama models and their tokenizers, for the sandbox and for tests on real text.

Importing this module imports neither torch nor transformers; its functions do.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
MAX_TOKENS = 512
# vLLM's attention kernels accept heads of 32 (on CPU), 64 and more.
HEAD_DIM = 32


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts: any text passes and comes back unchanged.

    `tokenizer(text)` puts `<bos>` in front, as Llama's does; with `add_special_tokens=False` it adds nothing.
    ValueError if `vocab_size` is too small for the 256 bytes and three special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(f"vocab_size {vocab_size} is too small: byte-level BPE needs {len(alphabet) + len(special)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_TOKENS,
        padding_side="left",
    )


def new_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, intermediate_size: int, layers: int, seed: int
) -> LlamaForCausalLM:
    """A randomly initialised Llama with heads of 32 for the tokenizer's vocabulary, in float32, input and output
    embeddings tied. ValueError if `hidden_size` is no multiple of 32.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden_size % HEAD_DIM:
        raise ValueError(f"hidden_size {hidden_size} is no multiple of {HEAD_DIM}, the size of an attention head")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        # Larger than Llama's 0.02: a narrow model starts with signals of a useful size.
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write config, generation config, safetensors and tokenizer to `out_dir`, all or nothing.

    The files are written aside and renamed into place; an earlier model there is replaced.
    """
    from transformers import GenerationConfig

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    aside = out_dir.with_name(f".{out_dir.name}-{uuid4().hex[:8]}")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if out_dir.exists():
            old = aside.with_name(aside.name + "-old")
            out_dir.rename(old)
            aside.rename(out_dir)
            shutil.rmtree(old)
        else:
            aside.rename(out_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


TINY_VOCABULARY = 1280


def make_tiny_model(
    texts: Iterable[str],
    out_dir: Path,
    *,
    vocab_size: int = TINY_VOCABULARY,
    hidden_size: int = 128,
    intermediate_size: int = 384,
    layers: int = 4,
    seed: int = 0,
) -> None:
    """Train a tokenizer on the texts and save it with a randomly initialised Llama in `out_dir`.

    The defaults give about 1.0 million parameters; the vocabulary is smaller than `vocab_size` where the texts do not
    hold that many pieces. ValueError as `make_tokenizer` and `new_model`.
    """
    tokenizer = make_tokenizer(texts, vocab_size)
    model = new_model(tokenizer, hidden_size=hidden_size, intermediate_size=intermediate_size, layers=layers, seed=seed)
    save_model(model, tokenizer, out_dir)

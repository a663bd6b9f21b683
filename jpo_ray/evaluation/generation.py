"""Sampling with transformers, where vLLM is not installed, and what both engines share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GREEDY_BELOW = 1e-6
VLLM_LOWEST_TEMPERATURE = 0.01  # vLLM raises lower ones to this (greedy, exactly 0, excepted)


@dataclass(frozen=True)
class SampledModel:
    """A model to sample: a folder of its own, or an adapter on the folder `base`."""

    name: str
    path: Path
    base: Path  # equals `path` for a full model

    @property
    def is_adapter(self) -> bool:
        return self.path != self.base


@dataclass(frozen=True)
class Request:
    """One response to generate."""

    number: int
    model: SampledModel
    prompt_ids: list[int]
    temperature: float
    seed: int


@dataclass(frozen=True)
class Generated:
    """The answer to a request, or why there is none."""

    number: int
    text: str
    tokens: int
    error: str = ""
    ended: bool = True  # by itself or at a stop string; else `max_new_tokens` cut it


def effective_temperature(engine: str, temperature: float) -> float:
    """What the engine makes of a requested temperature."""
    if engine == "vllm" and temperature > 0:
        return max(temperature, VLLM_LOWEST_TEMPERATURE)
    return temperature


def clean_response(text: str, response_prefix: str) -> str:
    """The response without what the layout puts around it."""
    return text.removeprefix(response_prefix).strip()


class TransformersSampler:
    """One base model with any number of adapters, batch by batch."""

    def __init__(self, base: Path, adapters: Sequence[SampledModel], dtype: str, device: str) -> None:
        from jpo_ray.engine.model import load_model, load_tokenizer

        self.tokenizer = load_tokenizer(base)
        self.model: Any = load_model(base, dtype=dtype, device=device)
        self.adapters = {adapter.name for adapter in adapters}
        for adapter in adapters:
            self._add(adapter)

    def _add(self, adapter: SampledModel) -> None:
        from peft import PeftModel

        if hasattr(self.model, "load_adapter") and isinstance(self.model, PeftModel):
            self.model.load_adapter(adapter.path, adapter_name=_module_name(adapter.name), use_safetensors=True)
        else:
            self.model = PeftModel.from_pretrained(
                self.model, adapter.path, adapter_name=_module_name(adapter.name), use_safetensors=True
            )
        self.model.eval()

    def generate(self, requests: Sequence[Request], max_new_tokens: int, stop: Sequence[str] = ()) -> list[Generated]:
        """Answer requests of one model and temperature together. What a request's seed draws does not depend on the
        others.
        """
        import torch

        model, temperature = requests[0].model, requests[0].temperature
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        longest = max(len(request.prompt_ids) for request in requests)
        padding = [longest - len(request.prompt_ids) for request in requests]
        device = next(self.model.parameters()).device
        ids = torch.tensor([[pad] * n + r.prompt_ids for n, r in zip(padding, requests, strict=True)], device=device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        drawn = [] if temperature < GREEDY_BELOW else [_Drawn(temperature, [r.seed for r in requests], device)]
        with torch.no_grad(), self._using(model):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                repetition_penalty=1.0,
                **({"stop_strings": list(stop), "tokenizer": self.tokenizer} if stop else {}),
                do_sample=False,
                logits_processor=drawn,
            )
        rows = zip(requests, output, strict=True)
        return [self._answer(request, row[longest:].tolist(), stop) for request, row in rows]

    def _answer(self, request: Request, ids: list[int], stop: Sequence[str]) -> Generated:
        closing = end_tokens(self.tokenizer, self.model.generation_config)
        place = next((place for place, token in enumerate(ids) if token in closing), None)
        ids = ids if place is None else ids[: place + 1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        stops = [found for end in stop if (found := text.find(end)) >= 0]
        ended = bool(stops) or place is not None
        return Generated(request.number, text[: min(stops)] if stops else text, len(ids), ended=ended)

    def _using(self, model: SampledModel) -> Any:
        from contextlib import nullcontext

        if not self.adapters:
            return nullcontext()
        if model.name not in self.adapters:
            return self.model.disable_adapter()
        self.model.set_adapter(_module_name(model.name))
        return nullcontext()


class _Drawn:
    """Makes the largest score that of a token drawn at a temperature, by the Gumbel-max trick (arXiv 1611.01144,
    Eq. 1), with random numbers of each row's own.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: Any) -> None:
        import torch

        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, _: Any, scores: Any) -> Any:
        import torch

        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self._temperature - noise.log()


def end_tokens(tokenizer: Any, generation_config: Any) -> set[int]:
    """Tokens that end a response."""
    given = generation_config.eos_token_id
    some = given if isinstance(given, list) else [given]
    return {token for token in (tokenizer.eos_token_id, *some) if token is not None}


def _module_name(name: str) -> str:
    return name.replace("_", "__").replace(".", "_d")  # torch modules cannot have dots in their names

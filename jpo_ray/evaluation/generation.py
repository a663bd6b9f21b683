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
        """Answer requests of one model and temperature together. The first one's seed seeds the batch."""
        import torch

        model, temperature = requests[0].model, requests[0].temperature
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        longest = max(len(request.prompt_ids) for request in requests)
        padding = [longest - len(request.prompt_ids) for request in requests]
        device = next(self.model.parameters()).device
        ids = torch.tensor([[pad] * n + r.prompt_ids for n, r in zip(padding, requests, strict=True)], device=device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        greedy = temperature < GREEDY_BELOW
        plain = {"top_k": 0, "top_p": 1.0}  # whatever the model's generation_config says
        sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature} | plain
        torch.manual_seed(requests[0].seed)
        with torch.no_grad(), self._using(model):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                repetition_penalty=1.0,
                **({"stop_strings": list(stop), "tokenizer": self.tokenizer} if stop else {}),
                **sampling,
            )
        rows = zip(requests, output, strict=True)
        return [self._answer(request, row[longest:].tolist(), stop) for request, row in rows]

    def _answer(self, request: Request, ids: list[int], stop: Sequence[str]) -> Generated:
        eos = self.tokenizer.eos_token_id
        ids = ids[: ids.index(eos) + 1] if eos in ids else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ends = [place for end in stop if (place := text.find(end)) >= 0]
        return Generated(request.number, text[: min(ends)] if ends else text, len(ids))

    def _using(self, model: SampledModel) -> Any:
        from contextlib import nullcontext

        if not self.adapters:
            return nullcontext()
        if model.name not in self.adapters:
            return self.model.disable_adapter()
        self.model.set_adapter(_module_name(model.name))
        return nullcontext()


def _module_name(name: str) -> str:
    return name.replace("_", "__").replace(".", "_d")  # torch modules cannot have dots in their names

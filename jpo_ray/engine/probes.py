"""What a model does that the engine must know, found out on a few tokens rather than by the architecture's name."""

from typing import Any

import torch
from torch import Tensor, nn

from jpo_ray.engine.passing import PassState
from jpo_ray.errors import InputError


@torch.no_grad()
def projects_plainly(model: Any, backbone: Any, head: Any, ids: Tensor) -> bool:
    """Whether the model's logits are `head(hidden)`: some models scale or cap them, or scale the hidden states.

    What the head gave is compared with the logits exactly: a cap hardly changes the small logits of these few tokens.
    """
    if type(head) is not nn.Linear:  # an adapter on the head, or a quantised one
        return False
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    logits = model(input_ids=ids, use_cache=False).logits
    hook.remove()
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    if len(seen) != 2 or not torch.equal(seen[1].float(), logits.float()):
        return False
    return torch.allclose(seen[0].float(), hidden.float(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def refuse_drawn_dropout(model: Any, backbone: Any, state: PassState, ids: Tensor) -> None:
    """Raise `InputError` for a model whose forward pass in training draws from a random generator."""
    state.tokens_BL = torch.zeros_like(ids, dtype=torch.int32)
    first, again = (backbone(input_ids=ids, use_cache=False).last_hidden_state for _ in range(2))
    if not torch.allclose(first, again, rtol=1e-2, atol=1e-3):
        raise InputError(
            f"model.model_name_or_path: {type(model).__name__} draws dropout in its forward pass, which cannot be "
            "repeated item by item; set its dropout rates to 0 in config.json"
        )

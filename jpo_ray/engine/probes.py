"""What a model does that the engine must know, found out on a few tokens rather than by the architecture's name."""

from typing import Any

import torch
from torch import Tensor, nn

from jpo_ray.engine.dropout import DropoutKeys
from jpo_ray.errors import InputError

UNLIMITED = 2**31


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
def maskable_length(backbone: Any, ids: Tensor) -> int:
    """The longest row in which a sequence beside another one, masked from it, gives what it gives alone; 0 for none.

    None for models that ignore masks or positions or mix tokens otherwise than by attention. A sliding window does not
    act within rows that are no longer than it.
    """
    config = backbone.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        return 0
    window = getattr(config, "sliding_window", None)
    prompt, response = ids[:, : ids.shape[1] // 2], ids[:, ids.shape[1] // 2 :]
    other = response.flip(1) + 1
    position = torch.arange(ids.shape[1], device=ids.device)
    piece = torch.tensor([0] * prompt.shape[1] + [1] * response.shape[1] + [2] * other.shape[1], device=ids.device)
    mask = attention_mask(backbone, piece.unsqueeze(0), torch.zeros_like(piece).unsqueeze(0), (piece == 0).unsqueeze(0))
    both = torch.cat([prompt, response, other], dim=1)
    positions = torch.cat([position, position[prompt.shape[1] :]]).unsqueeze(0)
    dtype = next(backbone.parameters()).dtype
    try:
        together = hidden_states(backbone, both, positions, mask)
    except (TypeError, ValueError):  # takes no positions or no such mask
        return 0
    alone = hidden_states(backbone, torch.cat([prompt, other], dim=1))
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    found = together[:, piece != 1]
    return (window or UNLIMITED) if torch.allclose(found, alone, rtol=tolerance, atol=tolerance) else 0


@torch.no_grad()
def refuse_drawn_dropout(model: Any, backbone: Any, keys: DropoutKeys, ids: Tensor) -> None:
    """Raise `InputError` for a model whose forward pass in training draws from a random generator."""
    keys.tokens_BL = torch.zeros_like(ids, dtype=torch.int32)
    first, again = (hidden_states(backbone, ids) for _ in range(2))
    if not torch.allclose(first, again, rtol=1e-2, atol=1e-3):
        raise InputError(
            f"model.model_name_or_path: {type(model).__name__} draws dropout in its forward pass, which cannot be "
            "repeated item by item; set its dropout rates to 0 in config.json"
        )


def hidden_states(backbone: Any, ids_BL: Tensor, position_BL: Tensor | None = None, mask: Any = None) -> Tensor:
    """Hidden states [B, L, D]; positions and mask where they are not those of padded rows."""
    special = {} if mask is None else {"position_ids": position_BL, "attention_mask": mask}
    hidden: Tensor = backbone(input_ids=ids_BL, use_cache=False, **special).last_hidden_state
    return hidden


def attention_mask(backbone: Any, piece_BL: Tensor, tree_BL: Tensor, is_instruction_BL: Tensor) -> Any:
    """Which token attends to which: to earlier ones of its own piece and of its tree's instruction.

    As the model's attention takes it: a block mask for FlexAttention, else [B, 1, L, L], zero or the lowest number.
    """
    rows, length = piece_BL.shape

    def attends(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_tree = tree_BL[row, query] == tree_BL[row, key]
        seen = (piece_BL[row, query] == piece_BL[row, key]) | is_instruction_BL[row, key]
        return (query >= key) & same_tree & seen

    if backbone.config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(attends, rows, None, length, length, device=piece_BL.device)
    row = torch.arange(rows, device=piece_BL.device)[:, None, None]
    place = torch.arange(length, device=piece_BL.device)
    mask = attends(row, row, place[None, :, None], place[None, None, :])
    dtype = next(backbone.parameters()).dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min).unsqueeze(1)

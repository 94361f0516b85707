"""Attention over packed sequences: a micro-batch is one row of tokens, without padding.

    hidden = last_hidden(body, tokens, lengths)        (s, L) padded on the right -> (s, L, D)

The body of a Hugging Face model sees all sequences side by side in one row; each attends to itself
alone. flash-attn does that where it is installed, torch's own varlen attention on other GPUs, and
elsewhere plain sdpa, a sequence at a time, which computes no masked block either. Calls without
`packed`, such as sampling with a cache, go to sdpa as they are. N tokens in all, H heads, E wide.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

PACKED = "packed"
"""Name of this attention in transformers."""


@dataclass(frozen=True)
class Packed:
    bounds: Tensor  # (s + 1) int32: where sequences begin and end in the row
    lengths: list[int]

    @staticmethod
    def of(lengths: Tensor) -> Packed:
        bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return Packed(bounds, lengths.tolist())


def last_hidden(body: PreTrainedModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Hidden states of the last layer; what lies behind a sequence's end is of no meaning."""
    if body.config._attn_implementation != PACKED:
        return body(input_ids=tokens, use_cache=False).last_hidden_state
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    real = places < lengths.unsqueeze(1)
    states = body(
        input_ids=tokens[real].unsqueeze(0),
        position_ids=places[real].unsqueeze(0),
        attention_mask=real.new_ones(1, 1, 1, 1),  # transformers makes no mask where it finds one
        use_cache=False,
        packed=Packed.of(lengths),
    ).last_hidden_state[0]
    out = states.new_zeros(*tokens.shape, states.shape[1])
    return out.masked_scatter(real.unsqueeze(2), states)


def use_packed(model: PreTrainedModel) -> bool:
    """Switch a transformers model over, where it can: whether it could."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None)  # known to none of these kernels
    if capped or not getattr(model, "_supports_sdpa", False):
        return False
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    model.set_attn_implementation(PACKED)
    return True


@functools.cache
def kernel(device: str, dtype: torch.dtype) -> str:
    """Which one runs."""
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16):
        if importlib.util.find_spec("flash_attn"):
            return "flash-attn"
        from torch.nn.attention import varlen  # since torch 2.10, these arguments since later

        known = inspect.signature(varlen.varlen_attn).parameters
        if {"scale", "window_size", "enable_gqa"} <= known.keys():
            return "torch varlen"
    return "sdpa"


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, N, E)
    key: Tensor,  # (1, H or a divisor of it, N, E)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed: Packed | None = None,
    **others: object,
) -> tuple[Tensor, None]:  # (1, N, H, E)
    if packed is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    which = kernel(query.device.type, query.dtype)
    if which == "sdpa":
        return _each_alone(query, key, value, scaling, sliding_window, packed.lengths), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, E)
    longest = max(packed.lengths)
    window = (sliding_window - 1, 0) if sliding_window else (-1, 0)
    if which == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        window = window if sliding_window else (-1, -1)
        out = flash_attn_varlen_func(
            q, k, v, packed.bounds, packed.bounds, longest, longest,
            softmax_scale=scaling, causal=True, window_size=window,
        )  # fmt: skip
    else:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q, k, v, packed.bounds, packed.bounds, longest, longest,
            scale=scaling, window_size=window, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    return out.unsqueeze(0), None


def _each_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    lengths: list[int],
) -> Tensor:
    outs = []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value))):
        near = None
        if window is not None and q.shape[2] > window:
            steps = torch.arange(q.shape[2], device=q.device)
            behind = steps.unsqueeze(1) - steps
            near = (behind >= 0) & (behind < window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=near, is_causal=near is None,
            scale=scaling, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        outs.append(out)
    return torch.cat(outs, 2).transpose(1, 2)

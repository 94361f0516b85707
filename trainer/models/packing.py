"""Attention over sequences that lie side by side in one row of tokens.

    hidden = run(body, Layout.of(sequences, last=False))          (N, D), no padding

Each token attends to what stands before it in its own sequence. Several answers to one prompt lie
behind it once: their tokens attend to the prompt's keys, then to their own. flash-attn does that
where it is installed, torch's own varlen attention on other GPUs; elsewhere sdpa, for which
queries, keys and values alone are padded, inside the attention: everything else in a model never
meets padding. Calls without `packed`, such as sampling with a cache, go to sdpa as they are.

Nothing here depends on values that lie on a device, and lengths reach torch.compile as shapes of
tensors only. N tokens, s segments of them, H heads, E wide, n answer tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.batch.sequences import Sequences, on_device, ranges

PACKED = "packed"
"""Name of this attention in transformers."""


class Padded(NamedTuple):
    """Some segments as sdpa wants them: places of their tokens, padded by any place at all."""

    queries: Tensor  # (s, Lq) in the row
    keys: Tensor  # (s, Lk) in the row: of the prompt before it, then its own
    before: Tensor | None  # (s) tokens of that prompt; None: none, and plain causal attention


class Packed(NamedTuple):
    """Which tokens attend to which."""

    bounds: Tensor  # (s + 1) int32: where segments begin and end in the row
    key_bounds: Tensor  # (s + 1) int32: and their keys, among those at `keys`
    keys: Tensor | None  # places of all segments' keys in the row; None: the row itself
    longest: int
    longest_keys: int
    padded: tuple[Padded, ...]  # for sdpa alone
    back: Tensor | None  # (N) for sdpa alone: where each token stands in what it returns


class Layout(NamedTuple):
    """A batch of sequences as a model sees it."""

    tokens: Tensor  # (N)
    positions: Tensor  # (N) within each sequence
    packed: Packed
    before_answer: Tensor  # (n) places of the states in front of answer tokens
    answer: Tensor  # (n) places of the answer tokens themselves; with `last` alone
    prompt_ends: Tensor  # (S) places of the prompts' last tokens
    ends: Tensor  # (S) places of the sequences' last tokens; with `last` alone

    @staticmethod
    def of(sequences: Sequences, last: bool, sdpa: bool, shared: bool = True) -> Layout:
        """`last`: with the answers' last tokens, which predict nothing. `sdpa`: for that kernel."""
        return _layout(sequences, last, sdpa, shared and worth_sharing(sequences))


def worth_sharing(sequences: Sequences) -> bool:
    """Whether computing shared prompts once saves more than looking them up costs."""
    return len(sequences.units) * 2 <= len(sequences)


def _layout(sequences: Sequences, last: bool, sdpa: bool, shared: bool) -> Layout:
    asked, drop = sequences.prompt_lengths, 0 if last else 1
    said = sequences.answer_lengths - drop
    if not shared:
        lengths = asked + said
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        source = ranges(sequences.starts[:-1], lengths)
        positions = ranges(torch.zeros_like(lengths), lengths)
        prompt_ends = bounds[:-1] + asked - 1
        before_answer = ranges(prompt_ends, sequences.answer_lengths)
        packed = _plain(bounds, lengths, sdpa)
        ends = bounds[1:] - 1
    else:
        # The prompts, each once, and behind them all answers.
        first = torch.tensor([rows[0] for rows in sequences.units])
        prompt = sequences.unit_of
        once = asked[first]
        prompt_bounds = F.pad(once.cumsum(0), (1, 0))
        total = int(prompt_bounds[-1])
        bounds = total + F.pad(said.cumsum(0), (1, 0))
        source = torch.cat(
            [
                ranges(sequences.starts[first], once),
                ranges(sequences.starts[:-1] + asked, said),
            ]
        )
        positions = torch.cat([ranges(torch.zeros_like(once), once), ranges(asked, said)])
        prompt_ends = prompt_bounds[1:][prompt] - 1
        # The state in front of an answer's first token is its prompt's last, the others' its own.
        count = sequences.answer_lengths
        before_answer = ranges(bounds[:-1] - 1, count)
        before_answer[sequences.answer_starts[:-1][count > 0]] = prompt_ends[count > 0]
        packed = _behind_prompts(prompt_bounds, once, bounds, said, prompt, sdpa)
        ends = torch.where(said > 0, bounds[1:] - 1, prompt_ends)
    answer = ranges(bounds[1:] - said, said)
    places = (before_answer, answer, prompt_ends, ends)
    return Layout(
        on_device(sequences.tokens[source]),
        on_device(positions),
        packed,
        *(on_device(each) for each in places),
    )


def grid_of(sequences: Sequences, last: bool) -> tuple[Tensor, Tensor]:
    """For models that want padding: (S, L) places of sequences in a row where they stand one after
    another, and (N) where each token stands in that grid."""
    lengths = sequences.lengths - (0 if last else 1)
    grid, inverse = _grid(F.pad(lengths.cumsum(0), (1, 0)), lengths)
    return on_device(grid), on_device(inverse)


def _grid(bounds: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(s, L) places of padded rows, and (N) of each token in them."""
    width = int(lengths.max())
    steps = torch.arange(width)
    grid = (bounds[:-1].unsqueeze(1) + steps).clamp(max=int(bounds[-1]) - 1)
    inverse = ranges(torch.arange(len(lengths)) * width, lengths)
    return grid, inverse


def _plain(bounds: Tensor, lengths: Tensor, sdpa: bool) -> Packed:
    longest = _rounded(int(lengths.max()))
    on = on_device(bounds.int())
    if not sdpa:
        return Packed(on, on, None, longest, longest, (), None)
    grid, inverse = map(on_device, _grid(bounds, lengths))
    return Packed(on, on, None, longest, longest, (Padded(grid, grid, None),), inverse)


def _behind_prompts(
    prompt_bounds: Tensor,
    once: Tensor,  # (prompts) lengths
    bounds: Tensor,
    said: Tensor,  # (S) lengths
    prompt: Tensor,  # (S)
    sdpa: bool,
) -> Packed:
    before = once[prompt]
    seen = before + said
    both = torch.cat([prompt_bounds, bounds[1:]])
    key_bounds = F.pad(torch.cat([once, seen]).cumsum(0), (1, 0))
    longest = _rounded(max(int(once.max()), int(said.max())))
    longest_keys = _rounded(max(int(once.max()), int(seen.max())))
    # Keys of an answer: its prompt's, then its own.
    starts = torch.stack([prompt_bounds[:-1][prompt], bounds[:-1]], 1).flatten()
    lengths = torch.stack([before, said], 1).flatten()
    answer_keys = ranges(starts, lengths)
    keys = on_device(torch.cat([torch.arange(int(prompt_bounds[-1])), answer_keys]))
    ends = on_device(both.int()), on_device(key_bounds.int())
    if not sdpa:
        return Packed(*ends, keys, longest, longest_keys, (), None)
    prompts, back = _grid(prompt_bounds, once)
    first = Padded(on_device(prompts), on_device(prompts), None)
    if int(said.max()) == 0:  # nothing but prompts
        return Packed(*ends, keys, longest, longest_keys, (first,), on_device(back))
    answers, behind = _grid(bounds, said)
    wide = int(seen.max())
    key_starts = F.pad(seen.cumsum(0), (1, 0))[:-1].unsqueeze(1)
    where = (key_starts + torch.arange(wide)).clamp(max=len(answer_keys) - 1)
    second = Padded(on_device(answers), on_device(answer_keys[where]), on_device(before))
    inverse = on_device(torch.cat([back, prompts.numel() + behind]))
    return Packed(*ends, keys, longest, longest_keys, (first, second), inverse)


def _rounded(length: int) -> int:
    """Kernels want a bound, not a maximum: few different ones, for the sake of torch.compile."""
    return -(-length // 128) * 128


def run(body: nn.Module, sequences: Sequences, last: bool = False) -> tuple[Tensor, Layout]:
    """(N, D) hidden states of the last layer, and where they stand."""
    config: Any = body.config
    if config._attn_implementation == PACKED:
        weight = next(body.parameters())
        sdpa = kernel(weight.device.type, weight.dtype) == "sdpa"
        layout = Layout.of(sequences, last, sdpa)
        out = body(
            input_ids=layout.tokens.unsqueeze(0),
            position_ids=layout.positions.unsqueeze(0),
            # transformers makes no mask where it finds one
            attention_mask=layout.tokens.new_ones(1, 1, 1, 1, dtype=torch.bool),
            use_cache=False,
            packed=layout.packed,
        )
        return out.last_hidden_state[0], layout
    layout = Layout.of(sequences, last, sdpa=False, shared=False)
    grid, inverse = grid_of(sequences, last)
    tokens = layout.tokens[grid]  # with causal attention nobody sees what fills up a row
    out = body(input_ids=tokens, use_cache=False)
    return out.last_hidden_state.flatten(0, 1)[inverse], layout


def use_packed(model: nn.Module) -> None:
    """Switch a transformers model over."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    given: Any = model
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    given.set_attn_implementation(PACKED)


def why_not_packed(model: nn.Module) -> str:
    """Empty where a transformers model can be switched over."""
    given: Any = model
    if caps_attention(given.config):
        return "caps attention's logits, which no packed kernel does"
    if not getattr(given, "_supports_sdpa", False):
        return "has attention of its own"
    return ""


def caps_attention(config: Any) -> bool:
    """Gemma 2's softcap, which sdpa does not know either; not that of the last logits."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, E)
    if packed.padded:
        return _padded(q, k, v, scaling, sliding_window, packed), None
    if packed.keys is not None:
        k, v = k[packed.keys], v[packed.keys]
    longest, longest_keys = packed.longest, packed.longest_keys
    if kernel(query.device.type, query.dtype) == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        window = (sliding_window - 1, 0) if sliding_window else (-1, -1)
        out = flash_attn_varlen_func(
            q, k, v, packed.bounds, packed.key_bounds, longest, longest_keys,
            softmax_scale=scaling, causal=True, window_size=window,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    else:
        from torch.nn.attention.varlen import varlen_attn

        window = (sliding_window - 1, 0) if sliding_window else (-1, 0)
        out = varlen_attn(
            q, k, v, packed.bounds, packed.key_bounds, longest, longest_keys,
            scale=scaling, window_size=window, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    return out.unsqueeze(0), None


def _padded(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, packed: Packed
) -> Tensor:
    """sdpa over padded rows, for this alone; (N, H, E) -> (1, N, H, E)."""
    heads, wide = q.shape[1:]
    q, k, v = (x.flatten(1) for x in (q, k, v))
    outs = []
    for part in packed.padded:
        rows, steps = part.queries.shape
        x, y, z = (
            F.embedding(places, t).unflatten(2, (-1, wide)).transpose(1, 2)
            for places, t in ((part.queries, q), (part.keys, k), (part.keys, v))
        )
        mask = None
        if part.before is not None or (window is not None and steps > window):
            mask = _visible(part, steps, window)
        out = F.scaled_dot_product_attention(
            x,
            y,
            z,
            mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=x.shape[1] != y.shape[1],
        )
        outs.append(out.transpose(1, 2).reshape(rows * steps, heads * wide))
    flat = outs[0] if len(outs) == 1 else torch.cat(outs)
    assert packed.back is not None
    return F.embedding(packed.back, flat).unflatten(1, (heads, wide)).unsqueeze(0)


def _visible(part: Padded, steps: int, window: int | None) -> Tensor:
    """(s or 1, 1, Lq, Lk) bool: a query sees the keys up to its own, as far as the window goes."""
    places = torch.arange(part.keys.shape[1], device=part.keys.device)
    own = torch.arange(steps, device=places.device)
    own = own.unsqueeze(0) if part.before is None else part.before.unsqueeze(1) + own
    behind = own.unsqueeze(2) - places
    seen = behind >= 0
    if window is not None:
        seen &= behind < window
    return seen.unsqueeze(1)

"""Hidden states in front of answer tokens: what every model here reads.

s sequences, L padded tokens, T padded answer tokens, D hidden, n answer tokens in all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from trainer.batch.sequences import Sequences, micro_batches
from trainer.models.packing import last_hidden


def before_answer(sequences: Sequences) -> Tensor:
    """(s, L - 1) bool: True at tokens whose next token belongs to the answer."""
    places = torch.arange(1, sequences.tokens.shape[1], device=sequences.tokens.device)
    after_prompt = places >= sequences.prompt_lengths.unsqueeze(1)
    return after_prompt & (places < sequences.lengths.unsqueeze(1))


def answer_states(body: PreTrainedModel, sequences: Sequences) -> Tensor:
    """(n, D): the hidden states in front of the answers' tokens, in row order."""
    if sequences.shared and _keeps_plain_keys(body):
        prompts, padding = sequences.prompts_on_the_right()
        unique, row_of = torch.unique(prompts, dim=0, return_inverse=True)
        if 2 * len(unique) <= len(prompts):
            return _states_with_shared_prompts(
                body, sequences, prompts.clamp(min=0), padding, row_of
            )
    # the last token predicts nothing
    states = last_hidden(body, sequences.tokens[:, :-1], sequences.lengths - 1)
    return states[before_answer(sequences)]


def _keeps_plain_keys(body: PreTrainedModel) -> bool:
    """Whether its cache can be split by rows: not with a sliding window or linear attention, and
    there is no cache at all where activations are computed twice."""
    if body.training and getattr(body, "gradient_checkpointing", False):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=body.config).layers)


def _states_with_shared_prompts(
    body: PreTrainedModel,
    sequences: Sequences,
    prompts: Tensor,  # (s, P), padded on the left
    padding: Tensor,  # (s, P) bool
    row_of: Tensor,  # (s) each row's place among the different prompts
) -> Tensor:
    """Each different prompt is computed once; its keys and values serve all of its answers.

    Gradients flow through the cache. Answers go in batches of like length, so next to nothing is
    padded: with 4 answers to a prompt and prompts as long as answers, 0.6 of the tokens.
    """
    first = torch.zeros(int(row_of.max()) + 1, dtype=torch.long, device=row_of.device)
    first[row_of] = torch.arange(len(row_of), device=row_of.device)  # one row for each prompt
    seen = ~padding
    cache = DynamicCache(config=body.config)
    out = body(
        input_ids=prompts[first],
        attention_mask=seen[first] if bool(padding.any()) else None,
        position_ids=(seen[first].cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    before_first = out.last_hidden_state[:, -1]
    mask = sequences.mask  # (s, T)
    states = before_first.new_zeros(*mask.shape, before_first.shape[1])
    states[:, 0] = before_first[row_of]
    follow = sequences.answer_lengths - 1  # tokens that predict another
    for rows in micro_batches(follow, len(follow) * mask.shape[1]):
        steps = torch.arange(int(follow[rows].max()), device=rows.device)
        if len(steps) == 0:
            continue
        places = sequences.prompt_lengths[rows].unsqueeze(1) + steps
        part = DynamicCache(config=body.config)
        for i, layer in enumerate(cache.layers):
            part.update(layer.keys[row_of[rows]], layer.values[row_of[rows]], i)
        inside = places.clamp(max=sequences.tokens.shape[1] - 1)  # padding; nobody looks at it
        out = body(
            input_ids=sequences.tokens[rows].gather(1, inside),
            attention_mask=torch.cat([seen[rows], torch.ones_like(places, dtype=torch.bool)], 1),
            position_ids=places,
            past_key_values=part,
            use_cache=True,
        )
        states[rows, 1 : len(steps) + 1] = out.last_hidden_state
    return states[mask]


def at(hidden: Tensor, place: Tensor) -> Tensor:  # (s, L, D), (s) -> (s, D)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """(n) in row order -> (s, T) with zeros where mask is False; gradients flow."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)

"""Sampling with a Hugging Face model and its key-value cache.

`generate()` of transformers is not used: it takes sampling settings from the model's folder without
a word (top-k 50, top-p, repetition penalties), which makes the log-probabilities those of another
policy, and its per-token bookkeeping costs more than a small model's forward. This is 60 lines.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from trainer import parallel
from trainer.config import Config
from trainer.models import loading
from trainer.models.backbone import ALONE
from trainer.models.policy import Policy
from trainer.rollout.engine import Draws, Rollout, Sync, drawn, end_tokens, gathered, next_sync


class HuggingFaceEngine:
    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer, self.pad = config, tokenizer, tokenizer.pad_token_id
        self.eos: set[int] = set()
        self.policy: Policy | None = None
        self.whole: Policy | None = None  # where the trainer's is sharded
        self.synced: Sync | None = None

    def sync(self, policy: Policy, step: int | None = None) -> None:
        """The weights are shared with the trainer, or gathered from its shards. Adapters stay where
        they are, on a base that is gathered for as long as answers are sampled."""
        if self.synced is not None and self.synced.brought(policy, step):
            return
        self.policy, moved = policy, 0
        if policy.through is ALONE and parallel.shards(self.config):
            dtype = parallel.compute_dtype(self.config)
            self.whole = loading.gather(policy, dtype, self.whole)
            self.policy = self.whole
            moved = sum(p.nbytes for p in self.whole.parameters())
        self.eos = end_tokens(self.tokenizer, policy)
        self.synced = next_sync(self.synced, policy, step, moved)

    def rest(self) -> None:
        """The cache lives for one batch only: there is nothing to give back."""

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], samples: int, draws: Draws) -> Rollout:
        """Row i * samples + k is sample k of prompts[i].

        All uniform numbers are drawn at once, on the CPU: how prompts are batched, and on which
        device, is no part of the result (but for rounding).
        """
        policy = self.policy
        assert policy is not None, "sync() a policy first"
        limit = self.config.rollout.max_new_tokens
        count = len(prompts) * samples
        # in (0, 1]: a token of probability 0 is never drawn
        uniform = drawn(draws, lambda n, own: torch.rand(n, limit, generator=own), count)
        uniform = (1 - uniform).to(parallel.device())
        # Prompts of nearly equal length together: padding on the left is little.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        ranks = parallel.world_size()
        batch = max(1, min(self.config.rollout.batch // samples, -(-len(prompts) // ranks)))
        tokens = torch.zeros(count, limit, dtype=torch.long, device=uniform.device)
        logprobs = uniform.new_zeros(count, limit)
        lengths, truncated = tokens.new_zeros(count), tokens.new_zeros(count)
        keys: list[Tensor] = []
        ids: list[Tensor] = []
        with policy.through.whole():
            for start in range(batch * parallel.rank(), len(order), batch * ranks):
                here = order[start : start + batch]
                rows = torch.tensor([i * samples + k for i in here for k in range(samples)])
                rows = rows.to(uniform.device)
                asked = [prompts[i] for i in here]
                sample = partial(self._sample, policy, asked, samples, uniform[rows])
                *out, kept = policy.through(sample)
                tokens[rows], logprobs[rows], lengths[rows], truncated[rows] = out
                keys += [(rows[row] * limit + step).cpu() for row, step, _ in kept]
                ids += [each.int().cpu() for _, _, each in kept]
        found = None
        if self.truncates:
            none = torch.zeros(0, dtype=torch.long)
            found = torch.cat([none, *keys]), torch.cat([none.int(), *ids])
        return gathered(prompts, samples, tokens, logprobs, lengths, truncated, found)

    def _sample(
        self, policy: Policy, prompts: list[list[int]], samples: int, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[Tensor, int, Tensor]]]:
        """Tokens and their log-probabilities (rows, limit), lengths and cut ones (rows); and of
        each step rows and ids that could be drawn there, where not every id could."""
        device = uniform.device
        longest = max(map(len, prompts))
        inputs = torch.tensor([[self.pad] * (longest - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        seen = torch.arange(longest, device=device) >= longest - lengths.unsqueeze(1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        padded = bool((~seen).any())
        cache = DynamicCache(config=policy.model.config)
        # One prefill a prompt, whatever the number of samples.
        hidden = last_state(policy, inputs, seen if padded else None, positions, cache)
        if samples > 1:
            cache.batch_repeat_interleave(samples)
            hidden, seen = (x.repeat_interleave(samples, 0) for x in (hidden, seen))
            lengths = lengths.repeat_interleave(samples)

        tokens = torch.full(uniform.shape, self.pad, device=device)
        logprobs = uniform.new_zeros(uniform.shape)
        stops = torch.tensor(sorted(self.eos), device=device)
        ends = lengths.new_full((len(uniform),), uniform.shape[1])  # all but the ended go on
        cut = torch.ones_like(ends)
        alive = torch.arange(len(uniform), device=device)  # rows that are still being computed
        open_ = torch.ones(len(alive), dtype=torch.bool, device=device)  # of those, not yet ended
        kept: list[tuple[Tensor, int, Tensor]] = []
        for step in range(uniform.shape[1]):
            z = policy.logits(hidden) / self.config.rollout.temperature
            if self.truncates:
                z = truncate(z, self.config.rollout.top_k, self.config.rollout.top_p)
                row, token = ((z > -torch.inf) & open_.unsqueeze(1)).nonzero(as_tuple=True)
                kept.append((alive[row], step, token))
            token, logprob = draw(z, uniform[alive, step])
            tokens[alive, step] = torch.where(open_, token, self.pad)
            logprobs[alive, step] = logprob.masked_fill(~open_, 0)
            ended = open_ & torch.isin(token, stops)
            if self.config.rollout.stop:
                ended |= open_ & self._spells_a_stop(tokens[alive, : step + 1])
            ends[alive[ended]], cut[alive[ended]] = step + 1, 0
            open_ = open_ & ~ended
            left = int(open_.sum())
            if left == 0 or step + 1 == uniform.shape[1]:
                break
            if left <= 0.75 * len(alive):  # copying the cache is worth it
                keep = open_.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, seen, lengths, token, open_ = (
                    x[keep] for x in (alive, seen, lengths, token, open_)
                )
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
            positions = (lengths + step).unsqueeze(1)
            visible = seen if padded else None
            hidden = last_state(policy, token.unsqueeze(1), visible, positions, cache)
        return tokens, logprobs, ends, cut, kept

    @property
    def truncates(self) -> bool:
        return self.config.rollout.truncates

    def _spells_a_stop(self, answers: Tensor) -> Tensor:  # (rows, steps) -> (rows) bool
        """Whether a stop text ends an answer so far. Its last tokens tell: one that adds a byte or
        more each, and a few whose text depends on what stands before them."""
        stops = self.config.rollout.stop
        last = max(len(stop.encode()) for stop in stops) + 4
        texts = self.tokenizer.batch_decode(answers[:, -last:], skip_special_tokens=True)
        found = [any(stop in text for stop in stops) for text in texts]
        return torch.tensor(found, device=answers.device)


def last_state(
    policy: Policy, inputs: Tensor, seen: Tensor | None, positions: Tensor, cache: DynamicCache
) -> Tensor:
    """Hidden state of the last token, (rows, D)."""
    out = policy.model.base_model(
        input_ids=inputs,
        attention_mask=seen,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1]


def truncate(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (rows, V), -inf but for the k largest, and of them for the fewest that have top_p
    together: the order in which vLLM does it."""
    if 0 < top_k < z.shape[1]:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        largest, order = z.sort(descending=True, stable=True)
        p = largest.softmax(-1)
        enough = p.cumsum(-1) - p >= top_p  # without this one
        z = z.masked_fill(torch.zeros_like(enough).scatter(1, order, enough), -torch.inf)
    return z


def draw(z: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row of logits (rows, V) by inversion of the distribution function.

    The first place where the sum reaches `uniform` times the whole is one where it rises, so a
    token without probability is never drawn. Summed in integers of 2^-46, exactly: float32 loses
    the tokens of probability 1e-8, and on a GPU the order of its sum is not always the same.
    """
    logprobs = z.log_softmax(-1)
    sums = (logprobs.exp() * 2.0**46).long().cumsum(-1)
    least = (uniform.double() * sums[:, -1]).ceil().long().clamp(min=1)
    token = torch.searchsorted(sums, least.unsqueeze(1)).squeeze(1)
    return token, logprobs.gather(1, token.unsqueeze(1)).squeeze(1)

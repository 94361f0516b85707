"""TRL (tested with 1.16): our head, group-invariant weights, adaptive KL, prompts drawn by group.

    trainer = GroupInvariantGRPOTrainer(  # not GRPOTrainer(
        ..., invariance=GroupInvariance(), draw=Drawing(rule="variance")
    )

or, to change only where the memory goes, the trainer that you have, built inside a block:

    with gikernels.integrations.trl.patched():
        trainer = GRPOTrainer(...)
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from torch import Tensor, nn
from trl import GRPOTrainer, RLOOTrainer

import gikernels
from gikernels.backends import checks
from gikernels.integrations.huggingface import ABOUT_LABELS, CONFIG, LmHeadPatch, labels_by_name
from gikernels.integrations.invariance import GroupInvariance, InferredGroups
from gikernels.integrations.replace import replaced
from gikernels.integrations.sampler import Drawing, GroupSampler, Repeated
from gikernels.reference import stat_dtype

# TRL's own, also where this module is imported inside a block.
trl_add_fused_lm_head = trl_utils.add_fused_lm_head

# --- TRL's functions, with their own signatures -------------------------------------------------


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...) or (..., K)
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # (...)
) -> Tensor:
    if index.dim() == logits.dim():  # K tokens a position: TRL uses it for top-K only
        checks.number("temperature", temperature, above=0)
        z = logits.to(stat_dtype(logits)) / temperature
        logp = z.log_softmax(-1).gather(-1, index)
        return logp if row_mask is None else logp.masked_fill(row_mask == 0, 0)
    return selective_log_softmax_and_entropy(logits, index, True, temperature, row_mask)[0]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both in fp32, whatever the logits are; TRL's are in the precision of the logits on a CPU."""
    targets = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
    stats = gikernels.logprobs(logits, targets, temperature)
    return stats.logprobs, stats.entropy if entropy_requires_grad else stats.entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return gikernels.logprobs(logits, logits.new_zeros(logits.shape[:-1], dtype=torch.long)).entropy


@dataclass
class Block:
    """What `patched` was told, and whether the last trainer built in the block keeps TRL's head."""

    logit_scale: float | str = CONFIG
    softcap: float | str | None = CONFIG
    keeps_trl: bool = False


current_block: ContextVar[Block] = ContextVar("current_block")


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """`model(..., labels=labels, fused_lm_head=True)` scores labels through `linear_logprobs`.

    DPO, KTO and SFT ask for the mean of the logits or whether a label is the likeliest token, which
    are no statistics of ours: their trainers keep TRL's own head. So do their reference models,
    which ask for log-probabilities alone, after the policy: two heads round differently, and the
    first ratio of policy to reference would not be 1.
    """
    block = current_block.get(None) or Block()
    if tuple(outputs) != ("log_probs",):
        block.keeps_trl = bool(set(outputs) - {"log_probs", "entropy"})
    if block.keeps_trl:
        trl_add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)
        return
    patch = LmHeadPatch(
        model,
        temperature=temperature,
        logit_scale=block.logit_scale,
        softcap=block.softcap,
        fp32=cast_lm_head_to_fp32,
    )
    model.forward = FusedForward(patch, model.forward)


class FusedForward:
    """Stands in for `model.forward`: TRL asks for log-probabilities by `fused_lm_head=True`."""

    def __init__(self, patch: LmHeadPatch, original: Any) -> None:
        self.patch, self.original = patch, original
        self.__signature__ = inspect.signature(original)

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return self.original(*args, **kwargs)
        args, kwargs = labels_by_name(self.__signature__, args, kwargs)
        labels, shift_labels, num_items = (kwargs.pop(name, None) for name in ABOUT_LABELS)
        kwargs["use_cache"] = False
        out: Any = self.patch.run(self.original, args, kwargs, labels, shift_labels, num_items)
        logprobs, entropy = out.logprobs, out.entropy
        if shift_labels is None:  # TRL has no entry for the token that nothing precedes
            shift_labels, logprobs, entropy = (x[:, 1:] for x in (labels, logprobs, entropy))
        return trl_utils.FusedCausalLMOutput(
            loss=out.loss,
            log_probs=logprobs,
            entropy=entropy,
            label_mask=shift_labels != -100,
            aux_loss=out.aux_loss,
        )


@contextmanager
def patched(
    *, logit_scale: float | str = CONFIG, softcap: float | str | None = CONFIG
) -> Iterator[None]:
    """In force inside the block, for trainers built there and for TRL's functions called there.

    A trainer keeps the head that it was built with. Everything else is undone on the way out,
    exceptions included; blocks nest, and what an inner one is not told it takes from the outer.
    `logit_scale` and `softcap` as in `patch_lm_head`, for a model whose config does not say what
    follows its head.
    """
    ours = (
        selective_log_softmax,
        selective_log_softmax_and_entropy,
        entropy_from_logits,
        add_fused_lm_head,
    )
    outer = current_block.get(None) or Block()
    block = Block(
        outer.logit_scale if logit_scale == CONFIG else logit_scale,
        outer.softcap if softcap == CONFIG else softcap,
    )
    token = current_block.set(block)
    try:
        with replaced("trl", [(getattr(trl_utils, f.__name__), f) for f in ours]):
            yield
    finally:
        current_block.reset(token)


# --- group-invariant trainers -------------------------------------------------------------------


class RowwiseBeta(float):
    """TRL multiplies a KL by `self.beta`, a float; this one scales row i by beta * scale[i].

    Both trainers, and every loss_type of GRPO, say `self.beta * kl` at the one place that matters,
    and compare it with 0 elsewhere. Overriding those methods would mean copying 300 lines.
    """

    scale: Tensor  # (S)

    def __new__(cls, beta: float, scale: Tensor) -> RowwiseBeta:
        self = super().__new__(cls, beta)
        self.scale = scale
        return self

    def __mul__(self, kl: Any) -> Any:  # (S) or (S, T)
        scale = self.scale.to(kl.dtype).view(-1, *[1] * (kl.dim() - 1))
        return float(self) * scale * kl


ROW = "draw_row"
"""Column of the data set with each prompt's place in it, where prompts are drawn."""
STATE = "draw.pt"
"""Of a checkpoint: what is known of the prompts."""

Trainer: Any = object  # to a type checker: whatever TRL's trainers have, the mixin has


class GroupInvariantMixin(Trainer):
    """For GRPOTrainer and RLOOTrainer: infers groups from each generation batch's rewards, and by
    what groups score draws the next prompts.

    `invariance=None` and `draw=None` leave TRL's algorithm as it is, and `fused_head=False` its
    head. `group_column` names a column with each prompt's group; without it groups are inferred.

    Rewards must be comparable across prompts. Those of verifiers are; those of a reward model
    carry an offset for each prompt, so give the data set a column with the mean reward of some
    reference answers to the prompt and name it in `baseline_column`.
    """

    beta: float  # TRL's KL coefficient
    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        invariance: GroupInvariance | None = None,
        baseline_column: str | None = None,
        draw: Drawing | None = None,
        group_column: str | None = None,
        fused_head: bool = True,
        **kwargs: Any,
    ) -> None:
        self.invariance = invariance
        self.draw, self.group_column = draw, group_column
        self.sampler: GroupSampler | None = None
        self.baseline_column = baseline_column
        self.inferred: InferredGroups | None = None  # of the current generation batch, all ranks
        with patched() if fused_head else nullcontext():
            super().__init__(*args, **kwargs)
        if draw is not None:
            self._prepare_draw()

    def _prepare_draw(self) -> None:
        data, args = self.train_dataset, self.args
        if not hasattr(data, "add_column"):
            raise ValueError(f"train_dataset: got {type(data).__name__}, want a datasets.Dataset")
        if args.dataloader_num_workers:
            raise ValueError(
                f"dataloader_num_workers: got {args.dataloader_num_workers}, want 0: workers fetch "
                f"prompts before the rewards are known by which they are drawn"
            )
        if args.remove_unused_columns:
            raise ValueError(f"remove_unused_columns: got True, want False, or {ROW} is lost")
        if self.group_column is not None and self.group_column not in data.column_names:
            raise ValueError(f"group_column: got {self.group_column!r}, not in {data.column_names}")
        self.sampler = GroupSampler(
            len(data),
            args.generation_batch_size // self.num_generations,
            groups=None if self.group_column is None else data[self.group_column],
            seed=args.seed,
            **vars(self.draw),
        )
        self.train_dataset = data.add_column(ROW, list(range(len(data))))

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        if self.sampler is None:
            return super()._get_train_sampler(dataset)
        times = self.num_iterations * self.args.steps_per_generation
        return Repeated(self.sampler, each=self.num_generations, times=times)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.sampler is not None and self.args.should_save:  # all ranks know the same
            torch.save(self.sampler.state_dict(), os.path.join(output_dir, STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.sampler is None or checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE)
        if not os.path.isfile(path):
            raise ValueError(f"resume_from_checkpoint: no {path}; it was saved without draw=")
        # Trainer starts the epoch again and skips the batches that it had.
        self.sampler.load_state_dict(torch.load(path, weights_only=True), rewind=True)

    def _calculate_rewards(self, inputs: list[dict], *args: Any, **kwargs: Any) -> Tensor:
        """TRL gathers the rewards over ranks here; its KL penalty comes after."""
        rewards_per_func = super()._calculate_rewards(inputs, *args, **kwargs)  # (S, functions)
        if (self.invariance is None and self.sampler is None) or not self.model.training:
            return rewards_per_func
        weights = self.reward_weights.to(rewards_per_func)
        rewards = (rewards_per_func * weights).nansum(1)
        rewards = rewards.masked_fill(rewards_per_func.isnan().all(1), torch.nan)
        if self.baseline_column is not None:
            local = torch.tensor([float(x[self.baseline_column]) for x in inputs])
            rewards = rewards - self.accelerator.gather(local.to(rewards))
        if self.sampler is not None:
            local = torch.tensor([x[ROW] for x in inputs], device=rewards.device)
            self.sampler.observe(self.accelerator.gather(local), rewards)
            for name, value in self.sampler.metrics().items():
                self._metrics["train"][name].append(value)
        if self.invariance is None:
            return rewards_per_func
        prompt_group = torch.arange(len(rewards), device=rewards.device) // self.num_generations
        self.inferred = self.invariance.infer(rewards, prompt_group)
        self.beta = RowwiseBeta(self.beta, self.inferred.kl_scale)  # RLOO penalises rewards
        for name, value in self.inferred.metrics.items():
            self._metrics["train"][name].append(value)
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        beta, self.inferred = self.beta, None
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.beta = beta
        if self.inferred is not None:
            start = self.accelerator.process_index * len(inputs)
            mine = slice(start, start + len(inputs))
            output["advantages"] = output["advantages"] * self.inferred.weights[mine]
            output["kl_scale"] = self.inferred.kl_scale[mine]  # TRL shuffles and splits it along
        return output

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        beta = self.beta
        if "kl_scale" in inputs:
            self.beta = RowwiseBeta(beta, inputs["kl_scale"])  # GRPO penalises the loss
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta


class GroupInvariantGRPOTrainer(GroupInvariantMixin, GRPOTrainer):
    """trl.GRPOTrainer with `invariance`, `draw` and the mixin's other settings."""


class GroupInvariantRLOOTrainer(GroupInvariantMixin, RLOOTrainer):
    """trl.RLOOTrainer with `invariance`, `draw` and the mixin's other settings."""

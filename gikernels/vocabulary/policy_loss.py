"""The PPO loss straight from hidden states, with its gradients formed on the way.

    stats = linear_logprobs(hidden, weight, targets)        2NHV forward, 6NHV backward
    loss  = ppo_loss(stats.logprobs, ...) + kl_coef * kl - entropy_coef * entropy

A per-token interface has to compute the logits again in the backward, because it cannot know the
upstream gradients before. Here the loss is inside, a scalar, so its upstream gradient is a factor:
a chunk of rows whose logits fit into the workspace gives its statistics, its loss, its dZ, and both
products, one after the other: 6NHV in all. The forward does this where a gradient is wanted (under
no_grad it does not), and the backward only multiplies.

Read downward: custom operation, public function. The loss of a chunk is in policy_loss_terms.py,
the two ways to its gradients in policy_loss_torch.py and policy_loss_triton.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gikernels import reference
from gikernels.backends import checks, dispatch
from gikernels.backends.symbols import as_tensors, changing, scalar, settled
from gikernels.reference import LossOut, Support, TokenStats, stat_dtype
from gikernels.vocabulary import formed, policy_loss_torch
from gikernels.vocabulary.formed import denominators, saved_dtype
from gikernels.vocabulary.head import (
    Head,
    Kept,
    check_values,
    choose_backend,
    full_precision,
    head_arguments,
    temperature_arguments,
    transform_arguments,
)
from gikernels.vocabulary.linear_logprobs_parts import parts
from gikernels.vocabulary.policy_loss_terms import (
    METRICS,
    Recipe,
    Tokens,
)
from gikernels.vocabulary.split import local_head
from gikernels.vocabulary.support import support_arguments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# --- custom operation ---------------------------------------------------------------------------


@torch.library.custom_op(
    "gikernels::linear_policy_loss", mutates_args=(), tags=dispatch.OUTSIDE_GRAPHS
)
@full_precision
def _op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N)
    old_logprobs: Tensor,  # (N)
    advantages: Tensor,  # (N)
    mask: Tensor,  # (N)
    denom: Tensor,  # ()
    weights: Tensor | None,  # (N): row i is divided by denom / weights[i]
    loss: str,  # "ppo" or "cispo"
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    cap_low: float,
    cap_high: float,
    ref_logprobs: Tensor | None,  # (N)
    kl_coef: float,
    kl_coefs: Tensor | None,  # (N), then `kl_coef` is 1
    kl_estimator: str,
    entropy_coef: float,
    temperature: float,
    temperatures: Tensor | None,  # (N), then `temperature` is 1
    bias: Tensor | None,  # (V)
    softcap: float | None,
    logit_scale: float,
    backend: str,
    wanted: list[bool],  # gradients of hidden, weight, bias
    carried: Tensor | None = None,  # the numbers, where torch.compile knows them as symbols
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), METRICS stacked, and the gradients of the loss, empty where not wanted."""
    numbers = (clip_low, clip_high, dual_clip, cap_low, cap_high, kl_coef, entropy_coef)
    *of_recipe, temperature, softcap, logit_scale = settled(
        carried, *numbers, temperature, softcap, logit_scale
    )
    dtype = stat_dtype(hidden, weight)
    kept = Kept(mask)
    pick = kept.pick
    if temperatures is None:
        temperature_n = hidden.new_full((), temperature, dtype=dtype).expand(len(kept))
    else:
        temperature_n = pick(temperatures, 1).to(dtype)
    tokens = Tokens(
        pick(targets).long(),
        temperature_n,
        pick(old_logprobs).to(dtype),
        pick(advantages).to(dtype),
        None if ref_logprobs is None else pick(ref_logprobs).to(dtype),
        None if kl_coefs is None else pick(kl_coefs).to(dtype),
        mask if kept.blank else None,
        None if weights is None else pick(weights).to(dtype),
    )
    if hidden.device.type == "cpu":
        check_values(tokens.targets, temperature_n, len(weight))
    recipe = Recipe(loss, kl_estimator, *of_recipe)
    scale = formed.scale_of(hidden, denom)
    x, head = pick(hidden), Head(weight, bias, softcap, logit_scale)
    if backend == "triton":
        from gikernels.vocabulary import policy_loss_triton

        run = policy_loss_triton.chunked
    else:
        run = policy_loss_torch.chunked
    logprobs, entropy, (dx, dw, db) = run(x, tokens, head, recipe, scale, wanted)
    if dx is not None and not kept.all:
        dx = torch.zeros(hidden.shape, dtype=dtype, device=dx.device).index_copy_(0, kept.rows, dx)
    saved = saved_dtype(weight)
    dx, dw, db = (
        hidden.new_empty(0, dtype=d) if x is None else x.to(d)
        for x, d in zip((dx, dw, db), (dtype, saved, saved))
    )
    return *recipe.total(logprobs, entropy, tokens, denom), dx, dw, db


@_op.register_fake
def _(
    hidden, weight, targets, old_logprobs, advantages, mask, denom, weights, loss, clip_low,
    clip_high, dual_clip, cap_low, cap_high, ref_logprobs, kl_coef, kl_coefs, kl_estimator,
    entropy_coef, temperature, temperatures, bias, softcap, logit_scale, backend, wanted,
    carried=None,
):  # fmt: skip
    dtype = stat_dtype(hidden, weight)
    count = len(METRICS) - (ref_logprobs is None)
    out, metrics = hidden.new_empty((), dtype=dtype), hidden.new_empty(count, dtype=dtype)
    return out, metrics, *formed.blanks(hidden, weight, dtype, wanted)


formed.register(_op, formed.Places(denom=6, bias=21, backend=24, wanted=25, gradients=2))


# --- public -------------------------------------------------------------------------------------


def linear_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), of the same dtype
    targets: Tensor,  # (N) integers
    old_logprobs: Tensor,  # (N), no gradient
    advantages: Tensor,  # (N), no gradient
    *,
    mask: Tensor,  # (N) bool
    denom: float | Tensor,  # the GLOBAL number of tokens, a number or (); or (N): each row's own
    loss: str = "ppo",  # or "cispo"
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    cap_low: float = 0.0,  # for "cispo"
    cap_high: float = 5.0,
    ref_logprobs: Tensor | None = None,  # (N), no gradient
    kl_coef: float | Tensor = 0.0,  # a number, or (N), no gradient
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,  # a number, or (N); no gradient
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support: Support | None = None,  # of the rows in order
    vocab_group: ProcessGroup | None = None,  # over which the rows of weight and bias are split
    backend: str = "auto",  # "triton" or "reference"
) -> LossOut:
    """The clipped policy loss with its KL and entropy terms, without the logits:

        stats = linear_logprobs(hidden, weight, targets, temperature, ...)
        loss, metrics = ppo_loss(stats.logprobs, old_logprobs, advantages, mask, denom=denom, ...)
        kl = kl_estimate(stats.logprobs - ref_logprobs, kl_estimator)
        loss += ((kl_coef * kl - entropy_coef * stats.entropy) * mask).sum() / denom

    or cispo_loss(..., cap_low=cap_low, cap_high=cap_high) in place of ppo_loss. gspo_loss cannot be
    formed here: the ratio of a sequence is known only after its last token.

    Gradients flow through all three terms to hidden, weight and bias. They are formed in the
    forward, where a gradient is wanted, and kept until the backward: forward + backward cost 6NHV.
    Metrics are detached sums over mask / denom: policy, ratio, clipfrac, approxkl, entropy, and kl
    where ref_logprobs are given. Scratch memory: gikernels.backends.settings, and a dW in fp32
    while more than one chunk of rows is added up.

    `support` and `vocab_group` as in `linear_logprobs`. With either of them the loss is composed of
    that operation and what is written above: rows of the whole vocabulary then cost 8NHV.
    """
    hidden, weight, bias, _, group = local_head(hidden, weight, bias, None, vocab_group)
    checks.dims("hidden", checks.floats("hidden", hidden), 2, "(N, D)")
    hidden, weight, bias = head_arguments(hidden, weight, targets, bias, part=bool(group))
    rows = {"old_logprobs": old_logprobs, "advantages": advantages}
    if ref_logprobs is not None:
        rows["ref_logprobs"] = ref_logprobs
    for name, x in rows.items():
        checks.shape(name, checks.floats(name, x), targets.shape, "one for each row")
    checks.shape("mask", checks.bools("mask", mask), targets.shape, "one for each row")
    checks.same_device(hidden=hidden, mask=mask, **rows)
    checks.one_of("loss", loss, ("ppo", "cispo"))
    checks.caps(cap_low, cap_high)
    checks.number("clip_low", clip_low, at_least=0)
    checks.number("clip_high", clip_high, at_least=0)
    if dual_clip is not None:
        checks.number("dual_clip", dual_clip, above=1)
    kl_coefs = None
    if isinstance(kl_coef, Tensor):
        kl_coefs = checks.floats("kl_coef", kl_coef)
        checks.shape("kl_coef", kl_coefs, targets.shape, "one for each row")
        checks.same_device(hidden=hidden, kl_coef=kl_coefs)
        kl_coefs, kl_coef = kl_coefs.detach(), 1.0
    kl_coef = checks.number("kl_coef", kl_coef)
    if ref_logprobs is None and kl_coef != 0:
        raise checks.wrong("ref_logprobs", None, "a tensor (N), as kl_coef is not 0")
    checks.number("entropy_coef", entropy_coef)
    checks.one_of("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    temperature, temperatures = temperature_arguments(temperature, targets)
    softcap, logit_scale = transform_arguments(softcap, logit_scale)
    dtype = stat_dtype(hidden, weight)
    checks.denominator(denom, mask)
    offsets, ids = support_arguments(support, targets)
    if offsets is not None or group:
        carried, head_numbers = changing(temperature, softcap, logit_scale)
        logprobs, entropy, *_ = parts(
            hidden, weight, targets.long().masked_fill(~mask, -100), head_numbers[0], temperatures,
            bias, *head_numbers[1:], None, None, -100, offsets, ids, group,
            choose_backend(backend, hidden), carried,
        )  # fmt: skip
        given = (clip_low, clip_high, dual_clip, cap_low, cap_high, kl_coef, entropy_coef)
        clip_low, clip_high, dual_clip, cap_low, cap_high, kl_coef, entropy_coef = as_tensors(
            hidden.device, dtype, *given
        )
        return reference.policy_loss_of(
            TokenStats(logprobs, entropy, None),
            old_logprobs,
            advantages,
            mask=mask,
            denom=denom.detach() if isinstance(denom, Tensor) else scalar(denom, hidden, dtype),
            loss=loss,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            cap_low=cap_low,
            cap_high=cap_high,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef if kl_coefs is None else kl_coefs,
            kl_estimator=kl_estimator,
            entropy_coef=entropy_coef,
        )
    denom, weights = denominators(denom, mask, dtype)
    grad = torch.is_grad_enabled()
    wanted = [x is not None and grad and x.requires_grad for x in (hidden, weight, bias)]
    numbers: Any = (clip_low, clip_high, dual_clip, cap_low, cap_high, kl_coef, entropy_coef)
    numbers = (
        *(None if x is None else float(x) for x in numbers),
        temperature,
        softcap,
        logit_scale,
    )
    carried, numbers = changing(*numbers)
    clip_low, clip_high, dual_clip, cap_low, cap_high, kl_coef, entropy_coef = numbers[:7]
    temperature, softcap, logit_scale = numbers[7:]
    total, metrics, *_ = _op(
        hidden,
        weight,
        targets,
        old_logprobs.detach(),
        advantages.detach(),
        mask,
        denom,
        weights,
        loss,
        clip_low,
        clip_high,
        dual_clip,
        cap_low,
        cap_high,
        None if ref_logprobs is None else ref_logprobs.detach(),
        kl_coef,
        kl_coefs,
        kl_estimator,
        entropy_coef,
        temperature,
        temperatures,
        bias,
        softcap,
        logit_scale,
        choose_backend(backend, hidden),
        wanted,
        carried,
    )
    return LossOut(total, dict(zip(METRICS, metrics.detach().unbind())))

"""The losses: formulas, masks, denominators, gradients, refusals."""

import math
from itertools import pairwise

import pytest
import torch

import gikernels as gk
from gikernels import reference

NAN, INF = math.nan, math.inf


def tokens(dtype=torch.float64):
    new, old, advantages = (torch.randn(4, 9, dtype=dtype) for _ in range(3))
    mask = torch.rand(4, 9) < 0.7
    mask[0] = False
    return [x.masked_fill(~mask, p) for x, p in zip((new, old, advantages), (INF, NAN, -INF))], mask


KNOBS = [{}, {"dual_clip": 1.5}, {"clip_low": 0.1, "clip_high": 0.4}]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_ppo_loss_by_the_token(knobs):
    (new, old, advantages), mask = tokens()
    new.requires_grad_()
    out = gk.ppo_loss(new, old, advantages, mask, denom=17, **knobs)
    want = clipped = 0.0
    low, high = 1 - knobs.get("clip_low", 0.2), 1 + knobs.get("clip_high", 0.2)
    for i, t in mask.nonzero().tolist():
        a, ratio = advantages[i, t].item(), math.exp(new[i, t].item() - old[i, t].item())
        loss = max(-ratio * a, -min(max(ratio, low), high) * a)
        if "dual_clip" in knobs and a < 0:
            loss = min(loss, -knobs["dual_clip"] * a)
        want += loss
        clipped += loss != -ratio * a
    assert math.isclose(out.loss.item(), want / 17, rel_tol=1e-12)
    assert math.isclose(out.metrics["clipfrac"].item(), clipped / 17)
    assert not any(x.requires_grad for x in out.metrics.values())
    out.loss.backward()
    assert torch.isfinite(new.grad).all() and (new.grad[~mask] == 0).all()
    assert (new.grad != 0).sum() == mask.sum() - round(clipped)


def test_cispo_loss_by_the_token():
    (new, old, advantages), mask = tokens()
    new.requires_grad_()
    out = gk.cispo_loss(new, old, advantages, mask, denom=17, cap_low=0.5, cap_high=1.5)
    want = capped = 0.0
    slope = torch.zeros_like(new)
    for i, t in mask.nonzero().tolist():
        a, ratio = advantages[i, t].item(), math.exp(new[i, t].item() - old[i, t].item())
        weight = min(max(ratio, 0.5), 1.5)
        want -= weight * a * new[i, t].item()
        slope[i, t] = -weight * a / 17
        capped += weight != ratio
    assert math.isclose(out.loss.item(), want / 17, rel_tol=1e-12)
    assert math.isclose(out.metrics["clipfrac"].item(), capped / 17)
    out.loss.backward()
    assert torch.allclose(new.grad, slope)  # every token has one, those beyond a cap too


@pytest.mark.parametrize("denom", [None, 7, "own"])
def test_gspo_loss_by_the_sequence(denom):
    (new, old, _), mask = tokens()
    advantages = torch.tensor([NAN, 1.0, -0.5, 2.0], dtype=torch.float64)  # of an empty one: NaN
    new.requires_grad_()
    own = torch.tensor([1.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    out = gk.gspo_loss(new, old, advantages, mask, clip_low=0.1, clip_high=0.2,
                       denom=own if denom == "own" else denom)  # fmt: skip
    want = clipped = 0.0
    for i in (1, 2, 3):
        a, n = advantages[i].item(), mask[i].sum()
        ratio = math.exp(((new[i] - old[i])[mask[i]].sum() / n).item())
        loss = max(-ratio * a, -min(max(ratio, 0.9), 1.2) * a)
        over = {None: 3, 7: 7, "own": own[i].item()}[denom]
        want, clipped = want + loss / over, clipped + (loss != -ratio * a) / over
    assert math.isclose(out.loss.item(), want, rel_tol=1e-12)
    assert math.isclose(out.metrics["clipfrac"].item(), clipped)
    out.loss.backward()
    assert torch.isfinite(new.grad).all() and (new.grad[~mask] == 0).all()
    assert (new.grad != 0).any()


def test_answers_alike_and_a_constant():
    """GRPO's mean of means, and Dr. GRPO's sum over a constant, are denominators."""
    (new, old, advantages), mask = tokens()
    mask[0, 3] = True
    rows = [x.masked_fill(~mask, 0).nan_to_num(posinf=0, neginf=0) for x in (new, old, advantages)]
    ratio = (rows[0] - rows[1]).exp()
    each = torch.maximum(-ratio * rows[2], -ratio.clamp(0.8, 1.2) * rows[2])
    lengths = mask.sum(1, keepdim=True)
    alike = gk.ppo_loss(*rows, mask, denom=(4.0 * lengths).expand(4, 9)).loss
    assert torch.allclose(alike, ((each * mask).sum(1) / lengths[:, 0]).mean())
    constant = gk.ppo_loss(*rows, mask, denom=4 * 9).loss
    assert torch.allclose(constant, (each * mask).sum() / 36)


@pytest.mark.parametrize("loss", [gk.ppo_loss, gk.cispo_loss, gk.value_loss])
def test_micro_batches_add_up(loss):
    """Loss, gradient and every metric, however the batch is cut."""
    (x, old, other), mask = tokens()
    denom = torch.tensor(float(mask.sum()))
    x.requires_grad_()
    whole = loss(x, old, other, mask, denom=denom)
    (want,) = torch.autograd.grad(whole.loss, x)
    for cut in ([0, 1, 4], [0, 2, 3, 4]):
        parts = [
            loss(x[a:b], old[a:b], other[a:b], mask[a:b], denom=denom) for a, b in pairwise(cut)
        ]
        total = sum(p.loss for p in parts)
        assert torch.allclose(total, whole.loss)
        assert torch.allclose(torch.autograd.grad(total, x)[0], want)
        for name, metric in whole.metrics.items():
            assert torch.allclose(sum(p.metrics[name] for p in parts), metric)


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_by_the_token(clip):
    (values, old, returns), mask = tokens()
    values.requires_grad_()
    out = gk.value_loss(values, old, returns, mask, denom=5, clip=clip)
    want = 0.0
    for i, t in mask.nonzero().tolist():
        v, o, r = (x[i, t].item() for x in (values, old, returns))
        near = v if clip is None else o + min(max(v - o, -clip), clip)
        want += 0.5 * max((v - r) ** 2, (near - r) ** 2)
    assert math.isclose(out.loss.item(), want / 5, rel_tol=1e-12)
    out.loss.backward()
    assert torch.isfinite(values.grad).all() and (values.grad[~mask] == 0).all()


def test_gradients():
    (new, old, advantages), mask = tokens()
    new = new.nan_to_num(posinf=0).requires_grad_()
    checked = [
        lambda x: gk.ppo_loss(x, old, advantages, mask, denom=3, dual_clip=2.0).loss,
        lambda x: gk.value_loss(x, old, advantages, mask, denom=3).loss,
        lambda x: gk.gspo_loss(x, old, advantages[:, 0].nan_to_num(neginf=1), mask).loss,
        lambda x: gk.preference_loss(x[0], x[1], margin=0.3, label_smoothing=0.1),
        gk.difference_objective,
    ]
    for f in checked:
        assert torch.autograd.gradcheck(f, new)


def test_nothing_unmasked_is_zero_with_zero_gradient():
    x = torch.full((2, 3), NAN, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    of_answers = lambda x, *_, denom: gk.gspo_loss(x, x, x[:, 0], mask, denom=denom)  # noqa: E731
    for loss in (gk.ppo_loss, gk.cispo_loss, gk.value_loss, of_answers):
        out = loss(x, x, x, mask, denom=1)
        out.loss.backward()
        assert out.loss == 0 and all(m == 0 for m in out.metrics.values())
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_bf16_inputs_give_fp32_sums():
    (new, old, advantages), mask = tokens(torch.bfloat16)
    out = gk.ppo_loss(new, old, advantages, mask, denom=1)
    truth = reference.ppo_loss(new.double(), old.double(), advantages.double(), mask, denom=1)
    assert out.loss.dtype == torch.float32
    assert torch.allclose(out.loss.double(), truth.loss, rtol=1e-5)


def test_compiles_whole():
    (new, old, advantages), mask = tokens(torch.float32)
    denom = torch.tensor(7.0)
    of_answers = lambda a, b, c, mask, denom: gk.gspo_loss(a, b, c[:, 1], mask, denom=denom)  # noqa: E731
    for loss in (gk.ppo_loss, gk.cispo_loss, gk.value_loss, of_answers):
        f = torch.compile(
            lambda *a, loss=loss: loss(*a, denom=denom), fullgraph=True, backend="eager"
        )
        a, b = f(new, old, advantages, mask), loss(new, old, advantages, mask, denom=denom)
        assert torch.equal(a.loss, b.loss) and a.metrics.keys() == b.metrics.keys()


def test_preference_loss():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64).unbind()
    margin = torch.rand(6, dtype=torch.float64)
    for m in (None, 0.5, margin):
        d = chosen - rejected - (0 if m is None else m)
        p = torch.sigmoid(d)
        want = (-0.9 * p.log() - 0.1 * (1 - p).log()).mean()
        got = gk.preference_loss(chosen, rejected, margin=m, label_smoothing=0.1)
        assert torch.allclose(got, want)
    far = gk.preference_loss(torch.tensor([1e6]), torch.tensor([1e6 + 200]))
    assert far == 200  # no overflow, and the offset cancels
    assert gk.preference_loss(chosen[:0], rejected[:0]) == 0


def test_difference_objective():
    r = torch.randn(3, 5, dtype=torch.float64)
    pairs = [torch.sigmoid((r[:, i] - r[:, j]).abs()) for i in range(5) for j in range(i + 1, 5)]
    assert torch.allclose(gk.difference_objective(r), 2 / 25 * sum(pairs).mean())
    assert gk.difference_objective(r[:0]) == 0
    assert gk.difference_objective(r[:, :1]) == 0


X, M, P = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(4)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("logprobs", lambda: gk.ppo_loss(X.long(), X, X, M, denom=1)),
        ("old_logprobs", lambda: gk.ppo_loss(X, X[:, :1], X, M, denom=1)),
        ("advantages", lambda: gk.ppo_loss(X, X, X[:1], M, denom=1)),
        ("mask", lambda: gk.ppo_loss(X, X, X, X, denom=1)),
        ("mask", lambda: gk.ppo_loss(X, X, X, M[:, :1], denom=1)),
        ("denom", lambda: gk.ppo_loss(X, X, X, M, denom=0)),
        ("denom", lambda: gk.ppo_loss(X, X, X, M, denom=torch.ones(1))),
        ("clip_low", lambda: gk.ppo_loss(X, X, X, M, denom=1, clip_low=-0.1)),
        ("clip_high", lambda: gk.ppo_loss(X, X, X, M, denom=1, clip_high=NAN)),
        ("dual_clip", lambda: gk.ppo_loss(X, X, X, M, denom=1, dual_clip=1.0)),
        ("denom", lambda: gk.ppo_loss(X, X, X, M, denom=torch.ones(2))),
        ("cap_low", lambda: gk.cispo_loss(X, X, X, M, denom=1, cap_low=-0.1)),
        ("cap_high", lambda: gk.cispo_loss(X, X, X, M, denom=1, cap_low=2, cap_high=1.5)),
        ("old_logprobs", lambda: gk.cispo_loss(X, X[:1], X, M, denom=1)),
        ("logprobs", lambda: gk.gspo_loss(P, P, P, P > 0)),
        ("advantages", lambda: gk.gspo_loss(X, X, X, M)),
        ("old_logprobs", lambda: gk.gspo_loss(X, X[:1], X[:, 0], M)),
        ("mask", lambda: gk.gspo_loss(X, X, X[:, 0], X)),
        ("clip_low", lambda: gk.gspo_loss(X, X, X[:, 0], M, clip_low=2)),
        ("clip_high", lambda: gk.gspo_loss(X, X, X[:, 0], M, clip_high=-1)),
        ("denom", lambda: gk.gspo_loss(X, X, X[:, 0], M, denom=0)),
        ("denom", lambda: gk.gspo_loss(X, X, X[:, 0], M, denom=X)),
        ("values", lambda: gk.value_loss(None, X, X, M, denom=1)),
        ("old_values", lambda: gk.value_loss(X, X[0], X, M, denom=1)),
        ("returns", lambda: gk.value_loss(X, X, X[0], M, denom=1)),
        ("clip", lambda: gk.value_loss(X, X, X, M, denom=1, clip=-1)),
        ("chosen", lambda: gk.preference_loss(X, X)),
        ("rejected", lambda: gk.preference_loss(P, P[:1])),
        ("margin", lambda: gk.preference_loss(P, P, margin=P[:1])),
        ("margin", lambda: gk.preference_loss(P, P, margin="wide")),
        ("label_smoothing", lambda: gk.preference_loss(P, P, label_smoothing=1.0)),
        ("rewards", lambda: gk.difference_objective(P)),
        ("rewards", lambda: gk.difference_objective(torch.zeros(3, 0))),
    ],
)
def test_refuses(name, call):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call()

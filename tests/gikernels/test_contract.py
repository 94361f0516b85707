"""What users of the API are promised, sentence by sentence, seen from outside.

The other test files know their operation; this one knows only the published table: names, shapes,
dtypes, meaning of masks, what raises. Values are compared with reference.py in float64.
"""

import inspect
import math
import subprocess
import sys

import pytest
import torch

import gikernels as gk
from gikernels import reference as ref

NAN, INF = math.nan, math.inf

SIGNATURES = {
    "linear_logprobs": "hidden weight targets temperature=1.0 * bias=None softcap=None "
    "logit_scale=1.0 ref=None ignore_index=-100 support=None vocab_group=None backend=auto",
    "logprobs": "logits targets temperature=1.0 * softcap=None logit_scale=1.0 ref_logits=None "
    "ignore_index=-100 support=None backend=auto",
    "linear_policy_loss": "hidden weight targets old_logprobs advantages * mask denom clip_low=0.2 "
    "clip_high=0.2 dual_clip=None ref_logprobs=None kl_coef=0.0 kl_estimator=k3 entropy_coef=0.0 "
    "temperature=1.0 bias=None softcap=None logit_scale=1.0 support=None vocab_group=None "
    "backend=auto",
    "linear_gather_logprobs": "hidden weight ids temperature=1.0 * bias=None softcap=None "
    "logit_scale=1.0 backend=auto",
    "linear_divergence": "hidden weight ref * kind=reverse mix=0.5 mask denom temperature=1.0 "
    "bias=None softcap=None logit_scale=1.0 backend=auto",
    "kl_penalty": "logprobs ref_logprobs coef group_ids=None * estimator=k1",
    "gae": "rewards values mask * gamma=1.0 lam=0.95 last_values=None backend=auto",
    "experience": "logprobs ref_logprobs values scores mask kl_coef * gamma=1.0 lam=0.95 "
    "estimator=k1 norm=none group_ids=None num_groups=None eps=1e-08 backend=auto",
    "linear_experience": "hidden weight targets cu_seqlens ref_logprobs values scores kl_coef * "
    "temperature=1.0 bias=None softcap=None logit_scale=1.0 ref=None ignore_index=-100 "
    "support=None vocab_group=None gamma=1.0 lam=0.95 estimator=k1 norm=none group_ids=None "
    "num_groups=None eps=1e-08 backend=auto",
    "group_stats": "values group_ids num_groups * weights=None backend=auto",
    "merge_stats": "a b",
    "group_advantages": "rewards group_ids num_groups * baseline=mean scale=std eps=1e-06",
    "partition": "values num_groups=2 * weights=None min_size=1 backend=auto",
    "soft_groups": "logits returns * form=mass reduce=None",
    "group_weights": "probs returns beta * form=mass clamp=(0.0, 5.0) reduce=None",
    "ppo_loss": "logprobs old_logprobs advantages mask * denom clip_low=0.2 clip_high=0.2 "
    "dual_clip=None",
    "value_loss": "values old_values returns mask * denom clip=0.2",
    "cispo_loss": "logprobs old_logprobs advantages mask * denom cap_low=0.0 cap_high=5.0",
    "gspo_loss": "logprobs old_logprobs advantages mask * clip_low=0.0003 clip_high=0.0004",
    "preference_loss": "chosen rejected * margin=None label_smoothing=0.0",
    "difference_objective": "rewards",
    "meta_ascent": "params lr * normalise=False",
    "backends": "",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_published_arguments_are_there_with_their_defaults(name):
    """More keywords may follow; none may be missing, renamed, reordered or default otherwise."""
    parameters = inspect.signature(getattr(gk, name)).parameters
    want, _, keywords = SIGNATURES[name].partition("*")
    positional = [
        p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)
    ]
    assert [p.name for p in positional] == [w.split("=")[0] for w in want.split()]
    for word in want.split() + keywords.replace("(0.0, 5.0)", "(0.0,5.0)").split():
        key, _, default = word.partition("=")
        got = parameters[key].default
        shown = "" if got is inspect.Parameter.empty else str(got).replace(", ", ",")
        assert shown == default, key


def close(got, want, tol=1e-5):
    for g, w in zip(got, want):
        if w is None:
            assert g is None
            continue
        if isinstance(w, dict):
            assert g.keys() == w.keys()
            close(g.values(), w.values(), tol)
            continue
        assert g.shape == w.shape
        torch.testing.assert_close(g.double(), w.double(), rtol=tol, atol=tol)


def head(n=7, d=12, v=61, dtype=torch.float32):
    x = torch.randn(n, d, dtype=dtype)
    return x, torch.randn(v, d, dtype=dtype) / d**0.5, torch.randint(v, (n,))


def f64(x):
    """Arguments in float64, nested as they come."""
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().double()
    if isinstance(x, (tuple, list)):
        return type(x)(map(f64, x))
    if isinstance(x, dict):
        return {k: f64(v) for k, v in x.items()}
    return x


HEAD_OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "all": {"softcap": 3.0, "logit_scale": 0.5, "bias": True, "ref": True, "temperature": "rows"},
}


@pytest.mark.parametrize("options", HEAD_OPTIONS)
@pytest.mark.parametrize("lead", [(7,), (2, 3), ()])
def test_linear_logprobs(options, lead):
    n, d, v = math.prod(lead), 12, 61
    x, w, y = head(n, d, v)
    x, y = x.reshape(*lead, d), y.reshape(lead)
    kw = dict(HEAD_OPTIONS[options])
    if kw.get("bias"):
        kw["bias"] = torch.randn(v)
    if kw.get("ref"):
        kw["ref"] = (torch.randn(*lead, 5), torch.randn(v, 5))
    if kw.get("temperature") == "rows":
        kw["temperature"] = torch.rand(lead) + 0.5
    if lead:
        y.view(-1)[1] = -100
        x.view(-1, d)[1] = NAN
    x.requires_grad_()
    w.requires_grad_()
    got = gk.linear_logprobs(x, w, y, **kw)
    assert type(got) is gk.TokenStats and all(t is None or t.shape == lead for t in got)
    assert all(t is None or t.dtype == torch.float32 for t in got)
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    want = ref.linear_logprobs(x64, w64, y, **f64(kw))
    close(got, want)
    weights = [torch.randn(lead) for _ in got]
    for out, inputs in ((got, (x, w)), (want, (x64, w64))):
        sum((a * b.to(a.dtype)).sum() for a, b in zip(out, weights) if a is not None).backward()
        assert all(torch.isfinite(i.grad).all() for i in inputs)
    close([x.grad, w.grad], [x64.grad, w64.grad])


def test_logprobs_from_logits():
    z = torch.randn(2, 3, 50)
    z[0, 0, 7] = -INF
    y = torch.randint(8, 50, (2, 3))
    y[1, 2], z[1, 2, 0] = -100, NAN
    r = torch.randn(2, 3, 50)
    z.requires_grad_()
    z64 = z.detach().double().requires_grad_()
    got = gk.logprobs(z, y, 0.9, softcap=None, logit_scale=1.5, ref_logits=r)
    want = ref.logprobs(z64, y, 0.9, logit_scale=1.5, ref_logits=r.double())
    close(got, want)
    for out in (got, want):
        (2 * out.logprobs + 3 * out.entropy - out.kl).sum().backward()
    close([z.grad], [z64.grad])


def test_linear_policy_loss():
    x, w, y = head()
    x, w = x.requires_grad_(), w.requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0]).bool()
    with torch.no_grad():
        old = ref.linear_logprobs(x, w, y).logprobs + 0.4 * torch.randn(7)
    adv, refs = torch.randn(7), old + 0.1 * torch.randn(7)
    for t in (old, adv, refs, x.data):
        t[2] = NAN
    kw = dict(mask=mask, denom=11.0, dual_clip=3.0, kl_coef=0.3, entropy_coef=0.1, clip_high=0.3)
    for estimator in ("k1", "k2", "k3"):
        x.grad = w.grad = None
        got = gk.linear_policy_loss(
            x, w, y, old, adv, **kw, ref_logprobs=refs, kl_estimator=estimator
        )
        x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
        want = ref.linear_policy_loss(
            x64, w64, y, *f64((old, adv)), **kw, ref_logprobs=f64(refs), kl_estimator=estimator
        )
        close(got, want)
        assert not any(m.requires_grad for m in got.metrics.values())
        got.loss.backward()
        want.loss.backward()
        close([x.grad, w.grad], [x64.grad, w64.grad])


def token_arguments(s=5, t=9):
    mask = torch.rand(s, t) < 0.7
    mask[3] = False
    logp, refs, values = (torch.randn(s, t).masked_fill(~mask, NAN) for _ in range(3))
    return logp, refs, values, torch.randn(s), mask


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("critic", [True, False])
def test_experience(norm, critic):
    logp, refs, values, scores, mask = token_arguments()
    ids = torch.tensor([2, 0, 2, 1, 0])
    kw = dict(gamma=0.97, lam=0.9, estimator="k3", norm=norm)
    if norm == "group":
        kw |= dict(group_ids=ids, num_groups=4)
    args = (logp, refs, values if critic else None, scores, mask, torch.rand(5))
    got, want = gk.experience(*args, **kw), ref.experience(*f64(args), **kw)
    assert type(got) is gk.Experience
    close(got, want)
    assert got.moments.shape == ({"group": 4}.get(norm, 1), 3)


def test_gae_and_kl_penalty():
    logp, _, values, _, mask = token_arguments()
    args = (logp, values, mask)
    kw = dict(gamma=0.9, lam=0.8, last_values=torch.randn(5))
    close(gk.gae(*args, **kw), ref.gae(*f64(args), **f64(kw)))
    ids, coef = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([0.1, 0.2, 0.3])
    a, b = torch.randn(5, 9), torch.randn(5, 9)
    got = gk.kl_penalty(a, b, coef, ids, estimator="k2")
    close([got], [coef[ids][:, None] * (a - b).square() / 2])
    close([gk.kl_penalty(a[:, 0], b[:, 0], coef, ids)], [coef[ids] * (a - b)[:, 0]])
    close([gk.kl_penalty(a, b, 0.5)], [0.5 * (a - b)])


def test_linear_experience():
    x, w, y = head(9)
    y[4] = -100
    cu = torch.tensor([0, 3, 3, 9])
    refs, values, scores = torch.randn(9), torch.randn(9), torch.randn(3)
    kw = dict(
        ref=(torch.randn(9, 4), torch.randn(61, 4)),
        estimator="exact",
        norm="group",
        group_ids=torch.tensor([1, 1, 0]),
        num_groups=2,
        temperature=0.8,
        softcap=5.0,
    )
    args = (x, w, y, cu, refs, values, scores, torch.rand(3))
    got, want = gk.linear_experience(*args, **kw), ref.linear_experience(*f64(args), **f64(kw))
    close(got[0], want[0])
    close(got[1], want[1])


def test_groups():
    x, ids = torch.randn(40) + 1e3, torch.randint(0, 3, (40,))
    weights = torch.rand(40)
    close(gk.group_stats(x, ids, 4), ref.group_stats(x.double(), ids, 4), 1e-4)
    parts = [gk.group_stats(x[i::2], ids[i::2], 4, weights=weights[i::2]) for i in (0, 1)]
    whole = ref.group_stats(x.double(), ids, 4, weights=weights.double())
    close(gk.merge_stats(*parts), whole, 1e-3)
    nothing = gk.group_stats(x[:0], ids[:0], 2)
    assert all((f == 0).all() for f in gk.merge_stats(nothing, nothing))
    for baseline in ("mean", "leave_one_out"):
        for scale in ("std", "none"):
            kw = dict(baseline=baseline, scale=scale)
            got = gk.group_advantages(x, ids, 3, **kw)
            close([got], [ref.group_advantages(x.double(), ids, 3, **kw)], 1e-3)


def test_partition_is_exact_and_labelled_from_the_lowest():
    x = torch.tensor([[3.0, 1, 9, 1, 8, 10], [0, 5, 5, 5, 9, 9]])
    got, want = gk.partition(x, 3), ref.partition(x, 3)
    assert got.group_ids.dtype == torch.int32
    assert torch.equal(got.group_ids, want.group_ids)
    close(got[1:], want[1:])
    big = 1e8 + torch.tensor([0.0, 0.1, 5.0, 5.2], dtype=torch.float64)
    assert gk.partition(big).group_ids.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("form", ["mass", "uniform", "one_sided"])
def test_two_ranks_agree_with_one(form):
    logits = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    returns = torch.randn(8)
    whole = gk.soft_groups(logits, returns, form=form)
    (gradient,) = torch.autograd.grad(whole.variance, logits)
    halves = []
    calls = [0, 0]
    for rank in (0, 1):
        mine = logits.detach()[rank::2].requires_grad_()
        theirs = logits.detach()[1 - rank :: 2]

        def reduce(local, rank=rank, theirs=theirs):
            calls[rank] += 1
            probe = []
            gk.soft_groups(
                theirs, returns[1 - rank :: 2], form=form, reduce=lambda t: probe.append(t) or t
            )
            return local + probe[calls[rank] - 1]

        out = gk.soft_groups(mine, returns[rank::2], form=form, reduce=reduce)
        close([out.mass, out.returns, out.variance], [whole.mass, whole.returns, whole.variance])
        (g,) = torch.autograd.grad(out.variance, mine)
        halves.append(g)
    close(halves, [gradient[0::2], gradient[1::2]])
    c = gk.group_weights(whole.probs.detach(), returns, 0.3, form=form)
    close([c], [ref.group_weights(whole.probs.detach(), returns, 0.3, form=form)])
    assert not c.requires_grad and c.shape == (8,)


def test_losses_never_see_masked_places():
    mask = torch.tensor([[True, False, True]])
    hole = torch.tensor([[1.0, NAN, 1.0]])
    logp = torch.tensor([[-1.0, NAN, -2.0]], requires_grad=True)
    out = gk.ppo_loss(logp, hole * -1.1, hole, mask, denom=torch.tensor(2.0))
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(logp.grad).all()
    values = torch.tensor([[0.5, INF, 2.0]], requires_grad=True)
    out = gk.value_loss(values, hole * 0.1, hole, mask, denom=2)
    out.loss.backward()
    assert torch.isfinite(out.loss) and values.grad[0, 1] == 0


def test_meta_ascent_restores_after_an_exception():
    p = torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
    before, storage = p.detach().clone(), p.data_ptr()
    p.grad = torch.ones_like(p)
    with pytest.raises(KeyError), gk.meta_ascent((q for q in [p]), 0.5):
        assert p.grad is None and not torch.equal(p, before)
        p.sum().backward()
        raise KeyError
    assert torch.equal(p, before) and p.data_ptr() == storage and p.grad is not None


def bad_calls():
    x, w, y = head()
    logp, refs, values, scores, mask = token_arguments()
    nums = torch.arange(6.0)
    ids = torch.zeros(5, dtype=torch.long)
    loss = dict(mask=torch.ones(7, dtype=torch.bool), denom=7.0)
    cu = torch.tensor([0, 3, 7])
    t7 = torch.zeros(7)

    def lp(*a, **k):
        return lambda: gk.linear_logprobs(*a, **k)

    def ex(**k):
        base = dict(scores=scores, mask=mask, kl_coef=0.1, values=values, ref_logprobs=refs)
        return lambda: gk.experience(logp, **(base | k))

    def le(**k):
        base = dict(cu_seqlens=cu, ref_logprobs=t7, values=None, scores=t7[:2], kl_coef=0.1)
        return lambda: gk.linear_experience(x, w, y, **(base | k))

    return {
        "hidden": lp(x[:, :5], w, y),
        "hidden ": lp(x.long(), w, y),
        "weight": lp(x, w[0], y),
        "weight ": lp(x, w[:0], y),
        "targets": lp(x, w, y[:3]),
        "targets ": lp(x, w, y.float()),
        "targets  ": lp(x, w, y + 100),
        "targets   ": lp(x, w, y * 0 - 1),
        "temperature": lp(x, w, y, 0.0),
        "temperature ": lp(x, w, y, torch.ones(3)),
        "temperature  ": lp(x, w, y, NAN),
        "bias": lp(x, w, y, bias=torch.zeros(3)),
        "softcap": lp(x, w, y, softcap=-1.0),
        "ref": lp(x, w, y, ref=x),
        "ref ": lp(x, w, y, ref=(x, w[:4])),
        "ref  ": lp(x, w, y, ref=(x[:2], w)),
        "backend": lp(x, w, y, backend="cublas"),
        "logits": lambda: gk.logprobs(x[0], y),
        "ref_logits": lambda: gk.logprobs(x, y % 12, ref_logits=x[:, :3]),
        "mask": lambda: gk.linear_policy_loss(x, w, y, t7, t7, mask=t7, denom=1),
        "denom": lambda: gk.linear_policy_loss(x, w, y, t7, t7, mask=t7 > 0, denom=torch.ones(2)),
        "advantages": lambda: gk.linear_policy_loss(x, w, y, t7, t7[:3], **loss),
        "old_logprobs": lambda: gk.linear_policy_loss(x, w, y, t7[:, None], t7, **loss),
        "ref_logprobs": lambda: gk.linear_policy_loss(x, w, y, t7, t7, ref_logprobs=t7[:1], **loss),
        "ref_logprobs  ": lambda: gk.linear_policy_loss(x, w, y, t7, t7, kl_coef=0.1, **loss),
        "kl_estimator": lambda: gk.linear_policy_loss(x, w, y, t7, t7, kl_estimator="k4", **loss),
        "clip_low": lambda: gk.linear_policy_loss(x, w, y, t7, t7, clip_low=-0.1, **loss),
        "values": ex(values=values[:, :1]),
        "scores": ex(scores=scores[:2]),
        "mask ": ex(mask=mask.float()),
        "ref_logprobs ": ex(ref_logprobs=refs[:, :1]),
        "kl_coef": ex(kl_coef=torch.ones(2)),
        "estimator": ex(estimator="k9"),
        "norm": ex(norm="layer"),
        "group_ids": ex(norm="group"),
        "num_groups": ex(norm="group", group_ids=ids),
        "group_ids ": ex(norm="group", group_ids=ids + 7, num_groups=2),
        "group_ids  ": ex(norm="group", group_ids=ids.float(), num_groups=2),
        "gamma": ex(gamma="1"),
        "cu_seqlens": le(cu_seqlens=torch.tensor([0, 5, 3])),
        "cu_seqlens ": le(cu_seqlens=torch.tensor([1, 3, 7])),
        "cu_seqlens  ": le(cu_seqlens=torch.tensor([0, 3, 6])),
        "ref   ": le(estimator="exact"),
        "rewards": lambda: gk.gae(logp.long(), values, mask),
        "last_values": lambda: gk.gae(logp, values, mask, last_values=scores[:1]),
        "coef": lambda: gk.kl_penalty(logp, refs, torch.ones(3)),
        "logprobs": lambda: gk.kl_penalty(logp.long(), refs, 0.1),
        "group_ids   ": lambda: gk.group_stats(nums, torch.full((6,), -1), 2),
        "weights": lambda: gk.group_stats(nums, nums.long() * 0, 2, weights=-nums),
        "num_groups ": lambda: gk.group_stats(nums, nums.long() * 0, 0),
        "baseline": lambda: gk.group_advantages(nums, nums.long() * 0, 1, baseline="median"),
        "scale": lambda: gk.group_advantages(nums, nums.long() * 0, 1, scale="mad"),
        "values ": lambda: gk.partition(torch.tensor([1.0, NAN, 2])),
        "values  ": lambda: gk.partition(torch.tensor([1.0, INF, 2])),
        "values   ": lambda: gk.partition(torch.ones(5)),
        "values    ": lambda: gk.partition(torch.ones(0)),
        "min_size": lambda: gk.partition(nums, 2, min_size=4),
        "num_groups  ": lambda: gk.partition(nums, 0),
        "weights ": lambda: gk.partition(nums, weights=nums * NAN),
        "weights  ": lambda: gk.partition(nums, weights=nums - 1),
        "form": lambda: gk.soft_groups(torch.zeros(3, 2), nums[:3], form="l2"),
        "returns": lambda: gk.soft_groups(torch.zeros(3, 2), nums),
        "clamp": lambda: gk.group_weights(torch.ones(3, 2) / 2, nums[:3], 0.1, clamp=(2.0, 1.0)),
        "old_values": lambda: gk.value_loss(values, values[:, :1], values, mask, denom=1),
        "denom ": lambda: gk.ppo_loss(logp, logp, logp, mask, denom=0.0),
        "label_smoothing": lambda: gk.preference_loss(nums, nums, label_smoothing=1.0),
        "rejected": lambda: gk.preference_loss(nums, nums[:2]),
        "rewards ": lambda: gk.difference_objective(nums),
        "lr": lambda: gk.meta_ascent([torch.nn.Parameter(nums)], "fast").__enter__(),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_names_the_argument(name):
    with pytest.raises(ValueError, match=rf"\b{name.strip()}\b") as raised:
        bad_calls()[name]()
    assert len(str(raised.value)) < 400


def test_backends_are_told_and_never_replaced():
    known = gk.backends()
    assert list(known) == ["reference", "triton", "cuda", "cpp"] and known["reference"]
    for name, status in known.items():
        assert status.reason
        if not status:
            with pytest.raises(gk.BackendUnavailable, match=name):
                if name in ("cuda", "cpp"):
                    gk.partition(torch.arange(4.0), backend=name)
                else:
                    gk.logprobs(torch.zeros(2, 3), torch.zeros(2).long(), backend=name)


def test_every_op_with_a_backend_has_a_custom_op():
    parts = {"linear_experience": ["linear_logprobs", "experience"]}
    for name, words in SIGNATURES.items():
        if "backend" in words:
            for op in parts.get(name, [name]):
                assert hasattr(torch.ops.gikernels, op), name


def test_nothing_in_gives_nothing_out():
    x, w, y = head(0)
    x.requires_grad_()
    w.requires_grad_()
    out = gk.linear_logprobs(x, w, y, ref=(x.detach(), w.detach()))
    assert all(t.shape == (0,) for t in out)
    sum(t.sum() for t in out).backward()
    assert (w.grad == 0).all()
    empty = torch.zeros(0, 4)
    out = gk.experience(empty, empty, empty, empty[:, 0], empty.bool(), 0.1, norm="batch")
    assert out.advantages.shape == (0, 4) and (out.moments == 0).all()
    x, w, y = head()
    out = gk.linear_logprobs(x, w, torch.full_like(y, -100))
    assert (out.logprobs == 0).all() and (out.entropy == 0).all()


def test_nan_is_never_hidden():
    x, w, y = head()
    x[3, 2] = NAN
    out = gk.linear_logprobs(x, w, y)
    assert out.logprobs.isnan().nonzero().flatten().tolist() == [3]
    assert out.entropy.isnan().nonzero().flatten().tolist() == [3]


def test_logprobs_are_never_positive():
    x = torch.full((4, 8), -3.0)
    w = torch.full((50, 8), 5.0)  # all logits are -120
    for y in (0, 49):
        out = gk.linear_logprobs(x, w, torch.full((4,), y))
        assert (out.logprobs <= 1e-6).all()
        assert torch.allclose(out.logprobs, torch.full((4,), -math.log(50)), atol=1e-5)
    w[7] = -5.0  # one certain token
    assert (gk.linear_logprobs(x, w, torch.full((4,), 7)).logprobs.abs() <= 1e-6).all()


def test_import_is_quiet_and_light():
    code = (
        "import sys, torch\n"
        "torch.cuda.is_available = torch.cuda._lazy_init = lambda *a: 1 / 0\n"
        "sys.modules['triton'] = None\n"
        "import gikernels\n"
        "bad = {'transformers', 'trl', 'matplotlib', 'trainer', 'pandas'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "x = torch.randn(3, 4)\n"
        "gikernels.linear_logprobs(x, x, torch.arange(3))\n"
        "gikernels.experience(x, x, x, x[:, 0], x > 0, 0.1)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr

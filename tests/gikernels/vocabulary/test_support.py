"""support=: exact statistics of the truncated distribution, values and gradients against float64.

Rows with a few kept ids, with nearly all, with all, with one, and with none, which stands for the
whole vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gikernels
from gikernels import Support, backends, reference
from gikernels.backends.settings import workspace
from gikernels.vocabulary import linear_logprobs_parts, logprobs_support
from gikernels.vocabulary import support as support_module

NAN, INF = float("nan"), float("inf")
needs_triton = pytest.mark.skipif(not backends()["triton"], reason=backends()["triton"].reason)


def kept_ids(lengths, v, g):
    """A Support of so many ids a row, in no order."""
    ids = [torch.randperm(v, generator=g)[:k] for k in lengths]
    return Support(torch.tensor([0, *lengths]).cumsum(0), torch.cat(ids))


def problem(device, dtype=torch.float32, n=23, d=24, v=400, seed=0):
    """Inputs by name. Ignored rows hold NaN; row 5's target was not kept."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    p = {
        "hidden": normal(n, d),
        "weight": normal(v, d) / 3,
        "bias": normal(v),
        "ref_hidden": normal(n, 12),
        "ref_weight": normal(v, 12) / 3,
        "temperature": torch.rand(n, generator=g, dtype=torch.float64) + 0.5,
        "logits": 3 * normal(n, v),
        "ref_logits": 3 * normal(n, v),
    }
    support = kept_ids([min(v, (3, 0, 60, 1, v - 5, 5, v)[i % 7]) for i in range(n)], v, g)
    targets = torch.randint(v, (n,), generator=g)
    starts = support.offsets[:-1]
    some = support.offsets.diff() > 0
    targets[some] = support.ids[starts[some]]
    if n > 5:
        row = support.ids[support.offsets[5] : support.offsets[6]].tolist()
        targets[5] = next(i for i in range(v) if i not in row)
    targets[2::6] = -100
    for name in ("hidden", "ref_hidden", "temperature", "logits", "ref_logits"):
        p[name][targets == -100] = NAN
    p = {k: x.to(device, dtype) for k, x in p.items()}
    return p | {
        "targets": targets.to(device),
        "support": Support(*(x.to(device) for x in support)),
        "old_logprobs": (normal(n) - 4).float().to(device),
        "ref_logprobs": (normal(n) - 4).float().to(device),
        "advantages": normal(n).float().to(device),
        "upstream": {k: normal(n).to(device) for k in ("logprobs", "entropy", "kl")},
    }


PLAIN = {}
MOST = {"bias": True, "ref": True, "softcap": 4.0, "logit_scale": 0.8, "temperature": True}
LEAVES = {"linear": ("hidden", "weight", "bias"), "logits": ("logits",)}


def call(op, f, p, options, **extra):
    """TokenStats of `linear_logprobs` or `logprobs`; True stands for the problem's tensor."""
    o = {k: p[k] if k in p and x is True else x for k, x in options.items()} | extra
    ref = o.pop("ref", None)
    if op == "linear":
        o["ref"] = (p["ref_hidden"], p["ref_weight"]) if ref else None
        return f(p["hidden"], p["weight"], p["targets"], support=p["support"], **o)
    o.pop("bias", None)
    o["ref_logits"] = p["ref_logits"] if ref else None
    return f(p["logits"], p["targets"], support=p["support"], **o)


OPS = {
    "linear": (gikernels.linear_logprobs, reference.linear_logprobs),
    "logits": (gikernels.logprobs, reference.logprobs),
}


def run(op, f, p, options, **extra):
    """Outputs and gradients by name, in float64."""
    leaves = [name for name in LEAVES[op] if name != "bias" or options.get("bias")]
    p = p | {name: p[name].detach().clone().requires_grad_() for name in leaves}
    stats = {k: x for k, x in call(op, f, p, options, **extra)._asdict().items() if x is not None}
    # The infinite log-probability of row 5 has a gradient from upstream, and gives none.
    loss = sum((x.where(x.isfinite(), 0) * p["upstream"][k]).sum() for k, x in stats.items())
    loss = loss + (stats["logprobs"] * 0.1)[5]
    grads = torch.autograd.grad(loss, [p[name] for name in leaves])
    return {k: x.detach().double() for k, x in (stats | dict(zip(leaves, grads))).items()}


def exact(p):
    return {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in p.items()
    }


def plain(hidden, weight, targets, *, bias=None, ref=None, **rest):
    """Logits in the dtype of the inputs, the rest in fp32."""
    blank = (targets == -100).unsqueeze(1)
    logits = F.linear(hidden.masked_fill(blank, 0), weight, bias)
    ref_logits = None if ref is None else F.linear(*ref)
    return reference.logprobs(logits, targets, ref_logits=ref_logits, **rest)


def error(a, b):
    assert a.shape == b.shape
    assert torch.equal(a.isfinite(), b.isfinite()) and torch.equal(a == -INF, b == -INF)
    some = b.isfinite()
    return ((a - b)[some].abs().max() / b[some].abs().max().clamp(min=1e-30)).item()


EPS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("options", [PLAIN, {"bias": True, "ref": True}, MOST], ids=str)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients(op, dtype, options, device, poisoned_empty):
    p = problem(device, dtype)
    with workspace(60_000):  # some chunks of rows
        got = run(op, OPS[op][0], p, options, backend="reference")
    assert_as_good_as_plain(op, p, options, dtype, got)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_triton(op, dtype, device, poisoned_empty, monkeypatch):
    """Rows without a support are the other kernels' own. D that no block divides, many chunks."""
    monkeypatch.setattr(
        support_module, "COLUMNS_OF_AN_ID", {"cpu": 6, "cuda": 6}
    )  # 60 of 400 is a few
    p = problem(device, dtype, n=9, d=40, v=400)
    with workspace(60_000):
        got = run(op, OPS[op][0], p, MOST, backend="triton")
    assert_as_good_as_plain(op, p, MOST, dtype, got)


def assert_as_good_as_plain(op, p, options, dtype, got):
    want = run(op, OPS[op][1], exact(p), options)
    same = run(op, plain if op == "linear" else reference.logprobs, p, options)
    for name in want:
        eps = EPS[dtype] if name in LEAVES[op] else EPS[torch.float32]
        assert error(got[name], want[name]) <= 2 * error(same[name], want[name]) + eps, name
    assert got["logprobs"][5] == -INF


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    p = problem("cpu", torch.float64, n=8, d=3, v=12)
    p["support"] = kept_ids([3, 0, 4, 1, 12, 5, 11, 2], 12, torch.Generator())
    p["targets"] = p["support"].ids[p["support"].offsets[:-1]]  # row 1 takes the next one's
    p = {k: x.nan_to_num(0.6) if isinstance(x, torch.Tensor) else x for k, x in p.items()}
    leaves = {k: p[k].requires_grad_() for k in LEAVES[op]}

    def f(*tensors):
        out = call(op, OPS[op][0], p | dict(zip(leaves, tensors)), MOST)
        return tuple(out)

    assert torch.autograd.gradcheck(f, tuple(leaves.values()))


LOSS = {
    "plain": {},
    "kl_and_entropy": {"ref_logprobs": True, "kl_coef": 0.1, "entropy_coef": 0.1},
    "most": {
        "ref_logprobs": True, "kl_coef": 0.1, "kl_estimator": "k1", "entropy_coef": 0.1,
        "dual_clip": 3.0, "bias": True, "softcap": 4.0, "temperature": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", LOSS.values(), ids=LOSS)
def test_policy_loss(options, device):
    """Loss, metrics and gradients are the specification's."""
    p = problem(device)
    mask = p["targets"] != -100
    mask[5] = False  # whose target nobody could have sampled
    out = {}
    for name, f, q in (
        ("ours", gikernels.linear_policy_loss, p),
        ("truth", reference.linear_policy_loss, exact(p)),
    ):
        leaves = [
            q[k].clone().requires_grad_()
            for k in ("hidden", "weight", "bias")[: 2 + ("bias" in options)]
        ]
        q = q | dict(zip(("hidden", "weight", "bias"), leaves))
        rest = {k: q[k] if x is True else x for k, x in options.items()}
        extra = {"backend": "reference"} if name == "ours" else {}
        loss, metrics = f(
            q["hidden"], q["weight"], q["targets"].clamp(min=0), q["old_logprobs"],
            q["advantages"], mask=mask, denom=20.0, support=q["support"], **rest, **extra,
        )  # fmt: skip
        grads = torch.autograd.grad(loss, leaves)
        out[name] = {"loss": loss, **metrics} | dict(zip("hwb", grads))
    assert list(out["ours"]) == list(out["truth"])
    for key, want in out["truth"].items():
        torch.testing.assert_close(out["ours"][key].double(), want, rtol=2e-5, atol=2e-6)


def test_as_if_there_were_none(device):
    """Empty rows alone are the whole vocabulary, and so are rows that list all of it."""
    p = problem(device)
    v = len(p["weight"])
    every = torch.arange(v, device=device).flip(0).repeat(len(p["targets"]))
    for op, (f, _) in OPS.items():
        whole = run(op, f, p | {"support": None}, MOST)
        for ids in (every[:0], every):
            offsets = torch.arange(len(p["targets"]) + 1, device=device) * (len(ids) // 23)
            got = run(op, f, p | {"support": Support(offsets, ids.int())}, MOST)
            for name in whole:
                torch.testing.assert_close(got[name], whole[name], rtol=1e-4, atol=1e-5)


def test_no_rows_and_leading_dimensions(device):
    p = problem(device, n=24)
    flat = call("linear", gikernels.linear_logprobs, p, {})
    p["hidden"], p["targets"] = p["hidden"].view(2, 3, 4, -1), p["targets"].view(2, 3, 4)
    got = call("linear", gikernels.linear_logprobs, p, {})
    assert all(torch.equal(a, b.view(2, 3, 4)) for a, b in zip(got[:2], flat[:2]))
    p = problem(device)
    none = Support(p["support"].offsets[:1], p["support"].ids[:0])
    weight = p["weight"].requires_grad_()
    out = gikernels.linear_logprobs(p["hidden"][:0], weight, p["targets"][:0], support=none)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert (weight.grad == 0).all() and out.logprobs.shape == (0,)


def test_two_runs_are_bit_equal_and_graphs_can_be_used_twice(device):
    p = problem(device, torch.bfloat16)
    a, b = (run("linear", gikernels.linear_logprobs, p, MOST) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    weight = p["weight"].requires_grad_()
    loss = call("linear", gikernels.linear_logprobs, p, {}).entropy.sum()
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


OURS = {
    "linear_logprobs_parts": linear_logprobs_parts.parts,
    "linear_logprobs_parts_backward": linear_logprobs_parts._backward_op,
    "logprobs_support": logprobs_support.kept_logprobs,
}


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, inside ours too; not of ids, which
    are as many as the caller's."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gikernels" and func.overloadpacket.__name__ in OURS:
            with self:
                return OURS[func.overloadpacket.__name__]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype != torch.int64:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("kept", [8, 1900])
def test_what_is_allocated(kept, device, monkeypatch):
    """Never rows x vocabulary: few ids cost what they are, many come in chunks of rows."""
    monkeypatch.setattr(support_module, "COLUMNS_OF_AN_ID", {"cpu": 64, "cuda": 64})
    n, d, v, size = 200, 4, 2000, 400_000
    g = torch.Generator().manual_seed(0)
    support = Support(*(x.to(device) for x in kept_ids([kept] * n, v, g)))
    hidden, weight = (torch.randn(k, d, device=device).requires_grad_() for k in (n, v))
    targets = support.ids[support.offsets[:-1]]
    with workspace(size):
        with Largest() as seen:
            gikernels.linear_logprobs(
                hidden, weight, targets, support=support
            ).logprobs.sum().backward()
        assert seen.elements <= (v * d if kept == 8 else n * v // 3)
        with Largest() as seen, torch.no_grad():
            gikernels.logprobs(torch.randn(n, v, device=device), targets, support=support)
        assert seen.elements <= n * v


@pytest.mark.parametrize("op", OPS)
def test_opcheck_and_compile(op, device):
    p = problem(device)
    if op == "linear":
        args = [
            p["hidden"].requires_grad_(), p["weight"].requires_grad_(), p["targets"], 1.0,
            p["temperature"], p["bias"].requires_grad_(), 4.0, 0.8, p["ref_hidden"],
            p["ref_weight"], -100, *p["support"], "", "reference",
        ]  # fmt: skip
        custom = linear_logprobs_parts.parts
    else:
        args = [
            p["logits"].requires_grad_(), p["targets"], p["ref_logits"], p["temperature"], 1.0,
            4.0, 0.8, -100, "reference", *p["support"],
        ]  # fmt: skip
        custom = logprobs_support.kept_logprobs
    torch.library.opcheck(custom, tuple(args))

    def f(q, support):
        out = call(op, OPS[op][0], q | {"support": Support(*support)}, MOST)
        return out.entropy.sum() + out.kl.sum()

    leaves = [p[k].requires_grad_() for k in LEAVES[op]]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(f(p, p["support"]), leaves, allow_unused=True)
    got = torch.autograd.grad(compiled(p, p["support"]), leaves, allow_unused=True)
    for a, b in zip(got, want):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-6)


def test_autocast(device):
    p = problem(device)
    p["targets"][5] = p["support"].ids[p["support"].offsets[5]]
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        got = call("linear", gikernels.linear_logprobs, p, {"bias": True})
    want = call("linear", reference.linear_logprobs, exact(p), {"bias": True})
    assert error(got.logprobs.double(), want.logprobs) < 0.02


def test_while_a_graph_is_captured_it_says_that_it_cannot(device, monkeypatch):
    from gikernels.backends import dispatch

    monkeypatch.setattr(dispatch, "capturing", lambda tensor: True)
    p = problem(device)
    for op, (f, _) in OPS.items():
        with pytest.raises(RuntimeError, match="support"):
            call(op, f, p, {})


BAD = {
    "not a pair": lambda o, i: o,
    "not integers": lambda o, i: Support(o, i.float()),
    "two dimensions": lambda o, i: Support(o, i[None]),
    "one offset too few": lambda o, i: Support(o[:-1], i),
    "does not start at 0": lambda o, i: Support(o + 1, i),
    "does not end at nnz": lambda o, i: Support(o, torch.cat([i, i[:1]])),
    "falls": lambda o, i: Support(o.index_fill(0, torch.tensor([2]), 70), i),
    "beyond the vocabulary": lambda o, i: Support(o, i.index_fill(0, torch.tensor([1]), 400)),
    "negative": lambda o, i: Support(o, i.index_fill(0, torch.tensor([1]), -1)),
    "twice in a row": lambda o, i: Support(o, torch.cat([i[:1], i[:1], i[2:]])),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("op", OPS)
def test_bad_input_raises_and_names_the_argument(op, name):
    p = problem("cpu")
    p["support"] = BAD[name](*p["support"])
    with pytest.raises(ValueError, match=r"^support"):
        call(op, OPS[op][0], p, {})


def test_an_id_may_be_in_two_rows():
    p = problem("cpu", n=2)
    p["support"] = Support(torch.tensor([0, 2, 4]), torch.tensor([7, 9, 9, 7]))
    p["targets"][:] = 9
    got = call("linear", gikernels.linear_logprobs, p | {"hidden": torch.ones(2, 24)}, {})
    assert torch.equal(got.logprobs[0], got.logprobs[1])


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [64, 20_000])
def test_real_sizes(kept):
    n, d, v = 256, 1024, 128256
    g = torch.Generator().manual_seed(0)
    support = Support(*(x.cuda() for x in kept_ids([kept] * n, v, g)))
    p = {
        "hidden": torch.randn(n, d).bfloat16().cuda(),
        "weight": (torch.randn(v, d) / d**0.5).bfloat16().cuda(),
        "targets": support.ids[support.offsets[:-1]],
        "support": support,
        "upstream": {k: torch.randn(n).cuda() for k in ("logprobs", "entropy")},
    }
    got = run("linear", gikernels.linear_logprobs, p, {})
    want = run("linear", reference.linear_logprobs, exact(p), {})
    for name in want:
        assert error(got[name], want[name]) <= (2e-5 if name in ("logprobs", "entropy") else 1e-2)

"""linear_policy_loss: loss, metrics and gradients against float64, on each backend."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gikernels import backends, linear_policy_loss, reference
from gikernels.backends import dispatch
from gikernels.backends.settings import workspace, workspace_for
from gikernels.vocabulary import policy_loss as MODULE
from gikernels.vocabulary import policy_loss_torch

NAN, INF = float("nan"), float("inf")
DENOM = 50.0

needs_triton = pytest.mark.skipif(not backends()["triton"], reason=backends()["triton"].reason)


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def backend(request):
    return request.param


def problem(device, dtype=torch.float32, n=41, d=24, v=300, seed=0):
    """Inputs by name; masked rows hold NaN, every sixth row has no advantage, some are clipped."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    p = {"hidden": normal(n, d), "weight": normal(v, d) / 3, "bias": normal(v)}
    p["bias"][-9:] = -INF
    p = {k: x.to(dtype) for k, x in p.items()}
    p["targets"] = torch.randint(0, v - 9, (n,), generator=g)
    now = reference.linear_logprobs(*(p[k].double() for k in ("hidden", "weight")), p["targets"])
    p["old_logprobs"] = (now.logprobs + 0.3 * normal(n)).float()
    p["ref_logprobs"] = (now.logprobs + 0.3 * normal(n)).float()
    p["advantages"] = normal(n).float()
    p["advantages"][::6] = 0
    p["kl_coef"] = torch.rand(n, generator=g)
    p["denom"] = 40 + 20 * torch.rand(n, generator=g)
    p["temperature"] = torch.rand(n, generator=g) + 0.5
    p["mask"] = torch.rand(n, generator=g) < 0.8
    p["targets"][~p["mask"]] = -100
    for name in (
        "hidden",
        "old_logprobs",
        "ref_logprobs",
        "advantages",
        "temperature",
        "kl_coef",
        "denom",
    ):
        p[name][~p["mask"]] = NAN
    return {k: x.to(device) for k, x in p.items()}


OPTIONS = {
    "plain": {},
    "bias": {"bias": True, "clip_low": 0.1, "clip_high": 0.3},
    "kl_and_entropy": {"ref_logprobs": True, "kl_coef": 0.1, "entropy_coef": 0.01},
    "kl_by_row": {"ref_logprobs": True, "kl_coef": True},
    "k1_softcap": {
        "ref_logprobs": True, "kl_coef": 0.1, "kl_estimator": "k1", "softcap": 4.0,
        "logit_scale": 1.5, "temperature": True,
    },
    "cispo": {"loss": "cispo", "cap_low": 0.8, "cap_high": 1.2, "bias": True},
    "answers_alike": {
        "denom": True, "ref_logprobs": True, "kl_coef": True, "entropy_coef": 0.1,
    },
    "everything": {
        "ref_logprobs": True, "kl_coef": 0.2, "kl_estimator": "k2", "entropy_coef": 0.1,
        "softcap": 4.0, "logit_scale": 0.8, "temperature": True, "dual_clip": 1.2, "bias": True,
    },
}  # fmt: skip

ROWS = ("targets", "old_logprobs", "advantages")


def keywords(p, options):
    """True stands for the problem's tensor."""
    named = {k: p[k] if x is True else x for k, x in options.items()}
    return {"mask": p["mask"], "denom": DENOM, **named}


def run(f, p, options, upstream=0.7, **extra):
    """Loss, metrics and gradients by name, in float64."""
    p = {k: x.detach() for k, x in p.items()}
    names = ["hidden", "weight"] + (["bias"] if options.get("bias") else [])
    for name in names:
        p[name] = p[name].clone().requires_grad_()
    args = [p[k] for k in ("hidden", "weight", *ROWS)]
    out = f(*args, **keywords(p, options), **extra)
    grads = torch.autograd.grad(out.loss * upstream, [p[name] for name in names])
    results = {"loss": out.loss, **out.metrics, **{"d" + k: g for k, g in zip(names, grads)}}
    return {k: x.detach().double() for k, x in results.items()}


def truth(p, options):
    return run(
        reference.linear_policy_loss,
        {k: x.double() if x.is_floating_point() else x for k, x in p.items()},
        options,
    )


def plain(hidden, weight, targets, old_logprobs, advantages, *, temperature=1.0, bias=None,
          softcap=None, logit_scale=1.0, mask, **rest):  # fmt: skip
    """Logits in the dtype of the inputs, everything after them in fp32, in two steps."""
    hidden = torch.where(mask[:, None], hidden, 0)
    logits = F.linear(hidden, weight, bias)

    class Logits:
        """reference.linear_policy_loss on logits that are there already."""

        @staticmethod
        def linear_logprobs(h, w, t, temperature, **kwargs):
            return reference.logprobs(
                logits, t, temperature, softcap=softcap, logit_scale=logit_scale
            )

    kept = reference.linear_logprobs
    reference.linear_logprobs = Logits.linear_logprobs
    try:
        return reference.linear_policy_loss(
            hidden, weight, targets, old_logprobs, advantages, mask=mask,
            temperature=temperature, **rest,
        )  # fmt: skip
    finally:
        reference.linear_logprobs = kept


def error(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() if a.numel() else 0.0


EPS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_good_as_plain(got, p, options, dtype):
    want, same = truth(p, options), run(plain, p, options)
    assert list(got) == list(want)  # the metrics' names and their order, too
    for name in want:
        eps = EPS[dtype] if name.startswith("d") else EPS[torch.float32]
        # A loss is a sum of terms of both signs: its error is that of its terms.
        scale = want["loss"] if name in ("loss", "policy") else want[name]
        slack = eps if name not in ("loss", "policy") else eps / scale.abs().clamp(min=0.1).item()
        assert error(got[name], want[name]) <= 2 * error(same[name], want[name]) + slack, name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_values_and_gradients(backend, device, dtype, options, poisoned_empty):
    p = problem(device, dtype)
    with workspace(30_000):  # some chunks of rows
        got = run(linear_policy_loss, p, options, backend=backend)
    assert_as_good_as_plain(got, p, options, dtype)


def test_one_chunk(backend, device, poisoned_empty):
    for dtype in EPS:
        p = problem(device, dtype)
        got = run(linear_policy_loss, p, OPTIONS["everything"], backend=backend)
        assert_as_good_as_plain(got, p, OPTIONS["everything"], dtype)


# Of CISPO the gradient is not that of the value: the weights are constants.
@pytest.mark.parametrize("options", [o for o in OPTIONS.values() if o.get("loss") != "cispo"])
def test_gradcheck(options):
    p = problem("cpu", torch.float64, n=6, d=3, v=14)
    p["bias"][-9:] = 0  # no finite differences at -inf
    p["mask"][:3] = True
    p["targets"] = p["targets"].clamp(min=0)
    p = {k: x.double().nan_to_num(nan=0.4) if x.is_floating_point() else x for k, x in p.items()}

    def f(hidden, weight, bias):
        rest = keywords(p | {"bias": bias}, options)
        return linear_policy_loss(hidden, weight, *(p[k] for k in ROWS), **rest).loss

    leaves = [p[k].requires_grad_() for k in ("hidden", "weight")]
    assert torch.autograd.gradcheck(f, (*leaves, p["bias"].requires_grad_("bias" in options)))


def test_confident_policy(backend, device):
    """1 - p of the target is 1e-5: its gradient must not come from a rounded exponential."""
    for dtype in (torch.float32, torch.bfloat16):
        p = problem(device, dtype, n=20, d=40)
        kept = p["mask"]
        p["weight"] *= 0.05
        p["weight"][p["targets"][kept]] += 0.6 * p["hidden"][kept]
        p["old_logprobs"][kept] = -0.05
        got = run(linear_policy_loss, p, {}, backend=backend)
        assert_as_good_as_plain(got, p, {}, dtype)


def test_empty_and_all_masked(backend, device, poisoned_empty):
    for n in (0, 5):
        p = problem(device, n=n)
        p["mask"][:] = False
        got = run(linear_policy_loss, p, OPTIONS["everything"], backend=backend)
        assert all((x == 0).all() for x in got.values())
        assert got["dweight"].shape == (300, 24)


def test_nan_is_never_hidden(backend, device):
    p = problem(device)
    row = p["mask"].nonzero()[1]
    p["hidden"][row, 0] = NAN
    got = run(linear_policy_loss, p, {}, backend=backend)
    assert got["loss"].isnan() and got["entropy"].isnan() and got["dweight"].isnan().any()


def test_two_runs_are_bit_equal(backend, device):
    p = problem(device, torch.float16)
    a, b = (run(linear_policy_loss, p, OPTIONS["everything"], backend=backend) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_micro_batches_add_up(backend, device):
    """denom is global: any split of the rows gives the same loss, metrics and gradients."""
    p, options = problem(device), OPTIONS["kl_and_entropy"]
    whole = run(linear_policy_loss, p, options, backend=backend)
    n = len(p["targets"])
    parts = []
    for rows in (slice(0, 13), slice(13, n)):
        part = {k: x[rows] if k not in ("weight", "bias") else x for k, x in p.items()}
        parts.append(run(linear_policy_loss, part, options, backend=backend))
    for name in whole:
        if name == "dhidden":
            total = torch.cat([x[name] for x in parts])
        else:
            total = sum(x[name] for x in parts)
        assert torch.allclose(total, whole[name], atol=1e-6), name


@pytest.mark.parametrize("name", OPTIONS)
def test_while_a_graph_is_captured_nobody_waits_for_a_number_of_rows(
    name, backend, device, monkeypatch
):
    """All rows stay, blank where they do not count, NaN or not: the same results."""
    p = problem(device)
    want = run(linear_policy_loss, p, OPTIONS[name], backend=backend)
    monkeypatch.setattr(dispatch, "capturing", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    got = run(linear_policy_loss, p, OPTIONS[name], backend=backend)
    for key, value in want.items():
        assert torch.allclose(got[key], value, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_graph_can_be_used_twice(backend, device, dtype):
    p = problem(device, dtype)
    leaves = [p["hidden"].requires_grad_(), p["weight"].requires_grad_()]
    rest = keywords(p, {})
    loss = linear_policy_loss(*leaves, *(p[k] for k in ROWS), **rest, backend=backend).loss
    first = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, second))
    assert all(torch.equal(a, b) for a, b in zip(kept, first))  # nobody wrote into them
    (2 * loss).backward(retain_graph=True)
    (2 * loss).backward()
    for leaf, g in zip(leaves, kept):
        assert torch.equal(leaf.grad, g + g)


class Allocations(TorchDispatchMode):
    """Shapes of all floats that any operation makes, those inside ours too; views are not made."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.gikernels.linear_policy_loss.default:
            with self:
                return MODULE._op._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        given = {storage(x) for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and storage(x) not in given:
                self.shapes[tuple(x.shape)] += 1
        return out


def storage(x):
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("trained", ["both", "hidden", "nothing"])
def test_what_is_allocated(backend, device, trained):
    """Never rows x vocabulary; no dW of a frozen weight, no gradient at all under no_grad."""
    n, d, v, size = 200, 8, 700, 100_000
    p = problem(device, n=n, d=d, v=v)
    leaves = [p["hidden"].requires_grad_(), p["weight"].requires_grad_(trained == "both")]
    with workspace(size), Allocations() as seen, torch.set_grad_enabled(trained != "nothing"):
        out = linear_policy_loss(*leaves, *(p[k] for k in ROWS), **keywords(p, {}), backend=backend)
        if trained != "nothing":
            out.loss.backward()
    assert max(torch.Size(s).numel() for s in seen.shapes) <= size // 4 < n * v / 4
    # One dW and no more: the backward's multiplication is in place.
    assert seen.shapes[v, d] == (trained == "both")
    assert out.loss.requires_grad == (trained != "nothing")
    assert not any(x.requires_grad for x in out.metrics.values())
    kept = int(p["mask"].sum())
    made = {(n, d), (kept, d)} & seen.shapes.keys()
    assert (n, d) in made if trained != "nothing" else made <= {(kept, d)}


class LargestFloat(TorchDispatchMode):
    """Elements of the largest fp32 tensor that any operation inside ours makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.gikernels.linear_policy_loss.default:
            with self:
                return MODULE._op._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("chunks", ["one", "many"])
def test_one_chunk_needs_no_dw_in_fp32(chunks, poisoned_empty):
    n, d, v = 10, 64, 4096
    p = problem("cpu", torch.bfloat16, n=n, d=d, v=v)
    with workspace(1 << 20 if chunks == "one" else 1 << 16), LargestFloat() as seen:
        got = run(linear_policy_loss, p, OPTIONS["plain"], backend="reference")
    assert (seen.elements >= v * d) == (chunks == "many")  # else an eighth of it, or a quarter
    assert_as_good_as_plain(got, p, OPTIONS["plain"], torch.bfloat16)


def test_no_row_with_a_gradient(backend, device, poisoned_empty):
    """No row has a gradient: zeros, in one chunk and in many."""
    for dtype in EPS:
        p = problem(device, dtype)
        p["advantages"] = torch.zeros_like(p["advantages"])
        for size in (30_000, 1 << 24):
            with workspace(size):
                got = run(linear_policy_loss, p, OPTIONS["plain"], backend=backend)
            assert (got["dweight"] == 0).all() and (got["dhidden"] == 0).all()


@needs_triton
def test_holes_are_filled_without_waiting():
    from gikernels.vocabulary.policy_loss_triton import _fill_holes

    n = 7
    for bits in range(1 << n):
        active = torch.tensor([i for i in range(n) if bits >> i & 1], dtype=torch.long)
        source = _fill_holes(active, n).tolist()
        assert sorted(source) == active.tolist()
        assert all(row == i or row >= len(active) for i, row in enumerate(source))
    # A meta tensor has no values that a size could depend on.
    assert _fill_holes(torch.empty(4, dtype=torch.long, device="meta"), n).shape == (4,)


def test_rows_without_a_gradient_are_left_out(backend, device, monkeypatch):
    """Clipped rows and those of zero advantage never enter a product of the backward."""
    p = problem(device)
    p["advantages"] = torch.where(p["mask"], torch.ones_like(p["advantages"]), NAN)
    kept = p["mask"].nonzero().flatten()
    p["old_logprobs"][kept[5:]] = -1e3  # a huge ratio: clipped
    p["advantages"][kept[3:5]] = 0
    sizes = []
    real = policy_loss_torch.active_rows

    def spy(slope, recipe):
        active = real(slope, recipe)
        sizes.append(len(active))
        return active

    monkeypatch.setattr(policy_loss_torch, "active_rows", spy)
    if backend == "triton":
        from gikernels.vocabulary import policy_loss_triton

        monkeypatch.setattr(policy_loss_triton, "active_rows", spy)
    got = run(linear_policy_loss, p, {}, backend=backend)
    assert sum(sizes) <= 3
    assert (got["dhidden"][kept[3:]] == 0).all()
    assert torch.isfinite(got["dweight"]).all() and (got["dweight"] != 0).any()


# --- PyTorch's own machinery --------------------------------------------------------------------


def test_opcheck(backend, device):
    p = problem(device, n=8, d=16, v=140)
    hidden, weight, bias = (p[k].requires_grad_() for k in ("hidden", "weight", "bias"))
    denom = torch.tensor(DENOM, device=device)
    rows = [p[k] for k in ("targets", "old_logprobs", "advantages", "mask")]
    ppo, cispo = ("ppo", 0.2, 0.3, 3.0, 0.0, 5.0), ("cispo", 0.2, 0.3, None, 0.5, 1.5)
    for wanted, weights, loss in (
        ([True, True, True], None, (*ppo, p["ref_logprobs"], 0.1, None, "k3", 0.01)),
        ([True, True, True], p["kl_coef"], (*cispo, p["ref_logprobs"], 1.0, p["kl_coef"], "k2", 0)),
        ([True, False, False], None, (*ppo, None, 0.0, None, "k1", 0.0)),
    ):
        leaves = [x.detach().requires_grad_(yes) for x, yes in zip((hidden, weight, bias), wanted)]
        head = (0.7, None, leaves[2], 4.0, 0.9)
        args = (*leaves[:2], *rows, denom, weights, *loss, *head, backend, wanted)
        torch.library.opcheck(torch.ops.gikernels.linear_policy_loss, args)


def test_compile_fullgraph(backend, device):
    p = problem(device, n=9)
    leaves = [p["hidden"].requires_grad_(), p["weight"].requires_grad_()]

    def f(hidden, weight):
        rest = keywords(p, OPTIONS["kl_and_entropy"])
        out = linear_policy_loss(hidden, weight, *(p[k] for k in ROWS), **rest, backend=backend)
        return 0.3 * out.loss, out.metrics["kl"]

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    (loss, kl), (loss_c, kl_c) = f(*leaves), compiled(*leaves)
    assert torch.equal(loss, loss_c) and torch.equal(kl, kl_c)
    want = torch.autograd.grad(loss, leaves)
    for _ in range(2):
        got = torch.autograd.grad(loss_c, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_autocast(backend, device):
    p, options = problem(device), {"bias": True}
    want = truth(p, options)
    with torch.autocast(device, torch.bfloat16):
        got = run(linear_policy_loss, p, options, backend=backend)
        same = run(plain, p, options)
    for name in want:
        assert error(got[name], want[name]) <= error(same[name], want[name]) + 2e-2, name


def test_strided_inputs(backend, device):
    p = problem(device, torch.float32)
    want = run(linear_policy_loss, p, OPTIONS["everything"], backend=backend)
    for name in ("hidden", "weight"):
        p[name] = p[name].t().contiguous().t()
    for name in ("old_logprobs", "advantages", "ref_logprobs", "temperature", "targets", "mask"):
        p[name] = torch.stack([p[name], p[name]], 1)[:, 0]
    got = run(linear_policy_loss, p, OPTIONS["everything"], backend=backend)
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-5), name


# --- bad input ----------------------------------------------------------------------------------


def bad(**changes):
    p = problem("cpu", n=4, d=8, v=20)
    call = {k: p[k] for k in ("hidden", "weight", *ROWS)} | {"mask": p["mask"] | True, "denom": 4}
    call["targets"] = call["targets"].clamp(min=0)
    return lambda: linear_policy_loss(**(call | {k: f(p) for k, f in changes.items()}))


BAD = {
    "hidden": [bad(hidden=lambda p: p["hidden"][0]), bad(hidden=lambda p: p["hidden"].long())],
    "weight": [bad(weight=lambda p: p["weight"][:, 1:]), bad(weight=lambda p: p["weight"].half())],
    "targets": [
        bad(targets=lambda p: p["targets"][:2]),
        bad(targets=lambda p: torch.tensor([0, 20, 1, 1])),
        bad(targets=lambda p: torch.tensor([0, -100, 1, 1])),
    ],
    "old_logprobs": [
        bad(old_logprobs=lambda p: p["old_logprobs"][:, None]),
        bad(old_logprobs=lambda p: None),
    ],
    "advantages": [
        bad(advantages=lambda p: p["advantages"][:1]),
        bad(advantages=lambda p: p["targets"]),
    ],
    "mask": [bad(mask=lambda p: p["mask"].long()), bad(mask=lambda p: p["mask"][:3])],
    "denom": [
        bad(denom=lambda p: 0),
        bad(denom=lambda p: torch.ones(2)),
        bad(denom=lambda p: torch.ones(4, 1)),
        bad(denom=lambda p: "many"),
    ],
    "loss": [bad(loss=lambda p: "gspo")],
    "cap_low": [bad(cap_low=lambda p: -1)],
    "cap_high": [bad(cap_low=lambda p: 2, cap_high=lambda p: 1.5)],
    "clip_low": [bad(clip_low=lambda p: -0.1)],
    "clip_high": [bad(clip_high=lambda p: NAN)],
    "dual_clip": [bad(dual_clip=lambda p: 0.9)],
    "ref_logprobs": [bad(ref_logprobs=lambda p: p["ref_logprobs"][:3])],
    "kl_coef": [bad(kl_coef=lambda p: INF), bad(kl_coef=lambda p: p["kl_coef"][:3])],
    "kl_estimator": [bad(kl_estimator=lambda p: "k4")],
    "entropy_coef": [bad(entropy_coef=lambda p: NAN)],
    "temperature": [bad(temperature=lambda p: 0), bad(temperature=lambda p: p["advantages"][:1])],
    "bias": [bad(bias=lambda p: p["bias"][:3])],
    "softcap": [bad(softcap=lambda p: 0)],
    "logit_scale": [bad(logit_scale=lambda p: INF)],
    "backend": [bad(backend=lambda p: "magic")],
}


@pytest.mark.parametrize("name, call", [(k, f) for k, fs in BAD.items() for f in fs])
def test_bad_input_raises_and_names_the_argument(name, call):
    with pytest.raises(ValueError, match=name):
        call()


# --- shapes and masks ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 60),
    d=st.integers(1, 12),
    v=st.integers(10, 1500),
    options=st.sampled_from(list(OPTIONS.values())),
    size=st.sampled_from([1 << 14, 1 << 16, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_any_shape_on_the_cpu(n, d, v, options, size, seed):
    p = problem("cpu", n=n, d=d, v=v, seed=seed)
    with workspace(size):
        got = run(linear_policy_loss, p, options, backend="reference")
    want = truth(p, options)
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-4, rtol=1e-4), name


@needs_triton
@settings(max_examples=5, deadline=None)
@given(n=st.integers(1, 70), d=st.integers(1, 50), v=st.integers(10, 400), seed=st.integers(0, 99))
def test_any_shape_in_triton(n, d, v, seed):
    p = problem("cuda" if torch.cuda.is_available() else "cpu", n=n, d=d, v=v, seed=seed)
    with workspace(50_000):
        got = run(linear_policy_loss, p, OPTIONS["everything"], backend="triton")
    want = truth(p, OPTIONS["everything"])
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-4, rtol=1e-4), name


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("n, d, v", [(8192, 1024, 128256), (2000, 896, 151937)])
def test_real_sizes(n, d, v):
    """Against linear_logprobs and ppo_loss by autograd, which have been held against float64."""
    from gikernels import linear_logprobs

    torch.manual_seed(0)
    dtype = torch.bfloat16
    hidden = torch.randn(n, d, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(v, d, device="cuda", dtype=dtype) / d**0.5).requires_grad_()
    targets = torch.randint(0, v, (n,), device="cuda")
    mask = torch.rand(n, device="cuda") < 0.8
    stats = linear_logprobs(hidden, weight, torch.where(mask, targets, -100))
    old = (stats.logprobs + 0.2 * torch.randn(n, device="cuda")).detach()
    advantages = torch.randn(n, device="cuda")
    want = reference.ppo_loss(stats.logprobs, old, advantages, mask, denom=float(n))
    loss = want.loss - 0.01 * (stats.entropy * mask).sum() / n
    want_grads = torch.autograd.grad(loss, [hidden, weight])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = linear_policy_loss(
        hidden, weight, targets, old, advantages, mask=mask, denom=n, entropy_coef=0.01,
        backend="triton",
    )  # fmt: skip
    got.loss.backward()
    extra = torch.cuda.max_memory_allocated() - before
    # The gradients, an fp32 dW while chunks are added up, an fp32 dX, the rows that count.
    own = 6 * v * d + (2 + 4 + 2 + 4) * n * d
    assert extra - own < 1.1 * workspace_for(hidden.device) + (44 << 20)
    assert (got.loss - loss).abs() < 1e-5
    for name, x in want.metrics.items():
        assert (got.metrics[name] - x).abs() < 1e-4, name
    for leaf, g in zip((hidden, weight), want_grads):
        assert error(leaf.grad.double(), g.double()) < 2e-2

"""experience, gae, linear_experience and normalize_advantages against the specification in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gikernels as gk
from gikernels import reference
from gikernels.sequence import experience_torch, experience_triton

BACKENDS = ["reference", "triton"]
WITH_CPP = [*BACKENDS, "cpp"]  # `experience` alone has it, and on the CPU alone


@pytest.fixture(autouse=True)
def _cpp_is_here(request, device):
    if getattr(request.node, "callspec", None) and "cpp" in request.node.callspec.params.values():
        if device != "cpu":
            pytest.skip("the tensors of this session are on a GPU")
        if not (status := gk.backends()["cpp"]):
            pytest.skip(status.reason)


NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter pays for every element of a scan, so it gets tiles of 64 instead of 1024."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(experience_triton, "TILE", 64)


def batch(s=6, t=40, dtype=torch.float32, device="cpu", kept=0.7):
    """Log-probs, reference log-probs, values, scores, mask; poison at masked places, one row
    without any step and one with a single one."""
    logprobs, ref_logprobs, values = (torch.randn(s, t, dtype=dtype) for _ in range(3))
    mask = torch.rand(s, t) < kept
    if s > 3:
        mask[1], mask[2] = False, False
        mask[2, t // 2] = True
        mask[3] = torch.arange(t) < t // 3  # ragged, without holes
    for x, poison in ((logprobs, NAN), (ref_logprobs, INF), (values, -INF)):
        x.masked_fill_(~mask, poison)
    scores = torch.randn(s, dtype=dtype)
    scores[~mask.any(1)] = NAN
    return [x.to(device) for x in (logprobs, ref_logprobs, values, scores, mask)]


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_no_worse(got, plain, truth, eps=2e-6):
    """Each field no further from the truth than twice the same formula in the same precision."""
    for name, a, b, c in zip(got._fields, got, plain, truth):
        assert a.dtype == b.dtype and a.shape == c.shape, name
        scale = 1 + c.abs().max() if c.numel() else 1
        error = ((a.double() - c).abs() / scale).flatten().sum() if a.numel() == 0 else None
        if error is None:
            error = (a.double() - c).abs().max() / scale
            allowed = 2 * (b.double() - c).abs().max() / scale + eps
            assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def check(args, backend, **keywords):
    got = gk.experience(*args, backend=backend, **keywords)
    truth = reference.experience(*map(double, args), **keywords)
    assert_no_worse(got, reference.experience(*args, **keywords), truth)
    return got


CASES = [
    {"norm": "none", "estimator": "k1"},
    {"norm": "batch", "estimator": "k2", "gamma": 0.9, "lam": 0.5},
    {"norm": "group", "estimator": "k3", "gamma": 0.99},
    {"norm": "batch", "gamma": 1.0, "lam": 1.0, "apply_norm": False},
    {"norm": "none", "gamma": 0.0},
    {"norm": "group", "lam": 0.0},
]


def grouped(keywords, s, device="cpu"):
    if keywords["norm"] != "group":
        return keywords
    ids = torch.arange(s, device=device) % 3
    return keywords | {"group_ids": ids, "num_groups": 5}


@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize("keywords", CASES, ids=str)
@pytest.mark.parametrize("backend", WITH_CPP)
def test_experience(backend, keywords, critic, device, poisoned_empty):
    args = batch(device=device)
    args[2] = args[2] if critic else None
    coef = 0.3 if critic else torch.rand(6, device=device)
    check([*args, coef], backend, **grouped(keywords, 6, device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", WITH_CPP)
def test_precision_follows_the_inputs(backend, dtype, device):
    args = [*batch(dtype=dtype, device=device), 0.1]
    got = gk.experience(*args, norm="batch", estimator="k3", gamma=0.97, backend=backend)
    truth = reference.experience(*map(double, args), norm="batch", estimator="k3", gamma=0.97)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = 1e-11 if dtype == torch.float64 else 1e-4
    for a, b in zip(got, truth):
        assert a.dtype == wide
        assert torch.allclose(a.double(), b, rtol=bound, atol=bound)


@pytest.mark.parametrize("t", [1, 63, 150])
def test_sequences_longer_than_a_block(t, device):
    args = batch(2, t, device=device, kept=0.9)
    args[4][0, t // 3 :] = False
    args[4][0, t - 1] = True
    for x in args[:3]:
        x[0, t - 1] = 0.5
    check([*args, 0.2], "triton", norm="batch")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_or_almost_nothing(backend, shape, device, poisoned_empty):
    args = batch(*shape, device=device, kept=2.0)
    for norm in ("none", "batch"):
        check([*args, 0.2], backend, norm=norm)
    g = gk.gae(args[0], args[2], args[4], backend=backend)
    assert_no_worse(g, *[reference.gae(args[0], args[2], args[4])] * 2)


@pytest.mark.parametrize("backend", WITH_CPP)
def test_all_masked(backend, device, poisoned_empty):
    args = batch(4, 9, device=device, kept=0.0)
    args[4].zero_()
    args[3].fill_(NAN)
    got = gk.experience(*args, 0.2, norm="batch", backend=backend)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in got)


@pytest.mark.parametrize("backend", WITH_CPP)
def test_strided_inputs_and_fresh_outputs(backend, device):
    dense = batch(device=device)
    strided = [torch.stack([x, x], -1)[..., 1] for x in dense]
    strided[0], strided[4] = dense[0].T.contiguous().T, dense[4].T.contiguous().T
    a, b = (gk.experience(*x, 0.3, norm="batch", backend=backend) for x in (dense, strided))
    # On a GPU other strides are another kernel, which may sum in another order.
    same = torch.allclose if device == "cuda" else torch.equal
    assert all(same(x, y) for x, y in zip(a, b))
    pointers = [x.data_ptr() for x in (*a, *dense)]
    assert len(set(pointers)) == len(pointers)
    assert all(x.is_contiguous() for x in a)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize(
    ("gamma", "lam"), [(1, 1), (0.99, 0.9), (0.9, 0.25), (1, 1e-4), (1, 0), (0, 0.5)]
)
@pytest.mark.slow
def test_gae_of_several_blocks_at_any_decay(gamma, lam, offset, device):
    """Where gamma * lam is small a kernel must not divide by it. Holes, rows of none and of one."""
    s, t = 6, 2100
    rewards, values = torch.randn(2, s, t, device=device)
    values += offset
    mask = torch.rand(s, t, device=device) < 0.7
    mask[1], mask[2, 5:], mask[3, :-1] = False, False, False
    for last in (None, values[:, 0] + 1):
        args = (rewards, values, mask, last)
        want = reference.gae(*map(double, args[:2]), mask, gamma=gamma, lam=lam,
                             last_values=None if last is None else last.double())  # fmt: skip
        size = want.advantages.abs().max()
        for backend in gae_backends():
            got = gk.gae(*args[:3], gamma=gamma, lam=lam, last_values=last, backend=backend)
            assert (got.advantages - want.advantages).abs().max() <= 4e-6 * size, backend


def gae_backends():
    return [name for name in ("triton", "reference") if gk.backends()[name]]


@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize("backend", WITH_CPP)
def test_offset_of_a_million(backend, critic, device):
    """Inputs that float32 holds exactly there: what is lost would be lost by the statistics."""
    s, t = 12, 30
    noise = torch.randint(-16, 16, (s, t)) / 8
    zeros = torch.zeros(s, t)
    values = noise + 1e6 if critic else None
    scores = torch.randint(-16, 16, (s,)) / 8 + 1e6
    mask = torch.rand(s, t) < 0.8
    mask[:, 0] = True
    args = [None if x is None else x.to(device) for x in (zeros, zeros, values, scores, mask)]
    for norm in ("batch", "group"):
        keywords = grouped({"norm": norm, "lam": 0.9}, s, device)
        got = gk.experience(*args, 0.0, backend=backend, **keywords)
        truth = reference.experience(*map(double, args), 0.0, **keywords)
        assert torch.allclose(got.advantages.double(), truth.advantages, atol=2e-5)
        assert torch.allclose(got.moments[:, 2].double(), truth.moments[:, 2], rtol=1e-4)


@pytest.mark.parametrize("backend", WITH_CPP)
def test_order_of_sequences_does_not_matter_and_runs_agree(backend, device):
    s = 300 if backend == "reference" else 9
    args = [*batch(s, 50 if backend == "reference" else 10, device=device), 0.1]
    for norm in ("batch", "group"):
        keywords = grouped({"norm": norm}, s, device)
        order = torch.randperm(s, device=device)
        moved = keywords | ({"group_ids": keywords["group_ids"][order]} if norm == "group" else {})
        shuffled = [x[order] if isinstance(x, torch.Tensor) else x for x in args]
        a, again = (gk.experience(*args, backend=backend, **keywords) for _ in range(2))
        b = gk.experience(*shuffled, backend=backend, **moved)
        assert all(torch.equal(x, y) for x, y in zip(a, again))
        for name in ("advantages", "returns", "rewards", "seq_kl"):
            assert torch.allclose(getattr(a, name)[order], getattr(b, name), atol=1e-6)
        assert torch.allclose(a.moments, b.moments, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("programs", "resident"), [(1, False), (3, False), (1, True)])
def test_who_merges_does_not_matter(programs, resident, norm, device, monkeypatch):
    """The last of three programs, or one that waits for itself: the only wait that an interpreter
    can run, as it runs programs one after another."""
    args = batch(device=device, t=12)
    keywords = grouped({"norm": norm}, 6, device)
    run = experience_triton.experience

    def chosen(*a):
        run(*a, programs=programs, resident=resident)

    monkeypatch.setattr(experience_triton, "experience", chosen)
    check([*args, 0.2], "triton", **keywords)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_merge_their_moments(backend, norm, device):
    args = batch(8, 20, device=device)
    keywords = grouped({"norm": norm}, 8, device)
    ids = keywords.get("group_ids")
    whole = gk.experience(*args, 0.1, backend=backend, **keywords)
    halves = []
    for rows in (slice(0, 5), slice(5, 8)):
        mine = keywords | ({"group_ids": ids[rows]} if norm == "group" else {})
        part = [x[rows] for x in args]
        halves.append(gk.experience(*part, 0.1, apply_norm=False, backend=backend, **mine))
    stats = [gk.GroupStats(*x.moments.unbind(-1)) for x in halves]
    moments = torch.stack(gk.merge_stats(*stats), -1)
    assert torch.allclose(moments, whole.moments, rtol=1e-5, atol=1e-6)
    raw = torch.cat([x.advantages for x in halves])
    got = gk.normalize_advantages(raw, args[4], moments, ids, backend=backend)
    assert torch.allclose(got, whole.advantages, atol=1e-5)
    truth = reference.normalize_advantages(raw.double(), args[4], moments.double(), ids, eps=1e-8)
    assert torch.allclose(got.double(), truth, atol=1e-5)
    rows = None if ids is None else ids.repeat_interleave(20)
    flat = gk.normalize_advantages(raw.flatten(), args[4].flatten(), moments, rows, backend=backend)
    assert torch.equal(flat, got.flatten())


@pytest.mark.parametrize("backend", WITH_CPP)
def test_a_group_of_one_token_is_zero(backend, device):
    x = torch.full((2, 1), 0.1, device=device)
    mask = torch.ones(2, 1, dtype=torch.bool, device=device)
    ids = torch.tensor([1, 0], device=device)
    got = gk.experience(
        x, x, x * 3, x[:, 0] * 7e6, mask, 0.1, norm="group", group_ids=ids, num_groups=2,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(got.advantages, torch.zeros_like(x))


@settings(deadline=None, max_examples=60)
@given(
    s=st.integers(1, 5),
    t=st.integers(1, 70),
    kept=st.floats(0, 1),
    gamma=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 1e-3, 0.3, 0.95, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_gae_over_any_mask(s, t, kept, gamma, lam, seed):
    torch.manual_seed(seed)
    rewards, values = torch.randn(2, s, t, dtype=torch.float64).unbind()
    mask = torch.rand(s, t) < kept
    rewards, values = (x.masked_fill(~mask, NAN) for x in (rewards, values))
    last = torch.randn(s, dtype=torch.float64)
    keywords = {"gamma": gamma, "lam": lam, "last_values": last}
    got = gk.gae(rewards, values, mask, **keywords)
    for a, b in zip(got, reference.gae(rewards, values, mask, **keywords)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma_lam", [(1.0, 0.95), (0.9, 0.0), (0.0, 0.5), (0.5, 0.01)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gae(backend, gamma_lam, device, poisoned_empty):
    rewards, _, values, last, mask = batch(t=33, device=device)
    last = last.nan_to_num(2.0)
    gamma, lam = gamma_lam
    for last_values in (None, last):
        keywords = {"gamma": gamma, "lam": lam, "last_values": last_values}
        truth = {k: double(v) for k, v in keywords.items()}
        assert_no_worse(
            gk.gae(rewards, values, mask, backend=backend, **keywords),
            reference.gae(rewards, values, mask, **keywords),
            reference.gae(rewards.double(), values.double(), mask, **truth),
        )


def test_values_far_from_zero_lose_no_digits_to_the_blocks():
    rewards, values = torch.zeros(2, 64), torch.randint(-8, 8, (2, 64)) / 8 + 1e6
    mask = torch.rand(2, 64) < 0.8
    keywords = {"gamma": 1.0, "lam": 0.9, "last_values": torch.full((2,), 1e6)}
    got = gk.gae(rewards, values, mask, **keywords)
    truth = reference.gae(
        rewards.double(), values.double(), mask, gamma=1.0, lam=0.9,
        last_values=keywords["last_values"].double(),
    )  # fmt: skip
    assert torch.allclose(got.advantages.double(), truth.advantages, atol=1e-5)


# --- registration -------------------------------------------------------------------------------


def op_arguments(device, flat=False):
    logprobs, ref_logprobs, values, scores, mask = batch(4, 6, device=device, kept=2.0)
    ids = torch.arange(4, device=device) % 2
    cu = None
    if flat:
        logprobs, ref_logprobs, values, mask = (
            x.flatten() for x in (logprobs, ref_logprobs, values, mask)
        )
        cu = torch.tensor([0, 5, 5, 20, 24], device=device)
    return (
        logprobs, ref_logprobs, values, scores.nan_to_num(), mask, None, 0.1, cu, ids, None, 2,
        1.0, 0.95, "k1", "group", 1e-8, True, 0,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, device):
    ops = torch.ops.gikernels
    for flat in (False, True):
        arguments = op_arguments(device, flat)
        arguments[0].requires_grad_()
        torch.library.opcheck(ops.experience.default, (*arguments, backend))
    rewards, _, values, last, mask = batch(3, 5, device=device, kept=2.0)
    torch.library.opcheck(
        ops.gae.default, (rewards.requires_grad_(), values, mask, last, 0.9, 0.95, backend)
    )
    moments = torch.rand(2, 3, device=device)
    ids = torch.tensor([0, 1, 1], device=device)
    torch.library.opcheck(
        ops.normalize_advantages.default, (rewards, mask, moments, ids, 1e-8, backend)
    )


@pytest.mark.parametrize("backend", WITH_CPP)
def test_constant_to_autograd_and_compiles(backend, device):
    logprobs, ref_logprobs, values, scores, mask = batch(3, 8, device=device, kept=2.0)

    def loss(logprobs, values):
        out = gk.experience(
            logprobs, ref_logprobs, values, scores, mask, 0.1, norm="batch", backend=backend
        )
        assert not any(x.requires_grad for x in out)
        return (logprobs * out.advantages).sum() + (values - out.returns).square().sum()

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        a, b = (x.clone().requires_grad_() for x in (logprobs, values))
        f(a, b).backward()
        grads.append((a.grad, b.grad))
    out = gk.experience(logprobs, ref_logprobs, values, scores, mask, 0.1, norm="batch")
    assert torch.allclose(grads[0][0], out.advantages, atol=1e-6)
    assert torch.allclose(grads[0][1], 2 * (values - out.returns), atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(*grads))


@pytest.mark.parametrize("backend", WITH_CPP)
def test_autocast_changes_nothing(backend, device):
    args = batch(device=device)
    plain = gk.experience(*args, 0.1, norm="batch", backend=backend)
    with torch.autocast(device, torch.bfloat16):
        cast = gk.experience(*args, 0.1, norm="batch", backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(plain, cast))


# --- kl_penalty ---------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty(estimator):
    logprobs, ref_logprobs = torch.randn(2, 4, 5, dtype=torch.float64).unbind()
    coef, ids = torch.rand(3, dtype=torch.float64), torch.tensor([2, 0, 2, 1])
    d = logprobs - ref_logprobs
    kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator]
    assert torch.allclose(gk.kl_penalty(logprobs, ref_logprobs, 0.3, estimator=estimator), 0.3 * kl)
    got = gk.kl_penalty(logprobs, ref_logprobs, coef, ids, estimator=estimator)
    assert torch.allclose(got, coef[ids][:, None] * kl)
    flat = gk.kl_penalty(
        logprobs.flatten(), ref_logprobs.flatten(), coef, ids.repeat_interleave(5),
        estimator=estimator,
    )  # fmt: skip
    assert torch.equal(flat, got.flatten())
    assert torch.autograd.gradcheck(
        lambda *x: gk.kl_penalty(x[0], x[1], x[2], ids, estimator=estimator),
        [x.requires_grad_() for x in (logprobs, ref_logprobs, coef)],
    )


def test_k3_of_nearly_equal_policies_keeps_its_digits(device):
    logprobs = torch.linspace(-1e-3, 1e-3, 64, device=device).view(4, 16)
    zero = torch.zeros_like(logprobs)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    truth = reference.kl_estimate(logprobs.double(), "k3")
    for backend in BACKENDS:
        got = gk.experience(
            logprobs, zero, None, zero[:, 0], mask, 0.1, estimator="k3", backend=backend
        )
        assert torch.allclose(got.kl.double(), truth, rtol=1e-4 if backend == "triton" else 1e-1)


# --- linear_experience --------------------------------------------------------------------------


def packed(n=40, d=8, v=24, device="cpu"):
    torch.manual_seed(1)
    hidden = torch.randn(n, d, device=device)
    weight = torch.randn(v, d, device=device) / 2
    targets = torch.randint(0, v, (n,), device=device)
    targets[::7] = -100
    cu_seqlens = torch.tensor([0, 11, 11, 30, n], device=device)
    ref_logprobs, values = -torch.rand(n, device=device) * 3, torch.randn(n, device=device)
    for x, poison in ((hidden, NAN), (ref_logprobs, INF), (values, NAN)):
        x[targets == -100] = poison
    return hidden, weight, targets, cu_seqlens, ref_logprobs, values, torch.randn(4, device=device)


@pytest.mark.parametrize(
    "keywords",
    [
        {"norm": "batch", "temperature": 0.7},
        {"norm": "group", "estimator": "exact", "softcap": 5.0},
        {"norm": "none", "estimator": "k3", "critic": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_linear_experience(backend, keywords, device):
    keywords = dict(keywords)
    hidden, weight, targets, cu, ref_logprobs, values, scores = packed(device=device)
    values = values if keywords.pop("critic", True) else None
    coef = torch.rand(4, device=device)
    keywords = grouped(keywords, 4, device)
    if keywords.get("estimator") == "exact":
        keywords["ref"] = (torch.randn_like(hidden).nan_to_num(), torch.randn_like(weight))
    args = (hidden, weight, targets, cu, ref_logprobs, values, scores, coef)
    truth_keywords = dict(keywords)
    if "ref" in keywords:
        truth_keywords["ref"] = tuple(map(double, keywords["ref"]))
    stats, got = gk.linear_experience(*args, backend=backend, **keywords)
    want_stats, want = reference.linear_experience(*map(double, args), **truth_keywords)
    for a, b in zip((*stats[:2], *got), (*want_stats[:2], *want)):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_keep_their_gradient_and_experience_has_none(backend, device):
    hidden, weight, *rest = packed(device=device)
    hidden, weight = hidden.nan_to_num().requires_grad_(), weight.requires_grad_()
    stats, out = gk.linear_experience(hidden, weight, *rest, 0.1, norm="batch", backend=backend)
    assert not any(x.requires_grad for x in out)
    (stats.logprobs * out.advantages).sum().backward()
    got = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    want, plain = reference.linear_experience(hidden, weight, *rest, 0.1, norm="batch")
    (want.logprobs * plain.advantages).sum().backward()
    assert torch.allclose(got[0], hidden.grad, atol=1e-4)
    assert torch.allclose(got[1], weight.grad, atol=1e-4)


def test_flat_rows_are_padded_in_bounded_runs(monkeypatch):
    """One long sequence among short ones: padding all to the longest would be the whole square."""
    monkeypatch.setattr(experience_torch, "CHUNK", 64)
    assert list(experience_torch._chunks([3, 2, 60, 1, 0, 70, 4])) == [
        (0, 2, 3), (2, 3, 60), (3, 5, 1), (5, 6, 70), (6, 7, 4),
    ]  # fmt: skip
    args = packed()
    got = gk.linear_experience(*args, 0.1, norm="batch", backend="reference")[1]
    want = reference.linear_experience(*args, 0.1, norm="batch")[1]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted by the profiler there")
def test_three_launches(monkeypatch):
    """The vocabulary's tiles, their merge, and all of the experience."""
    from triton.runtime import interpreter

    launched = []
    launch = interpreter.GridExecutor.__call__

    def counting(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counting)
    keywords = grouped({"norm": "group"}, 4)
    gk.linear_experience(*packed(), 0.1, backend="triton", **keywords)
    assert launched == ["forward_kernel", "merge_kernel", "experience_kernel"]
    launched.clear()
    gk.experience(*batch(), 0.1, backend="triton", **grouped({"norm": "group"}, 6))
    assert len(launched) == 1, launched


# --- what is refused ----------------------------------------------------------------------------

X, MASK, SCORES = torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool), torch.zeros(3)
IDS = torch.tensor([0, 1, 1])
GROUP = {"norm": "group", "group_ids": IDS, "num_groups": 2}


@pytest.mark.parametrize(
    ("name", "args", "keywords"),
    [
        ("logprobs", [X[0], X, X, SCORES, MASK, 0.1], {}),
        ("logprobs", [X.long(), X, X, SCORES, MASK, 0.1], {}),
        ("ref_logprobs", [X, X[:, :1], X, SCORES, MASK, 0.1], {}),
        ("values", [X, X, X[:1], SCORES, MASK, 0.1], {}),
        ("values", [X, X, 1.0, SCORES, MASK, 0.1], {}),
        ("scores", [X, X, X, SCORES[:, None], MASK, 0.1], {}),
        ("mask", [X, X, X, SCORES, MASK.float(), 0.1], {}),
        ("mask", [X, X, X, SCORES, MASK[:, :1], 0.1], {}),
        ("kl_coef", [X, X, X, SCORES, MASK, "much"], {}),
        ("kl_coef", [X, X, X, SCORES, MASK, NAN], {}),
        ("kl_coef", [X, X, X, SCORES, MASK, torch.zeros(3, 1)], {}),
        ("gamma", [X, X, X, SCORES, MASK, 0.1], {"gamma": 1.5}),
        ("lam", [X, X, X, SCORES, MASK, 0.1], {"lam": -0.1}),
        ("eps", [X, X, X, SCORES, MASK, 0.1], {"eps": -1.0}),
        ("estimator", [X, X, X, SCORES, MASK, 0.1], {"estimator": "k4"}),
        ("norm", [X, X, X, SCORES, MASK, 0.1], {"norm": "layer"}),
        ("group_ids", [X, X, X, SCORES, MASK, 0.1], {"norm": "group", "num_groups": 2}),
        ("num_groups", [X, X, X, SCORES, MASK, 0.1], {"norm": "group", "group_ids": IDS}),
        ("num_groups", [X, X, X, SCORES, MASK, 0.1], GROUP | {"num_groups": 0}),
        ("group_ids", [X, X, X, SCORES, MASK, 0.1], GROUP | {"num_groups": 1}),
        ("group_ids", [X, X, X, SCORES, MASK, 0.1], GROUP | {"group_ids": IDS - 1}),
        ("group_ids", [X, X, X, SCORES, MASK, 0.1], GROUP | {"group_ids": IDS.float()}),
        ("group_ids", [X, X, X, SCORES, MASK, 0.1], GROUP | {"group_ids": IDS[:2]}),
        ("exact_kl", [X, X, X, SCORES, MASK, 0.1], {"exact_kl": X[:2]}),
        ("backend", [X, X, X, SCORES, MASK, 0.1], {"backend": "fast"}),
    ],
)
def test_experience_refuses(name, args, keywords):
    with pytest.raises(ValueError, match=f"^{name}: "):
        gk.experience(*args, **keywords)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("rewards", lambda: gk.gae(X[0], X, MASK)),
        ("values", lambda: gk.gae(X, X[:, :1], MASK)),
        ("mask", lambda: gk.gae(X, X, X)),
        ("last_values", lambda: gk.gae(X, X, MASK, last_values=SCORES[:1])),
        ("gamma", lambda: gk.gae(X, X, MASK, gamma=2)),
        ("ref_logprobs", lambda: gk.kl_penalty(X, X[:, :1], 0.1)),
        ("group_ids", lambda: gk.kl_penalty(X, X, SCORES)),
        ("group_ids", lambda: gk.kl_penalty(X, X, SCORES, IDS[:2])),
        ("group_ids", lambda: gk.kl_penalty(X, X, SCORES, IDS + 2)),
        ("group_ids", lambda: gk.kl_penalty(X, X, SCORES, IDS.float())),
        ("coef", lambda: gk.kl_penalty(X, X, 0.1, IDS)),
        ("coef", lambda: gk.kl_penalty(X, X, INF)),
        ("estimator", lambda: gk.kl_penalty(X, X, 0.1, estimator="exact")),
        ("moments", lambda: gk.normalize_advantages(X, MASK, torch.zeros(2, 3))),
        ("moments", lambda: gk.normalize_advantages(X, MASK, torch.zeros(3))),
        ("mask", lambda: gk.normalize_advantages(X, MASK[0], torch.zeros(1, 3))),
        ("group_ids", lambda: gk.normalize_advantages(X, MASK, torch.zeros(1, 3), IDS)),
    ],
)
def test_others_refuse(name, call):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call()


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("hidden", 0, torch.zeros(2, 20, 8)),
        ("targets", 2, torch.zeros(40)),
        ("targets", 2, torch.zeros(39, dtype=torch.long)),
        ("cu_seqlens", 3, torch.tensor([0, 11, 9, 30, 40])),
        ("cu_seqlens", 3, torch.tensor([1, 11, 11, 30, 40])),
        ("cu_seqlens", 3, torch.tensor([0, 11, 11, 30, 39])),
        ("cu_seqlens", 3, torch.tensor([0.0, 40.0])),
        ("cu_seqlens", 3, torch.zeros(0, dtype=torch.long)),
        ("ref_logprobs", 4, torch.zeros(40, 1)),
        ("scores", 6, torch.zeros(3)),
    ],
)
def test_linear_experience_refuses(name, place, value):
    args = [*packed(), 0.1]
    args[place] = value
    with pytest.raises(ValueError, match=f"^{name}: "):
        gk.linear_experience(*args)


def test_exact_wants_a_reference():
    with pytest.raises(ValueError, match=r"^ref: "):
        gk.linear_experience(*packed(), 0.1, estimator="exact")
    with pytest.raises(ValueError, match=r"^ref: "):
        gk.linear_experience(*packed(), 0.1, ref=torch.zeros(3))


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("shape", [(4096, 1024), (512, 60), (3, 20_000), (1, 1)])
def test_gpu(shape, norm, critic):
    """The wait of all programs for each other, at sizes that fill the machine."""
    s, t = shape
    args = batch(s, t, device="cuda")
    args[2] = args[2] if critic else None
    ids = torch.arange(s, device="cuda") // 8
    keywords = {"norm": norm, "lam": 0.95}
    if norm == "group":
        keywords |= {"group_ids": ids, "num_groups": s // 8 + 2}
    got = check([*args, torch.rand(s, device="cuda")], "triton", **keywords)
    assert gk.experience(*args, 0.1).kl.equal(got.kl)


@pytest.mark.gpu
def test_gpu_streams_graphs_and_ids_out_of_range():
    args = batch(2048, 256, device="cuda")
    want = gk.experience(*args, 0.1, norm="batch")
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(gk.experience(*args, 0.1, norm="batch"))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, want))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gk.experience(*args, 0.1, norm="batch")
    for _ in range(3):
        captured.advantages.zero_()
        graph.replay()
        assert torch.equal(captured.advantages, want.advantages)

    ids = torch.zeros(2048, dtype=torch.long, device="cuda")
    ids[5] = 9
    out = gk.experience(*args, 0.1, norm="group", group_ids=ids, num_groups=2)
    bad = out.advantages.isnan().any(1).nonzero().flatten().tolist()
    assert bad == [5]


@pytest.mark.gpu
def test_gpu_three_launches():
    n, d, v = 4096, 512, 32768
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16) / d**0.5
    targets = torch.randint(0, v, (n,), device="cuda")
    cu = torch.arange(0, n + 1, 64, device="cuda")
    s = len(cu) - 1
    args = (hidden, weight, targets, cu, -torch.rand(n, device="cuda"))
    args += (torch.randn(n, device="cuda"), torch.randn(s, device="cuda"), 0.1)
    keywords = {"norm": "group", "num_groups": 8, "group_ids": torch.arange(s, device="cuda") // 8}
    gk.linear_experience(*args, **keywords)  # compiles, and clears the counter of this stream
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gk.linear_experience(*args, **keywords)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [x for x in names if not any(y in x for y in ("gemm", "cublas", "nvjet", "cutlass"))]
    kernels = [x for x in ours if "kernel" in x and "at::" not in x]
    assert len(kernels) <= 3, names  # beside PyTorch's, which sort row blocks: a few numbers


def test_threads_do_not_change_a_bit():
    """Lengths that leave lanes over, holes, an empty sequence; large enough for several threads."""
    if not (status := gk.backends()["cpp"]):
        pytest.skip(status.reason)
    lengths = torch.randint(0, 2000, (203,))
    lengths[5] = 0
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    n = int(cu[-1])
    kept = torch.where(torch.rand(n) < 0.8, 0, -100)
    tokens = [torch.randn(n).masked_fill(kept != 0, math.nan) for _ in range(3)]
    op = torch.ops.gikernels.experience
    numbers = (1, 0.97, 0.9, "k2", "batch", 1e-8, True, -100)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            args = (*tokens, torch.linspace(-1, 1, 203), kept, torch.rand(203) * 0 + 0.1, 0.0, cu)
            runs.append(op(*args, None, None, *numbers, "cpp"))
    finally:
        torch.set_num_threads(before)
    plain = op(*args, None, None, *numbers, "reference")
    for got, again, third, want in zip(*runs, plain):
        assert torch.equal(got, again) and torch.equal(got, third)
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)

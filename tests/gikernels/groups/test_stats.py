"""group_stats and its kin against the specification in fp64."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gikernels as gk
from gikernels import reference
from gikernels.groups import stats_triton

BACKENDS = ["reference", "triton", "cpp"]
FORMS = ["mass", "uniform", "one_sided"]


@pytest.fixture(autouse=True)
def _cpp_is_here(request, device):
    if getattr(request.node, "callspec", None) and "cpp" in request.node.callspec.params.values():
        _want_cpp(device)


def _want_cpp(device):
    if device != "cpu":
        pytest.skip("the C++ half is for the CPU")
    if not (status := gk.backends()["cpp"]):
        pytest.skip(status.reason)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "groups"), [(0, 2), (1, 1), (700, 3), (3000, 2), (90, 40)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_group_stats(backend, n, groups, weighted, device, poisoned_empty):
    values = torch.randint(-64, 64, (n,), device=device) / 16 + 1e6  # exact in float32
    ids = torch.randint(0, max(1, groups - 1), (n,), device=device)  # the last one is empty
    weights = torch.rand(n, device=device) * (torch.rand(n, device=device) < 0.8)
    weights = weights if weighted else None
    strided = torch.stack([values, values], -1)[:, 1]
    got = gk.group_stats(strided, ids, groups, weights=weights, backend=backend)
    again = gk.group_stats(values, ids.int(), groups, weights=weights, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    truth = reference.group_stats(
        values.double(), ids, groups, weights=None if weights is None else weights.double()
    )
    for a, b in zip(got, truth):
        assert a.dtype == torch.float32
        assert torch.allclose(a.double(), b, rtol=2e-7, atol=0)
    exact = gk.group_stats(values.double(), ids, groups, weights=weights, backend=backend)
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(exact, truth))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_dtype_of_values_and_weights(backend, dtype, device):
    values, ids = torch.randn(300, device=device).to(dtype) + 3, torch.arange(300) % 7
    ids = ids.to(device, torch.uint8)
    for other in (torch.float16, torch.float32, torch.float64):
        weights = torch.rand(300, device=device).to(other)
        got = gk.group_stats(values, ids, 8, weights=weights, backend=backend)
        truth = reference.group_stats(values.double(), ids, 8, weights=weights.double())
        double = torch.float64 in (dtype, other)
        for a, b in zip(got, truth):
            assert a.dtype == (torch.float64 if double else torch.float32)
            assert torch.allclose(a.double(), b, rtol=1e-12 if double else 1e-7, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("groups", [1, 8, 600, 20_000])  # tables side by side, one, longer spans
def test_cpp_at_size(groups, weighted, device, poisoned_empty):
    """fp32 results are float64 ones rounded, and threads do not change a bit."""
    _want_cpp(device)
    n = (1 << 19) + 5
    values, ids = torch.randn(n) + 1e3, torch.randint(0, groups, (n,))
    weights = torch.rand(n) if weighted else None
    truth = reference.group_stats(
        values.double(), ids, groups, weights=None if weights is None else weights.double()
    )
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2, 7):
        try:
            torch.set_num_threads(count)
            runs.append(gk.group_stats(values, ids, groups, weights=weights, backend="cpp"))
        finally:
            torch.set_num_threads(threads)
    for a, b, c, true in zip(*runs, truth):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert torch.allclose(a.double(), true, rtol=6.1e-8, atol=0)


def test_cpp_keeps_what_is_not_finite_where_it_is(device):
    _want_cpp(device)
    values, ids = torch.randn(70_000), torch.arange(70_000) % 4
    values[1], values[-2] = math.inf, math.nan
    got, want = (gk.group_stats(values, ids, 4, backend=b) for b in ("cpp", "reference"))
    assert all(torch.allclose(a, b, equal_nan=True) for a, b in zip(got, want))
    assert got.mean[1] == math.inf and got.mean[2].isnan() and got.mean[0].isfinite()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spread", ["even", "one", "none"])
def test_many_groups_in_pieces(weighted, spread, device, poisoned_empty, monkeypatch):
    """Sorted; groups of no value, of some, and of more pieces than are joined at a time."""
    monkeypatch.setattr(stats_triton, "SHORT", 0)
    monkeypatch.setattr(stats_triton, "_pieces", lambda n, groups: {"PIECE": 32, "BLOCK": 16})
    n, groups = 1500, 70
    values = torch.randint(-64, 64, (n,), device=device) / 16 + 1e6
    ids = torch.randint(0, groups - 2, (n,), device=device)
    if spread == "one":  # 44 pieces, joined 16 at a time
        ids[100:] = 9
    if spread == "none":
        values, ids, n = values[:0], ids[:0], 0
    weights = torch.rand(n, device=device) if weighted else None
    strided = torch.stack([values, values], -1)[:, 1]
    got = gk.group_stats(strided, ids.int(), groups, weights=weights, backend="triton")
    truth = reference.group_stats(
        values.double(), ids, groups, weights=None if weights is None else weights.double()
    )
    for a, b in zip(got, truth):
        assert a.dtype == torch.float32 and torch.allclose(a.double(), b, rtol=1e-7, atol=0)


@pytest.mark.parametrize("groups", [3, 70])
def test_an_id_out_of_range_belongs_to_no_group(groups, device, monkeypatch):
    """As on a GPU, where ids are not looked at before."""
    monkeypatch.setattr(stats_triton, "SHORT", 0)
    values, ids = torch.randn(200, device=device), torch.randint(-2, groups + 2, (200,))
    out = gk.GroupStats._make(torch.full((groups,), math.nan, device=device) for _ in range(3))
    stats_triton.group_stats(values, ids.to(device), None, out)
    kept = ((ids >= 0) & (ids < groups)).to(device)
    want = reference.group_stats(values[kept], ids.to(device)[kept], groups)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(out, want))


def test_pieces_are_enough_for_any_groups():
    for n, groups in ((4097, 65), (1 << 24, 4096), (10, 1000)):
        piece = stats_triton._pieces(n, groups)["PIECE"]
        for largest in (n // groups, n):
            others = torch.full((groups - 1,), (n - largest) // (groups - 1))
            needed = -(-largest // piece) + (-(-others // piece)).sum()
            assert needed <= n // piece + groups


def test_parts_of_one_group_cover_every_value():
    for n in (0, 1, 4095, 4096, 4097, 10**6):
        for groups in (1, 3, 500, 10**5):
            cut = stats_triton._cut(n, groups)
            assert cut["PARTS"] * -(-n // cut["PARTS"]) >= n
            assert -(-groups // cut["GROUPS"]) <= 1024 or cut["PARTS"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_does_not_matter(backend, device):
    values, ids = torch.randn(500, device=device) + 1e6, torch.randint(0, 3, (500,), device=device)
    order = torch.randperm(500, device=device)
    a = gk.group_stats(values, ids, 3, backend=backend)
    b = gk.group_stats(values[order], ids[order], 3, backend=backend)
    assert all(torch.allclose(x, y, rtol=1e-6, atol=0) for x, y in zip(a, b))


@settings(deadline=None, max_examples=50)
@given(cuts=st.lists(st.integers(0, 30), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_merging_parts_is_the_whole(cuts, seed):
    torch.manual_seed(seed)
    values, ids = torch.randn(30, dtype=torch.float64) + 1e6, torch.randint(0, 4, (30,))
    bounds = [0, *sorted(cuts), 30]
    merged = None
    for a, b in pairwise(bounds):
        part = gk.group_stats(values[a:b], ids[a:b], 5)
        merged = part if merged is None else gk.merge_stats(merged, part)
    whole = reference.group_stats(values, ids, 5)
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-8) for a, b in zip(merged, whole))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend, device):
    values = torch.randn(20, device=device, requires_grad=True)
    ids, weights = torch.arange(20, device=device) % 3, torch.rand(20, device=device)
    for w in (None, weights):
        torch.library.opcheck(torch.ops.gikernels.group_stats.default, (values, ids, 3, w, backend))

    def f(v):
        return gk.group_stats(v * 2, ids, 3, weights=weights, backend=backend)

    got = torch.compile(f, fullgraph=True, backend="aot_eager")(values)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(got, f(values)))


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_group_advantages(baseline, scale):
    rewards = torch.randint(-64, 64, (40,)) / 16 + 1e6
    ids = torch.randint(0, 6, (40,))
    ids[0] = 7  # alone
    keywords = {"baseline": baseline, "scale": scale}
    got = gk.group_advantages(rewards.requires_grad_(), ids, 9, **keywords)
    assert got[0] == 0 and not got.requires_grad and got.dtype == torch.float32
    truth = reference.group_advantages(rewards.double(), ids, 9, **keywords)
    assert torch.allclose(got.double(), truth, rtol=1e-6, atol=1e-6)
    for g in range(6):  # by hand
        r = rewards.detach().double()[ids == g]
        base = r.mean() if baseline == "mean" else (r.sum() - r) / (len(r) - 1)
        want = (r - base) / ((r.std() + 1e-6) if scale == "std" else 1)
        assert torch.allclose(got[ids == g].double(), want, atol=1e-5)


# --- soft groups --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_soft_groups_are_differentiable(form):
    logits = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    returns = torch.randn(7, dtype=torch.float64) + 3
    outputs = slice(1, 3) if form == "one_sided" else slice(1, 4)  # it stops its maximum's gradient
    assert torch.autograd.gradcheck(
        lambda x: gk.soft_groups(x, returns, form=form)[outputs], logits
    )
    # A constant added to all returns changes neither variance nor weights.
    far = gk.soft_groups(logits, returns + 2.0**20, form=form)
    assert torch.allclose(far.variance, gk.soft_groups(logits, returns, form=form).variance)
    # Nor does it in fp32, where probabilities sum to 1 +- 1e-7 only.
    probs = logits.detach().float().softmax(-1)
    coarse = (returns * 8).round().float() / 8
    for beta in (0.3, 2.0):
        near, far = (
            gk.group_weights(probs, coarse + offset, beta, form=form) for offset in (0, 1e6)
        )
        assert torch.allclose(near, far, atol=1e-6)


class Ranks:
    """Two ranks in one process: the first call records, the second round sums."""

    def __init__(self, locals_):
        self.locals = locals_
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        assert not x.requires_grad
        total = sum(self.locals)
        x.zero_()  # what an in-place collective would leave behind must not matter
        return total


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_see_what_one_sees(form):
    x = torch.randn(9, 4, dtype=torch.float64)
    head = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    returns = torch.randn(9, dtype=torch.float64)
    parts = [slice(0, 5), slice(5, 9)]
    recorded = []
    for rows in parts:
        gk.soft_groups(
            x[rows] @ head, returns[rows], reduce=lambda t: recorded.append(t.clone()) or t
        )
    one = gk.soft_groups(x @ head, returns, form=form)
    (want,) = torch.autograd.grad(one.variance, head)
    got = torch.zeros_like(head)
    for rows in parts:
        ranks = Ranks(recorded)
        out = gk.soft_groups(x[rows] @ head, returns[rows], form=form, reduce=ranks)
        assert ranks.calls == 1
        assert torch.allclose(out.mass, one.mass) and torch.allclose(out.returns, one.returns)
        assert torch.allclose(out.variance, one.variance)
        got += torch.autograd.grad(out.variance, head)[0]
        weights = gk.group_weights(
            out.probs.detach(), returns[rows], 0.7, form=form, reduce=Ranks(recorded)
        )
        whole = gk.group_weights(one.probs.detach(), returns, 0.7, form=form)
        assert torch.allclose(weights, whole[rows])
    assert torch.allclose(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_the_gradient_of_the_variance(form):
    """c_i - 1 = -beta S dVar / dR_i, R_i entering through the group returns at fixed masses."""
    probs = torch.randn(8, 3, dtype=torch.float64).softmax(-1)
    returns = torch.randn(8, dtype=torch.float64, requires_grad=True)
    mass, group_returns = probs.mean(0), (probs.T @ returns) / probs.sum(0)
    variance = reference._variance(form, mass, group_returns)
    (slope,) = torch.autograd.grad(variance, returns)
    got = gk.group_weights(probs, returns, 0.3, form=form, clamp=(-math.inf, math.inf))
    assert torch.allclose(got, 1 - 0.3 * 8 * slope)
    assert not got.requires_grad
    clamped = gk.group_weights(probs, returns, 50.0, form=form)
    assert clamped.min() >= 0 and clamped.max() <= 5


def test_one_sided_is_the_gradient_at_a_fixed_maximum():
    logits = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    returns = torch.randn(7, dtype=torch.float64)
    top = gk.soft_groups(logits, returns).returns.max().detach()

    def by_hand(x):
        return (top - gk.soft_groups(x, returns).returns).clamp(min=0).square().mean()

    a, b = by_hand(logits), gk.soft_groups(logits, returns, form="one_sided").variance
    assert torch.allclose(a, b)
    assert torch.allclose(*(torch.autograd.grad(x, logits)[0] for x in (a, b)))


def test_an_empty_group_is_finite():
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for form in FORMS:
        weights = gk.group_weights(probs, torch.tensor([1.0, 2.0]), 1.0, form=form)
        assert torch.isfinite(weights).all()
        logits = torch.tensor([[0.0, -1e9], [0.0, -1e9]], requires_grad=True)
        out = gk.soft_groups(logits, torch.tensor([1.0, 2.0]), form=form)
        out.variance.backward()
        assert all(torch.isfinite(t).all() for t in (*out, logits.grad))
    nobody = gk.soft_groups(torch.zeros(0, 2), torch.zeros(0))
    assert all(torch.isfinite(t).all() for t in nobody)


def test_soft_groups_compile():
    logits, returns = torch.randn(6, 2), torch.randn(6)
    f = torch.compile(lambda a, b: gk.soft_groups(a, b).variance, fullgraph=True, backend="eager")
    assert torch.equal(f(logits, returns), gk.soft_groups(logits, returns).variance)


# --- what is refused ----------------------------------------------------------------------------

V, I, P = torch.zeros(4), torch.tensor([0, 1, 1, 0]), torch.ones(4, 2) / 2
STATS = gk.GroupStats(V, V, V)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("values", lambda: gk.group_stats(I, I, 2)),
        ("values", lambda: gk.group_stats(P, I, 2)),
        ("group_ids", lambda: gk.group_stats(V, I.float(), 2)),
        ("group_ids", lambda: gk.group_stats(V, I[:1], 2)),
        ("group_ids", lambda: gk.group_stats(V, I, 1)),
        ("group_ids", lambda: gk.group_stats(V, I - 1, 2)),
        ("group_ids", lambda: gk.group_stats(V, I, 1, backend="reference")),
        ("weights", lambda: gk.group_stats(V, I, 2, weights=V - 1, backend="reference")),
        ("num_groups", lambda: gk.group_stats(V, I, 0)),
        ("num_groups", lambda: gk.group_stats(V, I, 2.0)),
        ("weights", lambda: gk.group_stats(V, I, 2, weights=V - 1)),
        ("weights", lambda: gk.group_stats(V, I, 2, weights=V + math.inf)),
        ("weights", lambda: gk.group_stats(V, I, 2, weights=V / 0)),
        ("weights", lambda: gk.group_stats(V, I, 2, weights=V[:1])),
        ("backend", lambda: gk.group_stats(V, I, 2, backend="quick")),
        ("a", lambda: gk.merge_stats(V, STATS)),
        (r"b\.mean", lambda: gk.merge_stats(STATS, gk.GroupStats(V, V[:1], V))),
        ("rewards", lambda: gk.group_advantages(P, I, 2)),
        ("group_ids", lambda: gk.group_advantages(V, I.double(), 2)),
        ("group_ids", lambda: gk.group_advantages(V, I, 1)),
        ("baseline", lambda: gk.group_advantages(V, I, 2, baseline="median")),
        ("scale", lambda: gk.group_advantages(V, I, 2, scale="var")),
        ("eps", lambda: gk.group_advantages(V, I, 2, eps=-1.0)),
        ("logits", lambda: gk.soft_groups(V, V)),
        ("logits", lambda: gk.soft_groups(torch.zeros(4, 0), V)),
        ("returns", lambda: gk.soft_groups(P, V[:, None])),
        ("form", lambda: gk.soft_groups(P, V, form="otsu")),
        ("reduce", lambda: gk.soft_groups(P, V, reduce="sum")),
        ("probs", lambda: gk.group_weights(V, V, 1.0)),
        ("beta", lambda: gk.group_weights(P, V, math.nan)),
        ("clamp", lambda: gk.group_weights(P, V, 1.0, clamp=(2.0, 1.0))),
        ("clamp", lambda: gk.group_weights(P, V, 1.0, clamp=3.0)),
        ("clamp", lambda: gk.group_weights(P, V, 1.0, clamp=(0, math.nan))),
    ],
)
def test_refuses(name, call):
    with pytest.raises(ValueError, match=f"^{name}: "):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "groups"), [(1 << 20, 2), (1 << 20, 30), (4096, 512), (9, 100_000), (1 << 20, 5000)]
)
def test_gpu(n, groups):
    values = torch.randn(n, device="cuda") + 1e6
    ids = torch.randint(0, groups, (n,), device="cuda")
    weights = torch.rand(n, device="cuda")
    got = gk.group_stats(values, ids, groups, weights=weights)
    again = gk.group_stats(values, ids, groups, weights=weights)
    truth = reference.group_stats(values.double(), ids, groups, weights=weights.double())
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    assert all(torch.allclose(a.double(), b, rtol=1e-6, atol=1e-6) for a, b in zip(got, truth))

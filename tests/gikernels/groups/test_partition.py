"""gikernels.partition against brute force and against a programme that shares nothing with it."""

import itertools
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gikernels
from gikernels import partition, reference
from gikernels.backends import dispatch

F64 = torch.float64
CPP = dispatch.backend_status("cpp")
NATIVE = pytest.mark.skipif(not CPP, reason=CPP.reason)
BACKENDS = [pytest.param("cpp", marks=NATIVE), "reference"]


def spec(values, num_groups=2, *, weights=None, min_size=1, backend="spec"):
    return reference.partition(values, num_groups, weights=weights, min_size=min_size)


def solve(backend, *args, **kwargs):
    return (spec if backend == "spec" else partition)(*args, backend=backend, **kwargs)


# --- independent answers --------------------------------------------------------------------------


def merged(x, w):
    """Distinct values, their weights and their numbers of members."""
    distinct, index, members = np.unique(x, return_inverse=True, return_counts=True)
    return distinct, np.bincount(index, w, len(distinct)), members


def between(x, w, ids):
    """sum_g f_g (mean_g - mean)^2, by its definition."""
    total = w.sum()
    if total == 0:
        return 0.0
    mean, result = np.average(x, weights=w), 0.0
    for g in np.unique(ids):
        mass = w[ids == g].sum()
        if mass > 0:
            result += mass / total * (np.average(x[ids == g], weights=w[ids == g]) - mean) ** 2
    return result


def by_brute_force(x, w, k, m):
    """The best between-group variance over all contiguous cuts, or None."""
    x = x - x.mean()
    distinct, _, members = merged(x, w)
    best = None
    for cuts in itertools.combinations(range(1, len(distinct)), k - 1):
        group = np.searchsorted(cuts, np.arange(len(distinct)), side="right")
        if np.bincount(group, members, k).min() >= m:
            ids = group[np.searchsorted(distinct, x)]
            best = max(best if best is not None else -1.0, between(x, w, ids))
    return best


def by_welford(x, w, k, m):
    """The same in O(K n^2): squared errors of all intervals by Welford's recurrence, no prefix sums
    and no differences of large numbers; then the shortest path."""
    distinct, mass, members = merged(x - np.median(x), w)
    u = len(distinct)
    errors = np.full((u + 1, u + 1), np.inf)
    weight, mean, m2, count = np.zeros(u), np.zeros(u), np.zeros(u), np.zeros(u)
    for j in range(u):  # element j joins all the intervals i..j, i <= j
        a = slice(0, j + 1)
        weight[a] += mass[j]
        delta = distinct[j] - mean[a]
        mean[a] += np.divide(mass[j] * delta, weight[a], np.zeros(j + 1), where=weight[a] > 0)
        m2[a] += mass[j] * delta * (distinct[j] - mean[a])
        count[a] += members[j]
        errors[:-1, j + 1][a] = np.where(count[a] >= m, m2[a], np.inf)
    best = np.full(u + 1, np.inf)
    best[0] = 0
    for _ in range(k):
        best = (best[:, None] + errors).min(0)
    if not np.isfinite(best[u]):
        return None
    if mass.sum() == 0:
        return 0.0
    everything = np.average((distinct - np.average(distinct, weights=mass)) ** 2, weights=mass)
    return everything - best[u] / mass.sum()


def check(found, x, w, k, m, best, rtol=1e-9):
    """`found` is a legal partition of x, consistent in itself, and as good as `best`."""
    ids = found.group_ids.numpy()
    scale = max(np.abs(x - np.median(x)).max(), 1e-300)
    assert found.group_ids.dtype == torch.int32
    assert np.bincount(ids, minlength=k).min() >= m and ids.max() == k - 1
    order = np.argsort(x, kind="stable")
    assert (np.diff(ids[order]) >= 0).all()  # ascending, and then contiguous
    assert len(np.unique(x)) == len(set(zip(x, ids)))  # equal values together
    for g in range(k - 1):
        middle = x[ids == g].max() / 2 + x[ids == g + 1].min() / 2
        assert found.thresholds[g].item() == pytest.approx(middle, rel=1e-6)
    for g in range(k):
        mine = ids == g
        if w[mine].sum() > 0:
            mean = np.average(x[mine], weights=w[mine])
        else:
            mean = x[mine].max() / 2 + x[mine].min() / 2
        tolerance = rtol * scale + 1e-15 * np.abs(x).max()
        assert found.centers[g].item() == pytest.approx(mean, rel=rtol, abs=tolerance)
    assert found.between_variance.item() == pytest.approx(best, rel=rtol, abs=rtol * scale**2)
    assert between(x - np.median(x), w, ids) == pytest.approx(best, rel=1e-9, abs=1e-12 * scale**2)


# --- the optimum ----------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Few values, so that ties and equal optima abound."""
    n = draw(st.integers(1, 10))
    few = st.integers(-3, 3).map(float)
    element = draw(st.sampled_from([few, st.floats(-10, 10, width=16), few.map(lambda v: v / 7)]))
    x = draw(st.lists(element, min_size=n, max_size=n))
    weight = st.sampled_from([0.0, 0.25, 1.0, 3.0])
    w = draw(st.none() | st.lists(weight, min_size=n, max_size=n))
    return x, w, draw(st.integers(1, min(n, 4))), draw(st.integers(1, 3))


@pytest.mark.parametrize("backend", [*BACKENDS, "spec"])
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_brute_force(backend, problem):
    x, w, k, m = problem
    weights = None if w is None else torch.tensor(w, dtype=F64)
    x, w = np.array(x), np.ones(len(x)) if w is None else np.array(w)
    best = by_brute_force(x, w, k, m)
    if best is None:
        with pytest.raises(ValueError, match="values"):
            solve(backend, torch.tensor(x), k, weights=weights, min_size=m)
    else:
        found = solve(backend, torch.tensor(x), k, weights=weights, min_size=m)
        check(found, x, w, k, m, best)


SHAPES = {
    "normal": lambda r, n: r.normal(size=n),
    "clusters": lambda r, n: r.choice([0.0, 1, 5, 6, 20], n) + 0.1 * r.normal(size=n),
    "outliers": lambda r, n: r.standard_cauchy(n),
    "extreme": lambda r, n: r.standard_cauchy(n) ** 3,
    "few": lambda r, n: r.integers(0, 12, n) / 3.0,
    "offset": lambda r, n: 1e8 + r.normal(size=n),
    "huge": lambda r, n: 1e300 * r.uniform(-1, 1, n),
    "tiny": lambda r, n: 1e-300 * r.uniform(-1, 1, n),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_independent_program(backend, shape):
    r = np.random.default_rng(len(shape))
    extreme = {"huge": 1e-300, "tiny": 1e300}.get(shape, 1.0)  # what the program can square
    for n, k in ((12, 12), (60, 2), (150, 3), (150, 9)):
        x = SHAPES[shape](r, n)
        k = min(k, len(np.unique(x)))
        for w in (np.ones(n), r.random(n), r.random(n) * (r.random(n) < 0.7)):
            for m in (1, n // (2 * k), n // k):
                best = by_welford(x * extreme, w, k, m)
                weights = None if w[0] == 1 else torch.tensor(w)
                args = {"weights": weights, "min_size": max(m, 1), "backend": backend}
                if best is None:
                    with pytest.raises(ValueError, match="values"):
                        partition(torch.tensor(x), k, **args)
                    continue
                found = partition(torch.tensor(x), k, **args)
                if extreme != 1:
                    # float64 has no number for the variance, whatever units it is in
                    assert found.between_variance == (math.inf if shape == "huge" else 0)
                    found = found._replace(
                        thresholds=found.thresholds * extreme,
                        centers=found.centers * extreme,
                        between_variance=torch.tensor(best),
                    )
                check(found, x * extreme, w, k, m, best)


@NATIVE
@pytest.mark.parametrize("shape", ["normal", "clusters", "outliers"])
def test_long_rows_agree_with_the_specification(shape):
    """Windows that close, windows that stay wide, threads that share a level."""
    r = np.random.default_rng(1)
    x = torch.tensor(SHAPES[shape](r, 1500))
    w = torch.tensor(r.random(1500) + 0.01)
    for k, m in ((2, 1), (5, 1), (5, 290)):
        for weights in (None, w):
            found = partition(x, k, weights=weights, min_size=m, backend="cpp")
            want = reference.partition(x, k, weights=weights, min_size=m)
            torch_backend = partition(x, k, weights=weights, min_size=m, backend="reference")
            for other in (want, torch_backend):
                assert torch.equal(found.group_ids, other.group_ids)
                assert torch.equal(found.thresholds, other.thresholds)
                atol = 1e-14 * x.abs().max().item()
                torch.testing.assert_close(found.centers, other.centers, rtol=1e-12, atol=atol)
                torch.testing.assert_close(
                    found.between_variance, other.between_variance, rtol=1e-12, atol=0
                )


@NATIVE
@pytest.mark.parametrize("shape", ["normal", "clusters", "outliers", "few"])
def test_threads_change_no_bit(shape):
    r = np.random.default_rng(2)
    x = torch.tensor(SHAPES[shape](r, 60_000), dtype=torch.float32)
    weights = torch.tensor(r.random(len(x)) * (r.random(len(x)) < 0.9))
    before = torch.get_num_threads()
    try:
        for w in (None, weights + 0.1, weights):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(partition(x, 4, weights=w, min_size=5, backend="cpp"))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other))
            row_by_row = partition(
                torch.stack([x, x.flip(0), x]),
                4,
                weights=None if w is None else torch.stack([w, w.flip(0), w]),
                min_size=5,
                backend="cpp",
            )
            assert torch.equal(row_by_row.group_ids[0], results[0].group_ids)
            assert torch.equal(row_by_row.group_ids[2], results[0].group_ids)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_changes_nothing(backend):
    """At 1e8 float64 has steps of 1.5e-8, so values on a grid of 2**-20 are kept exactly."""
    x = (torch.randn(3000, dtype=F64) * 2**20).round() / 2**20
    for k in (2, 5):
        plain = partition(x, k, backend=backend)
        moved = partition(x + 1e8, k, backend=backend)
        assert torch.equal(plain.group_ids, moved.group_ids)
        assert torch.equal(plain.thresholds + 1e8, moved.thresholds)
        torch.testing.assert_close(
            plain.between_variance, moved.between_variance, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("backend", [*BACKENDS, "spec"])
def test_of_equal_optima_the_lowest_cut(backend):
    for x, k, want in (
        ([2.0, 0, 1], 2, [1, 0, 1]),
        ([0.0, 1, 2, 3, 4], 4, [0, 1, 2, 3, 3]),
        ([-1.0, 1, 0, 0], 2, [0, 1, 1, 1]),
    ):
        found = solve(backend, torch.tensor(x, dtype=F64), k)
        assert found.group_ids.tolist() == want, (x, k)
    # A value of weight 0 may go either way, though it is nearer to the left.
    x, weights = torch.tensor([0.0, 1, 10]), torch.tensor([1.0, 0, 1])
    assert solve(backend, x, weights=weights).group_ids.tolist() == [0, 1, 1]


@pytest.mark.parametrize("backend", [*BACKENDS, "spec"])
def test_by_hand(backend):
    x = torch.tensor([10.0, 1, 2, 12, 1])
    found = solve(backend, x, 2)
    assert found.group_ids.tolist() == [1, 0, 0, 1, 0]
    assert found.thresholds.tolist() == [6.0]
    torch.testing.assert_close(found.centers, torch.tensor([4 / 3, 11.0]))
    mean = 26 / 5
    want = 3 / 5 * (4 / 3 - mean) ** 2 + 2 / 5 * (11 - mean) ** 2
    assert found.between_variance.item() == pytest.approx(want)
    one = solve(backend, torch.full((4,), 3.0), 1)
    assert one.group_ids.tolist() == [0] * 4 and one.centers.tolist() == [3.0]
    assert one.thresholds.shape == (0,) and one.between_variance == 0
    # A group without weight: midway between its ends; it adds nothing.
    weightless = solve(backend, x, 2, weights=torch.tensor([0.0, 1, 0, 0, 1]), min_size=2)
    assert weightless.centers.tolist() == [1, 7]
    assert weightless.between_variance.item() == pytest.approx(0, abs=1e-6)
    nothing = solve(backend, x, 2, weights=torch.zeros(5))
    assert nothing.between_variance == 0 and torch.isfinite(nothing.centers).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_of_both_signs_are_equal(backend):
    found = partition(torch.tensor([-0.0, 1.0, 0.0, -0.0]), 2, backend=backend)
    assert found.group_ids.tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="values"):
        partition(torch.tensor([-0.0, 0.0]), 2, backend=backend)


# --- shapes, dtypes, the operation ----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_strides_and_dtypes(backend, poisoned_empty):
    x = torch.randn(5, 40)
    batch = partition(x, 3, weights=x.abs(), min_size=4, backend=backend)
    assert [t.shape for t in batch] == [(5, 40), (5, 2), (5, 3), (5,)]
    for b in range(5):
        row = partition(x[b], 3, weights=x[b].abs(), min_size=4, backend=backend)
        assert all(torch.equal(a[b], c) for a, c in zip(batch, row))
    strided = torch.stack([x, torch.full_like(x, torch.nan)], 2).transpose(0, 1)[..., 0].T
    assert not strided.is_contiguous()
    again = partition(strided, 3, weights=strided.abs(), min_size=4, backend=backend)
    assert all(torch.equal(a, c) for a, c in zip(batch, again))
    for dtype in (torch.float16, torch.bfloat16):
        halves = partition(x.to(dtype), 3, backend=backend)
        singles = partition(x.to(dtype).float(), 3, backend=backend)
        assert halves.centers.dtype == torch.float32
        assert all(torch.equal(a, c) for a, c in zip(halves, singles))
    assert partition(x.double(), backend=backend).centers.dtype == F64
    assert [t.shape for t in partition(x[:0], 3, backend=backend)] == [
        (0, 40),
        (0, 2),
        (0, 3),
        (0,),
    ]
    counts = partition(x[0], weights=torch.arange(40), backend=backend)
    floats = partition(x[0], weights=torch.arange(40.0), backend=backend)
    assert all(torch.equal(a, c) for a, c in zip(counts, floats))
    scaled = partition(x[0], weights=torch.arange(40.0, dtype=F64) * 2.0**1000, backend=backend)
    assert all(torch.equal(a, c) for a, c in zip(counts, scaled))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_custom_operation(backend):
    x, w = torch.randn(2, 30), torch.rand(2, 30)
    for weights in (None, w):
        torch.library.opcheck(torch.ops.gikernels.partition, (x, weights, 3, 2, backend))
    eager = partition(x, 3, weights=w, backend=backend)
    compiled = torch.compile(partition, fullgraph=True)(x, 3, weights=w, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))
    leaf = x.clone().requires_grad_()
    assert not any(t.requires_grad for t in partition(leaf, weights=leaf.abs(), backend=backend))


def test_auto_takes_the_best_backend_there_is(monkeypatch):
    x = torch.tensor([0.0, 1, 5])
    asked = []
    monkeypatch.setattr(dispatch, "backend_status", lambda name: asked.append(name) or CPP)
    assert partition(x).group_ids.tolist() == [0, 0, 1]
    assert asked == ["cpp"]
    assert gikernels.partition is partition


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("values", {"values": torch.tensor([1.0, torch.nan])}, "finite"),
        ("values", {"values": torch.tensor([[1.0, 2], [1, 2], [1, -torch.inf]])}, "row 2"),
        ("values", {"values": torch.tensor([[1.0, 2, 3], [1, 1, 1]])}, "row 1.*1 distinct"),
        ("values", {"values": torch.ones(5)}, "distinct"),
        ("values", {"values": torch.tensor([1.0, 1, 1, 2]), "min_size": 2}, "min_size=2"),
        ("values", {"values": torch.arange(3.0), "min_size": 2}, "num_groups . min_size"),
        ("values", {"values": torch.arange(3.0), "num_groups": 4}, "num_groups"),
        ("values", {"values": torch.zeros(0)}, "at least one"),
        ("values", {"values": torch.zeros(3, 0)}, "at least one"),
        ("values", {"values": torch.zeros(2, 2, 2)}, "shape"),
        ("values", {"values": torch.tensor(1.0)}, "shape"),
        ("values", {"values": torch.arange(5)}, "floating"),
        ("values", {"values": [1.0, 2.0]}, "tensor"),
        ("weights", {"weights": torch.tensor([1.0, -1, 1, 1])}, ">= 0"),
        ("weights", {"weights": torch.tensor([1.0, torch.nan, 1, 1])}, "finite"),
        ("weights", {"weights": torch.tensor([1.0, torch.inf, 1, 1])}, "finite"),
        ("weights", {"weights": torch.ones(3)}, "shape"),
        ("weights", {"weights": torch.ones(1, 4)}, "shape"),
        ("weights", {"weights": torch.ones(4, dtype=torch.bool)}, "float"),
        ("num_groups", {"num_groups": 0}, "integer"),
        ("num_groups", {"num_groups": 2.0}, "integer"),
        ("min_size", {"min_size": 0}, "integer"),
        ("min_size", {"min_size": True}, "integer"),
    ],
)
def test_bad_arguments(backend, name, args, message):
    args = {"values": torch.arange(4.0), **args}
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        partition(**args, backend=backend)


def test_unknown_and_unsuited_backends():
    with pytest.raises(ValueError, match="backend"):
        partition(torch.arange(4.0), backend="fast")
    with pytest.raises(gikernels.BackendUnavailable, match="triton"):
        partition(torch.arange(4.0), backend="triton")
    if not torch.cuda.is_available():
        with pytest.raises(gikernels.BackendUnavailable, match=r"cuda.*no GPU"):
            partition(torch.arange(4.0), backend="cuda")


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 700, 8192, 8193, 300_000])
@pytest.mark.parametrize("shape", ["normal", "clusters", "outliers", "few", "offset"])
def test_cuda_gives_the_cpus_bits(shape, n):
    r = np.random.default_rng(n)
    x = torch.tensor(SHAPES[shape](r, 2 * n)).reshape(2, n)
    w = torch.tensor(r.random((2, n)))
    for dtype in (F64, torch.float32):
        for k, m, weights in ((1, 1, None), (2, 1, None), (7, 3, w), (8, 1, w * (w > 0.3))):
            if n < k * m:
                continue
            try:
                want = partition(x.to(dtype), k, weights=weights, min_size=m, backend="cpp")
            except ValueError as error:
                with pytest.raises(ValueError, match=str(error)[:20]):
                    partition(x.to(dtype).cuda(), k, min_size=m, backend="cuda")
                continue
            moved = None if weights is None else weights.cuda()
            found = partition(x.to(dtype).cuda(), k, weights=moved, min_size=m, backend="cuda")
            assert all(torch.equal(a, b.cpu()) for a, b in zip(want, found))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1000, 20_000])
def test_cuda_graphs_and_bad_rows(n):
    x = torch.randn(2, n, device="cuda")
    partition(x, 4)  # builds and warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = partition(x, 4)
    x.copy_(torch.randn_like(x))
    x[1, 7] = torch.nan
    graph.replay()
    good = partition(x[0], 4)
    assert all(torch.equal(a[0], b) for a, b in zip(out, good))
    assert (out.group_ids[1] == -1).all() and out.centers[1].isnan().all()
    with pytest.raises(ValueError, match="row 1"):
        partition(x, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer")
    code = (
        "import torch, gikernels\n"
        "for n in (900, 9000):\n"
        "    gikernels.partition(torch.randn(2, n, device='cuda'), 5, backend='cuda')\n"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c"]
    done = subprocess.run([*command, code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]

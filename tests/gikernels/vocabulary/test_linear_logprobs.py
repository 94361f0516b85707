"""linear_logprobs: values and gradients against float64, on each backend that can run here.

Without a GPU the Triton kernels are interpreted, in tiles of 32 x 128: shapes here are ragged and a
few tiles large. `pytest -m gpu` repeats the comparison at real sizes.
"""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gikernels
from gikernels import backends, reference
from gikernels.backends import dispatch
from gikernels.backends.settings import workspace, workspace_for
from gikernels.vocabulary import linear_logprobs as MODULE

linear_logprobs = gikernels.linear_logprobs
BACKENDS = ("reference", "triton")
NAN, INF = float("nan"), float("inf")

needs_triton = pytest.mark.skipif(not backends()["triton"], reason=backends()["triton"].reason)


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def backend(request):
    return request.param


def problem(device, dtype=torch.float32, n=37, d=40, v=300, ref_d=24, seed=0):
    """Inputs by name, in `dtype`; some rows are ignored and the last tokens have a bias of -inf."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    bias = normal(v)
    bias[-9:] = -INF
    targets = torch.randint(0, v - 9, (n,), generator=g)
    targets[::5] = -100
    floats = {
        "hidden": normal(n, d),
        "weight": normal(v, d) / 3,
        "bias": bias,
        "ref_hidden": normal(n, ref_d),
        "ref_weight": normal(v, ref_d) / 3,
        "temperature": torch.rand(n, generator=g, dtype=torch.float64) + 0.5,
    }
    inputs = {name: x.to(device, dtype) for name, x in floats.items()}
    return inputs | {"targets": targets.to(device)}


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0, "logit_scale": 1.5, "temperature": 0.7},
    "ref": {"ref": True},
    "everything": {
        "bias": True, "ref": True, "softcap": 4.0, "logit_scale": 0.8, "temperature": True
    },
}  # fmt: skip


def arguments(p, options):
    """Positional and keyword arguments of linear_logprobs; True stands for the problem's tensor."""
    o = dict(options)
    temperature = o.pop("temperature", 1.0)
    o["bias"] = p["bias"] if o.get("bias") else None
    o["ref"] = (p["ref_hidden"], p["ref_weight"]) if o.get("ref") else None
    temperature = p["temperature"] if temperature is True else temperature
    return (p["hidden"], p["weight"], p["targets"], temperature), o


def plain(hidden, weight, targets, temperature=1.0, *, bias, ref, ignore_index=-100, **kwargs):
    """What one writes without this package: logits in the inputs' dtype, statistics in fp32."""
    logits = F.linear(hidden, weight, bias)
    ref_logits = None if ref is None else F.linear(*ref)
    kept = (targets != ignore_index).unsqueeze(-1)
    logits = torch.where(kept, logits, 0)
    return reference.logprobs(
        logits, targets, temperature, ref_logits=ref_logits, ignore_index=ignore_index, **kwargs
    )


def run(f, p, options, upstream=None, **kwargs):
    """Every output and gradient of f by name, in float64."""
    p = {k: x.detach() for k, x in p.items()}
    names = ["hidden", "weight"] + (["bias"] if options.get("bias") else [])
    for name in names:
        p[name] = p[name].clone().requires_grad_()
    args, keywords = arguments(p, options)
    out = f(*args, **keywords, **kwargs)
    stats = {k: x for k, x in out._asdict().items() if x is not None}
    if upstream is None:
        upstream = random_upstream(p["targets"])
    loss = sum((x * upstream[k].to(x.dtype)).sum() for k, x in stats.items() if k in upstream)
    grads = torch.autograd.grad(loss, [p[name] for name in names])
    results = stats | {"d" + name: g for name, g in zip(names, grads)}
    return {k: x.detach().double() for k, x in results.items()}


def random_upstream(targets, names=("logprobs", "entropy", "kl")):
    g = torch.Generator().manual_seed(1)
    up = {k: torch.randn(targets.shape, generator=g, dtype=torch.float64) for k in names}
    for x in up.values():
        x.view(-1)[3::7] = 0  # rows that the backward may leave out
    return {k: x.to(targets.device) for k, x in up.items()}


def truth(p, options, upstream=None):
    double = {k: x.double() if x.is_floating_point() else x for k, x in p.items()}
    return run(reference.linear_logprobs, double, options, upstream)


def error(a, b):
    """Largest error relative to the largest value: what a gradient step sees."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() if a.numel() else 0.0


EPS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_good_as_plain(got, p, options, dtype, upstream=None):
    want, same = truth(p, options, upstream), run(plain, p, options, upstream)
    assert got.keys() == want.keys()
    for name in want:
        eps = EPS[dtype] if name.startswith("d") else EPS[torch.float32]
        assert error(got[name], want[name]) <= 2 * error(same[name], want[name]) + eps, name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_values_and_gradients(backend, device, dtype, options, poisoned_empty):
    p = problem(device, dtype)
    got = run(linear_logprobs, p, options, backend=backend)
    assert_as_good_as_plain(got, p, options, dtype)


@pytest.mark.parametrize("name", ["logprobs", "entropy", "kl"])
def test_gradient_of_each_output_alone(backend, device, name):
    p, options = problem(device), {"ref": True}
    upstream = random_upstream(p["targets"], (name,))
    got = run(linear_logprobs, p, options, upstream, backend=backend)
    assert_as_good_as_plain(got, p, options, torch.float32, upstream)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    p = problem("cpu", torch.float64, n=5, d=3, v=12, ref_d=2)
    args, keywords = arguments(p, options)

    def f(hidden, weight, bias):
        keywords["bias"] = None if keywords["bias"] is None else bias
        out = linear_logprobs(hidden, weight, *args[2:], **keywords)
        return tuple(x for x in out if x is not None)

    leaves = [p[k].requires_grad_() for k in ("hidden", "weight")]
    bias = p["bias"].clone()
    bias[-9:] = 0  # no finite differences at -inf
    assert torch.autograd.gradcheck(f, (*leaves, bias.requires_grad_(bool(options.get("bias")))))


def test_small_workspace_gives_the_same(backend, device, poisoned_empty):
    """Several slabs of the vocabulary and, in the second case, several chunks of rows a slab."""
    p, options = problem(device, n=45, v=500), OPTIONS["everything"]
    for size in (100_000, 20_000):
        with workspace(size):
            got = run(linear_logprobs, p, options, backend=backend)
        assert_as_good_as_plain(got, p, options, torch.float32)


@pytest.mark.parametrize("kind", ["peaked", "minus_110", "offset_1e4"])
def test_adversarial_logits(backend, device, kind):
    p = problem(device, n=20)
    options = {"bias": True}
    if kind == "peaked":
        kept = p["targets"] != -100
        p["weight"] *= 0.1
        p["weight"][p["targets"][kept]] += p["hidden"][kept]
    elif kind == "minus_110":
        p["weight"] *= 0
        p["bias"][:] = -110
    else:
        p["bias"][:-9] += 1e4
    got = run(linear_logprobs, p, options, backend=backend)
    assert (got["logprobs"] <= 1e-6).all()
    assert (got["entropy"] >= -1e-5).all()
    assert_as_good_as_plain(got, p, options, torch.float32)


def test_what_lies_at_ignored_rows_never_shows(backend, device):
    p = problem(device)
    options = OPTIONS["everything"]
    upstream = random_upstream(p["targets"])
    want = run(linear_logprobs, p, options, upstream, backend=backend)
    ignored = p["targets"] == -100
    for name in ("hidden", "ref_hidden", "temperature"):
        p[name][ignored] = NAN
    for x in upstream.values():
        x[ignored] = NAN
    args, keywords = arguments({k: x.clone() for k, x in p.items()}, options)
    leaves = [args[0].requires_grad_(), args[1].requires_grad_(), keywords["bias"].requires_grad_()]
    out = linear_logprobs(*args, **keywords, backend=backend)
    torch.autograd.backward(list(out), [upstream[k].float() for k in out._fields])
    for name, x in zip(("dhidden", "dweight", "dbias"), leaves):
        assert torch.equal(x.grad.double(), want[name]), name
    for name, x in out._asdict().items():
        assert torch.equal(x.detach().double(), want[name]), name
        assert (x[ignored] == 0).all()
    assert (leaves[0].grad[ignored] == 0).all()


def test_nan_is_never_hidden(backend, device):
    p = problem(device, n=6)
    p["targets"][:] = 1
    p["hidden"][2, 3] = NAN
    args, keywords = arguments(p, {"ref": True})
    for x in linear_logprobs(*args, **keywords, backend=backend):
        assert x.isnan().nonzero().flatten().tolist() == [2]
    p["weight"][7] = INF
    out = linear_logprobs(*args, **keywords, backend=backend)
    assert out.logprobs.isnan().all()


def test_empty_one_row_and_all_ignored(backend, device, poisoned_empty):
    for n in (0, 1, 4):
        p = problem(device, n=n)
        if n == 4:
            p["targets"][:] = -100
        got = run(linear_logprobs, p, OPTIONS["everything"], backend=backend)
        assert got["logprobs"].shape == (n,) and got["dhidden"].shape == (n, 40)
        assert all((x == 0).all() for x in got.values())  # problem() ignores row 0
    p["targets"][:] = 1
    p = {k: x[:1] if len(x) == 4 else x for k, x in p.items()}
    got = run(linear_logprobs, p, OPTIONS["everything"], backend=backend)
    assert_as_good_as_plain(got, p, OPTIONS["everything"], torch.float32)


def test_strides_and_leading_dimensions(backend, device):
    p = problem(device, n=24)
    want = linear_logprobs(
        p["hidden"], p["weight"], p["targets"], p["temperature"], backend=backend
    )
    hidden = torch.stack([p["hidden"], p["hidden"] * NAN], 1)[:, 0].view(2, 3, 4, 40)
    weight = p["weight"].t().contiguous().t()
    targets = torch.stack([p["targets"]] * 2, 1)[:, 0].view(2, 3, 4).to(torch.int32)
    temperature = torch.stack([p["temperature"]] * 2, 1)[:, 0].view(2, 3, 4)
    hidden.requires_grad_(), weight.requires_grad_()
    got = linear_logprobs(hidden, weight, targets, temperature, backend=backend)
    assert got.logprobs.shape == (2, 3, 4)
    for a, b in zip(got[:2], want[:2]):
        assert torch.allclose(a.flatten(), b, atol=1e-5)
    (got.logprobs.sum() + got.entropy.sum()).backward()
    leaves = [p["hidden"].requires_grad_(), p["weight"].requires_grad_()]
    out = linear_logprobs(*leaves, p["targets"], p["temperature"], backend=backend)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert torch.allclose(hidden.grad.view(24, 40), leaves[0].grad, atol=1e-5)
    assert torch.allclose(weight.grad, leaves[1].grad, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_any_integers_are_targets(backend, device, dtype):
    p = problem(device, n=9)
    targets = torch.tensor([0, 1, 99, 100, 101, 120, 126, 127, 5], device=device)
    if dtype == torch.uint8:
        targets[3] = 156  # what -100 is in 8 bits without a sign
    want = linear_logprobs(p["hidden"], p["weight"], targets, backend=backend)
    got = linear_logprobs(p["hidden"], p["weight"], targets.to(dtype), backend=backend)
    assert torch.equal(got.logprobs, want.logprobs) and (got.logprobs != 0).all()


def test_two_runs_are_bit_equal_and_graphs_can_be_used_twice(backend, device):
    p = problem(device, torch.float16)
    a, b = (run(linear_logprobs, p, OPTIONS["everything"], backend=backend) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    hidden = p["hidden"].requires_grad_()
    out = linear_logprobs(hidden, p["weight"], p["targets"], backend=backend)
    grads = [torch.autograd.grad(out.logprobs.sum(), hidden, retain_graph=True)[0] for _ in "12"]
    assert torch.equal(*grads)


def test_while_a_graph_is_captured_nobody_waits_for_a_number_of_rows(backend, device, monkeypatch):
    """All rows stay, blank where they do not count, NaN or not: the same results."""
    p = problem(device)
    args, keywords = arguments(p, OPTIONS["everything"])
    hidden, weight, targets, *others = args
    hidden = hidden.detach().clone()
    hidden[targets == -100] = NAN
    leaves = [x.requires_grad_() for x in (hidden, weight, keywords["bias"])]
    g = torch.randn(3, len(targets), device=device)
    g[:, ::5] = 0

    def run():
        out = linear_logprobs(hidden, weight, targets, *others, **keywords, backend=backend)
        loss = sum((a * b).sum() for a, b in zip(out, g) if a is not None)
        return *out, *torch.autograd.grad(loss, leaves)

    want = run()
    monkeypatch.setattr(dispatch, "capturing", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    for got, expected in zip(run(), want):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_forward_walks_the_vocabulary_once(device, monkeypatch):
    if not backends()["triton"]:
        pytest.skip(backends()["triton"].reason)
    from gikernels.vocabulary import linear_logprobs_triton as half

    launches = []

    class Counting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(self.kernel.__name__)
            return self.kernel[grid]

    for name in ("forward_kernel", "merge_kernel"):
        monkeypatch.setattr(half, name, Counting(getattr(half, name)))
    p = problem(device)
    args, keywords = arguments(p, OPTIONS["everything"])
    linear_logprobs(*args, **keywords, backend="triton")
    assert launches == ["forward_kernel", "merge_kernel"]


@pytest.mark.parametrize("ignored", [range(0), range(70), range(33, 97), range(100)])
def test_blocks_of_ignored_rows_are_passed_over(device, ignored, monkeypatch):
    """Whole blocks, in front, in the middle and all of them: what their tiles would have left is
    not read; and several launches, as a small workspace asks for, are as one."""
    if not backends()["triton"]:
        pytest.skip(backends()["triton"].reason)
    from gikernels.vocabulary import launch
    from gikernels.vocabulary import linear_logprobs_triton as half

    p = problem(device, n=100)
    hidden, weight, targets = p["hidden"], p["weight"], p["targets"].clamp(min=0)
    targets[list(ignored)] = -100
    rows = launch.blocks_for(hidden, weight).rows
    blocks, count = half._active_blocks(targets, -100, rows)
    want = [b for b in range(-(-100 // rows)) if (targets[b * rows : (b + 1) * rows] >= 0).any()]
    assert blocks[: int(count)].tolist() == want
    assert sorted(blocks.tolist()) == list(range(-(-100 // rows)))
    expected = linear_logprobs(hidden, weight, targets, backend="reference")
    for most in (1 << 30, 1):
        monkeypatch.setattr(half, "workspace_for", lambda device, most=most: most)
        monkeypatch.setattr(launch, "GROUP", 1)
        got = linear_logprobs(hidden, weight, targets, backend="triton")
        for a, b in zip(got[:2], expected[:2]):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
            assert not a[list(ignored)].any()


# --- memory -------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Shapes of all floats that any operation makes, those inside ours too; views are not made."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = {"linear_logprobs": MODULE._op, "linear_logprobs_backward": MODULE._backward_op}
        inner = ours.get(func._overloadpacket.__name__) if func.namespace == "gikernels" else None
        if inner is not None:
            with self:
                return inner._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        given = {storage(x) for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point() and storage(x) not in given:
                self.shapes.add(tuple(x.shape))
        return out


def storage(x):
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("weight_grad", [True, False])
def test_no_tensor_of_rows_by_vocabulary(backend, device, weight_grad):
    n, d, v, size = 96, 8, 1200, 120_000
    p = problem(device, n=n, d=d, v=v)
    args, keywords = arguments(p, {"ref": True})
    args[0].requires_grad_(), args[1].requires_grad_(weight_grad)
    with workspace(size), Allocations() as seen:
        out = linear_logprobs(*args, **keywords, backend=backend)
        sum(x.sum() for x in out).backward()
    largest = max(torch.Size(s).numel() for s in seen.shapes)
    assert (n, d) in seen.shapes  # what happens inside the operations is seen
    assert largest < n * v / 2 and largest <= max(size // 4, v * max(d, 24))
    # A frozen weight costs no dW, nor any part of one.
    assert ((v, d) in seen.shapes) == weight_grad


PEAK = """
import json, resource, sys, torch
import gikernels
torch.manual_seed(0)
n, d, v = 2048, 256, 32768
hidden = torch.randn(n, d).requires_grad_()
weight = (torch.randn(v, d) / 16).requires_grad_()
targets = torch.randint(0, v, (n,))

def plain(hidden, weight, targets):
    logp = torch.nn.functional.linear(hidden, weight).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

f = plain if sys.argv[1] == "plain" else gikernels.linear_logprobs
few = torch.randn(64, d).requires_grad_()  # what the libraries allocate once
sum(x.sum() for x in f(few[:4], few, targets[:4] % 64)[:2]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
logprobs, entropy = f(hidden, weight, targets)[:2]
(logprobs.sum() + 0.1 * entropy.sum()).backward()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
def test_cpu_peak_memory_is_at_most_12_percent_of_plain_torch():
    """KiB above the inputs, of forward + backward, the gradients included; each in a process."""
    peak = {
        name: json.loads(subprocess.check_output([sys.executable, "-c", PEAK, name], text=True))
        for name in ("plain", "ours")
    }
    print(f"peak extra memory, KiB: {peak}, {peak['ours'] / peak['plain']:.1%}")
    assert peak["ours"] <= 0.12 * peak["plain"], peak


# --- PyTorch's own machinery --------------------------------------------------------------------


def test_opcheck(backend, device):
    p = problem(device, n=8, d=16, v=140, ref_d=8)
    hidden, weight, bias = (p[k].requires_grad_() for k in ("hidden", "weight", "bias"))
    op = torch.ops.gikernels
    rest = (1.0, p["temperature"], bias, 4.0, 0.9, p["ref_hidden"], p["ref_weight"], -100, backend)
    args = (hidden, weight, p["targets"], *rest)
    torch.library.opcheck(op.linear_logprobs, args)
    none = (1.0, None, None, None, 1.0, None, None, -100, backend)
    torch.library.opcheck(op.linear_logprobs, (hidden, weight, p["targets"], *none))
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    logprobs, _, _, stats = op.linear_logprobs(*args)
    g = torch.ones(8, device=device)
    torch.library.opcheck(
        op.linear_logprobs_backward, (g, None, g, logprobs, stats, *args, [True, False, True])
    )


def test_compile_fullgraph(backend, device):
    p = problem(device, n=9)
    leaves = [p["hidden"].requires_grad_(), p["weight"].requires_grad_()]

    def f(hidden, weight):
        out = linear_logprobs(
            hidden.view(3, 3, -1), weight, p["targets"].view(3, 3), 0.7, backend=backend
        )
        return out.logprobs.sum() - 0.1 * out.entropy.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(g(*leaves), leaves) for g in (f, compiled))):
        assert torch.equal(a, b)


def test_autocast(backend, device):
    """At least as accurate as F.linear; and bf16 hidden states with an fp32 weight work, as they do
    outside."""
    p = problem(device)
    p["bias"] = p["bias"].nan_to_num(neginf=-50)
    options = {"bias": True, "ref": True}
    rounded = {k: x.bfloat16() if x.is_floating_point() else x for k, x in p.items()}
    want = truth(p, options)
    with torch.autocast(device, torch.bfloat16):
        got = run(linear_logprobs, p, options, backend=backend)
        same = run(plain, p, options)
        mixed = run(linear_logprobs, p | {"hidden": rounded["hidden"]}, options, backend=backend)
    for name in want:
        assert error(got[name], want[name]) <= error(same[name], want[name]) + 4e-3, name
        assert error(mixed[name], got[name]) < 1e-2, name
    with pytest.raises(ValueError, match="weight"):
        linear_logprobs(p["hidden"], rounded["weight"], p["targets"], backend=backend)


# --- bad input ----------------------------------------------------------------------------------


def bad(**changes):
    p = problem("cpu", n=4, d=8, v=20)
    call = {"hidden": p["hidden"], "weight": p["weight"], "targets": p["targets"]}
    return lambda: linear_logprobs(**(call | {k: f(p) for k, f in changes.items()}))


BAD = {
    "hidden": [
        bad(hidden=lambda p: [1.0]),
        bad(hidden=lambda p: p["hidden"].long()),
        bad(hidden=lambda p: torch.tensor(1.0)),
    ],
    "weight": [
        bad(weight=lambda p: p["weight"][:, :7]),
        bad(weight=lambda p: p["weight"][:0]),
        bad(weight=lambda p: p["weight"].double()),
        bad(weight=lambda p: p["weight"][0]),
    ],
    "targets": [
        bad(targets=lambda p: p["targets"][:3]),
        bad(targets=lambda p: p["targets"].unsqueeze(1)),
        bad(targets=lambda p: p["targets"].float()),
        bad(targets=lambda p: torch.tensor([0, 20, 1, 1])),
        bad(targets=lambda p: torch.tensor([0, -1, 1, 1])),
    ],
    "temperature": [
        bad(temperature=lambda p: 0.0),
        bad(temperature=lambda p: "hot"),
        bad(temperature=lambda p: p["temperature"][:2]),
        bad(temperature=lambda p: -p["temperature"]),
    ],
    "bias": [bad(bias=lambda p: p["bias"][:3]), bad(bias=lambda p: p["bias"].double())],
    "softcap": [bad(softcap=lambda p: 0.0), bad(softcap=lambda p: -3)],
    "logit_scale": [bad(logit_scale=lambda p: NAN)],
    "ignore_index": [bad(ignore_index=lambda p: 1.5)],
    "ref": [
        bad(ref=lambda p: p["ref_hidden"]),
        bad(ref=lambda p: (p["ref_hidden"],)),
        bad(ref=lambda p: (p["ref_hidden"][:2], p["ref_weight"])),
        bad(ref=lambda p: (p["ref_hidden"], p["ref_weight"][:9])),
        bad(ref=lambda p: (p["ref_hidden"], p["ref_weight"].double())),
    ],
    "backend": [bad(backend=lambda p: "magic")],
}


@pytest.mark.parametrize("name, call", [(k, f) for k, fs in BAD.items() for f in fs])
def test_bad_input_raises_and_names_the_argument(name, call):
    with pytest.raises(ValueError, match=name):
        call()


def test_a_sharded_weight_raises_with_advice():
    class Sharded(torch.Tensor):
        placements = device_mesh = "mesh"

    p = problem("cpu", n=4)
    with pytest.raises(ValueError, match="inside the head module's forward"):
        linear_logprobs(p["hidden"], p["weight"].as_subclass(Sharded), p["targets"])


def test_float64_is_not_for_triton():
    p = problem("cpu", torch.float64, n=4)
    with pytest.raises(ValueError, match="triton"):
        linear_logprobs(p["hidden"], p["weight"], p["targets"], backend="triton")


# --- shapes and masks ---------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 20),
    v=st.integers(10, 2500),
    ignored=st.floats(0, 1),
    options=st.sampled_from(list(OPTIONS.values())),
    seed=st.integers(0, 99),
)
def test_any_shape_on_the_cpu(n, d, v, ignored, options, seed):
    p = problem("cpu", n=n, d=d, v=v, ref_d=5, seed=seed)
    p["targets"][torch.rand(n) < ignored] = -100
    with workspace(1 << 16):
        got = run(linear_logprobs, p, options, backend="reference")
    want = truth(p, options)
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-4, rtol=1e-4), name


@needs_triton
@settings(max_examples=6, deadline=None)
@given(n=st.integers(1, 80), d=st.integers(1, 70), v=st.integers(10, 400), seed=st.integers(0, 99))
def test_any_shape_in_triton(n, d, v, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = problem(device, n=n, d=d, v=v, ref_d=5, seed=seed)
    got = run(linear_logprobs, p, OPTIONS["everything"], backend="triton")
    want = truth(p, OPTIONS["everything"])
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-4, rtol=1e-4), name


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n, d, v", [(8192, 4096, 128256), (65536, 1024, 151936), (777, 896, 151937)]
)
def test_real_sizes(n, d, v, dtype):
    """65536 x 151936 passes 2^31. Truth is float64 on a sample of rows and of the vocabulary."""
    from gikernels.vocabulary import linear_logprobs_triton

    torch.manual_seed(0)
    hidden = torch.randn(n, d, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(v, d, device="cuda", dtype=dtype) / d**0.5).requires_grad_()
    targets = torch.randint(0, v, (n,), device="cuda")
    targets[::3] = -100
    g = torch.randn(2, n, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = linear_logprobs(hidden, weight, targets, backend="triton")
    (out.logprobs * g[0] + out.entropy * g[1]).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    kept = int((targets != -100).sum())
    gradients = (hidden.grad.numel() + weight.grad.numel()) * dtype.itemsize
    compact = kept * d * dtype.itemsize  # the rows that have a gradient
    room = workspace_for(hidden.device)
    _, wide = linear_logprobs_triton._slab_shape(kept, v, room // dtype.itemsize)
    slab = 4 * wide * d if wide * d < 1 << 24 else 0  # of a small dW, before it is rounded
    assert extra - gradients - compact - 4 * kept * d - slab < room + (44 << 20)

    with torch.no_grad():
        rows = torch.cat([torch.arange(0, n, n // 64), torch.tensor([n - 1])]).cuda()
        want = reference.linear_logprobs(hidden[rows].double(), weight.double(), targets[rows])
        for a, b in zip(out[:2], want[:2]):
            assert (a[rows] - b).abs().max() < 1e-3
        # dW of some tokens, the last ones among them, from all rows: chunked in float64.
        some = torch.cat([torch.arange(0, v, v // 16), torch.tensor([v - 1])]).cuda()
        dw = torch.zeros(len(some), d, device="cuda", dtype=torch.float64)
        dx = torch.empty(len(rows), d, device="cuda", dtype=torch.float64)
        for chunk in torch.arange(n, device="cuda").split(512):
            kept_chunk = chunk[targets[chunk] != -100]
            z = (hidden[kept_chunk].float() @ weight.float().T).log_softmax(-1)
            c = -g[0][kept_chunk] - g[1][kept_chunk] * out.entropy[kept_chunk].detach()
            dz = z.exp() * (c[:, None] - g[1][kept_chunk, None] * z)
            dz.scatter_add_(1, targets[kept_chunk, None], g[0][kept_chunk, None])
            dw += dz[:, some].double().T @ hidden[kept_chunk].double()
            for i, row in enumerate(rows.tolist()):
                at = (kept_chunk == row).nonzero().flatten()
                if len(at):
                    dx[i] = dz[at[0]].double() @ weight.double()
        dx[targets[rows] == -100] = 0
    tolerance = 2 * torch.finfo(dtype).eps
    assert error(weight.grad[some].double(), dw) < tolerance
    assert error(hidden.grad[rows].double(), dx) < tolerance

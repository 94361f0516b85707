"""linear_gather_logprobs: values and gradients against float64, on each backend."""

import pytest
import torch
import torch.nn.functional as F

from gikernels import backends, linear_gather_logprobs, linear_logprobs, reference
from gikernels.backends import dispatch
from gikernels.backends.settings import workspace

NAN, INF = float("nan"), float("inf")
N, D, V, K = 11, 24, 300, 7

needs_triton = pytest.mark.skipif(not backends()["triton"], reason=backends()["triton"].reason)


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def backend(request):
    return request.param


OPTIONS = {
    "plain": (),
    "temperature": ("temperature",),
    "all": ("temperature", "bias", "softcap", "logit_scale"),
}


def problem(device, dtype=torch.float32):
    """Some ids twice, some missing; a row without any holds NaN; the last row is confident."""
    p = {"hidden": torch.randn(N, D), "weight": torch.randn(V, D) / 3, "bias": torch.randn(V)}
    p["bias"][-9:] = -INF
    p["ids"] = torch.randint(V - 9, (N, K))
    p["ids"][::3, 2] = -1
    p["ids"][:, 5] = p["ids"][:, 1]
    p["weight"][p["ids"][-1, 0]] = p["hidden"][-1] / 2
    p["temperature"] = torch.rand(N) + 0.5
    p = {k: x.to(dtype) if k in ("hidden", "weight", "bias") else x for k, x in p.items()}
    p["ids"][4] = -1
    p["hidden"][4], p["temperature"][4] = NAN, NAN
    p |= {"softcap": 6.0, "logit_scale": 1.3, "g": torch.randn(N, K)}
    p["g"][7] = 0
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in p.items()}


def run(f, p, options, **extra):
    """Values and gradients by name, in float64."""
    p = {k: x.detach().clone() if isinstance(x, torch.Tensor) else x for k, x in p.items()}
    names = ["hidden", "weight"] + ["bias"] * ("bias" in options)
    for name in names:
        p[name].requires_grad_()
    rest = {k: p[k] for k in options}
    out = f(p["hidden"], p["weight"], p["ids"], **rest, **extra)
    grads = torch.autograd.grad((out * p["g"].to(out.dtype)).sum(), [p[k] for k in names])
    found = {"logprobs": out, **{"d" + k: x for k, x in zip(names, grads)}}
    return {k: x.detach().double() for k, x in found.items()}


def plain(hidden, weight, ids, temperature=1.0, *, bias=None, softcap=None, logit_scale=1.0):
    """Logits in the dtype of the inputs, everything after them in fp32."""
    kept = ids.ge(0).any(1)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.masked_fill(~kept, 1)
    z = F.linear(hidden.masked_fill(~kept[:, None], 0), weight, bias).float()
    z = reference.transform_logits(z, temperature, softcap=softcap, logit_scale=logit_scale)
    return z.log_softmax(-1).gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0)


def truth(p, options):
    exact = {k: x.double() if getattr(x, "is_floating_point", bool)() else x for k, x in p.items()}
    return run(reference.linear_gather_logprobs, exact, options)


def error(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


EPS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


# Workspaces of many chunks, and of one.
CASES = [
    (torch.float32, "plain", 20_000),
    (torch.float32, "all", 1 << 22),
    (torch.float16, "temperature", 1 << 22),
    (torch.bfloat16, "all", 20_000),
]


@pytest.mark.parametrize(("dtype", "options", "size"), CASES, ids=str)
def test_values_and_gradients(backend, device, dtype, options, size, poisoned_empty):
    p, options = problem(device, dtype), OPTIONS[options]
    want, same = truth(p, options), run(plain, p, options)
    with workspace(size):
        got = run(linear_gather_logprobs, p, options, backend=backend)
    for name in want:
        eps = EPS[dtype] if name.startswith("d") else EPS[torch.float32]
        assert error(got[name], want[name]) <= 2 * error(same[name], want[name]) + eps, name
    assert (got["logprobs"][p["ids"] < 0] == 0).all()
    assert (got["dhidden"][[4, 7]] == 0).all()  # no token, no upstream gradient


def test_one_id_is_the_log_probability(backend, device):
    """K = 1 and linear_logprobs are the same thing; where the policy is confident, too."""
    p = problem(device)
    ids = p["ids"][:, :1].masked_fill(p["hidden"][:, :1].isnan(), -1)
    found = []
    for f, of in ((linear_gather_logprobs, ids), (linear_logprobs, ids[:, 0])):
        leaves = [p[k].clone().requires_grad_() for k in ("hidden", "weight")]
        more = {} if of.dim() == 2 else {"ignore_index": -1}
        out = f(*leaves, of, backend=backend, **more)
        out = out if of.dim() == 2 else out.logprobs[:, None]
        found.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    assert found[0][0][-1] > -3e-2  # confident it is


def test_gradcheck():
    p = problem("cpu", torch.float64)
    rows = torch.tensor([0, 3, 4, 5])
    hidden = p["hidden"][rows].nan_to_num()[:, :4]
    weight, bias = p["weight"][:40, :4].contiguous(), p["bias"][:40]
    ids = p["ids"][rows].clamp(max=39)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]

    def f(h, w, b):
        t = p["temperature"][rows].double().nan_to_num(1)
        return linear_gather_logprobs(h, w, ids, t, bias=b, softcap=6.0, logit_scale=1.3)

    assert torch.autograd.gradcheck(f, leaves)


def test_machinery(backend, device):
    """opcheck, compile(fullgraph), a graph used twice, bit-equal runs, autocast."""
    p = problem(device)
    p["temperature"] = p["temperature"].nan_to_num(1)
    leaves = [p[k].nan_to_num().requires_grad_() for k in ("hidden", "weight")]
    some = [x.detach()[:4].requires_grad_() for x in leaves[:1]] + leaves[1:]
    args = (*some, p["ids"][:4], p["temperature"][:4], p["bias"], 6.0, 0.9, backend)
    torch.library.opcheck(torch.ops.gikernels.linear_gather_logprobs, args)

    def f(h, w):
        return linear_gather_logprobs(h, w, p["ids"], 0.7, backend=backend)

    out, compiled = f(*leaves), torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(out, compiled)
    want = torch.autograd.grad(out, leaves, p["g"], retain_graph=True)
    for again in (out, compiled):
        got = torch.autograd.grad(again, leaves, p["g"])
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    with torch.autocast(device, torch.bfloat16):
        assert error(f(*leaves).double(), out.double()) < 1e-2


def test_only_what_is_wanted(backend, device):
    p = problem(device)
    hidden = p["hidden"].nan_to_num().requires_grad_()
    linear_gather_logprobs(hidden, p["weight"], p["ids"], backend=backend).sum().backward()
    assert hidden.grad.abs().sum() > 0
    weight = p["weight"].requires_grad_()
    for ids in (p["ids"][:0], p["ids"][:, :0], p["ids"].clamp(max=-1)):
        rows = hidden.detach()[: len(ids)]
        out = linear_gather_logprobs(rows, weight, ids, backend=backend)
        assert out.shape == ids.shape and (out == 0).all()
        (g,) = torch.autograd.grad(out.sum(), weight)
        assert (g == 0).all()


def test_while_a_graph_is_captured_nobody_waits(backend, device, monkeypatch):
    p = problem(device)
    want = run(linear_gather_logprobs, p, OPTIONS["all"], backend=backend)
    monkeypatch.setattr(dispatch, "capturing", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    got = run(linear_gather_logprobs, p, OPTIONS["all"], backend=backend)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden", {"hidden": torch.zeros(D)}),
        ("hidden", {"hidden": torch.zeros(N, D).long()}),
        ("weight", {"weight": torch.zeros(V, D + 1)}),
        ("weight", {"weight": torch.zeros(V, D).half()}),
        ("ids", {"ids": torch.zeros(N).long()}),
        ("ids", {"ids": torch.zeros(N + 1, 2).long()}),
        ("ids", {"ids": torch.zeros(N, 2)}),
        ("ids", {"ids": torch.full((N, 2), V)}),
        ("ids", {"ids": torch.full((N, 2), -2)}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": torch.zeros(N)}),
        ("temperature", {"temperature": torch.ones(N, K)}),
        ("bias", {"bias": torch.zeros(V - 1)}),
        ("softcap", {"softcap": -1.0}),
        ("logit_scale", {"logit_scale": NAN}),
        ("backend", {"backend": "magic"}),
    ],
)
def test_bad_input_raises_and_names_the_argument(name, change):
    given = {"hidden": torch.zeros(N, D), "weight": torch.zeros(V, D)}
    given["ids"] = torch.zeros(N, K).long()
    with pytest.raises(ValueError, match=name):
        linear_gather_logprobs(**(given | change))

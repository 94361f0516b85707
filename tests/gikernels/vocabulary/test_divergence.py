"""linear_divergence: loss and gradients against float64, on each backend and of each kind."""

import pytest
import torch
import torch.nn.functional as F

from gikernels import backends, linear_divergence, linear_logprobs, reference
from gikernels.backends import dispatch
from gikernels.backends.settings import workspace
from tests.gikernels.vocabulary.test_gather_logprobs import EPS, error

NAN, INF = float("nan"), float("inf")
N, D, V = 11, 24, 300

needs_triton = pytest.mark.skipif(not backends()["triton"], reason=backends()["triton"].reason)


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def backend(request):
    return request.param


KINDS = ("reverse", "forward", "jsd")
OPTIONS = {
    "plain": ("denom",),
    "all": ("denom_of_rows", "temperature", "bias", "softcap", "logit_scale", "mix"),
}


def problem(device, dtype=torch.float32, apart=1.0):
    """Masked rows hold NaN. `apart`: how different the two models are."""
    p = {"hidden": torch.randn(N, D), "weight": torch.randn(V, D) / 3, "bias": torch.randn(V)}
    p["ref_hidden"] = p["hidden"] + apart * torch.randn(N, D)
    p["ref_weight"] = p["weight"].clone()
    p["mask"] = torch.rand(N) < 0.7
    p["temperature"] = torch.rand(N) + 0.5
    p["denom_of_rows"] = 10 + 5 * torch.rand(N)
    for name in ("hidden", "ref_hidden", "temperature", "denom_of_rows"):
        p[name][~p["mask"]] = NAN
    rounded = ("hidden", "weight", "bias", "ref_hidden", "ref_weight")
    p = {k: x.to(dtype) if k in rounded else x for k, x in p.items()}
    p |= {"softcap": 6.0, "logit_scale": 1.3, "mix": 0.3, "denom": 13.0}
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in p.items()}


def run(f, p, kind, options, **extra):
    """Loss and gradients by name, in float64."""
    p = {k: x.detach().clone() if isinstance(x, torch.Tensor) else x for k, x in p.items()}
    names = ["hidden", "weight"] + ["bias"] * ("bias" in options)
    for name in names:
        p[name].requires_grad_()
    rest = {"denom" if k == "denom_of_rows" else k: p[k] for k in options}
    ref = (p["ref_hidden"], p["ref_weight"])
    out = f(p["hidden"], p["weight"], ref, kind=kind, mask=p["mask"], **rest, **extra)
    assert torch.equal(out.metrics["divergence"], out.loss.detach())
    grads = torch.autograd.grad(out.loss * 0.7, [p[k] for k in names])
    found = {"loss": out.loss, **{"d" + k: x for k, x in zip(names, grads)}}
    return {k: x.detach().double() for k, x in found.items()}


def plain(hidden, weight, ref, *, mask, bias=None, **rest):
    """Logits in the dtype of the inputs, everything after them by the specification in fp32."""

    def logits(x, w, b=None):
        return F.linear(x.masked_fill(~mask[:, None], 0), w, b).float()

    eye = torch.eye(V, device=hidden.device)  # the specification, given logits
    z, ref_z = logits(hidden, weight, bias), logits(*ref)
    return reference.linear_divergence(z, eye, (ref_z, eye), mask=mask, **rest)


def truth(p, kind, options):
    exact = {k: x.double() if getattr(x, "is_floating_point", bool)() else x for k, x in p.items()}
    return run(reference.linear_divergence, exact, kind, options)


# How different the models are: close, a KL is a difference of much larger terms. Workspaces of many
# chunks, and of one.
CASES = [
    (torch.float32, "plain", 1.0, 20_000),
    (torch.float32, "all", 0.03, 1 << 22),
    (torch.float16, "plain", 0.03, 1 << 22),
    (torch.bfloat16, "all", 1.0, 20_000),
]


@pytest.mark.parametrize(("dtype", "options", "apart", "size"), CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(backend, device, kind, dtype, options, apart, size, poisoned_empty):
    p, options = problem(device, dtype, apart), OPTIONS[options]
    want, same = truth(p, kind, options), run(plain, p, kind, options)
    with workspace(size):
        got = run(linear_divergence, p, kind, options, backend=backend)
    for name in want:
        eps = EPS[dtype] if name.startswith("d") else EPS[torch.float32]
        bound = 2 * error(same[name], want[name]) + eps / apart
        assert error(got[name], want[name]) <= bound, name
    assert (got["dhidden"][~p["mask"]] == 0).all()


def test_reverse_is_the_kl_of_linear_logprobs(backend, device):
    p = problem(device)
    want = run(linear_divergence, p, "reverse", ("denom",), backend=backend)
    leaves = [p[k].clone().requires_grad_() for k in ("hidden", "weight")]
    targets = torch.where(p["mask"], 0, -100)
    ref = (p["ref_hidden"], p["ref_weight"])
    loss = linear_logprobs(*leaves, targets, ref=ref, backend=backend).kl.sum() / 13
    got = [loss, *torch.autograd.grad(loss * 0.7, leaves)]
    for a, b in zip(got, want.values()):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-5)


def test_tokens_that_cannot_be_drawn(backend, device):
    """By the policy: reverse and jsd stay finite, forward is infinite; its gradient is p - q."""
    p = problem(device)
    p["bias"][-9:] = -INF
    for kind in KINDS:
        got = run(linear_divergence, p, kind, ("denom", "bias"), backend=backend)
        assert got["loss"].isfinite() == (kind != "forward") and got["loss"] > 0
        assert all(got[k].isfinite().all() for k in ("dhidden", "dweight", "dbias"))
        if kind != "forward":
            want = truth(p, kind, ("denom", "bias"))
            assert error(got["loss"], want["loss"]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    p = problem("cpu", torch.float64)
    some = p["mask"].nonzero().flatten()[:3]
    hidden, ref_hidden = p["hidden"][some][:, :4], p["ref_hidden"][some][:, :4]
    weight, ref_weight = p["weight"][:30, :4].contiguous(), p["ref_weight"][:30, :4]
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, p["bias"][:30])]

    def f(h, w, b):
        return linear_divergence(
            h, w, (ref_hidden, ref_weight), kind=kind, mix=0.3, mask=torch.ones(3) > 0, denom=2,
            temperature=torch.tensor([0.5, 1, 2]), bias=b, softcap=6.0, logit_scale=1.3,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(f, leaves)


def test_machinery(backend, device):
    """opcheck, compile(fullgraph), a graph used twice, autocast, nothing that is not wanted."""
    p = problem(device)
    leaves = [p[k].nan_to_num().requires_grad_() for k in ("hidden", "weight")]
    ref = (p["ref_hidden"].nan_to_num(), p["ref_weight"])
    some = [x[:3] for x in (leaves[0], ref[0], p["mask"])]
    denom, one = torch.tensor(13.0, device=device), torch.ones(3, device=device)
    for yes, weights, kind in ((True, one / 2, "jsd"), (False, None, "reverse")):
        heads = [x.detach()[:60].requires_grad_(yes) for x in (leaves[1], p["bias"])]
        args = (some[0].detach().requires_grad_(), heads[0], some[1], ref[1][:60], some[2], denom)
        args = (*args, weights, one, heads[1], 6.0, 0.9, kind, 0.3, backend, [True, yes, yes])
        torch.library.opcheck(torch.ops.gikernels.linear_divergence, args)

    def f(h, w):
        return linear_divergence(
            h, w, ref, kind="jsd", mask=p["mask"], denom=9, backend=backend
        ).loss

    out, compiled = f(*leaves), torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(out, compiled)
    want = torch.autograd.grad(3 * out, leaves, retain_graph=True)
    kept = [g.clone() for g in want]
    for again in (out, compiled):
        got = torch.autograd.grad(3 * again, leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, kept))
    assert all(torch.equal(a, b) for a, b in zip(want, kept))  # nobody wrote into them
    with torch.autocast(device, torch.bfloat16):
        assert error(f(*leaves).double(), out.double()) < 1e-2
    with torch.no_grad():
        assert torch.equal(f(*leaves), out) and not f(*leaves).requires_grad


def test_nothing_to_do(backend, device):
    p = problem(device)
    weight = p["weight"].requires_grad_()
    for n in (0, N):
        rows = [p[k][:n].nan_to_num() for k in ("hidden", "ref_hidden")]
        mask = torch.zeros(n, dtype=torch.bool, device=device)
        out = linear_divergence(rows[0], weight, (rows[1], p["ref_weight"]), mask=mask, denom=1,
                                backend=backend)  # fmt: skip
        out.loss.backward()
        assert out.loss == 0 and (weight.grad == 0).all()


def test_while_a_graph_is_captured_nobody_waits(backend, device, monkeypatch):
    p = problem(device)
    want = run(linear_divergence, p, "jsd", OPTIONS["all"], backend=backend)
    monkeypatch.setattr(dispatch, "capturing", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    got = run(linear_divergence, p, "jsd", OPTIONS["all"], backend=backend)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden", {"hidden": torch.zeros(D)}),
        ("weight", {"weight": torch.zeros(V, D + 1)}),
        ("ref", {"ref": None}),
        ("ref", {"ref": torch.zeros(N, D)}),
        (r"ref\[0\]", {"ref": (torch.zeros(N + 1, D), torch.zeros(V, D))}),
        (r"ref\[1\]", {"ref": (torch.zeros(N, D), torch.zeros(V + 1, D))}),
        ("kind", {"kind": "kl"}),
        ("mix", {"kind": "jsd", "mix": 0.0}),
        ("mix", {"kind": "jsd", "mix": 1.0}),
        ("mask", {"mask": torch.ones(N)}),
        ("mask", {"mask": torch.ones(N + 1) > 0}),
        ("denom", {"denom": 0}),
        ("denom", {"denom": torch.ones(2)}),
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": torch.zeros(N)}),
        ("bias", {"bias": torch.zeros(V - 1)}),
        ("softcap", {"softcap": 0.0}),
        ("logit_scale", {"logit_scale": INF}),
        ("backend", {"backend": "magic"}),
    ],
)
def test_bad_input_raises_and_names_the_argument(name, change):
    given = {"hidden": torch.zeros(N, D), "weight": torch.zeros(V, D), "denom": 3}
    given |= {"mask": torch.ones(N) > 0, "ref": (torch.zeros(N, D), torch.zeros(V, D))}
    with pytest.raises(ValueError, match=name):
        linear_divergence(**(given | change))

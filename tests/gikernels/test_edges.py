"""What the operations do where PyTorch's machinery meets them: second derivatives, forward mode,
torch.func, tensors on no device, mixed precision, numbers that are not Python's."""

import math

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

import gikernels as gk
from gikernels import reference as ref
from gikernels.vocabulary.formed import BLOCK, scaled
from tests.gikernels.test_compile import CASES, flat

D, V = 6, 11


def head(n=8):
    return torch.randn(n, D, requires_grad=True), torch.randn(V, D), torch.arange(n) % V


# --- derivatives --------------------------------------------------------------------------------


def losses(x, w, y):
    """One scalar of each operation that has a gradient."""
    n = len(x)
    old, mask = torch.full((n,), -2.0), torch.ones(n, dtype=torch.bool)
    return {
        "linear_logprobs": lambda: gk.linear_logprobs(x, w, y).logprobs.sum(),
        "logprobs": lambda: gk.logprobs(x @ w.T, y).logprobs.sum(),
        "linear_policy_loss": lambda: (
            gk.linear_policy_loss(x, w, y, old, old, mask=mask, denom=8.0).loss
        ),
    }


@pytest.mark.parametrize("name", losses(*head()))
def test_a_penalty_on_the_gradient_raises_and_is_never_dropped(name):
    x, w, y = head()
    loss = losses(x, w, y)[name]()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        (loss + gradient.square().sum()).backward()


def test_a_graph_made_of_gradients_of_the_policy_loss_has_their_values():
    x, w, y = head()
    plain = torch.autograd.grad(losses(x, w, y)["linear_policy_loss"](), x)
    kept = torch.autograd.grad(losses(x, w, y)["linear_policy_loss"](), x, create_graph=True)
    assert torch.equal(plain[0], kept[0])


@pytest.mark.parametrize("name", ["linear_logprobs", "logprobs", "linear_policy_loss"])
def test_forward_mode_and_torch_func_are_refused_by_name(name):
    x, w, y = head()
    x = x.detach()
    argument = "logits" if name == "logprobs" else "hidden"
    with pytest.raises(NotImplementedError, match=f"{argument}: got a tangent"):
        torch.func.jvp(lambda x: losses(x, w, y)[name](), (x,), (x,))
    with pytest.raises(NotImplementedError, match=f"{argument}: got a tensor of torch.func.grad"):
        torch.func.grad(lambda x: losses(x, w, y)[name]())(x)


@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("rows, vocab", [(1024, 300), (65536, 40)])
def test_the_gradient_of_the_bias_is_as_exact_as_plain_torchs(rows, vocab, policy):
    """It is a sum over rows, of which there are many."""
    x, w, b = torch.randn(rows, 4), torch.randn(vocab, 4), torch.randn(vocab)
    y, g, mask = torch.randint(vocab, (rows,)), torch.randn(rows), torch.ones(rows).bool()
    with torch.no_grad():
        old = ref.linear_logprobs(x.double(), w.double(), y, bias=b.double()).logprobs

    def gradient(linear_logprobs, linear_policy_loss, dtype, **kw):
        arguments = x.to(dtype), w.to(dtype), y
        bias = b.to(dtype).requires_grad_()
        if policy:
            rest = (old.to(dtype), g.to(dtype))
            out = linear_policy_loss(*arguments, *rest, mask=mask, denom=1.0, bias=bias, **kw)
            loss = out.loss
        else:
            loss = (linear_logprobs(*arguments, bias=bias, **kw).logprobs * g.to(dtype)).sum()
        return torch.autograd.grad(loss, bias)[0].double()

    plain = (ref.linear_logprobs, ref.linear_policy_loss)
    truth = gradient(*plain, torch.float64)
    own = gradient(gk.linear_logprobs, gk.linear_policy_loss, torch.float32, backend="reference")
    theirs = gradient(*plain, torch.float32)
    assert (own - truth).norm() <= 2 * (theirs - truth).norm()


def test_a_half_gradient_is_scaled_without_a_copy_of_it_in_fp32():
    """At a vocabulary of 151936 the copies took a GiB, and more time than the loss."""
    gradient = torch.randn(3000, 100).bfloat16()
    factor = torch.tensor(0.3)
    want = (gradient.float() * factor).bfloat16()
    with torch.profiler.profile(profile_memory=True) as seen:
        got = scaled(gradient, factor, torch.bfloat16, True, "reference")
    assert got is gradient and torch.equal(got, want)
    events = seen.profiler.kineto_results.events()
    taken = [e.nbytes() for e in events if e.name() == "[memory]"]
    assert max(taken) <= 4 * BLOCK < 4 * gradient.numel()


# --- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_tensors_on_no_device(name):
    """On "meta" there are shapes only, and what can be said of them is said: gradients, too."""
    case = CASES[name]
    inputs = case.make(12)
    want = flat(case.call(*inputs, **case.floats))
    with torch.device("meta"):
        meta = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in inputs]
        got = flat(case.call(*meta, **case.floats))
    assert [(t.shape, t.dtype, t.device.type) for t in got] == [
        (t.shape, t.dtype, "meta") for t in want
    ]
    if meta[0].requires_grad:
        sum(t.sum() for t in got if t.requires_grad).backward()
        assert meta[0].grad.shape == meta[0].shape


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_hidden_meets_a_head_kept_in_fp32(half):
    """As CCE and TRL take it; nothing is rounded to 16 bits but what was."""
    x, w, y = head()
    x, bias = x.detach().to(half).requires_grad_(), torch.randn(V).to(half)
    w.requires_grad_()
    gk.linear_logprobs(x, w, y, bias=bias).logprobs.sum().backward()
    assert x.grad.dtype == half and w.grad.dtype == torch.float32
    x32, w32 = x.detach().float().requires_grad_(), w.detach().requires_grad_()
    want = ref.linear_logprobs(x32, w32, y, bias=bias.float()).logprobs
    want.sum().backward()
    torch.testing.assert_close(gk.linear_logprobs(x, w, y, bias=bias).logprobs, want)
    torch.testing.assert_close(w.grad, w32.grad)
    torch.testing.assert_close(x.grad, x32.grad.to(half))
    with pytest.raises(ValueError, match=r"\bweight\b"):
        gk.linear_logprobs(x.detach().float(), w.detach().to(half), y)


def test_sharded_rows_are_refused_by_name():
    mesh = _mesh()
    try:
        x, w, y = head()
        with pytest.raises(ValueError, match=r"hidden: got a DTensor placed \(Shard\(dim=0\)"):
            gk.linear_logprobs(DTensor.from_local(x.detach(), mesh, [Shard(0)]), w, y)
        with pytest.raises(ValueError, match=r"logits: got a DTensor placed .*to_local"):
            gk.logprobs(DTensor.from_local(x.detach(), mesh, [Shard(0)]), y % D)
    finally:
        torch.distributed.destroy_process_group()


def _mesh():
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(2)])
def test_numbers_of_numpy(number):
    x, w, y = head()
    got = gk.linear_logprobs(x, w, y, number, softcap=number, logit_scale=number)
    want = gk.linear_logprobs(x, w, y, *[float(number)], softcap=float(number), logit_scale=number)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="temperature: got float"):
        gk.linear_logprobs(x, w, y, np.float32("nan"))


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0])
@pytest.mark.parametrize("name", ["linear_logprobs", "logprobs", "linear_policy_loss"])
def test_a_bad_temperature_among_those_of_rows_raises_on_the_cpu(name, bad):
    x, w, y = head()
    temperature = torch.ones(8)
    temperature[3] = bad
    t, mask = torch.zeros(8), torch.ones(8).bool()
    calls = {
        "linear_logprobs": lambda: gk.linear_logprobs(x, w, y, temperature),
        "logprobs": lambda: gk.logprobs(x @ w.T, y, temperature),
        "linear_policy_loss": lambda: gk.linear_policy_loss(
            x, w, y, t, t, mask=mask, denom=1, temperature=temperature
        ),
    }
    with pytest.raises(ValueError, match="temperature"):
        calls[name]()

"""`logprobs` against the specification in float64: values and gradients, on both backends."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import gikernels
from gikernels import BackendUnavailable, logprobs, reference
from gikernels.backends import dispatch
from gikernels.backends.settings import workspace

# The interpreter's numpy warns where a GPU computes -inf - -inf without a word.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = math.inf, math.nan
BACKENDS = ("reference", "triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FULL = {"softcap": 20.0, "logit_scale": 1.3, "temperature": 0.7}


def inputs(lead, vocab, dtype, device, *, ref=False, spread=3.0):
    logits = (spread * torch.randn(*lead, vocab)).to(device, dtype)
    targets = torch.randint(vocab, lead, device=device)
    ref_logits = (spread * torch.randn(*lead, vocab)).to(device, dtype) if ref else None
    return logits, targets, ref_logits


def values_and_gradient(fn, logits, targets, grads, **options):
    """What fn returns, and the gradient of sum(grads * results) for the logits."""
    logits = logits.detach().requires_grad_()
    out = [x for x in fn(logits, targets, **options) if x is not None]
    loss = sum((x.double() * g).sum() for x, g in zip(out, grads))
    (gradient,) = torch.autograd.grad(loss, logits)
    return [x.detach() for x in out], gradient


def in_double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_as_good_as_plain(logits, targets, backend, grads=None, eps=2e-6, **options):
    """Values and gradient: at most twice the error of plain fp32 PyTorch, plus eps and an ulp."""
    if grads is None:
        grads = [torch.randn(targets.shape, device=targets.device).double() for _ in range(3)]
    args = (targets, grads)
    truth, true_gradient = values_and_gradient(
        reference.logprobs, logits.double(), *args, **{k: in_double(v) for k, v in options.items()}
    )
    plain, plain_gradient = values_and_gradient(reference.logprobs, logits, *args, **options)
    ours, gradient = values_and_gradient(logprobs, logits, *args, backend=backend, **options)
    names = [*("logprobs", "entropy", "kl")[: len(ours)], "gradient"]
    for name, a, b, c in zip(
        names, [*ours, gradient], [*plain, plain_gradient], [*truth, true_gradient]
    ):
        error, size = (a - c).abs().max().item(), c.abs().max().item()
        allowed = 2 * (b - c).abs().max().item() + eps + 2**-23 * size
        if a.dtype == torch.bfloat16 and dispatch.interpreting() and backend == "triton":
            allowed += size / 128  # the interpreter truncates: one ulp
        assert error <= allowed, f"{name}: error {error:.2e}, plain PyTorch allows {allowed:.2e}"
    assert (ours[0] <= 1e-6).all()
    assert gradient.dtype == logits.dtype and all(x.dtype == torch.float32 for x in ours)
    return ours, gradient


def test_while_a_graph_is_captured_nobody_waits_for_a_number_of_rows(device, monkeypatch):
    """In PyTorch; the kernels never wait. All rows stay, blank where they do not count."""
    logits, targets, ref_logits = inputs((9,), 300, torch.float32, device, ref=True)
    targets[::3] = -100
    logits[::3] = NAN
    grads = torch.randn(3, 9, device=device)
    grads[:, 4] = 0
    options = {"ref_logits": ref_logits, "backend": "reference", **FULL}
    *want, gradient = values_and_gradient(logprobs, logits, targets, grads, **options)
    monkeypatch.setattr(dispatch, "capturing", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    *got, captured = values_and_gradient(logprobs, logits, targets, grads, **options)
    for a, b in zip((*got[0], captured), (*want[0], gradient)):
        assert torch.equal(a, b)


# --- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [{}, FULL, {"logit_scale": -0.5}])
@pytest.mark.parametrize("ref", [False, True])
def test_against_float64(backend, dtype, options, ref, device, poisoned_empty):
    logits, targets, ref_logits = inputs((2, 3), 4103, dtype, device, ref=ref)
    targets[0, 1] = -100
    assert_as_good_as_plain(logits, targets, backend, ref_logits=ref_logits, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (5,)])
def test_temperature_as_a_tensor(backend, shape, device):
    logits, targets, ref_logits = inputs((5,), 300, torch.float32, device, ref=True)
    temperature = 0.5 + torch.rand(shape, device=device)
    assert_as_good_as_plain(
        logits, targets, backend, ref_logits=ref_logits, temperature=temperature, softcap=9.0
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows, vocab", [(1, 1), (1, 40000), (3, 4096), (2, 4097), (20, 3)])
def test_shapes_where_rows_are_shared_split_or_tiny(backend, rows, vocab, device):
    """One row is shared by many programs; 4096 is a whole tile of 2-byte logits."""
    logits, targets, ref_logits = inputs((rows,), vocab, torch.float32, device, ref=True)
    assert_as_good_as_plain(logits, targets, backend, ref_logits=ref_logits)


def test_in_many_chunks(device):
    """32 KiB of workspace is one row of 4 KiB at a time."""
    logits, targets, ref_logits = inputs((7,), 1000, torch.float32, device, ref=True)
    targets[3] = -100
    with workspace(32 << 10):
        assert_as_good_as_plain(logits, targets, "reference", ref_logits=ref_logits, **FULL)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_and_mask(backend, device, data):
    rows, vocab = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9000))
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    dtype = data.draw(st.sampled_from(FLOATS))
    logits, targets, ref_logits = inputs((rows,), vocab, dtype, device, ref=True)
    targets[~kept.to(device)] = -7
    (values, *_), gradient = assert_as_good_as_plain(
        logits, targets, backend, ref_logits=ref_logits, ignore_index=-7
    )
    assert not values[targets == -7].any() and not gradient[targets == -7].any()


# --- hard inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name, change",
    [
        ("peaked", lambda z: z + 80 * (torch.arange(4500, device=z.device) == 7)),
        ("all at -110", lambda z: z / 100 - 110),
        ("offset", lambda z: z + 1e4),
        ("all equal", lambda z: torch.zeros_like(z)),
        ("huge", lambda z: z * 1e4),
    ],
)
def test_adversarial_logits(backend, name, change, device):
    # A running KL of 1e5 is shifted at each new maximum, and each time loses half an ulp: 0.004.
    logits, targets, ref_logits = inputs((4,), 4500, torch.float32, device, ref=name != "huge")
    ref_logits = None if ref_logits is None else change(ref_logits)
    assert_as_good_as_plain(change(logits), targets, backend, ref_logits=ref_logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_token_that_cannot_be_drawn(backend, softcap, device):
    """Padded vocabulary, top-k: -inf adds nothing, and leaves the rest exact."""
    logits, targets, ref_logits = inputs((3,), 5000, torch.float32, device, ref=True)
    for z in (logits, ref_logits):
        z[:, :4200] = -INF  # a whole tile, so that a maximum begins at -inf
        z[1, 4200:4990] = -INF
    targets.clamp_(min=4990)
    ours, gradient = assert_as_good_as_plain(
        logits, targets, backend, ref_logits=ref_logits, softcap=softcap
    )
    assert all(x.isfinite().all() for x in (*ours, gradient))
    if softcap is None:
        assert not gradient[:, :4200].any()
        targets[:] = 0
        assert (logprobs(logits, targets, backend=backend).logprobs == -INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_in_nan_out(backend, value, device):
    logits, targets, ref_logits = inputs((3,), 4500, torch.float32, device, ref=True)
    logits[1, 17] = value
    ours, gradient = values_and_gradient(
        logprobs, logits, targets, [1, 1, 1], ref_logits=ref_logits, backend=backend
    )
    for x in ours:
        assert x.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]
    logits[1] = -INF
    assert logprobs(logits, targets, backend=backend).entropy.isnan().tolist() == [0, 1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_an_ignored_row_is_seen(backend, device, poisoned_empty):
    logits, targets, ref_logits = inputs((3,), 500, torch.float32, device, ref=True)
    temperature = torch.tensor([1.0, NAN, 2.0], device=device)
    logits[1], ref_logits[1], targets[1] = NAN, INF, -100
    ours, gradient = values_and_gradient(
        logprobs,
        logits,
        targets,
        [torch.tensor([1.0, NAN, 1.0], device=device)] * 3,
        temperature=temperature,
        ref_logits=ref_logits,
        backend=backend,
    )
    assert all(x[1] == 0 and x.isfinite().all() for x in ours)
    assert not gradient[1].any() and gradient.isfinite().all() and gradient[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored_and_empty(backend, device, poisoned_empty):
    for rows in (4, 0):
        logits, targets, ref_logits = inputs((rows,), 50, torch.float32, device, ref=True)
        targets[:] = -100
        ours, gradient = values_and_gradient(
            logprobs, logits, targets, [1, 1, 1], ref_logits=ref_logits, backend=backend
        )
        assert all(x.shape == (rows,) and not x.any() for x in ours)
        assert gradient.shape == (rows, 50) and not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided(backend, device):
    """Shifted logits, a transposed vocabulary, and three leading strides; nothing is written to."""
    base = 3 * torch.randn(3, 5, 2, 700, device=device)
    for logits in (
        base[:, :-1, 0],
        base[:, 0, 0].expand(4, 3, 700),
        base[0, 0].repeat(3, 1).T.contiguous().T,
        base.permute(2, 0, 1, 3)[:, :, 1:],
        base[0, 0, 0],
    ):
        targets = torch.randint(700, (*logits.shape[:-1], 2), device=device)[..., 0]
        ref_logits = torch.randn(*logits.shape[:-1], 1400, device=device)[..., ::2]
        before = base.clone()
        assert_as_good_as_plain(logits, targets, backend, ref_logits=ref_logits, **FULL)
        assert torch.equal(base, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_integer_targets_of_any_width(backend, dtype, device):
    logits, targets, _ = inputs((6,), 200, torch.float32, device)
    ours = logprobs(logits, targets.to(dtype), backend=backend)
    assert torch.equal(ours.logprobs, logprobs(logits, targets, backend=backend).logprobs)


# --- registration -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, device):
    logits, targets, ref_logits = inputs((2, 3), 70, torch.float32, device, ref=True)
    targets[0, 0] = -100
    logits.requires_grad_()
    for ref, temperatures in ((None, None), (ref_logits, torch.ones(6, device=device))):
        args = (logits, targets.flatten(), ref, temperatures, 0.7, 9.0, 1.1, -100, backend)
        torch.library.opcheck(torch.ops.gikernels.logprobs.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradcheck(backend, softcap, device):
    if backend == "triton" and softcap:
        pytest.skip("the kernels' tanh is exact to fp32, too coarse for finite differences")
    logits, targets, ref_logits = inputs((3,), 9, torch.float64, device, ref=True, spread=1.0)
    targets[1] = -100

    def fn(x):
        return tuple(
            logprobs(x, targets, 0.7, softcap=softcap, ref_logits=ref_logits, backend=backend)
        )

    assert fn(logits)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(fn, (logits.requires_grad_(),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_graph_breaks(backend, device):
    logits, targets, ref_logits = inputs((2, 3), 70, torch.float32, device, ref=True)

    def step(x):
        out = logprobs(2 * x, targets, 0.7, ref_logits=ref_logits, softcap=9.0, backend=backend)
        return (out.logprobs + out.entropy + out.kl).sum()

    def gradient(fn):
        x = logits.clone().requires_grad_()
        fn(x).backward()
        return x.grad

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled), gradient(step))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_twice_and_two_runs_alike(backend, device):
    logits, targets, ref_logits = inputs((2,), 9000, torch.float32, device, ref=True)
    logits.requires_grad_()

    def run():
        return logprobs(logits, targets, ref_logits=ref_logits, backend=backend)

    out, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(out, again))
    loss = out.logprobs.sum() + out.entropy.square().sum() + out.kl.sum()
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError):  # no double backward, and no silent zero in its place
        g = torch.autograd.grad(loss, logits, create_graph=True)[0]
        torch.autograd.grad(g.sum(), logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend, device):
    logits, targets, _ = inputs((3,), 500, torch.float32, device)
    plain = logprobs(logits, targets, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = logprobs(logits, targets, backend=backend)
    assert torch.equal(plain.logprobs, cast.logprobs) and torch.equal(plain.entropy, cast.entropy)


def test_the_reference_gets_no_gradient_and_no_kl_without_it(device):
    logits, targets, ref_logits = inputs((3,), 50, torch.float32, device, ref=True)
    ref_logits.requires_grad_()
    out = logprobs(logits.requires_grad_(), targets, ref_logits=ref_logits)
    out.kl.sum().backward()
    assert ref_logits.grad is None and logits.grad.any()
    assert logprobs(logits, targets).kl is None
    assert isinstance(out, gikernels.TokenStats)


def test_no_second_tensor_of_rows_by_vocabulary():
    """fp32, 400 x 20000 is 30.5 MiB; the default workspace is 32 MiB, so we set it to 2."""
    logits, targets, ref_logits = inputs((400,), 20000, torch.float32, "cpu", ref=True)
    logits.requires_grad_()

    def step():
        out = logprobs(logits, targets, ref_logits=ref_logits, temperature=0.5, softcap=9.0)
        (out.logprobs + out.entropy + out.kl).sum().backward()

    with (
        workspace(2 << 20),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        step()
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert logits.grad.nbytes < peak < logits.grad.nbytes + (2 << 20) + (1 << 16)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": [[1.0]]}, "logits: got list"),
        ({"logits": torch.ones(2, 5, dtype=torch.long)}, "logits: got int64"),
        ({"logits": torch.tensor(1.0)}, "logits"),
        ({"logits": torch.ones(2, 0)}, "logits"),
        ({"targets": torch.ones(2)}, "targets: got float32"),
        ({"targets": torch.ones(2, 1, dtype=torch.long)}, "targets: .*want shape"),
        ({"targets": torch.tensor([0, 5])}, "targets: got 5, want 0 <= target < 5"),
        ({"targets": torch.tensor([0, -1])}, "targets: got -1"),
        ({"temperature": 0.0}, "temperature: got float 0.0"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": "warm"}, "temperature: got str"),
        ({"temperature": torch.ones(3)}, "temperature: .*want shape"),
        ({"temperature": torch.ones(2, dtype=torch.long)}, "temperature: got int64"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature: got -1"),
        ({"temperature": torch.tensor(NAN)}, "temperature: got nan"),
        ({"softcap": 0.0}, "softcap"),
        ({"softcap": torch.tensor(1.0)}, "softcap"),
        ({"logit_scale": INF}, "logit_scale"),
        ({"ref_logits": torch.ones(2, 1)}, "ref_logits: .*want shape"),
        ({"ref_logits": torch.ones(2, 5, dtype=torch.int)}, "ref_logits: got int32"),
        ({"ref_logits": torch.ones(2, 5, device="meta")}, "ref_logits: .*device"),
        ({"ignore_index": 1.5}, "ignore_index"),
        ({"backend": "fast"}, "backend: got 'fast'"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    good = {"logits": torch.ones(2, 5), "targets": torch.zeros(2, dtype=torch.long)}
    assert logprobs(**good)
    with pytest.raises(ValueError, match=f"^{message}"):
        logprobs(**{**good, **change})


def test_a_backend_that_is_not_offered():
    with pytest.raises(BackendUnavailable, match="cpp"):
        logprobs(torch.ones(2, 5), torch.zeros(2, dtype=torch.long), backend="cpp")


# --- on a GPU, at real sizes --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [128256, 151936, 151937])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 67, 2048])
def test_real_vocabularies(vocab, dtype, rows):
    logits, targets, ref_logits = inputs((rows,), vocab, dtype, "cuda", ref=rows < 100)
    assert_as_good_as_plain(logits, targets, "triton", ref_logits=ref_logits, **FULL)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """65536 x 151936 is 1e10 logits; the last rows would be read from the wrong place."""
    rows, vocab = 65536, 151936
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    targets = torch.randint(vocab, (rows,), device="cuda")
    out = logprobs(logits.requires_grad_(), targets)
    (out.logprobs + out.entropy).sum().backward()
    some = torch.tensor([0, 14136, 30000, rows - 1], device="cuda")
    truth, gradient = values_and_gradient(
        reference.logprobs, logits.detach()[some].double(), targets[some], [1, 1]
    )
    assert (out.logprobs[some] - truth[0]).abs().max() < 1e-5
    assert (out.entropy[some] - truth[1]).abs().max() < 1e-5
    assert (logits.grad[some] - gradient).abs().max() < 1e-2 * gradient.abs().max()

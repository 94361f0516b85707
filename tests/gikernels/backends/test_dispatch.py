"""Which backend runs, and what is asked of PyTorch on the way."""

import importlib

import pytest
import torch

import gikernels
from gikernels.backends import dispatch
from gikernels.groups import partition as partition_module
from gikernels.vocabulary.head import choose_backend
from tests.gikernels.pretend import OnGpu

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
BF16, FP32, FP64 = (torch.zeros(2, 3, dtype=dtype) for dtype in DTYPES)


@pytest.fixture
def products():
    """torch.backends.cuda.matmul, put back as it was."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


def test_precision_is_read_where_the_user_has_set_it(products):
    """The older function raises once the newer attribute was set."""
    products.fp32_precision = "ieee"
    assert dispatch.exact_fp32()
    products.fp32_precision = "tf32"
    assert not dispatch.exact_fp32()
    if gikernels.backends()["triton"]:
        where = "cuda" if torch.cuda.is_available() else "cpu"
        hidden, weight = torch.randn(2, 3, 16, device=where)
        y = torch.zeros(3, dtype=torch.long, device=where)
        got = gikernels.linear_logprobs(hidden, weight, y, backend="triton").logprobs
        want = gikernels.linear_logprobs(hidden, weight, y, backend="reference").logprobs
        assert torch.allclose(got, want, atol=1e-2)
    products.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("high")
    assert not dispatch.exact_fp32()
    torch.set_float32_matmul_precision("highest")
    assert dispatch.exact_fp32()


def test_exact_fp32_products_are_cublas_own(monkeypatch, products):
    """On a GPU; here every backend pretends that it suits."""
    monkeypatch.setattr(dispatch, "_suits", lambda name, tensor: True)
    products.fp32_precision = "ieee"
    assert choose_backend("auto", FP32) == choose_backend("auto", FP64) == "reference"
    assert choose_backend("auto", BF16) == "triton"
    products.fp32_precision = "tf32"
    assert choose_backend("auto", FP32) == "triton"


def test_a_gpu_without_nvcc_borrows_the_cpu(monkeypatch):
    if not (status := gikernels.backends()["cpp"]):
        pytest.skip(status.reason)
    values, weights = torch.randn(2, 50), torch.rand(2, 50)
    want = partition_module._partition._init_fn(values, weights, 3, 2, "cpp")
    solved, solve = [], partition_module._solve_native
    missing = dispatch.BackendStatus(False, "no nvcc")
    real = dispatch.backend_status
    status_of: dict[str, dispatch.BackendStatus] = {}

    def told(name):
        return status_of[name] if name in status_of else real(name)

    status_of["cuda"] = missing
    monkeypatch.setattr(dispatch, "backend_status", told)
    monkeypatch.setattr(
        partition_module,
        "_solve_native",
        lambda library, *rest: solved.append(library) or solve(library, *rest),
    )
    monkeypatch.setattr(dispatch, "capturing", lambda tensor: False)
    with OnGpu():
        got = partition_module._partition._init_fn(values, weights, 3, 2, "auto")
    assert solved == ["cpp"]
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    status_of["cpp"] = missing
    with OnGpu():
        got = partition_module._partition._init_fn(values, weights, 3, 2, "auto")
    assert solved == ["cpp"]
    assert torch.equal(got[0], want[0])


def test_what_waits_for_the_gpu_stays_outside_of_graphs():
    ops = torch.ops.gikernels
    for name in (
        *("linear_logprobs", "linear_logprobs_backward", "logprobs", "logprobs_backward"),
        *("linear_policy_loss", "experience", "group_stats", "partition"),
    ):
        assert torch.Tag.cudagraph_unsafe in getattr(ops, name).default.tags, name


# --- without Triton -------------------------------------------------------------------------------


def test_a_backend_for_a_block(monkeypatch):
    monkeypatch.setattr(dispatch, "_suits", lambda name, tensor: True)
    assert choose_backend("auto", BF16) == "triton"
    with gikernels.backend("reference"):
        assert choose_backend("auto", BF16) == "reference"
        with gikernels.backend("auto"):
            assert choose_backend("auto", BF16) == "triton"
        assert dispatch.choose("auto", BF16, ("cuda", "cpp", "reference")) == "reference"
    assert choose_backend("auto", BF16) == "triton"
    with gikernels.backend("cpp"):  # which this operation does not have
        assert choose_backend("auto", BF16) == "triton"
    with pytest.raises(ValueError, match="backend: got 'fast'"), gikernels.backend("fast"):
        pass
    if not gikernels.backends()["cuda"]:
        with gikernels.backend("cuda"), pytest.raises(gikernels.BackendUnavailable, match="cuda"):
            gikernels.partition(FP32[0])


@pytest.mark.parametrize("op", ["logprobs", "linear_logprobs"])
def test_a_gradient_is_by_the_backend_of_its_forward(op, monkeypatch):
    if not (status := gikernels.backends()["triton"]):
        pytest.skip(status.reason)
    used = []
    module = importlib.import_module(f"gikernels.vocabulary.{op}_triton")
    backward = module.backward
    monkeypatch.setattr(module, "backward", lambda *args: used.append(op) or backward(*args))
    where = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 16, device=where, requires_grad=True)
    y = torch.zeros(3, dtype=torch.long, device=where)
    args = (x, y) if op == "logprobs" else (x, torch.randn(20, 16, device=where), y)
    with gikernels.backend("triton"):
        stats = getattr(gikernels, op)(*args)
    with gikernels.backend("reference"):
        stats.logprobs.sum().backward()
    assert used == [op]


def test_a_kernel_that_fails_says_how_to_do_without(monkeypatch):
    if not (status := gikernels.backends()["triton"]):
        pytest.skip(status.reason)
    from gikernels.vocabulary import linear_logprobs_triton

    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(linear_logprobs_triton, "forward_kernel", Broken())
    where = "cuda" if torch.cuda.is_available() else "cpu"
    x, w, y = FP32.to(where), FP32.to(where), torch.zeros(2, dtype=torch.long, device=where)
    with pytest.raises(gikernels.KernelError) as raised:
        gikernels.linear_logprobs(x, w, y, backend="triton")
    for words in ("no such instruction", 'gikernels.backend("reference")', "gikernels.selftest"):
        assert words in str(raised.value)
    assert isinstance(raised.value.__cause__, RuntimeError)
    with gikernels.backend("reference"):
        gikernels.linear_logprobs(x, w, y)

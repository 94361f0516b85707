"""Without a GPU every Triton kernel is interpreted, which has to be chosen before the import."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def device():
    """Where kernels run in this test session: the GPU, or the CPU through the interpreter."""
    return "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty and its kin hand out NaN, so that a place nobody writes cannot pass for zero."""

    def poison(make):
        def poisoned(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.is_floating_point():
                out.fill_(float("nan"))
            elif out.dtype != torch.bool:
                out.fill_(torch.iinfo(out.dtype).max // 2)
            return out

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))

"""How much scratch memory operations may use: by the card, unless it is said."""

from types import SimpleNamespace

import pytest
import torch

import gikernels
from gikernels.backends import settings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("gib", "mib"), [(79.1, 1024), (139.7, 1024), (47.5, 256), (15.8, 256)])
def test_the_card_decides(gib, mib, monkeypatch):
    card = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert settings.workspace_for(GPU) == mib << 20
    assert settings.workspace_for(CPU) == 32 << 20
    monkeypatch.setitem(settings.workspace_bytes, "cuda", 50_000)
    assert settings.workspace_for(GPU) == 50_000


def test_a_block_has_its_own():
    before = dict(settings.workspace_bytes)
    with gikernels.workspace(1 << 30):
        assert settings.workspace_for(GPU) == settings.workspace_for(CPU) == 1 << 30
        with gikernels.workspace(70_000):
            assert settings.workspace_for(GPU) == 70_000
        assert settings.workspace_for(GPU) == 1 << 30
    assert settings.workspace_bytes == before


@pytest.mark.parametrize("size", [0, -1, 1, 1.5, None, True])
def test_a_workspace_that_is_none_is_refused_before_anything_runs(size, monkeypatch):
    """Of a byte, chunks of one number each took minutes; None failed in the first operation."""
    before = dict(settings.workspace_bytes)
    with pytest.raises(ValueError, match=r"size: got .* >= 16384"), gikernels.workspace(size):
        pass
    assert settings.workspace_bytes == before
    monkeypatch.setitem(settings.workspace_bytes, "cpu", size)
    with pytest.raises(ValueError, match="workspace_bytes"):
        settings.workspace_for(CPU)

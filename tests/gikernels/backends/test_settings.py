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
    monkeypatch.setitem(settings.workspace_bytes, "cuda", 5)
    assert settings.workspace_for(GPU) == 5


def test_a_block_has_its_own():
    before = dict(settings.workspace_bytes)
    with gikernels.workspace(1 << 30):
        assert settings.workspace_for(GPU) == settings.workspace_for(CPU) == 1 << 30
        with gikernels.workspace(7):
            assert settings.workspace_for(GPU) == 7
        assert settings.workspace_for(GPU) == 1 << 30
    assert settings.workspace_bytes == before

"""What is left of a GPU for vLLM."""

import pytest
import torch

from trainer.config import ConfigError, load
from trainer.rollout.room import gpu_share

GIB = 2**30


@pytest.fixture
def card(monkeypatch):
    """A GPU of 24 GiB with so much of it free, once the allocator has given back what it holds."""

    def with_free(gib):
        free = [0.0]
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.__setitem__(0, gib))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free[0] * GIB), 24 * GIB))

    return with_free


def settings(*overrides):
    return load("tldr_1gpu", ["rollout.engine=vllm", "rollout.sync_bucket_mb=512", *overrides])


def test_vllm_takes_what_is_left(card):
    auto = settings("rollout.gpu_memory=auto")
    card(12)  # a twentieth is CUDA's, and a bucket is gathered while another is sent
    assert gpu_share(auto) == pytest.approx((0.95 * 12 - 1) / 24, abs=5e-4)
    card(1.2)
    told = r"rollout.gpu_memory: auto: of 24 GiB there are 1.2 left: too little for an engine"
    with pytest.raises(ConfigError, match=told):
        gpu_share(auto)


def test_a_share_that_is_named_is_taken(card):
    card(0)
    assert gpu_share(settings("rollout.gpu_memory=0.4")) == 0.4

"""OpenRLHF: its interface, and its own code where it is installed.

openrlhf.models imports flash-attn and DeepSpeed, which want a GPU; its functions do not use them,
so with the package at hand they are stubbed.
"""

import importlib
import importlib.util
import sys
import types
from unittest import mock

import pytest
import torch

from gikernels.integrations import openrlhf as ours

REAL = importlib.util.find_spec("openrlhf") is not None


def test_log_probs_from_logits_is_log_softmax_and_leaves_the_logits_alone():
    logits = torch.randn(2, 5, 40, requires_grad=True)
    labels = torch.randint(0, 40, (2, 5))
    before = logits.detach().clone()
    got = ours.log_probs_from_logits(logits, labels, temperature=0.5)
    want = (logits / 0.5).log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(x.sum(), logits)[0] for x in (got, want))
    torch.testing.assert_close(a, b)
    assert torch.equal(logits, before)
    p = before.softmax(-1)
    torch.testing.assert_close(ours.compute_entropy(before), -(p * p.log()).sum(-1))


def inputs():
    old = -torch.rand(4, 6) * 3
    new = (old + torch.randn(4, 6)).requires_grad_()
    mask = torch.arange(6) < torch.tensor([6, 3, 0, 5]).unsqueeze(1)
    return new, old, torch.randn(4, 6), mask


@pytest.mark.parametrize(
    "known", [{}, dict(dp_size=2, batch_num_tokens=50.0, global_batch_size=7.0)]
)
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 2.0])
def test_policy_loss_is_the_formula(known, token_level, dual_clip):
    new, old, advantages, mask = inputs()
    ratio = (new - old).exp()
    per_token = torch.maximum(-ratio * advantages, -ratio.clamp(0.9, 1.3) * advantages)
    if dual_clip is not None:
        bounded = torch.minimum(per_token, -dual_clip * advantages)
        per_token = torch.where(advantages < 0, bounded, per_token)
    per_token = per_token * mask
    if token_level:
        want = per_token.sum() / known.get("batch_num_tokens", mask.sum())
    else:
        means = per_token.sum(1) / mask.sum(1).clamp(min=1)
        want = means.sum() / known.get("global_batch_size", 3)
    want = want * known.get("dp_size", 1)
    policy_loss = ours.PolicyLoss(
        clip_eps_low=0.1, clip_eps_high=0.3, dual_clip=dual_clip, token_level_loss=token_level
    )
    got, clipped, kl, vllm_kl, filtered = policy_loss(new, old, advantages, mask, **known)
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(x, new, retain_graph=True)[0] for x in (got, want))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(kl, (old - new)[mask].mean().detach())
    assert 0 < clipped < 1 and vllm_kl is None and filtered is None


def test_what_is_not_supported_raises():
    with pytest.raises(ValueError, match="policy_loss_type"):
        ours.PolicyLoss(policy_loss_type="gspo")
    with pytest.raises(ValueError, match="is_correction_level"):
        ours.PolicyLoss(is_correction_level="token")
    with pytest.raises(ValueError, match="dual_clip"):
        ours.PolicyLoss(dual_clip=0.5)
    ours.PolicyLoss(is_correction_mode="mask", is_correction_threshold=[0.5, 5.0])


def test_patched_replaces_and_undoes(monkeypatch):
    theirs = {name: object() for name in ("log_probs_from_logits", "compute_entropy", "PolicyLoss")}
    modules = {name: types.ModuleType(name) for name in ("openrlhf", "openrlhf.models")}
    for name in ("utils", "loss", "actor"):
        modules[f"openrlhf.models.{name}"] = module = types.ModuleType(name)
        vars(module).update(theirs)  # as `from .utils import ...` leaves them
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    actor = modules["openrlhf.models.actor"]
    with pytest.raises(ZeroDivisionError), ours.patched():
        assert actor.log_probs_from_logits is ours.log_probs_from_logits
        assert actor.PolicyLoss is ours.PolicyLoss
        raise ZeroDivisionError
    assert all(vars(actor)[name] is value for name, value in theirs.items())


# --- its own code -------------------------------------------------------------------------------


@pytest.fixture
def theirs():
    if not REAL:
        pytest.skip("openrlhf is not installed")
    stubs = {
        name: mock.MagicMock()
        for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "deepspeed")
    }
    stubs["flash_attn.ops"] = None  # so that log_probs_from_logits takes its plain path
    kept = {k: v for k, v in sys.modules.items() if k.partition(".")[0] == "openrlhf"}
    with mock.patch.dict(sys.modules, stubs):
        package = types.ModuleType("openrlhf.models")  # without its __init__, which wants more
        spec = importlib.util.find_spec("openrlhf")
        package.__path__ = [f"{spec.submodule_search_locations[0]}/models"]
        with mock.patch.dict(sys.modules, {"openrlhf.models": package}):
            yield (
                importlib.import_module("openrlhf.models.utils"),
                importlib.import_module("openrlhf.models.loss"),
            )
    for name in [k for k in sys.modules if k.partition(".")[0] == "openrlhf" and k not in kept]:
        del sys.modules[name]


def test_agrees_with_its_own_code(theirs):
    utils, loss = theirs
    logits, labels = torch.randn(2, 5, 40), torch.randint(0, 40, (2, 5))
    want = utils.log_probs_from_logits(logits.clone(), labels, temperature=0.7)
    torch.testing.assert_close(ours.log_probs_from_logits(logits, labels, 0.7), want)
    new, old, advantages, mask = inputs()
    for kwargs in (
        dict(token_level_loss=True),
        dict(token_level_loss=False),
        dict(clip_eps_high=0.3, dual_clip=3.0),
    ):
        for known in ({}, dict(dp_size=2, batch_num_tokens=50.0, global_batch_size=7.0)):
            args = (new, old, advantages, mask.float())
            want = loss.PolicyLoss(**kwargs)(*args, **known)
            got = ours.PolicyLoss(**kwargs)(*args, **known)
            for a, b in zip(got[:3], want[:3]):
                torch.testing.assert_close(a, b)
            a, b = (torch.autograd.grad(x[0], new, retain_graph=True)[0] for x in (got, want))
            torch.testing.assert_close(a, b)

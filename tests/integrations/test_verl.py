"""verl: against the real package where it is installed, else against its published interface.

verl 0.9.1 imports on a CPU. It pins an older transformers, so it is no extra of ours:
`make test-verl` makes an environment for it.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from gikernels.integrations import GroupInvariance

REAL = importlib.util.find_spec("verl") is not None
real_only = pytest.mark.skipif(not REAL, reason="verl is not installed")


def stand_in():
    """The two registries and the fused head, as verl documents them."""
    modules = {
        name: types.ModuleType(name)
        for name in (
            "verl",
            "verl.trainer",
            "verl.trainer.ppo",
            "verl.trainer.ppo.core_algos",
            "verl.utils",
            "verl.utils.kernel",
            "verl.utils.kernel.linear_cross_entropy",
        )
    }
    core = modules["verl.trainer.ppo.core_algos"]
    core.ADV_ESTIMATOR_REGISTRY, core.POLICY_LOSS_REGISTRY = {}, {}

    def registers(registry):
        return lambda name: lambda fn: registry.setdefault(name, fn)

    core.register_adv_est = registers(core.ADV_ESTIMATOR_REGISTRY)
    core.register_policy_loss = registers(core.POLICY_LOSS_REGISTRY)
    head = modules["verl.utils.kernel.linear_cross_entropy"]
    head.linear_cross_entropy = lambda *args: None
    for name, module in modules.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


@pytest.fixture(scope="module")
def ours():
    name = "gikernels.integrations.verl"
    if REAL:
        yield importlib.import_module(name)
        return
    modules = stand_in()
    sys.modules.update(modules)
    try:
        yield importlib.import_module(name)
    finally:
        for added in (*modules, name):
            del sys.modules[added]


def core():
    return sys.modules["verl.trainer.ppo.core_algos"]


class Config(dict):
    """Has the attributes and .get of verl's configs."""

    __getattr__ = dict.get


def batch(samples=4):
    mask = torch.arange(6) < torch.tensor([6, 3, 4, 1, 2, 5, 6, 6]).unsqueeze(1)
    scores = torch.tensor([1.0, 2.0, 4.0, 3.0, 9.0, 7.0, 8.0, 8.5])
    rewards = torch.zeros(8, 6)
    rewards[torch.arange(8), mask.sum(1) - 1] = scores
    uids = [f"prompt-{i // samples}" for i in range(8)]
    return rewards, mask.long(), uids, scores


def test_registered_under_the_documented_names(ours):
    ours.register()
    ours.register()  # every process may import it twice
    assert core().ADV_ESTIMATOR_REGISTRY["group_norm"] is ours.group_norm
    assert core().ADV_ESTIMATOR_REGISTRY["group_invariant"] is ours.group_invariant
    assert core().POLICY_LOSS_REGISTRY["gikernels"] is ours.policy_loss


@pytest.mark.parametrize("by_std", [True, False])
def test_group_norm_is_the_formula(ours, by_std):
    rewards, mask, uids, scores = batch()
    config = Config(norm_adv_by_std_in_grpo=by_std)
    advantages, returns = ours.group_norm(
        token_level_rewards=rewards, response_mask=mask, index=uids, config=config
    )
    r = scores.view(2, 4)
    want = r - r.mean(1, keepdim=True)
    if by_std:
        want = want / (r.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(advantages, want.view(8, 1) * mask)
    assert torch.equal(advantages, returns)


def test_group_invariant_is_group_norm_times_the_weight(ours):
    rewards, mask, uids, scores = batch(samples=2)
    settings = dict(num_groups=2, beta=0.3, clamp=[0.0, 5.0])
    plain, _ = ours.group_norm(rewards, mask, uids)
    got, _ = ours.group_invariant(
        rewards, mask, uids, Config(group_invariance=settings, norm_adv_by_std_in_grpo=True)
    )
    prompts = torch.arange(8) // 2
    weights = GroupInvariance(num_groups=2, beta=0.3).infer(scores, prompts).weights
    assert weights[0] > 1 > weights[-1]
    torch.testing.assert_close(got, plain * weights.unsqueeze(1))
    # A reference answer's reward takes a prompt's offset out before groups are formed.
    baselines = torch.tensor([0.0, 0.0, 0.0, 0.0, 20.0, 20.0, 0.0, 0.0])
    other, _ = ours.group_invariant(rewards, mask, uids, reward_baselines=baselines)
    assert (other[4] / plain[4])[0] > 1  # now the hardest
    off, _ = ours.group_invariant(rewards, mask, uids, Config(group_invariance=dict(beta=0.0)))
    torch.testing.assert_close(off, plain)
    with pytest.raises(TypeError, match="betta"):
        ours.group_invariant(rewards, mask, uids, Config(group_invariance=dict(betta=0.3)))


MODES = [
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
]


def loss_inputs():
    old = -torch.rand(5, 6) * 3
    new = (old + torch.randn(5, 6)).requires_grad_()
    mask = torch.arange(6) < torch.tensor([6, 3, 0, 1, 5]).unsqueeze(1)
    return old, new, torch.randn(5, 6), mask


def spelled_out(old, new, advantages, mask, mode, weights, batch):
    """verl's aggregation modes as its documentation defines them."""
    ratio = (new - old).exp()
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.3) * advantages)
    loss = torch.where(advantages < 0, torch.minimum(loss, -3 * advantages), loss) * weights
    loss = loss * mask
    tokens = batch.get("batch_num_tokens") or mask.sum()
    sequences = batch.get("global_batch_size") or mask.any(1).sum()
    per_token = {
        "token-mean": loss.sum() / tokens,
        "token-sum": loss.sum(),
        "seq-mean-token-sum": loss.sum() / sequences,
        "seq-mean-token-sum-norm": loss.sum() / sequences / 6,
        "seq-mean-token-mean": (loss.sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences,
    }
    return per_token[mode] * batch.get("dp_size", 1)


@pytest.mark.parametrize(
    "global_batch", [{}, dict(dp_size=2, batch_num_tokens=40, global_batch_size=9)]
)
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_is_the_formula(ours, mode, global_batch):
    old, new, advantages, mask = loss_inputs()
    weights = torch.rand(5, 6) * 2
    config = Config(
        clip_ratio=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0, global_batch_info=global_batch
    )
    want = spelled_out(old, new, advantages, mask, mode, weights, global_batch)
    got, metrics = ours.policy_loss(
        old_log_prob=old,
        log_prob=new,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=weights,
    )
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(x, new, retain_graph=True)[0] for x in (got, want))
    torch.testing.assert_close(a, b)
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
    with pytest.raises(ValueError, match="loss_agg_mode"):
        ours.policy_loss(old, new, advantages, mask, "mean", config)


def test_nothing_at_masked_places_reaches_the_policy_loss(ours):
    old, new, advantages, mask = loss_inputs()
    config = Config(clip_ratio=0.2, clip_ratio_c=3.0, global_batch_info={})
    want, _ = ours.policy_loss(old, new, advantages, mask, "token-mean", config)
    dirty = [x.detach().masked_fill(~mask, torch.nan) for x in (old, new, advantages)]
    dirty[1].requires_grad_()
    got, metrics = ours.policy_loss(*dirty, mask, "token-mean", config)
    got.backward()
    assert got == want and dirty[1].grad.isfinite().all()
    assert all(v == v for v in metrics.values())


def test_fused_head_takes_verls_positional_arguments(ours):
    hidden = torch.randn(1, 7, 8, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    labels = torch.randint(0, 30, (1, 7))
    logp = (hidden[0] @ weight.T / 0.7).log_softmax(-1)
    want = logp.gather(-1, labels[0, :, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
    got = ours.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    for a, b in zip(got, want):
        assert a.shape == (7,)
        torch.testing.assert_close(a, b)
        for x in (hidden, weight):
            ga, gb = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (a, b))
            torch.testing.assert_close(ga, gb)
    with pytest.raises(ValueError, match="reduction"):
        ours.linear_cross_entropy(hidden, weight, labels, 0.7, "mean")


def test_patched_replaces_the_head_and_undoes_itself(ours):
    head = sys.modules["verl.utils.kernel.linear_cross_entropy"]
    theirs = head.linear_cross_entropy
    with pytest.raises(ZeroDivisionError), ours.patched():
        assert head.linear_cross_entropy is ours.linear_cross_entropy
        raise ZeroDivisionError
    assert head.linear_cross_entropy is theirs


# --- the real package ---------------------------------------------------------------------------


@real_only
def test_group_norm_equals_verls_grpo(ours):
    import numpy as np

    rewards, mask, uids, _ = batch()
    want, _ = core().compute_grpo_outcome_advantage(rewards, mask, np.array(uids))
    got, _ = ours.group_norm(rewards, mask, uids)
    torch.testing.assert_close(got, want)


@real_only
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_equals_verls_vanilla(ours, mode):
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=1)
    config.global_batch_info.update(dp_size=2, batch_num_tokens=40, global_batch_size=9)
    old, new, advantages, mask = loss_inputs()
    new = (old + 3 * torch.randn_like(old)).requires_grad_()
    args = (old, new, advantages, mask, mode, config, torch.rand(5, 6))
    want, their_metrics = core().compute_policy_loss_vanilla(*args)
    got, metrics = ours.policy_loss(*args)
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(x, new, retain_graph=True)[0] for x in (got, want))
    torch.testing.assert_close(a, b)
    assert metrics == pytest.approx(their_metrics, rel=1e-5, abs=1e-6)
    assert their_metrics["actor/pg_clipfrac"] > 0 and their_metrics["actor/pg_clipfrac_lower"] > 0


@real_only
def test_compute_advantage_dispatches_to_us(ours):
    import numpy as np
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    ours.register()
    rewards, mask, uids, _ = batch(samples=2)
    config = OmegaConf.create(
        dict(norm_adv_by_std_in_grpo=True, group_invariance=dict(beta=0.3, clamp=[0.0, 4.0]))
    )
    data = DataProto.from_dict(
        tensors=dict(token_level_rewards=rewards, response_mask=mask),
        non_tensors=dict(uid=np.array(uids, dtype=object)),
    )
    out = compute_advantage(data, adv_estimator="group_invariant", config=config)
    want, _ = ours.group_invariant(rewards, mask, uids, config)
    torch.testing.assert_close(out.batch["advantages"], want)


@real_only
def test_the_plugin_registers_in_a_fresh_process():
    code = (
        "import verl; from verl.trainer.ppo import core_algos as c;"
        "from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as head;"
        "assert 'group_invariant' in c.ADV_ESTIMATOR_REGISTRY;"
        "assert 'gikernels' in c.POLICY_LOSS_REGISTRY;"
        "assert head.__module__ == 'gikernels.integrations.verl'"
    )
    env = dict(os.environ, VERL_USE_EXTERNAL_MODULES="gikernels.integrations.verl_plugin")
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@real_only
def test_the_documented_recipe_composes_with_verls_configuration(ours):
    from hydra import compose, initialize_config_dir

    text = (Path(__file__).parents[2] / "docs" / "how-to" / "verl.md").read_text()
    recipe = text.split("verl.trainer.main_ppo \\\n")[1].split("\n```")[0]
    overrides = [line.strip().removesuffix("\\").strip() for line in recipe.splitlines()]
    assert len(overrides) > 20
    folder = Path(sys.modules["verl"].__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    ours.register()
    assert config.algorithm.adv_estimator in core().ADV_ESTIMATOR_REGISTRY
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode in core().POLICY_LOSS_REGISTRY
    rewards, mask, uids, _ = batch(samples=2)
    ours.group_invariant(rewards, mask, uids, config.algorithm)

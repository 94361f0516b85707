"""The specification against hand computations, so that nothing else rests on an unproved text."""

import math

import torch

from gikernels import reference as ref

INF, NAN = math.inf, math.nan


def t(*values):
    """A float64 tensor: of rows where lists are given, else of numbers."""
    return torch.tensor(values, dtype=torch.float64)


def test_logprobs_by_hand():
    z = t([0.0, math.log(3.0)], [5.0, 5.0])
    out = ref.logprobs(z, torch.tensor([1, -100]), ref_logits=t([0.0, 0.0], [NAN, 1.0]))
    assert torch.allclose(out.logprobs, t(math.log(0.75), 0))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert torch.allclose(out.entropy, t(entropy, 0))
    assert torch.allclose(out.kl, t(math.log(2) - entropy, 0))


def test_transform_is_scale_then_softcap_then_temperature():
    z = ref.transform_logits(t([3.0]), 0.5, softcap=2.0, logit_scale=4.0)
    assert torch.allclose(z, t([2 * math.tanh(4 * 3 / 2) / 0.5]))


def test_gae_skips_masked_steps():
    mask = torch.tensor([[True, False, True]])
    out = ref.gae(t([1.0, NAN, 2.0]), t([0.5, INF, 1.0]), mask, gamma=0.9, lam=0.8)
    last = 2.0 - 1.0
    first = 1.0 + 0.9 * 1.0 - 0.5 + 0.9 * 0.8 * last
    assert torch.allclose(out.advantages, t([first, 0, last]))
    assert torch.allclose(out.returns, t([first + 0.5, 0, 2.0]))


def test_experience_without_critic_and_with_hole():
    mask = torch.tensor([[True, False, True, False]])
    out = ref.experience(
        t([-1.0, NAN, -2.0, NAN]), t([-1.5, NAN, -1.0, 0]), None, t(3.0), mask, 0.5
    )
    assert torch.allclose(out.kl, t([0.5, 0, -1.0, 0]))
    assert torch.allclose(out.rewards, t([-0.25, 0, 3.5, 0]))
    assert torch.allclose(out.advantages, t([3.25, 0, 3.25, 0]))
    assert torch.allclose(out.seq_kl, t(-0.5))


def test_normalisation_is_population_and_by_group():
    mask = torch.tensor([[True, True], [True, False]])
    out = ref.experience(
        t([0.0, 0], [0, NAN]),
        t([0.0, 0], [0, 0]),
        t([1.0, 3.0], [5.0, NAN]),
        t(0.0, 0),
        mask,
        0.0,
        gamma=0.0,
        norm="group",
        group_ids=torch.tensor([1, 0]),
        num_groups=3,
    )
    assert torch.allclose(out.moments, t([1.0, -5, 0], [2, -2, 2], [0, 0, 0]))
    assert torch.allclose(out.advantages, t([1.0, -1.0], [0, 0]))


def test_group_statistics_merge():
    x, ids = t(1.0, 2, 3, 10), torch.tensor([0, 0, 0, 2])
    whole = ref.group_stats(x, ids, 3)
    assert torch.equal(torch.stack(list(whole)), t([3.0, 0, 1], [2, 0, 10], [2, 0, 0]))
    halves = [ref.group_stats(x[i::2], ids[i::2], 3) for i in (0, 1)]
    assert all(torch.allclose(a, b) for a, b in zip(ref.merge_stats(*halves), whole))


def test_group_advantages():
    r, ids = t(1.0, 2, 6, 9), torch.tensor([0, 0, 0, 1])
    std = math.sqrt((4 + 1 + 9) / 2)
    out = ref.group_advantages(r, ids, 2, eps=0.0)
    assert torch.allclose(out, t(-2 / std, -1 / std, 3 / std, 0))
    out = ref.group_advantages(r, ids, 2, baseline="leave_one_out", scale="none")
    assert torch.allclose(out, t(1 - 4, 2 - 3.5, 6 - 1.5, 0))


def test_partition_by_hand():
    out = ref.partition(t(10.0, 1, 2, 12, 1), 2)
    assert out.group_ids.tolist() == [1, 0, 0, 1, 0]
    assert out.thresholds.item() == 6
    assert torch.allclose(out.centers, t(4 / 3, 11))
    mean = 26 / 5
    assert math.isclose(out.between_variance, 0.6 * (4 / 3 - mean) ** 2 + 0.4 * (11 - mean) ** 2)


def test_soft_groups_and_weights_match_the_closed_form():
    # two groups, uniform: c_easy = 1 - beta D / (2 f), c_hard = 1 + beta D / (2 f)
    probs = t([1.0, 0], [1, 0], [1, 0], [0, 1])
    returns = t(1.0, 2, 3, 6)
    c = ref.group_weights(probs, returns, 0.1, form="uniform")
    d = 6 - 2
    assert torch.allclose(c, t(*[1 + 0.1 * d / (2 * 0.75)] * 3, 1 - 0.1 * d / (2 * 0.25)))
    out = ref.soft_groups(probs.log().clamp(min=-1e9), returns, form="mass")
    assert torch.allclose(out.returns, t(2.0, 6))
    assert torch.allclose(out.variance, t(0.75 * 1 + 0.25 * 9).squeeze())


def test_ppo_and_value_loss_by_hand():
    logp = t(math.log(1.5), math.log(0.5), 0.0)
    mask = torch.tensor([True, True, False])
    out = ref.ppo_loss(logp, t(0.0, 0, NAN), t(1.0, -1, NAN), mask, denom=4.0)
    assert torch.allclose(out.loss, torch.tensor((-1.2 + 0.8) / 4, dtype=torch.float64))
    assert math.isclose(out.metrics["clipfrac"], 0.5)
    out = ref.value_loss(t(2.0), t(0.0), t(3.0), torch.tensor([True]), denom=1)
    assert math.isclose(out.loss, 0.5 * (0.2 - 3) ** 2)


def test_meta_ascent_restores_and_keeps_gradients():
    p = torch.nn.Parameter(t(1.0, 2))
    p.grad = t(3.0, 4)
    with ref.meta_ascent([p], 0.5, normalise=True):
        assert torch.allclose(p, t(1 + 0.3, 2 + 0.4))
        p.square().sum().backward()
    assert torch.equal(p, t(1.0, 2))
    assert torch.allclose(p.grad, t(2.6, 4.8))


def test_preference_and_difference():
    loss = ref.preference_loss(t(1.0), t(0.0), margin=0.5, label_smoothing=0.1)
    want = -0.9 * math.log(1 / (1 + math.exp(-0.5))) - 0.1 * math.log(1 / (1 + math.exp(0.5)))
    assert math.isclose(loss, want)
    assert math.isclose(ref.difference_objective(t([1.0, 3.0])), 0.5 / (1 + math.exp(-2)))

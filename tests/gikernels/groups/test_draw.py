"""Each rule of drawing against its formula, and against what it is for."""

import math

import pytest
import torch
import torch.nn.functional as F

from gikernels import GroupDraw
from gikernels.groups import draw as rules
from gikernels.groups.draw import RULES

SHARE = torch.tensor([0.05, 0.15, 0.2, 0.6], dtype=torch.float64)


def hard_probs(share, n=400):
    counts = (share * n).round().long()
    return F.one_hot(torch.arange(len(share)).repeat_interleave(counts), len(share)).double()


def drawn(weights, probs):
    return (weights / weights.sum()) @ probs


def told(rule, returns=(-1.0, 0.0, 0.5, 1.0), noise=None, **more):
    """A draw that has seen one step: 20 answers of each group."""
    draw = GroupDraw(rule, 4, **more)
    groups = torch.arange(4).repeat_interleave(20)
    values = torch.tensor(returns, dtype=torch.float64)[groups]
    if noise is not None:
        swing = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(40)
        values = values + swing * torch.tensor(noise, dtype=torch.float64)[groups]
    advantages = values - values.mean()
    draw.observe(F.one_hot(groups, 4), values, advantages)
    return draw


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_the_variance_rule_has_the_mean_gradient_of_the_papers_weights(beta):
    """E_q[x] Z = E_f[c x] for any per-group quantity x, with c the derivative of
    sum_g f_g (R_g - beta (R_g - R)^2), taken by autograd and cut off at 0."""
    returns = torch.tensor([-0.4, 0.1, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    mean = (SHARE * returns).sum()
    objective = mean - beta * (SHARE * (returns - mean).square()).sum()
    (slope,) = torch.autograd.grad(objective, returns)
    weights = (slope / SHARE).clamp(min=0)  # c_g
    q = rules.variance(SHARE, returns.detach(), beta)
    x = torch.randn(4, dtype=torch.float64)
    norm = (SHARE * weights).sum()
    torch.testing.assert_close(norm * (q * x).sum(), (SHARE * weights * x).sum())
    assert q.sum().item() == pytest.approx(1)


def test_draws_follow_the_rule_and_not_the_noise_of_weights():
    """What drawing is for: the same mean, and less variance where a group is rare."""
    torch.manual_seed(0)
    cost = torch.tensor([4.0, 1.0, 1.0, 0.5], dtype=torch.float64)  # c_g
    q = SHARE * cost / (SHARE * cost).sum()
    # advantages of equal size: Jensen's E_f[c^2] >= E_f[c]^2 is then all the difference
    values = torch.randn(4, 100_000).double() + torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])

    def estimates(rates, scale):
        groups = torch.multinomial(rates, 200_000, replacement=True)
        picked = values[groups, torch.randint(values.shape[1], groups.shape)]
        return (picked * scale[groups]).view(-1, 50).mean(1)

    weighted = estimates(SHARE, cost)
    by_draw = estimates(q, torch.full_like(cost, (SHARE * cost).sum()))
    assert weighted.mean().item() == pytest.approx(by_draw.mean().item(), abs=0.02)
    assert by_draw.var() < 0.8 * weighted.var()


@pytest.mark.parametrize("rule", RULES)
def test_prompts_are_taken_at_the_rates_of_their_groups(rule):
    draw, probs = told(rule, noise=(0.1, 0.9, 0.5, 0.2)), hard_probs(SHARE)
    weights = draw.weights(probs)
    assert weights.shape == (400,) and bool((weights >= 0).all())
    assert weights.mean().item() == pytest.approx(1)
    if rule != "signal":
        torch.testing.assert_close(drawn(weights, probs), draw.rates(probs.mean(0)))


def test_each_rule_is_its_formula():
    share, returns = SHARE, torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(told("even").rates(share), torch.full_like(share, 0.25))
    torch.testing.assert_close(told("none").rates(share), share)
    mean = (share * returns).sum()
    want = share * (1 - 2 * (returns - mean)).clamp(min=0)
    torch.testing.assert_close(told("variance", floor=0.0).rates(share), want / want.sum())
    want = torch.exp(-0.3 * returns)
    torch.testing.assert_close(told("gdro", rate=0.3, floor=0.0).rates(share), want / want.sum())
    sizes = (returns - returns.mean()).abs()
    torch.testing.assert_close(told("bandit", floor=0.0).rates(share), sizes / sizes.sum())


def test_progress_favours_what_has_gained_least():
    draw, probs = GroupDraw("progress", 2, rate=0.5), F.one_hot(torch.arange(2).repeat(10), 2)
    torch.testing.assert_close(draw.rates(torch.tensor([0.5, 0.5])).float(), torch.full((2,), 0.5))
    for step in range(20):  # group 1 gains, group 0 does not
        draw.observe(probs, torch.tensor([0.0, 0.1 * step]).repeat(10))
    rates = draw.rates(torch.tensor([0.1, 0.9]))
    assert rates[0] > 0.9 - draw.floor


def test_gdro_goes_to_the_worst_group_and_stops_at_the_floor():
    draw, probs = (
        GroupDraw("gdro", 2, rate=0.5, floor=0.05),
        F.one_hot(torch.arange(2).repeat(5), 2),
    )
    for _ in range(100):
        draw.observe(probs, torch.tensor([-1.0, 1.0]).repeat(5))
    torch.testing.assert_close(
        draw.rates(torch.tensor([0.5, 0.5])), torch.tensor([0.95, 0.05], dtype=torch.float64)
    )


def test_signal_of_zeros_and_ones_is_the_root_of_p_times_one_less_p():
    """Two classes that return 0 and 1; a prompt that is solved with probability p."""
    draw = GroupDraw("signal", 2, floor=0.0)
    draw.observe(F.one_hot(torch.tensor([0, 1]).repeat(8), 2), torch.tensor([0.0, 1.0]).repeat(8))
    p = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    beliefs = torch.stack([1 - p, p], 1)
    want = (p * (1 - p)).sqrt()
    torch.testing.assert_close(draw.weights(beliefs, beliefs), want / want.mean())


def test_signal_reads_beliefs_and_not_the_groups_in_force():
    draw = GroupDraw("signal", 2, floor=0.1)
    labels = F.one_hot(torch.tensor([0, 1]).repeat(8), 2)
    draw.observe(labels.flip(1), torch.tensor([0.0, 1.0]).repeat(8), beliefs=labels)
    beliefs = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    weights = draw.weights(labels[:2], beliefs)
    torch.testing.assert_close(weights, torch.tensor([0.1, 1.9], dtype=torch.float64))


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_there_or_not_known_does_no_harm(rule):
    unknown = GroupDraw(rule, 4)
    probs = hard_probs(torch.tensor([0.0, 0.5, 0.5, 0.0]))
    for draw in (unknown, told(rule, returns=(0.0,) * 4)):  # nothing known; all returns equal
        weights = draw.weights(probs)
        assert bool(weights.isfinite().all()) and weights.sum() > 0
        rates = draw.rates(probs.mean(0))
        assert rates.sum().item() == pytest.approx(1)
        assert rates[0] == rates[3] == 0
    one = GroupDraw(rule, 1)
    one.observe(torch.ones(3, 1), torch.randn(3), torch.randn(3))
    torch.testing.assert_close(one.rates(torch.ones(1)).float(), torch.ones(1))
    some = GroupDraw(rule, 4)  # a step in which two groups were not met
    some.observe(probs, torch.randn(len(probs)), torch.randn(len(probs)))
    rates = some.rates(SHARE)
    assert bool(rates.isfinite().all()) and bool((rates > 0).all())


def test_a_floor_holds_and_the_rest_keeps_its_proportions():
    rates = rules.at_least(0.1, torch.tensor([0.01, 0.02, 0.37, 0.6]).double(), SHARE)
    torch.testing.assert_close(rates[:2], torch.full((2,), 0.1, dtype=torch.float64))
    assert rates[3] / rates[2] == pytest.approx(0.6 / 0.37)
    assert rates.sum().item() == pytest.approx(1)
    # giving brings the third below the floor, which then takes as well
    rates = rules.at_least(0.2, torch.tensor([0.0, 0.0, 0.21, 0.79]).double(), SHARE)
    torch.testing.assert_close(rates, torch.tensor([0.2, 0.2, 0.2, 0.4]).double())
    # more than there is to share: evenly
    rates = rules.at_least(0.9, torch.tensor([0.1, 0.9]).double(), torch.ones(2))
    torch.testing.assert_close(rates, torch.full((2,), 0.5, dtype=torch.float64))


def test_the_running_mean_remembers():
    draw, probs = GroupDraw("variance", 1, memory=0.75), torch.ones(4, 1)
    draw.observe(probs, torch.zeros(4))
    draw.observe(probs, torch.ones(4))
    assert draw.mean.item() == pytest.approx(0.25)
    assert draw.slow.item() == pytest.approx(0.25 / rules.SLOWER)


@pytest.mark.parametrize("rule", RULES)
def test_state_comes_back_and_groups_change_places(rule):
    draw, other = told(rule, noise=(0.1, 0.9, 0.5, 0.2)), GroupDraw(rule, 4)
    other.load_state_dict(draw.state_dict())
    assert torch.equal(other.rates(SHARE), draw.rates(SHARE))
    moved = torch.tensor([2, 0, 3, 1])
    other.reorder(moved)
    torch.testing.assert_close(other.rates(SHARE[moved]), draw.rates(SHARE)[moved])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rule", "evenly"),
        ("num_groups", 0),
        ("num_groups", 2.0),
        ("beta", math.nan),
        ("rate", -1.0),
        ("floor", 1.0),
        ("memory", -0.1),
    ],
)
def test_bad_arguments_are_named(name, value):
    arguments = {"rule": "even", "num_groups": 4, name: value}
    with pytest.raises(ValueError, match=f"^{name}: got"):
        GroupDraw(**arguments)

"""Every formula of the groups, against the formula written out, and what the modes must not do."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import gikernels
from tests.trainer import tiny
from trainer.ppo.groups import Groups, group_means, performance


def prompts(n, domains=("copy", "sort", "reverse")):
    return [
        SimpleNamespace(ids=[i, i + 1], domain=domains[i % len(domains)], text=f"prompt {i}")
        for i in range(n)
    ]


def groups(*overrides, n=12):
    """The paper's method: two soft groups, weights, adaptive KL, prompts as they come."""
    plain = ("groups.num_groups=2", "groups.assign=soft", "groups.focus=0")
    plain += ("groups.beta=1", "kl.adaptive=true", "kl.coef=0.8")
    return Groups(tiny.config("unused", *plain, *overrides), prompts(n))


def soft(n, m, dtype=torch.float32):
    return torch.randn(n, m, dtype=dtype).softmax(1)


# --- weights ---


@pytest.mark.parametrize("form", ["uniform", "mass"])
def test_weights_are_the_formula(form):
    g = groups("groups.beta=0.7", f"groups.form={form}", "groups.clamp=[-100, 100]")
    p, r = soft(40, 2), torch.randn(40)
    f = p.mean(0)
    big_r = (p * r[:, None]).sum(0) / p.sum(0)
    mean = big_r.mean() if form == "uniform" else (f * big_r).sum()
    slope = big_r - mean if form == "uniform" else 2 * f * (big_r - mean)  # 2/M = 1
    want = 1 - 0.7 * (p * (slope / f)).sum(1)
    torch.testing.assert_close(g.weights(p, r), want)


def test_weights_follow_the_gradient_of_the_regularised_objective():
    """c_i is d/dR_i of S (mean R - beta Var): no formula copied, autograd of A.3 itself."""
    g = groups("groups.beta=0.3", "groups.form=mass", "groups.clamp=[-100, 100]")
    p, r = soft(20, 2, torch.float64), torch.randn(20, dtype=torch.float64, requires_grad=True)
    f, big_r = p.mean(0), (p * r[:, None]).sum(0) / p.sum(0)
    variance = (f * (big_r - (f * big_r).sum()).square()).sum()
    (want,) = torch.autograd.grad(len(r) * (r.mean() - 0.3 * variance), r)
    torch.testing.assert_close(g.weights(p, r.detach()), want)


def test_weights_are_clamped_and_the_clamp_is_logged():
    g = groups("groups.beta=100", "groups.clamp=[0, 5]")
    p, r = soft(40, 2), torch.randn(40)
    c = g.weights(p, r)
    assert c.min() == 0 and c.max() <= 5
    out = g.metrics(p, r, r, r, r, c)
    assert out["group/weight_clamped"] == pytest.approx(((c == 0) | (c == 5)).float().mean())


def test_one_group_and_beta_zero_weigh_exactly_one():
    for g in (groups("groups.inference=none"), groups("groups.beta=0")):
        p = soft(9, g.num)
        assert (g.weights(p, torch.randn(9)) == 1).all()


def test_controls():
    r = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    p = soft(10, 2)
    cvar = groups("groups.objective=cvar", "groups.cvar_alpha=0.3").weights(p, r)
    torch.testing.assert_close(cvar, torch.tensor([1 / 0.3] * 3 + [0.0] * 7))

    each = groups("groups.objective=sequence_variance", "groups.beta=0.05").weights(p, r)
    as_groups = gikernels.group_weights(torch.eye(10), r, 0.05, clamp=(0.0, 5.0))
    torch.testing.assert_close(each, as_groups)

    dro = groups("groups.objective=group_dro", "groups.dro_lr=0.5")
    big_r = (p * r[:, None]).sum(0) / p.sum(0)
    q = torch.exp(-0.5 * big_r) / torch.exp(-0.5 * big_r).sum()
    torch.testing.assert_close(dro.weights(p, r), 2 * p @ q)
    torch.testing.assert_close(dro.weights(p, r), 2 * p @ (q.square() / q.square().sum()))


# --- adaptive KL ---


@pytest.mark.parametrize("m", [2, 5, 8])
def test_kl_coefficient_of_each_sequence(m):
    g = groups(f"groups.num_groups={m}", "kl.coef=0.4", "kl.floor=0.1", "kl.shape=easiest")
    p = soft(30, m)
    torch.testing.assert_close(g.kl_coefs(p), 0.4 * (0.1 + 0.9 * p[:, -1]))
    g = groups("kl.coef=0.4", "kl.adaptive=false")
    assert (g.kl_coefs(soft(30, 2)) == torch.tensor(0.4)).all()


def test_controllers_hold_each_group_at_its_target():
    g = groups("kl.coef=1", "kl.floor=0.5", "kl.controller=true", "kl.target=[2, 4]")
    p = F.one_hot(torch.tensor([0, 0, 1, 1])).float()
    g.control(p, torch.tensor([100.0, 100.0, 3.6, 3.6]))  # far above; a tenth below
    torch.testing.assert_close(g.coefs, torch.tensor([0.5 * 1.02, 1.0 * 0.99]))
    torch.testing.assert_close(g.kl_coefs(p), g.coefs[[0, 0, 1, 1]])


# --- inference ---


def test_exact_labels_are_the_partition_and_groups_the_hardest_first():
    g = groups("groups.num_groups=3", "groups.min_size=1")
    r = torch.tensor([5.0, 0.1, 9.0, 0.0, 5.2, 9.1])
    assert g.labels(r).tolist() == [1, 0, 2, 0, 1, 2]
    assert groups().labels(torch.ones(12)) is None  # nothing to tell apart
    assert groups("groups.inference=adversarial").labels(r) is None


def test_exact_head_loss_is_balanced_cross_entropy_over_any_micro_batches():
    g = groups("groups.critic_beta=0.5")
    logits = torch.randn(9, 2, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 1])
    loss = g.head_loss(labels, torch.randn(9), lambda: logits)
    nll = F.cross_entropy(logits, labels, reduction="none")
    want = 0.5 * (nll[labels == 0].mean() + nll[labels == 1].mean()) / 2
    whole = loss(logits, torch.arange(9))
    torch.testing.assert_close(whole, want)
    parts = [torch.tensor([3, 1, 7, 0]), torch.tensor([2, 4, 5, 6, 8])]
    torch.testing.assert_close(sum(loss(logits[rows], rows) for rows in parts), want)


def test_adversarial_pull_is_the_gradient_of_the_variance_over_any_micro_batches():
    g = groups("groups.inference=adversarial", "groups.balance=0.2", "groups.critic_beta=0.5")
    logits, r = torch.randn(9, 2, requires_grad=True), torch.randn(9)
    s = gikernels.soft_groups(logits, r, form="mass")
    entropy = -(s.mass * s.mass.log()).sum()
    (want,) = torch.autograd.grad(
        0.5 * (0.2 * (math.log(2) - entropy) - s.variance), logits, retain_graph=True
    )
    loss = g.head_loss(None, r, lambda: logits)
    for rows in (torch.tensor([3, 1, 7, 0]), torch.tensor([2, 4, 5, 6, 8])):
        loss(logits[rows], rows).backward()
    torch.testing.assert_close(logits.grad, want)


def test_adversarial_ascent_finds_the_groups():
    g = groups("groups.inference=adversarial")
    hard = torch.arange(60) < 20
    features = torch.stack([hard.float(), torch.randn(60)], 1)
    r = torch.where(hard, -1.0, 1.0) + 0.3 * torch.randn(60)
    head = torch.nn.Linear(2, 2)
    optimiser = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(200):
        optimiser.zero_grad()
        logits = head(features)
        g.head_loss(None, r, lambda logits=logits: logits)(logits, torch.arange(60)).backward()
        optimiser.step()
        g.observe(g.probs(head(features).detach(), prompts(60)), r)
    p = g.probs(head(features).detach(), prompts(60))
    assert ((p[:, 0] > 0.5) == hard).float().mean() > 0.95  # and group 0 is the hard one


def test_order_is_held_by_a_running_mean_and_swaps_are_counted():
    g = groups("groups.inference=adversarial", "groups.ema=0.9")
    logits = torch.tensor([[8.0, -8.0]] * 5 + [[-8.0, 8.0]] * 5)
    hard_first = torch.tensor([0.0] * 5 + [1.0] * 5)

    def see(returns):
        ordered = g.observe(g.probs(logits, prompts(10)), returns)
        assert torch.equal(ordered, g.probs(logits, prompts(10)))
        return int(ordered.argmax(1)[0])

    assert see(hard_first) == 0 and g.swaps == 0
    assert see(1 - hard_first) == 0 and g.swaps == 0  # one batch the other way round is chance
    for _ in range(12):
        last = see(1 - hard_first)
    assert last == 1 and g.swaps == 1  # lasting change: one swap, and it is said


def test_a_first_order_against_the_slots_is_no_swap():
    g = groups("groups.inference=adversarial")
    logits = torch.tensor([[8.0, -8.0]] * 5 + [[-8.0, 8.0]] * 5)
    g.observe(g.probs(logits, prompts(10)), torch.tensor([1.0] * 5 + [0.0] * 5))
    assert g.probs(logits, prompts(10)).argmax(1).tolist() == [1] * 5 + [0] * 5
    assert g.swaps == 0


def test_oracle_uses_the_domains_ordered_by_return():
    g = groups("groups.inference=oracle")
    assert g.num == 3
    some = prompts(12)
    returns = torch.tensor([{"copy": 2.0, "sort": 0.0, "reverse": 1.0}[p.domain] for p in some])
    g.observe(g.probs(None, some), returns)
    want = [{"sort": 0, "reverse": 1, "copy": 2}[p.domain] for p in some]
    assert g.probs(None, some).argmax(1).tolist() == want
    with pytest.raises(ValueError, match=r"oracle.*domain column"):
        Groups(tiny.config("unused", "groups.inference=oracle"), prompts(3, (None,)))


# --- hard groups, and prompts drawn from them ---


def test_hard_groups_are_the_exact_partition_of_the_heads_ranking():
    g = groups("groups.num_groups=3", "groups.assign=hard")
    logits = 0.1 * torch.randn(50, 3)  # probabilities near a third, as a head's are
    g.cut(logits)
    rank = logits.softmax(1) @ torch.arange(3.0)
    want = gikernels.partition(rank, 3).group_ids.long()
    probs = g.probs(logits, prompts(50))
    assert torch.equal(probs.argmax(1), want) and torch.equal(probs.amax(1), torch.ones(50))
    # The borders stay for sequences that were not chosen to be typical.
    assert torch.equal(g.probs(logits[want == 0], []).argmax(1), want[want == 0])
    again = groups("groups.num_groups=3", "groups.assign=hard")
    again.load_state_dict(g.state_dict())
    assert torch.equal(again.probs(logits, []), probs)


def test_a_head_that_says_the_same_of_all_leaves_the_borders():
    g = groups("groups.assign=hard")
    g.cut(torch.randn(20, 2))
    before = g.cuts.clone()
    g.cut(torch.zeros(20, 2))
    assert torch.equal(g.cuts, before)


@pytest.mark.parametrize("focus", [0.0, 0.5, 1.0])
def test_drawing_meets_each_group_as_often_as_focus_asks(focus):
    g = groups("groups.num_groups=4", "groups.assign=hard", f"groups.focus={focus}", n=300)
    logits = torch.randn(300, 4)
    weights = g.drawing_weights(logits, prompts(300))
    probs = g.probs(logits, prompts(300))
    share = probs.mean(0)
    drawn = (weights / weights.sum()) @ probs  # of each group, in expectation
    torch.testing.assert_close(drawn, (1 - focus) * share + focus / 4)
    assert share.max() > 1.3 * share.min()


def test_groups_are_met_as_the_rule_asks_after_what_they_have_returned():
    """The variance rule, written out: more of the hard group, by how far below the mean it is."""
    rule = ("groups.draw=variance", "groups.draw_beta=0.5", "groups.draw_floor=0")
    g = groups("groups.num_groups=4", "groups.assign=hard", "groups.focus=1", *rule, n=300)
    logits = torch.randn(300, 4)
    probs = g.probs(logits, prompts(300))
    returns = torch.randn(300) * 0.1 + probs @ torch.tensor([-0.5, -0.1, 0.1, 0.3])
    g.learn(probs, returns, None, returns.abs())
    means = group_means(probs, returns)
    weights = g.drawing_weights(logits, prompts(300))
    probs = g.probs(logits, prompts(300))  # by the borders that the pool has
    share = probs.mean(0)
    q = share * (1 - (means - share @ means))
    torch.testing.assert_close((weights / weights.sum()) @ probs, q / q.sum())
    other = groups("groups.num_groups=4", "groups.assign=hard", "groups.focus=1", *rule, n=300)
    other.load_state_dict(g.state_dict())
    assert torch.equal(other.drawing_weights(logits, prompts(300)), weights)


def test_signal_learns_from_labels_what_the_heads_classes_return():
    g = groups("groups.focus=1", "groups.draw=signal", "groups.draw_floor=0")
    labels, returns = torch.tensor([0, 1]).repeat(6), torch.tensor([0.0, 1.0]).repeat(6)
    g.learn(soft(12, 2), returns, labels, returns)
    g.learn(soft(12, 2), torch.randn(12), None, returns)  # no labels: nothing is learnt of them
    p = torch.tensor([0.01, 0.5, 0.9])
    weights = g.drawing_weights(torch.stack([(1 - p).log(), p.log()], 1), prompts(3))
    want = (p * (1 - p)).sqrt()
    torch.testing.assert_close(weights, want / want.mean())


def test_a_group_that_nobody_is_in_takes_no_share():
    g = groups("groups.inference=random", "groups.num_groups=8", "groups.focus=1", n=3)
    some = prompts(3)
    weights = g.drawing_weights(None, some)
    drawn = (weights / weights.sum()) @ g.probs(None, some)
    present = drawn[drawn > 0]
    torch.testing.assert_close(present, torch.full_like(present, 1 / len(present)))


def test_random_labels_belong_to_the_prompt():
    g = groups("groups.inference=random", "groups.num_groups=4", "groups.min_size=1")
    some = prompts(400)
    first = g.probs(None, some)
    assert torch.equal(first, g.probs(None, some))
    assert (first.mean(0) > 0.15).all()


def test_group_means():
    p, v = soft(7, 3), torch.randn(7)
    torch.testing.assert_close(group_means(p, v), (p * v[:, None]).sum(0) / p.sum(0))
    empty = F.one_hot(torch.zeros(4, dtype=torch.long), 2).float()
    torch.testing.assert_close(group_means(empty, v[:4]), v[:4].mean().expand(2))


def test_state_comes_back():
    g = groups("groups.inference=adversarial", "groups.objective=group_dro")
    g.observe(soft(12, 2), torch.randn(12))
    g.weights(soft(12, 2), torch.randn(12))
    other = groups("groups.inference=adversarial", "groups.objective=group_dro")
    other.load_state_dict(g.state_dict())
    p, r = soft(12, 2), torch.randn(12)
    torch.testing.assert_close(other.weights(p, r), g.weights(p, r), rtol=0, atol=0)
    assert torch.equal(other.order, g.order) and torch.equal(other.running, g.running)


# --- the KL coefficient of a group ---


def test_graded_coefficients_rise_in_equal_steps():
    options = ("groups.num_groups=4", "kl.coef=0.6", "kl.floor=0.4")
    torch.testing.assert_close(groups(*options).coefs, 0.6 * torch.tensor([0.4, 0.6, 0.8, 1.0]))
    easiest = groups(*options, "kl.shape=easiest").coefs
    torch.testing.assert_close(easiest, 0.6 * torch.tensor([0.4, 0.4, 0.4, 1.0]))
    two = [groups("kl.floor=0.4", f"kl.shape={shape}").coefs for shape in ("graded", "easiest")]
    assert torch.equal(*two)
    fixed = groups(*options, "kl.shape=graded", "kl.adaptive=false").coefs
    torch.testing.assert_close(fixed, torch.full((4,), 0.6))


# --- performance ---


def test_performance_over_reference_has_no_offset():
    raw, reference = torch.randn(20), torch.randn(20, 4)
    offset = 10 * torch.randn(20)
    for how in ("over_reference", "quantile"):
        plain = performance(how, raw, raw, reference, 2.0)
        shifted = performance(how, raw, raw + offset, reference + offset[:, None], 2.0)
        torch.testing.assert_close(plain, shifted, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        performance("over_reference", raw, raw, reference, 2.0), (raw - reference.mean(1)) / 2
    )
    ties = performance("quantile", raw, torch.ones(1), torch.tensor([[0.0, 1.0, 2.0, 0.5]]), 1.0)
    assert ties.item() == (1 + 0.5 + 0 + 1) / 4
    assert performance("raw", raw, raw * 3, None, 1.0) is raw

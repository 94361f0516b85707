"""Drawing by group for any data loader: rates as the rule asks, and the same again after a stop."""

import itertools
import math

import pytest
import torch
from torch.utils.data import DataLoader

from gikernels import GroupDraw, partition
from gikernels.integrations import GroupSampler
from gikernels.integrations.sampler import Repeated, take
from gikernels.reference import group_stats

N, BATCH = 400, 8
REWARD = torch.arange(N).remainder(10) / 10 + torch.arange(N) / 1e5
"""What a prompt's answers score: clusters at 0.0, 0.1, ... of 40 prompts each."""


def scored(sampler, rows=range(N), samples=2, spread=0.05):
    """All of these prompts, once."""
    rows = torch.tensor([r for r in rows for _ in range(samples)])
    around = torch.linspace(-spread, spread, samples).repeat(len(rows) // samples)
    sampler.observe(rows, REWARD[rows] + around)
    return sampler


def drawn(sampler, batches):
    """(batches, BATCH) rows, over as many epochs as it takes, at one state of knowledge."""
    rows = itertools.chain.from_iterable(iter(lambda: list(sampler), None))
    return torch.tensor(list(itertools.islice(rows, batches * BATCH))).view(batches, BATCH)


def shares(rows, ids, num):
    return torch.bincount(ids[rows.flatten()], minlength=num) / rows.numel()


def within_noise(got, want, draws, sigmas=4):
    """Systematic samples are no noisier than independent ones."""
    assert ((got - want).abs() <= sigmas * (want * (1 - want) / draws).sqrt() + 1e-9).all(), got


def test_take_meets_unequal_chances_exactly_and_never_twice():
    weights = torch.tensor([9.0, 1, 1, 1, 2, 0, 0.5, 0.5], dtype=torch.float64)
    want = torch.cat([torch.ones(1), 3 * weights[1:] / weights[1:].sum()])  # 9 of 15 is above 1 / 4
    generator = torch.Generator().manual_seed(0)
    takes = torch.stack([take(weights, 4, generator) for _ in range(4000)])
    assert all(len(set(row)) == 4 for row in takes.tolist())
    within_noise(torch.bincount(takes.flatten(), minlength=8) / 4000, want, 4000)
    assert sorted(take(weights, 8, generator).tolist()) == list(range(8))
    assert takes[:, 0].bincount().count_nonzero() > 5  # no prompt has a place of its own


@pytest.mark.parametrize("rule", ["even", "variance", "gdro", "progress", "bandit", "none"])
def test_inferred_groups_are_met_at_the_rates_of_the_rule(rule):
    sampler = GroupSampler(N, BATCH, rule=rule, num_groups=4, rate=2.0, seed=3)
    scored(scored(sampler), range(0, N, 2))
    ids = partition(sampler.mean, 4).group_ids.long()
    assert torch.equal(sampler.ids, ids)
    share = ids.bincount() / N
    want = sampler.draw.rates(share)
    if rule == "even":
        assert want.tolist() == [0.25] * 4
    elif rule != "none":
        assert (want - share).abs().max() > 0.03  # the rule shows
    within_noise(shares(drawn(sampler, 500), ids, 4), want, 500 * BATCH)
    if rule != "none":
        metrics = sampler.metrics()
        assert metrics["draw/scored"] == 1 and metrics["draw/0/rate"] == pytest.approx(want[0])


def test_what_the_rule_sees_is_each_groups_rewards_in_standard_deviations():
    """Two observations, spelt out."""
    sampler = GroupSampler(4, 2, rule="variance", num_groups=2, group_memory=0.75)
    want = GroupDraw("variance", 2, memory=0.75)
    first, second = torch.tensor([0.0, 1, 5, 7]), torch.tensor([2.0, 5])
    sampler.observe([0, 0, 1, 1], first)
    one_hot = torch.eye(2)[torch.tensor([0, 0, 1, 1])]
    std = first.double().std(correction=0)
    own = torch.tensor([-0.5, 0.5, -1, 1]).double() / std
    want.observe(one_hot, first / std, own)
    sampler.observe(torch.tensor([1, 2]), second)  # prompt 1: 6 -> 4; prompt 2 is a new one: 5
    std = torch.cat([first, second]).double().std(correction=0)
    want.observe(torch.eye(2)[[1, 1]], second / std, torch.zeros(2))
    assert sampler.mean.tolist() == [0.5, 4, 5, 0] and sampler.ids.tolist() == [0, 1, 1, -1]
    for name, x in want.state_dict().items():
        torch.testing.assert_close(sampler.draw.state_dict()[name], x, msg=name)
    assert sampler.total[1] == pytest.approx(20 / 6)


def test_prompts_that_were_never_scored_count_as_average_ones():
    sampler = GroupSampler(N, BATCH, rule="even", num_groups=4)
    assert torch.equal(sampler.weights(), torch.ones(N).double())
    within_noise(
        drawn(sampler, 500).flatten().bincount(minlength=N) / 500, torch.tensor(BATCH / N), 500, 5
    )
    scored(sampler, range(100))
    weights = sampler.weights()
    assert torch.equal(weights[100:], torch.ones(300).double())
    assert weights[:100].mean() == pytest.approx(1) and weights[:100].std() > 0.1
    assert (sampler.ids[100:] == -1).all() and sampler.metrics()["draw/scored"] == 0.25


def test_ties_share_a_group_and_too_few_values_are_no_groups():
    sampler = GroupSampler(8, 2, num_groups=3)
    sampler.observe(range(8), [0.0, 1, 0, 1, 0, 1, 0, 1])
    assert sampler.ids is None and torch.equal(sampler.weights(), torch.ones(8).double())
    sampler.observe([0, 2], [0.5, 0.5])
    assert sampler.ids.tolist() == [1, 2, 1, 2, 0, 2, 0, 2]
    same = GroupSampler(8, 2, num_groups=1)
    same.observe(range(8), [3.0] * 8)
    assert same.draw.mean.isnan().all()  # no unit to measure it in
    large = GroupSampler(8, 2, num_groups=2, min_size=3)
    large.observe(range(8), range(8))
    assert large.ids.bincount().min() >= 3


def test_given_groups_hold_for_prompts_that_were_never_scored():
    domains = ["code" if i % 10 == 0 else "chat" for i in range(N)]
    sampler = GroupSampler(N, BATCH, rule="even", groups=domains)
    assert sampler.draw.num == 2
    ids = torch.tensor([d == "chat" for d in domains]).long()
    within_noise(shares(drawn(sampler, 300), ids, 2), torch.tensor([0.5, 0.5]), 300 * BATCH)
    by_rule = GroupSampler(N, BATCH, rule="variance", groups=ids)
    scored(by_rule, range(50))
    stats = group_stats(REWARD[:50].repeat_interleave(2).double(), ids[:50].repeat_interleave(2), 2)
    assert by_rule.draw.mean[0] < by_rule.draw.mean[1] and stats.mean[0] < stats.mean[1]
    want = by_rule.draw.rates(torch.tensor([0.1, 0.9]))
    assert want[0] > 0.2  # the rare, hard domain
    within_noise(shares(drawn(by_rule, 300), ids, 2), want, 300 * BATCH)


def test_signal_draws_prompts_by_the_spread_of_their_own_answers():
    sampler = GroupSampler(N, BATCH, rule="signal", floor=0.1)
    passes = [1, 0, 0, 0] * 50 + [1, 1, 0, 0] * 50 + [1, 1, 1, 1] * 50
    rows = torch.arange(150).repeat_interleave(4)
    sampler.observe(rows, passes)
    sampler.observe([150], [0.0])  # a lone answer has no spread: average
    spread = torch.tensor([3**0.5 / 4, 1 / 2, 0.0]).double()
    weights = sampler.weights()
    want = 0.9 * spread / spread.mean() + 0.1
    torch.testing.assert_close(weights[:150].view(3, 50), want.unsqueeze(1).expand(3, 50))
    assert torch.equal(weights[150:], torch.ones(250).double())


def test_a_head_is_asked_about_a_pool():
    asked = []

    def head(rows):
        asked.append(len(rows))
        hard = torch.tensor([0.9 if r % 10 == 0 else 0.2 for r in rows])
        return torch.stack([hard, 1 - hard], 1)

    sampler = GroupSampler(N, BATCH, rule="even", num_groups=2, groups=head, pool=5)
    rows = drawn(sampler, 300)
    assert asked == [5 * BATCH] * 300
    # sum_g p_g(x) q_g / f_g, with f the mean of p: here f_0 = 0.27
    f = torch.tensor([0.27, 0.73])
    hard = 0.1 * (torch.tensor([0.9, 0.1]) * 0.5 / f).sum()
    got = (rows % 10 == 0).double().mean()
    assert got == pytest.approx(float(hard), abs=0.02) and hard > 0.16
    scored(sampler, range(20))
    assert asked[-1] == 20 and not sampler.draw.mean.isnan().any()  # each prompt once
    for wrong in (torch.ones(BATCH * 5, 2), torch.full((BATCH * 5, 2), torch.nan)):
        sampler.head = lambda rows, wrong=wrong: wrong
        with pytest.raises(ValueError, match=r"groups\(rows\)"):
            next(iter(sampler))


@pytest.mark.parametrize("rule", ["even", "bandit"])
def test_two_processes_that_observe_the_same_draw_the_same(rule):
    ranks = [GroupSampler(N, BATCH, rule=rule, seed=7) for _ in range(2)]
    streams = [iter(s) for s in ranks]
    torch.manual_seed(0)
    seen = set()
    for step in range(12):
        batches = [[next(stream) for _ in range(BATCH)] for stream in streams]
        assert batches[0] == batches[1] and len(set(batches[0])) == BATCH
        seen.add(tuple(batches[0]))
        torch.manual_seed(step)  # nothing global is read
        rows = torch.tensor(batches[0]).repeat_interleave(2)
        rewards = REWARD[rows] + torch.randn(len(rows))
        for sampler in ranks:
            sampler.observe(rows, rewards)
        torch.rand(3)
    assert len(seen) == 12
    other = GroupSampler(N, BATCH, rule=rule, seed=8)
    assert list(itertools.islice(other, BATCH)) != list(itertools.islice(ranks[0], BATCH))


def run(sampler, loader, batches, ahead=0):
    """Trains on `batches` more of them, with a loader that has fetched `ahead` of those."""
    taken, fetched = [], []
    stream = iter(loader)
    for _ in range(batches):
        while len(fetched) <= ahead:
            fetched.append(next(stream))
        rows = fetched.pop(0)
        taken.append(rows.tolist())
        both = rows.repeat_interleave(2)
        sampler.observe(both, REWARD[both] + torch.tensor([0.1, -0.1] * len(rows)))
    return taken


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_resume_is_bit_equal_where_batches_are_skipped(ahead, tmp_path):
    """As trainers do that start the epoch again and throw away what they had."""

    def build():
        sampler = GroupSampler(N, BATCH, rule="variance", seed=1)
        return sampler, DataLoader(range(N), batch_size=BATCH, sampler=sampler)

    whole, loader = build()
    want = run(whole, loader, 20, ahead)
    first, loader = build()
    assert run(first, loader, 12, ahead) == want[:12]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again, loader = build()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), rewind=True)
    assert run(again, itertools.islice(loader, 12, None), 8, ahead) == want[12:]
    for name in GroupSampler.TENSORS:
        assert torch.equal(getattr(again, name), getattr(whole, name)), name


def test_a_state_goes_on_in_the_middle_of_a_batch_and_after_an_epoch():
    """As StatefulDataLoader does, which restores the sampler; here prompt by prompt."""
    size = 3 * BATCH + 5

    def rows_of(sampler, count):
        epochs, rows = [], []
        while len(rows) < count:
            epochs.append(len(rows))
            for row in sampler:
                rows.append(row)
                sampler.observe([row], [float(REWARD[row])])
                if len(rows) == count:
                    break
        return rows, epochs

    whole = GroupSampler(size, BATCH, num_groups=2)
    want, epochs = rows_of(whole, 7 * BATCH)
    assert len(whole) == 3 * BATCH and epochs == [0, 3 * BATCH, 6 * BATCH]
    for stop in (BATCH + 3, 3 * BATCH - 1, 3 * BATCH, 3 * BATCH + 1):
        first, rest = (
            GroupSampler(size, BATCH, num_groups=2),
            GroupSampler(size, BATCH, num_groups=2),
        )
        got, _ = rows_of(first, stop)
        rest.load_state_dict(first.state_dict())
        assert got + rows_of(rest, 7 * BATCH - stop)[0] == want, stop
    # At the end of an epoch that nobody has seen the end of, and after somebody has.
    sampler, loaded = GroupSampler(size, BATCH), GroupSampler(size, BATCH)
    stream = iter(sampler)
    for _ in range(3 * BATCH):
        next(stream)
    loaded.load_state_dict(sampler.state_dict())
    assert list(loaded) == []
    second = list(loaded)
    assert next(stream, None) is None
    loaded.load_state_dict(sampler.state_dict())
    assert list(loaded) == second == list(sampler)


def test_repeated_as_trainers_of_several_answers_want_it():
    sampler = GroupSampler(5, 2, seed=1)
    rows = list(Repeated(sampler, each=3, times=2))
    assert len(rows) == len(Repeated(sampler, each=3, times=2)) == 24
    for block in (rows[:12], rows[12:]):
        a, b = block[0], block[3]
        assert a != b and block == [a, a, a, b, b, b] * 2


def test_unscored_answers_are_left_out():
    one, two = GroupSampler(N, BATCH), GroupSampler(N, BATCH)
    rows, rewards = torch.arange(20), REWARD[:20].clone()
    one.observe(rows[:19], rewards[:19], rewards[:19])
    rewards[19] = torch.nan
    two.observe(rows, rewards, rewards)
    two.observe(rows, torch.full((20,), torch.nan))
    two.observe([], [])
    for name, x in one.state_dict().items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(two.state_dict()[name], x)
    assert not two.count[19]


@pytest.mark.parametrize(
    "settings, name",
    [
        (dict(size=0), "size"),
        (dict(batch=0), "batch"),
        (dict(batch=11), "batch"),
        (dict(seed=-1), "seed"),
        (dict(rule="evenly"), "rule"),
        (dict(num_groups=0), "num_groups"),
        (dict(memory=1.0), "memory"),
        (dict(min_size=0), "min_size"),
        (dict(pool=0), "pool"),
        (dict(floor=math.nan), "floor"),
        (dict(betta=1.0), "betta"),
        (dict(groups=[0] * 9), "groups"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        GroupSampler(**{"size": 10, "batch": 2, **settings})


def test_bad_observations_and_states_are_named():
    sampler = GroupSampler(10, 2)
    for args, name in [
        (([0, 10], [1.0, 2.0]), "rows"),
        (([0, -1], [1.0, 2.0]), "rows"),
        (([0.5], [1.0]), "rows"),
        (([[0]], [1.0]), "rows"),
        (([0, 1], [1.0]), "rewards"),
        (([0], [math.inf]), "rewards"),
        (([0], [1.0], [1.0, 2.0]), "advantages"),
    ]:
        with pytest.raises(ValueError, match=name):
            sampler.observe(*args)
    assert not sampler.count.any()
    with pytest.raises(ValueError, match="10 prompts, want 12"):
        GroupSampler(12, 2).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="4 groups, want 3"):
        GroupSampler(10, 2, num_groups=3).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="has no count, mean"):
        sampler.load_state_dict(
            {k: v for k, v in sampler.state_dict().items() if k not in ("count", "mean")}
        )

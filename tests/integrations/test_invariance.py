"""GroupInvariance: the groups, weights and KL scales of a batch of scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gikernels import reference
from gikernels.integrations import GroupInvariance


def test_groups_are_of_prompts_and_weights_are_the_formula():
    scores = torch.tensor([1.0, 3.0, 8.0, 2.0, 9.0, 9.0, 0.0, 1.0])
    prompts = torch.tensor([7, 7, 5, 5, 9, 9, 2, 2])  # means 2, 5, 9, .5
    out = GroupInvariance(beta=0.25, kl_floor=0.2).infer(scores, prompts)
    assert out.group_ids.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]  # 8 and 2 share their prompt's group
    r = (scores - scores.mean()) / scores.std(correction=0)
    probs = torch.nn.functional.one_hot(out.group_ids, 2).double()
    torch.testing.assert_close(out.weights, reference.group_weights(probs, r, 0.25).float())
    # mass form, hard groups: c = 1 - 2 beta (R_g - mean)
    hard = 1 - 2 * 0.25 * r[[0, 1, 6, 7]].mean()
    torch.testing.assert_close(out.weights[0], hard)
    torch.testing.assert_close(out.kl_scale, torch.where(out.group_ids == 1, 1.0, 0.2))
    assert out.metrics["group/gap"] == pytest.approx(7 - 1.25)
    assert out.metrics["group/0/weight"] == pytest.approx(hard.item())
    assert out.metrics["group/1/mass"] == 0.5 and out.metrics["group/inferred"] == 1


def test_without_prompts_each_sequence_stands_for_itself():
    scores = torch.tensor([0.0, 10.0, 1.0, 11.0])
    assert GroupInvariance().infer(scores).group_ids.tolist() == [0, 1, 0, 1]


def test_unscored_sequences_are_left_alone():
    scores = torch.tensor([0.0, torch.nan, 10.0, 1.0])
    out = GroupInvariance(beta=0.5).infer(scores, torch.tensor([0, 0, 1, 1]))
    assert out.group_ids.tolist() == [0, -1, 1, 1]
    assert out.weights[1] == 1 and out.kl_scale[1] == 1 and out.weights.isfinite().all()


@pytest.mark.parametrize(
    "scores, kwargs",
    [
        ([1.0, 1.0, 1.0], {}),
        ([1.0], {}),
        ([], {}),
        ([torch.nan, torch.nan], {}),
        ([1.0, 1.0, 2.0], dict(min_size=2)),
        ([1.0, 2.0], dict(num_groups=3)),
    ],
)
def test_nothing_to_infer_changes_nothing(scores, kwargs):
    out = GroupInvariance(beta=1.0, **kwargs).infer(torch.tensor(scores))
    assert out.weights.eq(1).all() and out.kl_scale.eq(1).all() and out.group_ids.eq(-1).all()
    assert out.metrics == {"group/inferred": 0.0}


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]), min_size=1, max_size=14),
    num_groups=st.integers(2, 4),
    min_size=st.integers(1, 3),
)
def test_never_raises_for_what_a_batch_may_hold(scores, num_groups, min_size):
    """Ties together, every group of min_size: inferred exactly when a brute force finds a cut."""
    values = torch.tensor(scores)
    out = GroupInvariance(num_groups=num_groups, min_size=min_size).infer(values)
    counts = [scores.count(v) for v in sorted(set(scores))]

    def feasible(rest, groups):
        if groups == 0:
            return not rest
        return any(
            sum(rest[:k]) >= min_size and feasible(rest[k:], groups - 1)
            for k in range(1, len(rest) + 1)
        )

    assert (out.metrics["group/inferred"] == 1) == feasible(counts, num_groups)
    if out.metrics["group/inferred"]:
        assert torch.bincount(out.group_ids, minlength=num_groups).min() >= min_size
        assert out.weights.min() >= 0 and out.weights.max() <= 5


def test_scale_and_offset_of_the_reward_do_not_matter():
    scores = torch.randn(64)
    invariance = GroupInvariance(num_groups=3, beta=0.3, form="uniform")
    a, b = invariance.infer(scores), invariance.infer(1000 * scores - 5e4)
    assert torch.equal(a.group_ids, b.group_ids)
    torch.testing.assert_close(a.weights, b.weights, rtol=1e-2, atol=1e-2)  # fp32 at an offset


@pytest.mark.parametrize(
    "kwargs, name",
    [
        (dict(num_groups=1), "num_groups"),
        (dict(beta=-1.0), "beta"),
        (dict(form="max"), "form"),
        (dict(clamp=(2.0, 1.0)), "clamp"),
        (dict(kl_floor=1.5), "kl_floor"),
        (dict(min_size=0), "min_size"),
    ],
)
def test_bad_settings_name_themselves(kwargs, name):
    with pytest.raises(ValueError, match=name):
        GroupInvariance(**kwargs)


def test_bad_tensors_name_themselves():
    infer = GroupInvariance().infer
    with pytest.raises(ValueError, match="performance"):
        infer(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="performance"):
        infer(torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="prompt_group"):
        infer(torch.zeros(2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="prompt_group"):
        infer(torch.zeros(2), torch.zeros(2))

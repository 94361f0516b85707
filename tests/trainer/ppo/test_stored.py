"""What is kept between steps and runs, beside data and rewards of several kinds."""

from collections import Counter

import pytest

from tests.trainer import tiny
from trainer.batch.order import Mixture
from trainer.batch.types import Prompt
from trainer.ppo.asked import Asked
from trainer.ppo.reference_scores import key_of, name_of
from trainer.runs.folder import RunFolder


def key(*functions):
    listed = ", ".join("{" + each + "}" for each in functions)
    alone = ("reward.model_weight=0", "model.critic=policy", "model.reference=toy")
    config = tiny.config("unused", *alone, f"reward.functions=[{listed}]")
    return key_of(config, RunFolder("unused"))


@pytest.mark.parametrize(
    "other",
    ["function: length, most: 4", "function: length, most: 3, weight: 2", "function: choice"],
)
def test_scores_are_kept_for_the_options_of_rewards(other):
    assert key("function: length, most: 3") == key("function: length, most: 3")
    assert key("function: length, most: 3") != key(other)


def test_what_an_answer_is_compared_with_is_part_of_a_prompt():
    one = Prompt(ids=[5], text="a", meta={"answer": "3"})
    assert name_of(one) == name_of(Prompt(ids=[5], text="a", meta={"answer": "3"}))
    assert name_of(one) != name_of(Prompt(ids=[5], text="a", meta={"answer": "4"}))


def test_the_pool_has_each_source_by_its_weight():
    class Two(list):
        mixture = Mixture.of([0] * 900 + [1] * 100, [1.0, 3.0])

    config = tiny.config("unused", "groups.pool=64", "groups.refresh=1")
    prompts = Two(Prompt(ids=[5], text=str(i)) for i in range(1000))
    pool = [i for step in range(20) for i in Asked(config, prompts, 2).pool(step)]
    counts = Counter(i >= 900 for i in pool)
    assert counts[True] / len(pool) == pytest.approx(0.75, abs=0.05)

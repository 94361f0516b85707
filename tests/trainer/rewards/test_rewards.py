"""Rewards: functions and what they may do wrong, several with weights, running normalisation."""

import sys

import pytest
import torch

from tests.trainer import tiny
from trainer.batch.sequences import Sequences
from trainer.batch.types import Prompt
from trainer.models import loading
from trainer.rewards.errors import RewardError
from trainer.rewards.functions import check_functions
from trainer.rewards.normaliser import Normaliser
from trainer.rewards.scorer import Scorer

REWARDS = """
import torch
def length(prompts, answers, meta): return [float(len(a.split())) for a in answers]
def weight(prompts, answers, meta): return torch.tensor([m["w"] for m in meta])
def raises(prompts, answers, meta): return 1 / 0
def one(prompts, answers, meta): return [1.0]
def number(prompts, answers, meta): return 1.0
def words(prompts, answers, meta): return ["good"] * len(answers)
def nan(prompts, answers, meta): return [float("nan")] * len(answers)
def leaves(prompts, answers, meta): import sys; sys.exit(3)
def quits(prompts, answers, meta): import sys; sys.exit(0)
def second(prompts, answers, meta): return [1 / (m["w"] - 2) for m in meta]
constant = 3
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


PROMPTS = [Prompt(text=f"prompt {i}", meta={"w": i}, ids=[5]) for i in (1, 2)]
SEQUENCES = Sequences.of([[5, 6, 11, 12, 3]] * 2, [[11, 12, 1], [12, 1]])


def scorer(*overrides, model=None):
    config = tiny.config("unused", "reward.model_weight=0", "model.critic=policy", *overrides)
    tokenizer = loading.load_tokenizer("toy", config)
    return Scorer(config, tokenizer, model)


def test_several_functions_with_weights(rewards):
    score = scorer(
        "reward.functions=[{function: 'my_rewards:length', weight: 2.0},"
        " {function: 'my_rewards:weight', name: mine}]",
        "reward.truncated_penalty=0.5",
    )
    out = score(PROMPTS, SEQUENCES, torch.tensor([False, True]))
    assert out["length"].tolist() == [2, 1] and out["mine"].tolist() == [1, 2]
    assert out["total"].tolist() == [2 * 2 + 1, 2 * 1 + 2 - 0.5]


@pytest.mark.parametrize(
    "name, message",
    [
        ("raises", "my_rewards:raises raised ZeroDivisionError: division by zero"),
        ("raises", "by zero; prompt 'prompt 1', answer ''"),
        ("second", "by zero; prompt 'prompt 2', answer ''"),
        ("leaves", "my_rewards:leaves raised SystemExit: 3; prompt 'prompt 1'"),
        ("quits", "my_rewards:quits raised SystemExit: 0; prompt 'prompt 1'"),
        ("nan", "returned nan for 0; prompt 'prompt 1'"),
        ("one", r"returned shape \(1,\), want 2 numbers"),
        ("number", r"returned shape \(\), want 2 numbers"),
        ("words", "returned list, want 2 numbers"),
        ("nan", "returned nan"),
        ("missing", "cannot import my_rewards:missing: AttributeError"),
        ("constant", "is a int, want a function"),
    ],
)
def test_bad_functions_are_one_clear_line(rewards, name, message):
    config = tiny.config(
        "unused",
        "reward.model_weight=0",
        "model.critic=policy",
        f"reward.functions=[{{function: 'my_rewards:{name}'}}]",
    )
    with pytest.raises(RewardError, match=rf"reward.functions\[0\]: .*{message}") as error:
        check_functions(config, PROMPTS)
    assert "\n" not in str(error.value)


def test_unknown_module(rewards):
    with pytest.raises(RewardError, match="cannot import no_such_module:f: ModuleNotFoundError"):
        scorer("reward.functions=[{function: 'no_such_module:f'}]")


def test_functions_work_while_something_else_is_done(rewards):
    """What is done between submit and collect changes no score; a failure comes with collect."""
    score = scorer("reward.functions=[{function: 'my_rewards:length'}]")
    truncated = torch.tensor([False, False])
    asked = score.submit(PROMPTS, SEQUENCES, truncated)
    assert asked.parts["length"].result(5).tolist() == [2, 1]  # done, with nobody waiting
    torch.manual_seed(3)
    assert torch.equal(score.collect(asked)["total"], score(PROMPTS, SEQUENCES, truncated)["total"])
    bad = scorer("reward.functions=[{function: 'my_rewards:leaves'}]")
    with pytest.raises(RewardError, match="SystemExit: 3; prompt 'prompt 1', answer 'a b'"):
        bad.collect(bad.submit(PROMPTS, SEQUENCES, truncated))


def test_running_std_is_that_of_all_scores_so_far():
    normalise = Normaliser(tiny.config("unused", "reward.clip=0"))
    batches = [torch.randn(n) * 3 + 7 for n in (5, 1, 30)]
    for batch in batches:
        normalise.observe(batch)
    std = torch.cat(batches).std()
    torch.testing.assert_close(normalise(batches[0]), batches[0] / std)
    normalise.config = tiny.config("unused", "reward.clip=0.5", "reward.normalise=meanstd")
    want = ((batches[2] - torch.cat(batches).mean()) / std).clamp(-0.5, 0.5)
    torch.testing.assert_close(normalise(batches[2]), want)
    again = Normaliser(normalise.config)
    again.load_state_dict(normalise.state_dict())
    torch.testing.assert_close(again(batches[2]), want)
    normalise.config = tiny.config("unused", "reward.clip=0", "reward.normalise=none")
    assert torch.equal(normalise(batches[2]), batches[2])


@pytest.mark.parametrize("outlier", [1e20, -3e38, 1e6])
@pytest.mark.parametrize("first", [False, True])
def test_one_finite_outlier_does_not_silence_the_rest(outlier, first, capsys):
    normalise, batches = Normaliser(tiny.config("unused")), torch.randn(200, 32) * 2
    bad = batches[0 if first else 50]
    bad[7] = outlier
    for batch in batches:
        normalise.observe(batch)
    rest = batches[batches.abs() < 1e5]
    assert float(normalise(rest).std()) == pytest.approx(1, rel=0.02)
    assert float(normalise(bad)[7]) == (5 if outlier > 0 else -5)
    assert f"1 of {32 if first else 51 * 32} scores" in capsys.readouterr().out
    again = Normaliser(normalise.config)
    again.load_state_dict(normalise.state_dict())
    assert torch.equal(again.std, normalise.std)
    far = normalise.bounded(torch.tensor([outlier, 0.5]))
    assert float(far.abs().max()) < 50 and float(far[1]) == 0.5


def test_constant_scores_and_then_an_outlier_are_not_for_good():
    normalise = Normaliser(tiny.config("unused"))
    normalise.observe(torch.zeros(64))
    normalise.observe(torch.tensor([0.0, 1e20]))
    for batch in torch.randn(100, 32):
        normalise.observe(batch)
    assert 0.9 < float(normalise.std) < 1.1


@pytest.mark.parametrize("every", [2, 50, 5000])
def test_rare_successes_count(every):
    """1 now and then and else 0: the only scale there is."""
    scores = torch.zeros(20_000)
    scores[::every] = 1
    normalise = Normaliser(tiny.config("unused"))
    for batch in scores.split(100):
        normalise.observe(batch)
    assert float(normalise.std) == pytest.approx(float(scores.std()), rel=1e-5)


def test_a_large_offset_costs_no_digits():
    scores = torch.randn(10_000, dtype=torch.float64) + 1e6
    normalise = Normaliser(tiny.config("unused"))
    for batch in scores.split(100):
        normalise.observe(batch)
    assert float(normalise.std) == pytest.approx(float(scores.std()), rel=1e-6)


def test_a_reward_model_with_its_own_tokens(base):
    """Translated through text: the same scores as when it reads the policy's ids."""
    config = tiny.config("unused")
    tokenizer = loading.load_tokenizer("toy", config)
    reward, own = loading.load_scoring_model(config, base)
    truncated = torch.zeros(2, dtype=torch.bool)
    direct = Scorer(config, tokenizer, reward, own)
    want = direct(PROMPTS, SEQUENCES, truncated)["total"]
    assert direct.model_tokenizer is None
    through_text = Scorer(config, tokenizer, reward, own)
    through_text.model_tokenizer = own  # as if its vocabulary were another
    got = through_text(PROMPTS, SEQUENCES, truncated)["total"]
    torch.testing.assert_close(got, want)


TEMPLATE = (
    "{% for m in messages %}copy {{ m.content }} {% if m.role == 'assistant' %}! {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}copy {% endif %}"
)


def test_a_reward_model_of_another_family_reads_messages_in_its_own_template(base):
    """Not what is left of the policy's template; how a turn ends is the reward model's to say."""
    config = tiny.config("unused")
    tokenizer = loading.load_tokenizer("toy", config)
    reward, own = loading.load_scoring_model(config, base)
    own.chat_template = TEMPLATE
    score = Scorer(config, tokenizer, reward, own)
    score.model_tokenizer = own  # as if its vocabulary were another
    messages = [{"role": "user", "content": "a b"}]
    prompts = [Prompt(text="<mess>", ids=[5], messages=messages), PROMPTS[1]]
    submitted = score.submit(prompts, SEQUENCES, torch.tensor([False, False]))
    read = score._retokenised(prompts, SEQUENCES, submitted.truncated)
    texts = own.batch_decode(read.tokens.split(read.lengths.tolist()))
    assert texts == ["copy a b copy a b !", "copy reverse a b : b <eos>"]
    assert own.decode(read.prompts()[0]) == "copy a b copy"
    cut = score._retokenised(prompts, SEQUENCES, torch.tensor([True, True]))
    texts = own.batch_decode(cut.tokens.split(cut.lengths.tolist()))
    assert texts == ["copy a b copy a b", "copy reverse a b : b"]

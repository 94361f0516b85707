"""Two ranks: one tokenises, both map the same rows; a reward that fails on one ends both."""

import torch

from tests.trainer import children, tiny
from trainer import parallel
from trainer.batch.sequences import Sequences
from trainer.batch.types import Prompt
from trainer.data import sources
from trainer.data.errors import DataError
from trainer.models import loading
from trainer.rewards.errors import RewardError
from trainer.rewards.scorer import Scorer


def load_on_a_rank(source, bad, output):
    config = tiny.config("unused", f"data.prompts={source}", f"data.cache={output}")
    tokenizer = loading.load_tokenizer("toy", config)
    calls, real = [], sources.encode_prompts
    sources.encode_prompts = lambda *arguments: calls.append(1) or real(*arguments)
    prompts = sources.load_prompts(config, "train", tokenizer)
    said = parallel.gather_objects((len(calls), [prompt.ids for prompt in prompts]))
    assert [count for count, _ in said] == [1, 0]
    assert said[0][1] == said[1][1] != []
    again = tiny.config("unused", f"data.prompts={bad}", f"data.cache={output}")
    try:
        sources.load_prompts(again, "train", tokenizer)
    except DataError as error:
        assert "bad.jsonl:1: prompt: is int" in str(error)
    else:
        raise AssertionError("no error")


def test_one_rank_tokenises_and_an_error_is_everybodys(tmp_path):
    (tmp_path / "good.jsonl").write_text('{"prompt": "copy copy a b :"}\n' * 3)
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    arguments = (tmp_path / "good.jsonl", tmp_path / "bad.jsonl", tmp_path / "cache")
    assert children.run_ranks(2, load_on_a_rank, *arguments) == [0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def score_on_a_rank():
    config = tiny.config(
        "unused", "reward.model_weight=0", "model.critic=policy",
        "reward.functions=[{function: contains, column: must}]",
    )  # fmt: skip
    score = Scorer(config, loading.load_tokenizer("toy", config), None)
    batch = Sequences.of([[5, 6, 11, 3]] * 4, [[11, 1], [12, 1], [11, 1], [12, 1]], 0)
    prompts = [Prompt(text="p", ids=[5], meta={"must": "a"})] * 4
    cut = torch.zeros(4, dtype=torch.bool)
    assert score(prompts, batch, cut)["contains"].tolist() == [1, 0, 1, 0]
    prompts[3] = Prompt(text="the last", ids=[5], meta={})  # rank 1 judges it
    try:
        score(prompts, batch, cut)
    except RewardError as error:
        assert "the row has no column must" in str(error) and "'the last'" in str(error)
    else:
        raise AssertionError("no error")


def test_each_answer_is_judged_on_one_rank_and_a_failure_is_everybodys():
    assert children.run_ranks(2, score_on_a_rank) == [0, 0]

"""`gi init`: a file that loads, says what was found, and fits the machine that it was made for."""

import json

import pytest
from transformers import AutoConfig

from trainer.__main__ import main
from trainer.cli import data, init, memory
from trainer.config import load

SEVEN, HALF = "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init.hub, "reachable", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(AutoConfig, "from_pretrained", no_network)


def no_network(*_, **__):
    raise OSError("no network")


def rows(path, *lines, times=50):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines * times))
    return str(path)


PAIR = {"prompt": "Which is it? " * 10, "chosen": "this one " * 20, "rejected": "that one"}
DEMONSTRATION = {"prompt": "Say a word.", "response": "word"}
PROBLEM = {"prompt": "1 + 1 =", "answer": "2"}


def made(*arguments, output="config.yaml"):
    assert main(["init", *map(str, arguments), "--output", output]) == 0
    return load(output)


def plan(config, source, gib, ranks=1):
    shape = memory.published(source)
    card = int(gib * init.GIB)
    return max(
        memory.at_once(config, memory.estimate(config, stage, shape, shape, ranks, card))
        for stage in config.run.stages
    )


@pytest.mark.parametrize("gib", [24, 40, 80])
def test_settings_that_fit(tmp_path, gib, capsys):
    pairs = rows(tmp_path / "pairs.jsonl", PAIR)
    config = made("--model", HALF, "--data", pairs, "--gpus", 1, "--memory", gib)
    assert plan(config, HALF, gib) < gib * init.GIB - init.ON_TOP
    assert config.model.policy == HALF and config.model.dtype == "bfloat16"
    assert config.run.stages == ("sft", "rm", "ppo") and config.data.pairs == pairs
    better = config.data.demonstrations[0]
    assert (better.source, better.columns) == (pairs, {"response": "chosen"})
    text = (tmp_path / "config.yaml").read_text()
    assert "memory and speed, never the result" in text and f"{gib} GiB, as asked for" in text
    said = capsys.readouterr().out
    assert "gi train config.yaml --dry-run" in said and "has demonstrations, pairs, prompts" in said


def test_a_smaller_card_gets_what_costs_more_time(tmp_path):
    pairs = rows(tmp_path / "pairs.jsonl", PAIR)
    given = ("--model", HALF, "--data", pairs, "--gpus", 1, "--memory")
    large, small = (made(*given, gib, output=f"{gib}.yaml") for gib in (80, 20))
    assert not large.model.gradient_checkpointing and small.model.gradient_checkpointing
    assert large.trainer.tokens_per_microbatch >= small.trainer.tokens_per_microbatch


def test_what_cannot_fit_is_said_and_nothing_is_written(tmp_path, capsys):
    pairs = rows(tmp_path / "pairs.jsonl", PAIR)
    given = ["init", "--model", SEVEN, "--data", pairs, "--gpus", "1", "--memory", "6"]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"gi: {SEVEN}: --model: does not fit") and said.count("\n") == 1
    assert not (tmp_path / "config.yaml").exists()
    config = made("--model", SEVEN, "--data", pairs, "--gpus", 8, "--memory", 80)
    assert not config.lora.active and config.run.memory == 80
    assert plan(config, SEVEN, 80, ranks=8) < 77 * init.GIB and config.run.ranks == 8


def test_adapters_where_all_weights_do_not_fit(tmp_path):
    pairs = rows(tmp_path / "pairs.jsonl", PAIR)
    given = ("--model", SEVEN, "--data", pairs, "--gpus", 1, "--memory")
    large, small = (made(*given, gib, output=f"{gib}.yaml") for gib in (48, 16))
    assert large.lora.active and large.lora.quantize == "none"
    assert small.lora.active and small.lora.quantize == "nf4" and small.rollout.engine == "hf"
    assert plan(small, SEVEN, 16) < 13 * init.GIB and small.ppo.lr == 2e-5
    assert "adapters: all weights do not fit" in (tmp_path / "16.yaml").read_text()


def test_what_the_rows_are_is_found_out(tmp_path, capsys):
    asked = ("--model", HALF, "--gpus", 0, "--memory", 64, "--data")
    config = made(*asked, rows(tmp_path / "a.jsonl", PROBLEM), output="a.yaml")
    assert config.run.stages == ("ppo",) and config.model.critic == "policy"
    assert config.reward.model_weight == 0 and config.reward.functions[0].function == "math"
    assert config.model.dtype == "float32"  # a CPU
    both = rows(tmp_path / "b.jsonl", PROBLEM | DEMONSTRATION)
    assert made(*asked, both, output="b.yaml").run.stages == ("sft", "ppo")
    with_model = made(*asked, rows(tmp_path / "c.jsonl", DEMONSTRATION), f"model.reward={HALF}")
    assert with_model.run.stages == ("sft", "ppo") and with_model.reward.model_weight != 0
    assert main(["init", *map(str, asked), str(tmp_path / "c.jsonl"), "--output", "d.yaml"]) == 2
    assert "c.jsonl: --data: has neither pairs nor a column answer" in capsys.readouterr().err


def test_lengths_and_what_is_held_out(tmp_path):
    short, long = {"prompt": "x" * 70, "response": "y"}, {"prompt": "x" * 7000, "response": "y"}
    train = rows(tmp_path / "train.jsonl", *[short] * 199, long, times=1)
    rows(tmp_path / "test.jsonl", short)
    found = data.look(train, "no/model")
    assert found.prompt_tokens == 64 and found.answer_tokens == 64  # the longest is dropped
    assert found.held_out == str(tmp_path / "test.jsonl")
    assert data.held_out(str(tmp_path / "test.jsonl")) == str(tmp_path / "test.jsonl")
    assert data.look(rows(tmp_path / "other.jsonl", long), "no/model").prompt_tokens == 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x.jsonl"], "init wants --model"),
        (["--model", HALF], "init wants --data"),
        (["--model", HALF, "--data", "no.jsonl", "--gpus", "0"], "--data: no.jsonl: no such file"),
        (["--model", "no/such", "--data", "p.jsonl", "--gpus", "0"], "no/such: --model: cannot be"),
        (["--model", HALF, "--data", "p.jsonl", "--memory", "-1"], "--memory: is -1"),
        (["--model", HALF, "--data", "p.jsonl", "--gpus", "two"], "argument --gpus: invalid int"),
        (["--model", HALF, "--data", "p.jsonl", "--gpus", "0", "ppo.stepz=1"], "ppo.stepz: unkn"),
        (["--model", HALF, "--data", "p.jsonl", "--output", "x.txt"], "--output: is x.txt"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, capsys, arguments, message):
    rows(tmp_path / "p.jsonl", PAIR)
    assert main(["init", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("mine")
    assert main(["init", "--model", HALF, "--data", "p.jsonl"]) == 2
    assert "config.yaml: is there already" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_overrides_go_into_the_file(tmp_path):
    pairs = rows(tmp_path / "pairs.jsonl", PAIR)
    config = made("--model", HALF, "--data", pairs, "--gpus", 1, "--memory", 80, "ppo.steps=7",
                  "groups.num_groups=3")  # fmt: skip
    assert config.ppo.steps == 7 and config.groups.num_groups == 3

"""The world of reasoning problems: exact checks, no leak, the same from its seed, and a run."""

import dataclasses
import json
import subprocess
import sys

import pytest

pytest.importorskip("reasoning_gym", reason="pip install -e '.[reasoning]'")

from tests.trainer import tiny
from trainer import report
from trainer.cli import check
from trainer.config import ConfigError, load
from trainer.data import sources
from trainer.models import loading
from trainer.rewards.functions import check_functions, load_functions
from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines
from trainer.stages import evaluate, registry
from trainer.worlds import reasoning

WORLD = reasoning.World(load("reasoning").reasoning)
SMALL = [
    *("reasoning.demonstrations=400", "reasoning.prompts=120", "reasoning.hidden=24"),
    *("reasoning.layers=2", "reasoning.heads=2", "reasoning.intermediate=48"),
    *("sft.steps=4", "sft.batch=32", "ppo.steps=2", "ppo.prompts_per_step=32"),
    *("ppo.critic_warmup_steps=0", "groups.min_size=2", "eval.samples_per_domain=4"),
    *("eval.samples=2", "eval.every=1", "trainer.progress=false", "rollout.max_new_tokens=6"),
    "trainer.save_every=0",
]


def small(output, *overrides):
    config = load("reasoning_quick", [*SMALL, *overrides])
    return dataclasses.replace(config, run=dataclasses.replace(config.run, output=str(output)))


@pytest.mark.parametrize(
    "domain", [*reasoning.FAMILIES, *(f"{f}_harder" for f in WORLD.config.shares)]
)
def test_the_solution_is_right_and_other_answers_are_not(domain):
    rows = WORLD._family(domain, "eval", 20)
    assert len(rows) == 20
    for row in json.loads(json.dumps(rows)):  # as they come back from the cache
        assert WORLD.gold(row, row["response"]) == 1 and WORLD.well_formed(row, row["response"])
        assert WORLD.gold(row, f" {row['response']}\n") == 1
        for wrong in ("", "?", "99999", "[", "None", row["response"] + "7", "x" * 500):
            assert WORLD.gold(row, wrong) < 1
        for malformed in ("", "?", f"{row['response']} {row['response']}", "the answer"):
            assert not WORLD.well_formed(row, malformed)


def test_no_problem_of_an_evaluation_is_ever_in_training():
    """Whatever the seed of the world or the stage: the text decides."""
    training, measuring = set(), set()
    for seed in (0, 1):
        world = reasoning.World(dataclasses.replace(WORLD.config, seed=seed))
        for split, side in (("demonstrations", training), ("train", training),
                            ("eval", measuring), ("ood", measuring)):  # fmt: skip
            rows = world.rows(split, 1500)
            texts = [row["prompt"] for row in rows]
            assert len(set(texts)) == len(texts)  # none twice
            side |= set(texts)
    assert len(training) > 3000 and len(measuring) > 3000
    assert not training & measuring
    assert not {reasoning.held(text) for text in training} & {True}


def test_a_leak_is_found(monkeypatch):
    monkeypatch.setattr(WORLD, "_family", lambda *_: [{"prompt": "a"}, {"prompt": "b"}] * 40)
    with pytest.raises(AssertionError, match="on both sides"):
        monkeypatch.setattr(reasoning, "held", lambda prompt: prompt == "a")
        WORLD.rows("train", 40)


def test_families_by_shares_in_training_and_evenly_in_evaluations():
    domains = [row["domain"] for row in WORLD.rows("train", 1000)]
    for name, share in WORLD.config.shares.items():
        assert domains.count(name) / len(domains) == pytest.approx(share, abs=0.02)
    domains = [row["domain"] for row in WORLD.rows("eval", 60)]
    assert {domains.count(name) for name in WORLD.config.shares} == {10}
    domains = {row["domain"] for row in WORLD.rows("ood", 80)}
    assert domains == {*(f"{n}_harder" for n in WORLD.config.shares), *WORLD.config.held_out}


def test_guessing_is_worth_what_the_commonest_answer_gets():
    config = load("reasoning", ["reasoning.shares={gcd: 0.5, chain_sum: 0.5}"])
    world = reasoning.World(config.reasoning)
    guessing = world.guessing(200)
    answers = [row["response"] for row in world._family("gcd", "demonstrations", 200)]
    commonest = max(sorted(set(answers)), key=answers.count)
    problems = world._family("gcd", "eval", 200)
    right = sum(row["response"] == commonest for row in problems) / len(problems)
    assert guessing["gcd"] == right > 0.1
    assert guessing["chain_sum"] < 0.1


def test_the_same_in_another_process():
    code = (
        "from trainer.config import load; from trainer.worlds import reasoning;"
        "import hashlib, json;"
        "w = reasoning.World(load('reasoning', ['reasoning.demonstrations=500']).reasoning);"
        "said = [w.rows('eval', 60), w.tokenizer().backend_tokenizer.to_str()];"
        "print(hashlib.sha256(json.dumps(said).encode()).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout


def test_numbers_keep_their_digits_apart():
    tokenizer = WORLD.tokenizer()
    ids = tokenizer("1234567890", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == list("1234567890")
    text = "Spell this word backward (example: sun -> nus): ammonia é\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == WORLD.config.vocabulary == WORLD.model_config().vocab_size
    parameters = sum(p.numel() for p in WORLD.model().parameters())
    assert 2e6 < parameters < 4e6


def test_another_tokenizer_reads_the_same_problems(tmp_path):
    """Rows are text: any policy's tokenizer will do."""
    config = small("unused", "reasoning.vocabulary=400")
    other = reasoning.World(config.reasoning).tokenizer()
    prompts = sources.load_prompts(config, "eval", other)
    assert other.decode(prompts[0].ids) == prompts[0].text == prompts[0].meta["prompt"]


def test_the_verifier_is_a_reward(tmp_path):
    config = small("unused")
    tokenizer = loading.load_tokenizer("reasoning", config)
    prompts = list(sources.load_prompts(config, "train", tokenizer))[:20]
    check_functions(config, prompts)
    ((verifier, _),) = load_functions(config).values()
    texts, meta = [p.text for p in prompts], [p.meta for p in prompts]
    assert verifier(texts, [p.meta["response"] for p in prompts], meta).tolist() == [1] * 20
    assert max(verifier(texts, ["?"] * 20, meta).tolist()) < 1


def test_what_it_cannot_do_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="held_out: is 'gcd'; want families not in shares"):
        load("reasoning", ["reasoning.held_out=[gcd]"])
    with pytest.raises(ConfigError, match=r"reasoning.shares.sums: is 'sums'; want one of spell"):
        load("reasoning", ["reasoning.shares={sums: 1}"])
    with pytest.raises(ValueError, match=r"data.pairs: reasoning: this world has no annotators"):
        config = small(tmp_path, "data.pairs=reasoning", "run.stages=[sft, rm]")
        check.check(config, ["sft", "rm"])
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[reasoning\]'"):
        WORLD.rows("eval", 6)


def whole(folder, *overrides):
    run = RunFolder(folder)
    config = small(folder, "baselines={}", *overrides)
    for stage in config.stages:
        registry.run(stage, config, run, False)
    return run, config


def test_a_run_is_bit_equal_and_says_what_is_right(tmp_path):
    """SFT and PPO by the verifier; pass@1 and pass@k by family, in the log, the report, gi eval."""
    run, config = whole(tmp_path / "a")
    again, _ = whole(tmp_path / "b")
    lines = tiny.without_times(read_lines(run.metrics))
    assert lines == tiny.without_times(read_lines(again.metrics))
    weights = "models/policy/model.safetensors"
    assert (run.path / weights).read_bytes() == (again.path / weights).read_bytes()
    assert (run.path / "samples.jsonl").read_text() == (again.path / "samples.jsonl").read_text()

    last = [line for line in lines if line["stage"] == "eval"][-1]
    for name in ("chain_sum", "number_filtering", "gcd"):
        for share in ("pass@1", "pass@2"):
            low, value, high = (last[f"domain/{name}/{share}{e}"] for e in ("_low", "", "_high"))
            assert 0 <= low <= value <= high <= 1
        assert 0 <= last[f"domain/{name}/malformed"] <= 1
    assert {"ood/basic_arithmetic/pass@1", "eval/ood_pass@2", "eval/pass@1"} <= last.keys()
    assert last["domain/gcd/pass@1"] == pytest.approx(last["domain/gcd/gold"])
    sample = read_lines(run.samples)[-1]
    assert {"right", "malformed", "domain"} <= sample.keys()

    page = report.write([run.path]).read_text()
    assert "pass@1 by family" in page and "out of distribution" in page
    assert len(list((run.path / "plots").glob("bars_domain_pass_1_*.png"))) == 1
    evaluate.run(config, run)
    only = read_lines(run.metrics)[-1]
    assert only["stage"] == "eval_only" and only["eval/pass@1"] == pytest.approx(
        last["eval/pass@1"]
    )

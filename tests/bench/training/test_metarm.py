"""MetaRM's study: figures by hand, and the memory of an ascent."""

import json
from types import SimpleNamespace

import pytest

from bench.training import metarm, metarm_page
from trainer.config import load
from trainer.runs.folder import RunFolder


def test_taste_is_gold_and_a_liking_for_flourishes(tmp_path):
    answers = [
        # the prompt's first two differ in taste by 0.05 for the flourish, gold says the opposite
        {"response": "a b <eos>", "gold": 1.0, "before": 0.0, "after": 1.0},
        {"response": "a b ! <eos>", "gold": 0.85, "before": 1.0, "after": 0.0},
        {"response": "a c <eos> !", "gold": 0.5, "before": 0.0, "after": -1.0},
    ]
    run = RunFolder(tmp_path)
    run.answers.write_text("".join(json.dumps(line) + "\n" for line in answers))
    config = SimpleNamespace(metarm=SimpleNamespace(samples=3), toy=SimpleNamespace(liking=0.2))
    figures = metarm.taste(run, config)
    # pairs by taste: second over first, first over third, second over third
    assert figures["before/taste_accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert figures["after/taste_accuracy"] == pytest.approx((0 + 1 + 1) / 3)
    assert figures["policy/flourishes"] == pytest.approx(1 / 3)


def rows():
    return [
        {"seed": seed, "variant": variant, "round": n, "policy/gold": seed / 10 + gain * n}
        for seed in (1, 2, 3)
        for variant, gain in (("none", 0.1), ("literal", 0.2))
        for n in (0, 1, 2)
    ]


def test_differences_are_of_the_same_seed_and_round():
    missing = [row for row in rows() if (row["seed"], row["variant"]) != (2, "none")]
    found = metarm_page.against_control(missing, "literal", 2, "policy/gold")
    assert found == pytest.approx([0.2, 0.2])
    mean, low, high = metarm_page.interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and 1 <= low < 2 < 3 < high <= 4
    assert metarm_page.interval([0.2, 0.2]) == pytest.approx((0.2, 0.2, 0.2))


def test_page_and_plot(tmp_path):
    results = {"seeds": [1, 2, 3], "variants": ["none", "literal"], "rounds": 2, "rows": rows()}
    for row in results["rows"]:
        for key, _ in metarm_page.REWARD_MODEL:
            row |= {f"before/{key}": 0.5, f"after/{key}": 0.5}
        row |= {"policy/proxy": 1.0, "policy/kl": row["round"], "policy/distinct": 1.0}
    page = metarm_page.markdown(results)
    assert "| 2 | literal | 0.600 [+0.200, +0.200] |" in page
    by_round = "+0.200 [+0.200, +0.200] | +0.200 [+0.200, +0.200]"
    assert f"| literal | {by_round} | +0.150 [+0.150, +0.150] |" in page
    metarm_page.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_an_ascent_keeps_one_copy_of_the_parameters(tmp_path):
    config = load("toy", ["toy.hidden=32", "toy.layers=1", "toy.heads=2"])
    metarm.make_toy(config, tmp_path)
    assert metarm.memory(config, tmp_path)["copies_inside"] == pytest.approx(1, abs=0.02)

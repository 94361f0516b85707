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


def test_equal_kl_is_the_controls_curve_at_the_variants_own_kl():
    def line(seed, variant, n, kl, gold):
        figures = {"policy/kl": kl, "policy/gold": gold}
        return {"seed": seed, "variant": variant, "round": n, **figures}

    made = []
    for seed in (1, 2):  # the control: gold = kl / 4 + seed, between KL 2 and 4
        for n in (1, 2):
            made.append(line(seed, "none", n, 2 + 0.1 * n, 0.5 + 0.025 * n + seed))
            made.append(line(seed, "none_0.15", n, 4 + 0.1 * n, 1 + 0.025 * n + seed))
            made.append(line(seed, "literal", n, 3 + 0.1 * n, 0.75 + 0.025 * n + seed + 0.1))
            made.append(line(seed, "additive", n, 9, 1.03 + seed))  # beyond the end: level
    results = {"rows": made, "controls": ["none_0.15"]}
    both = range(1, 3)
    assert metarm_page.at_equal_kl(results, "literal", both) == pytest.approx([0.1, 0.1])
    assert metarm_page.at_equal_kl(results, "literal", range(2, 3)) == pytest.approx([0.1, 0.1])
    level = 1 + 0.025 * 1.5
    assert metarm_page.at_equal_kl(results, "additive", both) == pytest.approx([1.03 - level] * 2)


def test_page_and_plot(tmp_path):
    results = {"seeds": [1, 2, 3], "variants": ["none", "literal"], "rounds": 2, "rows": rows()}
    results["controls"] = ["literal"]
    for row in results["rows"]:
        for key, _ in metarm_page.REWARD_MODEL:
            row |= {f"before/{key}": 0.5, f"after/{key}": 0.5}
        row |= {"policy/proxy": 1.0, "policy/kl": row["round"], "policy/distinct": 1.0}
    page = metarm_page.markdown(results)
    assert "| 2 | literal | 0.600 [+0.200, +0.200] |" in page
    by_round = "+0.200 [+0.200, +0.200] | +0.200 [+0.200, +0.200]"
    assert f"| literal | {by_round} | +0.150 [+0.150, +0.150] |" in page
    assert "| literal | +0.000 [+0.000, +0.000] |" in page.partition("## Gold at equal KL")[2]
    metarm_page.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_run_is_of_the_variant_that_it_says(tmp_path):
    """The control once took the packaged variant, as it said nothing."""
    for name, overrides in metarm.RUNS.items():
        config = metarm.setting(RunFolder(tmp_path), 1, 3, overrides)
        assert config.metarm.variant == name.partition("_")[0]
        coef = float(name.partition("_")[2] or 0.3)
        assert config.kl.coef == coef and not config.kl.adaptive


def test_an_ascent_keeps_one_copy_of_the_parameters(tmp_path):
    config = load("toy", ["toy.hidden=32", "toy.layers=1", "toy.heads=2"])
    metarm.make_toy(config, tmp_path)
    assert metarm.memory(config, tmp_path)["copies_inside"] == pytest.approx(1, abs=0.02)

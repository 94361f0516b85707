"""Every example runs as a script, is short, and does what it says."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def run(name, run_name="example"):
    if name.startswith("trl"):
        pytest.importorskip("trl", reason="trl is not installed")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=run_name)


@pytest.mark.parametrize("name", NAMES)
def test_runs_as_a_script_of_at_most_60_lines(name, capsys):
    run(name, "__main__")
    assert capsys.readouterr().out
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60


def test_all_are_there():
    assert NAMES == [
        "distil",
        "draw_dataloader",
        "group_weights",
        "hf_logprobs",
        "metarm_step",
        "ppo_step",
        "trl_draw",
        "trl_grpo",
    ]


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_distillation_comes_closer(kind):
    found = run("distil")["main"](16, kind)
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


def test_ppo_step_learns():
    scores = torch.tensor(run("ppo_step")["main"](14))
    assert scores[-4:].mean() > 2 * scores[:4].mean()


def test_hf_logprobs_are_the_models_own():
    got, want = run("hf_logprobs")["main"]()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_group_weights_find_the_hard_prompts():
    groups, weights = run("group_weights")["main"]()
    assert groups.tolist() == [1, 1, 0, 1, 0, 1]
    assert weights.min() < 1 < weights.max()


def test_metarm_step_learns_on_both_distributions():
    assert min(run("metarm_step")["main"]()) > 0.9


def test_trl_grpo_infers_groups():
    logs = run("trl_grpo")["main"](2)
    assert len(logs) == 2 and any(h["group/inferred"] for h in logs)


def test_draw_dataloader_draws_the_rare_hard_skill_more_often():
    main = run("draw_dataloader")["main"]
    even, none = main(rule="even"), main(rule="none")
    assert even["hard"] > 1.4 * none["hard"] and even["hard"] == min(even.values())


def test_trl_draw_draws_the_rare_hard_domain_more_often():
    logs = run("trl_draw")["main"](3)
    assert len(logs) == 3 and logs[-1]["draw/3/rate"] > 1.2 * logs[-1]["draw/3/share"]

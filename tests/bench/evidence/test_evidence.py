"""The study judges fairly: its matrix says what it means, its statistics are right, nothing stale
is taken for a result, and a killed study goes on."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.evidence import __main__ as command
from bench.evidence import claims, disturb, measure
from bench.evidence.matrix import ARMS, SECTIONS, STUDIES, sections_of
from bench.evidence.scheduler import PRELOADED, Study, StudyError, alone_in, mean_coefficient
from bench.evidence.store import Store, changed, settings_of
from bench.evidence.worlds import WORLDS
from trainer import config as settings

# --- the matrix -----------------------------------------------------------------------------------


def test_every_arm_stands_in_a_section_and_every_name_in_a_section_is_an_arm():
    named = {arm for section in SECTIONS.values() for arm in section.arms}
    assert named == set(ARMS)
    for name, section in SECTIONS.items():
        assert section.control in section.arms, name


def test_every_arm_is_a_valid_configuration_that_no_other_arm_has(tmp_path):
    study, seen = Study(Store(tmp_path)), {}
    for arm in ARMS.values():
        overrides = [*WORLDS[arm.world].overrides, *arm.overrides]
        if arm.coef_from:  # as if each had another mean
            overrides.append(f"kl.coef={0.43 + list(ARMS).index(arm.coef_from) / 1e4}")
        config = study.load(1, "ppo", overrides, arm.world)
        assert not (arm.coef_from and config.kl.adaptive), arm.name
        made_by = json.dumps(settings_of(config, arm.kind, dict(arm.disturb)), sort_keys=True)
        assert made_by not in seen, f"{arm.name} is the same run as {seen[made_by]}"
        seen[made_by] = arm.name


def test_a_mean_coefficient_comes_from_the_same_world_under_the_same_rewards():
    for arm in ARMS.values():
        if arm.coef_from:
            source = ARMS[arm.coef_from]
            assert source.world == arm.world
            assert [o for o in source.overrides if o.startswith("reward.")] == [
                o for o in arm.overrides if o.startswith("reward.")
            ]


def test_every_claim_is_about_arms_that_there_are():
    for claim in claims.CLAIMS:
        assert set(claim.arms) <= set(ARMS), claim.text


def test_arms_of_one_seed_share_world_prompts_and_random_numbers(tmp_path):
    study = Study(Store(tmp_path))
    one, two = (study.load(seed, "ppo", ARMS["ppo_0.2"].overrides) for seed in (3, 4))
    assert (one.run.seed, one.toy.seed) == (3, 3) and (two.run.seed, two.toy.seed) == (4, 4)
    assert one.ppo == study.load(3, "ppo", ()).ppo and one.baselines == {}


@pytest.mark.parametrize("world, start", [("reasoning", 1), ("weak_start", 0)])
def test_reasoning_stands_on_one_model_for_all_seeds_and_on_no_reward_model(tmp_path, world, start):
    study = Study(Store(tmp_path))
    for seed in (2, 5):
        step = study.missing(f"{world}/default", seed)
        assert (step.kind, step.seed, step.config.run.seed) == ("sft", start, start)
    study.models["sft", world, start] = tmp_path
    one, two = (study.missing(f"{world}/default", seed).config for seed in (2, 5))
    assert (one.run.seed, two.run.seed) == (2, 5) and one.reasoning == two.reasoning
    assert one.model.policy == two.model.policy == str(tmp_path) and one.model.reward == ""


def test_each_study_has_sections_of_its_own():
    own = {world: sections_of(world) for world in ("toy", *STUDIES)}
    assert sorted(name for names in own.values() for name in names) == sorted(SECTIONS)
    for world in STUDIES:
        assert {ARMS[arm].world for name in own[world] for arm in SECTIONS[name].arms} == {world}
    for name in own["toy"]:
        assert not {ARMS[arm].world for arm in SECTIONS[name].arms} & set(STUDIES)


def test_the_main_comparison_goes_seed_by_seed_and_before_the_rest():
    seeds = {"main": [1, 2], "beta": [1, 2], "kappa": [1]}
    runs = command.order(["beta", "main", "kappa"], seeds)
    main = len(SECTIONS["main"].arms)
    assert {seed for _, seed in runs[:main]} == {1} and {s for _, s in runs[main : 2 * main]} == {2}
    assert {arm for arm, _ in runs[:main]} == set(SECTIONS["main"].arms)
    rest = runs[2 * main :]
    assert [seed for _, seed in rest] == sorted(seed for _, seed in rest)
    assert ("beta_3", 2) in rest and ("kappa_0", 2) not in rest
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--seeds", "0-3"], "cannot be reported"),
        (["--seeds", "1,104"], "cannot be reported"),
        (["--seeds", "a"], "want numbers and ranges"),
        (["--section", "mian"], "did you mean main?"),
        (["--arms", "defualt"], "did you mean default?"),
        (["--again", "defualt"], "did you mean default?"),
        (["--set", "ppo.stepz=3", "--analyse-only"], "ppo.stepz"),
    ],
)
def test_a_wrong_word_is_one_line_and_nothing_is_written(tmp_path, capsys, arguments, problem):
    assert command.main([*arguments, "--folder", str(tmp_path / "study")]) == 2
    told = capsys.readouterr().err
    assert problem in told and told.count("\n") == 1
    assert not (tmp_path / "study").exists()


# --- what is done already -------------------------------------------------------------------------


def settings_for(*overrides):
    config = settings.load("toy", ["baselines={}", *overrides])
    return settings_of(config, "ppo")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    made_by = settings_for("kl.coef=0.3")
    store.keep(store.result_file("an/arm", 0, made_by), {"settings": made_by, "seconds": 1})
    return Store(tmp_path)  # as another process reads it


def test_a_result_is_found_by_its_settings_and_not_by_its_name(store):
    assert store.find(settings_for("kl.coef=0.3")) is not None
    for override in ("groups.beta=0.5", "rm.steps=299", "toy.liking=0.3", "run.seed=1"):
        assert store.find(settings_for("kl.coef=0.3", override)) is None, override
    here = settings.load("toy", ["baselines={}", "kl.coef=0.3"])
    assert store.find(settings_of(here, "ppo", {"wrong_group": 0.1})) is None
    assert store.find(settings_of(here, "evaluate")) is None


@pytest.mark.parametrize(
    "override", ["run.output=elsewhere", "run.threads=2", "trainer.save_every=7"]
)
def test_what_changes_no_result_changes_nothing(store, override):
    assert store.find(settings_for("kl.coef=0.3", override)) is not None


def test_a_new_setting_counts_as_unchanged_only_at_its_default():
    there = settings_for()
    older = {key: value for key, value in there.items() if key != "groups.form"}
    assert changed(settings_for(), older) == []
    assert changed(settings_for(), {**older, "reasoning.seed": 7}) == []  # another world's
    assert changed(settings_for("groups.form=uniform"), older) == [
        "groups.form: 'mass' -> 'uniform'"
    ]
    thin = settings_for("toy.pairs={sort: 0.05}")
    assert changed(thin, there) and changed(there, thin)
    assert changed(there, {**there, "groups.gone": 1}) == ["groups.gone: 1 -> gone"]


def test_a_file_that_is_no_record_is_no_result(store):
    (path,) = store.folder.glob("results/*.json")
    path.write_text(path.read_text()[:40])
    assert Store(store.folder).find(settings_for("kl.coef=0.3")) is None


def test_two_studies_do_not_share_a_folder(tmp_path):
    refused = pytest.raises(StudyError, match="another study is running")
    with alone_in(tmp_path), refused, alone_in(tmp_path):
        pass
    with alone_in(tmp_path):  # the first has ended
        pass


# --- the figures of a run -------------------------------------------------------------------------


def line(step, easy, hard, **more):
    gold = {"domain/copy/gold": easy, "domain/sort/gold": hard}
    figures = {"eval/gold": (easy + hard) / 2, "eval/proxy": 0.9, "eval/kl": 2.0}
    policy = "policy" if step else "sft"
    return {"step": step, "policy": policy, "eval/ood_gold": 0.5, **gold, **figures, **more}


def record(seed=1, coef=0.4, final=(0.9, 0.6), group=(1, 1, 0, 0), gold=(1.0, 0.8, 0.2, 0.4)):
    draw = {
        "metrics": line(2, *final),
        "prompts": "p",
        "domain": ["copy", "copy", "sort", "sort"],
        "gold": list(gold),
        "score": list(gold),
        "group": list(group),
    }
    return {
        "seed": seed,
        "seconds": 1.0,
        "settings": {
            "toy.shares.copy": 0.75,
            "toy.shares.sort": 0.25,
            "ppo.critic_warmup_steps": 1,
        },
        "evaluations": [
            line(0, 0.8, 0.3),
            line(1, 0.3, 0.7),
            line(2, *final, **{"eval/worst_group_gold": 0.3}),
        ],
        "curves": {"objective/kl_coef": [9.0, coef, coef], "objective/scores": [0.0, 1.0, 1.0]},
        "draws": [draw],
    }


def test_figures_of_a_run():
    run = record()
    seen = measure.figures(run, sft=record(gold=(0.9, 0.9, 0.1, 0.1)), grouped=run)
    assert seen["worst_run"] == pytest.approx((0.3 + 0.6) / 2)  # whichever is lowest each time
    assert seen["hardest_run"] == pytest.approx((0.7 + 0.6) / 2)  # sort: the SFT model's worst
    assert seen["worst_final"] == 0.6 and seen["gold_final"] == 0.75
    assert seen["share_final"] == pytest.approx(0.75 * 0.9 + 0.25 * 0.6)
    assert seen["coef"] == pytest.approx(0.4) and mean_coefficient(run) == seen["coef"]
    assert seen["ami"] == 1 and seen["difficulty"] == pytest.approx(1)
    assert seen["hard_group"] == pytest.approx(0.3) and seen["group_gap"] == pytest.approx(0.6)
    assert seen["drift"] == pytest.approx((0.9 - 0.75) - (0.9 - 0.55))
    assert seen["gold_lost"] == 0


def runs_of(figures):
    runs = object.__new__(measure.Runs)
    runs.records = {name: dict.fromkeys(by_seed) for name, by_seed in figures.items()}
    runs.figures = {
        name: {seed: {"gold_run": value} for seed, value in by_seed.items()}
        for name, by_seed in figures.items()
    }
    return runs


def test_the_best_coefficient_in_hindsight_and_on_the_other_seeds():
    runs = runs_of(
        {
            "default": {1: 0.5, 2: 0.5, 3: 0.5},
            "ppo_0.2": {1: 0.9, 2: 0.3, 3: 0.3},
            "ppo_0.3": {1: 0.2, 2: 0.5, 3: 0.5},
            "ppo_0.7": {1: 0.1, 2: 0.1, 3: 0.1, 4: 1.0},
        }
    )
    seen, best = runs.against_best("default", "gold_run", hindsight=True)
    assert best == "ppo_0.2" and seen.mean == pytest.approx(0.0)
    seen, names = runs.against_best("default", "gold_run", hindsight=False)
    # seed 1: 0.3 is best on 2 and 3; seeds 2 and 3: 0.2 is best on the others
    assert names == "ppo_0.3, ppo_0.2"
    assert seen.mean == pytest.approx(((0.5 - 0.2) + (0.5 - 0.3) + (0.5 - 0.3)) / 3)


# --- disturbances ---------------------------------------------------------------------------------


def test_disturbed_rewards_are_functions_of_the_answer():
    answers = [f"a {i}" for i in range(2000)]
    prompts, meta = ["copy a :"] * len(answers), [{}] * len(answers)
    noise = disturb.noise(prompts, answers, meta)
    assert noise == disturb.noise(prompts, answers, meta)
    assert np.std(noise) == pytest.approx(disturb.NOISE, rel=0.1)
    outliers = np.array(disturb.outliers(prompts, answers, meta))
    assert set(np.abs(outliers)) == {0.0, disturb.OUTLIER}
    assert np.mean(outliers != 0) == pytest.approx(disturb.OUTLIERS, abs=0.02)


def test_wrong_groups_and_labels(monkeypatch):
    from types import SimpleNamespace

    from trainer.ppo.groups import Groups

    for name in ("probs", "labels"):  # put back what the disturbances replace
        monkeypatch.setattr(Groups, name, getattr(Groups, name))
    config = settings.load("toy", ["baselines={}"])
    prompts = [SimpleNamespace(ids=[i], domain="copy") for i in range(1000)]
    groups = Groups(config, prompts)
    logits = torch.tensor([[5.0] + [0.0] * (groups.num - 1)]).expand(1000, groups.num)
    right = groups.probs(logits, prompts)
    performance = torch.arange(1000.0)
    labels = groups.labels(performance)
    disturb.apply({"wrong_group": 0.3, "wrong_label": 0.1})
    wrong = groups.probs(logits, prompts)
    turned = wrong[:, 0] < 0.5
    assert torch.equal(wrong[turned], right[turned].flip(1))
    assert torch.equal(wrong[~turned], right[~turned])
    assert 0.25 < turned.float().mean() < 0.35
    assert torch.equal(wrong, groups.probs(logits, prompts))  # the same prompts each time
    differs = groups.labels(performance) != labels
    assert 0.07 < differs.float().mean() < 0.13


# --- a study, killed ------------------------------------------------------------------------------

SMALL = (
    "--quick", "--seeds", "1", "--workers", "1", "--section", "main",
    "--arms", "sft,default,ppo_equal",
    *(
        word
        for setting in (
            "toy.hidden=16", "toy.demonstrations=500", "sft.steps=6", "rm.steps=3", "rm.pairs=64",
            "ppo.steps=3", "eval.every=2", "eval.samples_per_domain=4",
        )
        for word in ("--set", setting)
    ),
)  # fmt: skip
BROKEN = """
import sys
from dataclasses import replace
from bench.evidence import matrix
from bench.evidence.__main__ import main
matrix.ARMS["default"] = replace(matrix.ARMS["default"], disturb=(("no_such_thing", 1.0),))
sys.exit(main(sys.argv[1:]))
"""


def start(folder, *more, program=("-m", "bench.evidence")):
    line = [sys.executable, *program, *SMALL, "--folder", str(folder), *more]
    environment = {**os.environ, "STUDY": str(folder)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, cwd=command.ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def processes_of(folder):
    mark = f"STUDY={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue  # it has just ended, or belongs to somebody else
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.slow
def test_a_killed_study_goes_on_and_a_failed_arm_does_not_stop_the_others(tmp_path):
    folder = tmp_path / "study"
    first = start(folder)
    while "sft_toy" not in first.stdout.readline():
        assert first.poll() is None, first.stderr.read()
    first.send_signal(signal.SIGKILL)
    first.wait()
    give_up = time.monotonic() + 120
    while processes_of(folder):  # its runs and its server end by themselves
        assert time.monotonic() < give_up
        time.sleep(0.05)

    # An arm that cannot run is reported with the end of its log; the others run, but not the one
    # that needs its KL coefficient.
    second = start(folder, program=("-c", BROKEN))
    told, errors = second.communicate()
    assert second.returncode == 1, errors
    assert "sft_toy" not in told and "rm_toy" in told  # what was done is not done again
    assert "FAILED default seed 1" in told and "KeyError: 'no_such_thing'" in told
    assert "[1/3] seed 1 sft " in told and "ppo_equal" not in told
    assert "default seed 1" in errors

    third = start(folder)
    told, errors = third.communicate()
    assert third.returncode == 0, errors
    assert told.startswith("1 of 3 results are there") and "[3/3]" in told
    quick = folder / "quick"
    assert not list((quick / "running").iterdir())  # run folders are gone
    records = {
        record["name"]: record
        for record in map(json.loads, (p.read_text() for p in quick.glob("results/*.json")))
    }
    assert set(records) == {"sft", "default", "ppo_equal"}
    coefficient = mean_coefficient(records["default"])
    assert records["ppo_equal"]["settings"]["kl.coef"] == pytest.approx(coefficient, abs=1e-4)
    prompts = {record["draws"][i]["prompts"] for record in records.values() for i in range(4)}
    assert len(prompts) == 1
    draws = [draw["gold"] for draw in records["sft"]["draws"]]
    assert len(draws) == 4 and draws[0] != draws[1]
    page = json.loads((quick / "report" / "evidence.json").read_text())
    assert page["arms"]["default"]["seeds"]["1"]["coef"] == pytest.approx(coefficient, abs=1e-5)
    assert "one seed: no interval" in (quick / "report" / "evidence.md").read_text()

    again, errors = start(folder).communicate()
    assert again.startswith("3 of 3 results are there") and "[3/3]" not in again, errors


# --- what is told of it ---------------------------------------------------------------------------


def test_every_interval_in_the_documents_stands_in_a_result_file():
    """A difference is quoted with its interval, and a quoted one is not older than the results."""
    root = Path(__file__).parents[3]
    results = "\n".join(path.read_text() for path in (root / "bench" / "results").rglob("*.md"))
    difference = re.compile(r"([+-]?\d\.\d+) \[([+-]\d\.\d+), ([+-]\d\.\d+)\]")

    def size(text):
        return text.lstrip("+-"), text.startswith("-") and float(text) != 0

    def turned(mean, low, high):  # b less a, for a less b
        return tuple(
            (digits, not minus and float(digits) != 0) for digits, minus in (mean, high, low)
        )

    found = {tuple(map(size, each.groups())) for each in difference.finditer(results)}
    found |= {turned(*each) for each in found}
    documents = ("README.md", "docs/results.md", "docs/evidence.md", "docs/trainer.md")
    for name, least in (*((name, 3) for name in documents), ("docs/index.md", 2)):
        quoted = list(difference.finditer((root / name).read_text()))
        assert len(quoted) >= least, f"{name} quotes no differences: has their form changed?"
        for each in quoted:
            assert tuple(map(size, each.groups())) in found, f"{name}: {each.group()}"


@pytest.mark.parametrize("name", PRELOADED)
def test_what_is_to_be_imported_once_is_there(name):
    """The server skips in silence what it cannot import, and every run would import anew."""
    assert importlib.util.find_spec(name) is not None

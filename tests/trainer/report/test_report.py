"""The report: self-contained, honest about what is missing, safe with any text."""

import json
import re

import pytest
from matplotlib.figure import Figure

from trainer import report
from trainer.report import panels, thin

DOMAINS = ("copy", "sort")


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing forty plots takes seconds; one test draws them."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: file.write_bytes(b"png"))


def line(**values):
    return json.dumps({key.replace("__", "/"): value for key, value in values.items()})


def make_run(path, name, *, gold=True, groups=True, offset=0.0):
    """A run folder of the shape that training leaves."""
    folder = path / name
    folder.mkdir(parents=True)
    lines = [json.dumps({"stage": "sft", "step": s, "sft/loss": 3.0 / s}) for s in range(1, 9)]
    for step in range(0, 21, 5):
        each = {"stage": "eval", "step": step, "policy": "sft" if step == 0 else "policy"}
        for i, domain in enumerate(DOMAINS):
            each[f"domain/{domain}/score"] = i + step / 20 + offset
            each[f"domain/{domain}/kl"] = step / 10
            if gold:
                each[f"domain/{domain}/gold"] = 0.9 - i / 2 + step / 100 + offset
        if gold:
            each |= {"eval/gold": 0.5 + step / 100, "eval/worst_domain_gold": 0.4 + step / 100}
        each |= {"eval/proxy": step / 20, "eval/kl": step / 10, "eval/gap": 0.5}
        if step and groups:
            each |= {f"contingency/{g}/{d}": 10 + g for g in (0, 1) for d in DOMAINS}
        lines.append(json.dumps(each))
    for step in range(1, 21):
        each = {"stage": "ppo", "step": step, "objective/kl": step / 10, "timing/rollout": 0.1}
        each["value/explained_var"] = None  # what is not finite is written as null
        if groups:
            for g in (0, 1):
                each |= {f"group/{g}/score": g + step / 20, f"group/{g}/mass": 0.5}
            each["group/gap"] = 1.0
        lines.append(json.dumps(each))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"stage": "ppo", "st')
    samples = [
        {"stage": "eval", "step": 20, "prompt": f"{d} {i}", "response": "<script>x</script>",
         "domain": d, "score": i / 7, "gold": i / 9 if gold else None, "group": i % 2, "kl": 0.1}
        for d in DOMAINS for i in range(8)
    ]  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    inference = "exact" if groups else "none"
    (folder / "config.yaml").write_text(f"groups:\n  inference: {inference}\nkl:\n  coef: 0.3\n")
    return folder


def read(path):
    """What the page says, which nothing else says: it asks for nothing, and runs its own script."""
    page = path.read_text()
    scripts = re.findall(r"<script([^>]*)>", page)
    assert scripts == [' type="application/json" id="data"', ""]
    assert not re.search(r"<link|<img|<iframe|@import|url\((?!#)| src=|<script>x", page)
    assert set(re.findall(r"https?://[^\"']*", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page and "unsafe" not in page
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def titles(said):
    """Of the charts, less those of everything else."""
    sections = said["sections"][:-1] if said["rest"] else said["sections"]
    return [chart["title"] for section in sections for chart in section["charts"]]


def test_a_run_with_its_baseline(tmp_path):
    folder = make_run(tmp_path, "run")
    make_run(folder / "baselines", "ppo", groups=False, offset=-0.1)
    path = report.write([folder])
    assert path == folder / "report.html"
    said = read(path)
    for wanted in (
        "Gold, worst domain",
        "Gap: best less worst domain",
        "Gold: copy",
        "Proxy against gold",
        "KL against reward: the frontier",
        "Score by group",
        "Group against true domain",
        "Proxy, last evaluation",
        "Proxy by domain",
        "SFT loss",
        "Where a PPO step spends its time",
    ):
        assert wanted in titles(said), titles(said)
    plots = list((folder / "plots").glob("*.png"))
    assert len(plots) == len(titles(said))
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert "Critic: explained variance" not in titles(said)  # nothing was measured
    assert [run["name"] for run in said["runs"]] == ["group-invariant PPO", "ppo"]
    rows = {row["name"]: row["cells"] for row in said["table"]["rows"]}
    # SFT, then group-invariant, then the baseline
    assert said["table"]["columns"] == ["SFT", "group-invariant PPO", "ppo"]
    assert rows["copy"][:3] == [0.9, 1.1, 1.0]
    assert rows["mean, over the run"][1] == 0.65  # the mean of steps 10, 15 and 20
    assert ["groups.inference", "exact", "none"] in said["differences"]
    assert "inference: exact" in said["runs"][0]["settings"]


def test_several_runs(tmp_path, undrawn):
    first, second = make_run(tmp_path, "a/run"), make_run(tmp_path, "b/run", groups=False)
    path = report.write([first, second])
    assert path == first / "comparison" / "report.html"
    said = read(path)
    assert [run["name"] for run in said["runs"]] == ["a/run", "b/run"]
    assert said["title"] == "Comparison of runs: run, run"
    assert not (first / "report.html").exists()


def test_without_gold_the_proxy_is_what_there_is(tmp_path, undrawn):
    found = titles(read(report.write([make_run(tmp_path, "run", gold=False)])))
    assert "Proxy: copy" in found and "KL against reward: the frontier" in found
    assert "Proxy against gold" not in found


@pytest.mark.parametrize("lines", [[], [line(stage="sft", step=1, sft__loss=1.0)] * 2])
def test_a_run_that_has_only_begun(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    said = read(report.write([tmp_path]))
    assert titles(said) == (["SFT loss"] if lines else [])
    assert said["table"] is None and said["tiles"] == [] and said["samples"]["rows"] == []


def test_twice_is_the_same(tmp_path, undrawn):
    folder = make_run(tmp_path, "run")
    first = report.write([folder]).read_text()
    assert report.write([folder]).read_text() == first


def add_lines(path, lines):
    """Behind what is there, without its last line, which a crash cut short."""
    there = path.read_text().rpartition("\n")[0]
    path.write_text("\n".join([there, *map(json.dumps, lines)]) + "\n")


def test_metarm_has_a_row_for_each_round(tmp_path, undrawn):
    folder = make_run(tmp_path, "run")
    figures = {"policy/gold": 0.5, "policy/kl": 1, "after/spread": 1, "after/scale": 0.4}
    add_lines(
        folder / "metrics.jsonl",
        [{"stage": "metarm", "step": n, "before/scale": 0.5, **figures} for n in range(3)],
    )
    for n in (1, 2):
        inner = make_run(folder / "rounds", str(n))
        curves = {"metarm/spread": 0.5, "rm/pair_loss": 1}
        add_lines(
            inner / "metrics.jsonl", [{"stage": "metarm", "step": s, **curves} for s in (1, 2)]
        )
        answers = "".join(
            json.dumps({"prompt": "p", "response": str(i), "before": i, "after": i / 2}) + "\n"
            for i in range(4)
        )
        (inner / "answers.jsonl").write_text(answers)
    found = titles(read(report.write([folder])))
    assert {"Policy after the round", "Relative differences of rewards"} <= set(found)
    for n in (1, 2):
        at = found.index(f"Round {n}: differences of rewards")
        assert found[at + 1 : at + 3] == [
            f"Round {n}: training the reward model",
            f"Round {n}: PPO with it",
        ]
    differences = panels.differences_of_rewards(folder / "rounds" / "1", "after", 0.5)
    assert differences == [1, 2, 3, 1, 2, 1]


def test_a_long_run_is_shown_with_fewer_points_and_says_so(tmp_path, undrawn, monkeypatch):
    monkeypatch.setattr(thin, "CURVES", 0)
    lines = [{"stage": "ppo", "step": s, "objective/kl": float(s % 7 == 0)} for s in range(1, 601)]
    lines[300]["objective/kl"] = 9.0  # a spike
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    said = read(report.write([tmp_path]))
    curve = next(
        chart["series"][0]
        for section in said["sections"]
        for chart in section["charts"]
        if chart["name"] == "ppo_objective-kl"
    )
    assert said["thinned"] == 600 and len(curve["x"]) == len(curve["y"]) == thin.FEWEST
    assert curve["x"][-1] == 600 and max(curve["high"]) == 9.0 and min(curve["low"]) == 0.0
    mean = sum(each["objective/kl"] for each in lines) / 600
    assert sum(curve["y"]) / thin.FEWEST == pytest.approx(mean, rel=1e-3)


def sample(step, prompt, response="a" * 100):
    return {"stage": "eval", "step": step, "prompt": prompt, "response": response}


def test_the_last_evaluations_samples_are_kept_first():
    samples = [sample(step, f"p{i}") for step in (10, 20, 30) for i in range(10)]
    assert thin.fitting(samples) == sorted(
        samples, key=lambda x: (x["step"] != 30, int(x["prompt"][1:]) if x["step"] != 30 else 0)
    )
    few = thin.fitting(samples, budget=2500)  # 15 answers of 160 bytes
    assert [line["step"] for line in few[:10]] == [30] * 10
    assert [(line["prompt"], line["step"]) for line in few[10:]] == [
        (f"p{i}", step) for i in (0, 1) for step in (10, 20)
    ]
    fewer = thin.fitting(samples, budget=900)
    assert [line["prompt"] for line in fewer] == ["p0", "p2", "p4", "p6", "p8"]


def test_long_answers_are_cut_in_the_middle():
    text = "b" + "x" * 9998 + "e"
    assert (
        len(thin.cut(text)) < thin.LONGEST + 100 and thin.cut(text)[0] + thin.cut(text)[-1] == "be"
    )
    assert "6000 characters are left out" in thin.cut(text)

"""The report: self-contained, honest about what is missing, safe with any text."""

import json
import re

import pytest
from matplotlib.figure import Figure

from trainer import report
from trainer.report import panels

DOMAINS = ("copy", "sort")


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing forty plots takes seconds; one test draws them."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: file.write(b"png"))


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
    page = path.read_text()
    # Nothing comes from outside: every picture is inside, no script, no link, no style sheet.
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert all(
        src.startswith("data:image/png;base64,") for src in re.findall(r'src="([^"]*)"', page)
    )
    assert "<script>x" not in page
    return page


def pictures(page):
    return re.findall(r'<img alt="([^"]*)"', page)


def test_a_run_with_its_baseline(tmp_path):
    folder = make_run(tmp_path, "run")
    make_run(folder / "baselines", "ppo", groups=False, offset=-0.1)
    path = report.write([folder])
    assert path == folder / "report.html"
    page = read(path)
    titles = pictures(page)
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
        assert wanted in titles, titles
    plots = list((folder / "plots").glob("*.png"))
    assert len(plots) == len(titles)
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert "Critic: explained variance" not in titles  # nothing was measured
    assert "group-invariant PPO" in page and ">ppo<" in page
    table = re.search(r'<table class="figures">.*?</table>', page, re.S)[0]
    # copy: SFT, then group-invariant, then the baseline; the best in bold.
    row = re.search(r"<tr><th>copy</th>(.*?)</tr>", table)[1]
    assert re.findall(r"[\d.]+", re.sub("<[^>]*>", " ", row))[:3] == ["0.900", "1.100", "1.000"]
    assert "<b>1.100</b>" in row
    over = re.search(r"<tr><th>mean, over the run</th>(.*?)</tr>", table)[1]
    assert "0.650" in over  # the mean of steps 10, 15 and 20
    assert "groups.inference" in page and "inference: exact" in page


def test_several_runs(tmp_path, undrawn):
    first, second = make_run(tmp_path, "a/run"), make_run(tmp_path, "b/run", groups=False)
    path = report.write([first, second])
    assert path == first / "comparison" / "report.html"
    page = read(path)
    assert "a/run" in page and "b/run" in page and "Comparison of runs" in page
    assert not (first / "report.html").exists()


def test_without_gold_the_proxy_is_what_there_is(tmp_path, undrawn):
    page = read(report.write([make_run(tmp_path, "run", gold=False)]))
    assert "Proxy: copy" in pictures(page) and "KL against reward: the frontier" in pictures(page)
    assert "Proxy against gold" not in pictures(page)


@pytest.mark.parametrize("lines", [[], [line(stage="sft", step=1, sft__loss=1.0)] * 2])
def test_a_run_that_has_only_begun(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = read(report.write([tmp_path]))
    assert len(pictures(page)) == (1 if lines else 0)
    assert "Last evaluation" not in page and "<h2>Groups" not in page


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
    titles = pictures(read(report.write([folder])))
    assert {"Policy after the round", "Relative differences of rewards"} <= set(titles)
    for n in (1, 2):
        at = titles.index(f"Round {n}: differences of rewards")
        assert titles[at + 1 : at + 3] == [
            f"Round {n}: training the reward model",
            f"Round {n}: PPO with it",
        ]
    differences = panels.differences_of_rewards(folder / "rounds" / "1", "after", 0.5)
    assert differences == [1, 2, 3, 1, 2, 1]

"""Answers in the terminal: which ones, side by side, and nothing of theirs acts."""

import io
import json

import pytest
from rich.console import Console

from trainer.__main__ import main
from trainer.cli import samples
from trainer.config import ConfigError
from trainer.report.runs import read_runs

EVIL = "\x1b[2J\x1b]0;title\x07 [red]bold[/red] \u202egnp.exe \r\b"


@pytest.fixture
def folders(tmp_path):
    """Two runs; the second answers the same prompts, better with each."""
    made = []
    for name, more in (("a", 0.0), ("b", 0.5)):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            {"stage": "eval", "step": step, "prompt": f"prompt {i}", "response": f"{name}{step}{i}",
             "domain": ("easy", "hard")[i % 2], "group": i // 2, "score": i / 4 + more * i / 4,
             "gold": None, "kl": 0.125}
            for step in (5, 10) for i in range(4)
        ]  # fmt: skip
        (folder / "metrics.jsonl").touch()
        (folder / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        made.append(folder)
    return made


def chosen(folders, *filters):
    found = samples.select(read_runs(folders), samples.Wanted.of(filters))
    return [[line["response"] for _, line in answers] for answers in found.values()]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], [["a100", "b100"], ["a101", "b101"], ["a102", "b102"], ["a103", "b103"]]),
        (["domain=hard"], [["a101", "b101"], ["a103", "b103"]]),
        (["domain=hard", "group=1"], [["a103", "b103"]]),
        (["step=5", "words=PROMPT 2"], [["a52", "b52"]]),
        (["step=all", "words=prompt 0"], [["a50", "a100", "b50", "b100"]]),
        (["score=0.5.."], [["a102", "b102"], ["a103", "b103"]]),
        (["score=0.3..0.5"], [["b101"], ["a102"]]),
        (["score=0"], [["a100", "b100"]]),
        (["gold=0.."], []),
        (["sort=highest", "group=1"], [["a103", "b103"], ["a102", "b102"]]),
        (["sort=apart"], [["a103", "b103"], ["a102", "b102"], ["a101", "b101"], ["a100", "b100"]]),
    ],
)
def test_which_answers(folders, filters, expected):
    if filters == ["score=0.3..0.5"]:  # in the order of the first run that has one
        expected = [["a102"], ["b101"]]
    assert chosen(folders, *filters) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("domian=x", "domian: no such filter (did you mean domain?)"),
        ("count=-1", "count: is '-1'"), ("score=high", "score: is 'high'; want LOW..HIGH"),
        ("score=2..1", "score: is '2..1'"),
        ("sort=down", "sort: is 'down'"), ("by=length", "by: is 'length'"),
        ("step=x", "step: is"),
    ],
)  # fmt: skip
def test_a_filter_that_is_none(given, message):
    with pytest.raises(ConfigError) as refused:
        samples.Wanted.of([given])
    assert str(refused.value).startswith(message)


def shown(folders, *filters, width=100):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    samples.show(folders, filters, console)
    return console.file.getvalue()


def test_side_by_side_or_below(folders):
    wide = shown(folders, "count=1")
    line = next(line for line in wide.splitlines() if "a100" in line)
    assert "b100" in line and "1 of 4 prompts (count=4 shows all)" in wide
    assert "a: 4 answers, mean proxy 0.375; b: 4 answers, mean proxy 0.562" in wide
    assert "proxy 0 · KL 0.125 · group 0" in wide
    narrow = shown(folders, "count=1", width=60)
    assert not any("a100" in line and "b100" in line for line in narrow.splitlines())
    assert "a100" in narrow and "b100" in narrow
    assert "there are domain: easy, hard; group: 0, 1; step: 10, 5" in shown(folders, "domain=x")


def test_no_answer_steers_the_terminal(folders, capsys):
    line = {"stage": "eval", "step": 99, "prompt": EVIL, "response": EVIL * 100, "domain": EVIL}
    with (folders[0] / "samples.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert main(["samples", str(folders[0]), "chars=300"]) == 0
    out = capsys.readouterr().out
    assert not set("\x1b\x07\r\b\u202e") & set(out)
    assert "\\x1b[2J" in out and "[red]bold[/red]" in out and "more characters" in out


def test_the_command(folders, capsys, tmp_path):
    assert main(["samples", *map(str, folders), "domain=hard", "count=1"]) == 0
    assert "1 of 2 prompts" in capsys.readouterr().out
    (folders[0] / "samples.jsonl").unlink()
    assert main(["samples", str(folders[0])]) == 2
    assert "samples.jsonl: has no samples (yet)" in capsys.readouterr().err

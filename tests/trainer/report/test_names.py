"""Names from data and folders from elsewhere: a page comes out, and nothing of theirs acts."""

import json
import re
import time

import pytest
import yaml
from rich.console import Console
from rich.table import Table

from tests.trainer.report.test_report import read, undrawn  # noqa: F401
from trainer import report
from trainer.report.table import final_table
from trainer.runs import names
from trainer.runs.console import say
from trainer.runs.folder import RunFolder

STRANGE = [
    "a/b", "/", "../../x", "$\\frac{$", "$x$", "[math]", "[/red]", "<script>alert(1)</script>",
    "x" * 300, "\x1b[2J\x1b]0;title\x07", "two\nlines", "CON", " ", "ü" * 100, "\u202egnp.exe",
    "a\ud800b", "%s {name}", "__", "a_b", "A/B",
]  # fmt: skip


def folder_of(path, domains):
    lines = []
    for step in (0, 5, 10):
        line = {"stage": "eval", "step": step, "policy": "policy" if step else "sft"}
        for i, domain in enumerate(domains):
            line |= {f"domain/{domain}/{kind}": i + step / 10 for kind in ("score", "gold", "kl")}
            line[f"contingency/{i % 2}/{domain}"] = 3
        lines.append(line | {"eval/gold": 0.5, "eval/proxy": step / 5, "eval/kl": step / 5})
        lines.append({"stage": "ppo", "step": step, "group/0/score": 1, "group/1/score": 2})
    samples = [
        {"stage": "eval", "step": 10, "prompt": f"p{i} {d}", "response": d, "domain": d, "score": i,
         "group": i % 2}
        for i, d in enumerate(domains * 2)
    ]  # fmt: skip
    path.mkdir()
    for name, rows in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.yaml").write_text("groups: {inference: exact}\n")
    return path


def test_strange_domains_make_a_page_and_plots(tmp_path):
    folder = folder_of(tmp_path / "run", STRANGE)
    page = report.write([folder]).read_text()
    assert "<script>a" not in page and "\x1b" not in page and "\u202e" not in page
    said = read(folder / "report.html")
    assert {"[math]", "<script>alert(1)</script>"} <= {row["name"] for row in said["table"]["rows"]}
    plots = list((folder / "plots").iterdir())
    assert len(plots) > 8
    for path in plots:
        assert path.suffix == ".png" and len(path.name) < 120 and path.name.isascii()
    assert {p.name for p in folder.iterdir()} >= {"plots", "report.html"}
    assert not list(tmp_path.glob("x*")) and len(list(tmp_path.iterdir())) == 1


def test_strange_domains_on_the_terminal(tmp_path, capsys):
    folder = folder_of(tmp_path / "run", STRANGE)
    console = Console(width=200, record=True, force_terminal=True)
    console.print(final_table({"PPO [bold]": RunFolder(folder)}))
    text = console.export_text(styles=False)
    assert "[math]" in text and "[/red]" in text and "PPO [bold]" in text and "a/b" in text
    assert "\x1b[2J" not in capsys.readouterr().out
    say("domain [red] \x1b[2J")
    assert "domain [red] \\x1b[2J" in capsys.readouterr().out


def test_a_table_is_said_as_it_is(capsys):
    table = Table(names.in_markup("[red]x"))
    say(table)
    assert "[red]x" in (out := capsys.readouterr().out) and "\\" not in out


def test_two_hundred_domains_are_a_page_of_few_plots(tmp_path, undrawn):  # noqa: F811
    folder = folder_of(tmp_path / "run", [f"domain {i}" for i in range(200)])
    began = time.perf_counter()
    said = read(report.write([folder]))
    assert time.perf_counter() - began < 60
    assert len(list((folder / "plots").iterdir())) < 60
    assert {f"domain {i}" for i in range(200)} <= {row["name"] for row in said["table"]["rows"]}


@pytest.mark.parametrize("text", STRANGE)
def test_a_name_is_safe_wherever_it_goes(text):
    file = names.file_name(text)
    assert file and len(file) <= names.LONGEST and re.fullmatch(r"[a-z0-9_-]+", file)
    for shown in (names.one_line(text), names.in_plot(text), names.in_markup(text)):
        assert shown.isprintable() and len(shown) < 200
    assert "<" not in names.in_html(text) and "\x1b" not in names.in_html(text)
    names.in_html(text).encode()


def test_files_of_different_names_are_different():
    found = [names.file_name(text).lower() for text in STRANGE]
    assert len(set(found)) == len(found)


CRAFTED = {
    "metrics.jsonl": [
        "[]\n[1]\nnull\n3\n", '{"stage": 3, "step": "x"}\n', '{"stage": "eval"}\n',
        '{"stage": "eval", "step": 1e400}\n', '{"stage": "eval", "step": 1, "domain/": 1}\n',
        '{"stage": "eval", "step": 1, "domain/a/score": "high", "policy": "policy"}\n',
        '{"stage": "eval", "step": 1, "domain/a/score": [1], "eval/gold": {"a": 1}}\n',
        '{"stage": "ppo", "step": 1, "group/x/score": 1, "group/99999999999/score": 1}\n' * 2,
        '{"stage": "eval", "step": 1, "contingency/q": 3, "contingency/0/a": "b"}\n',
        '{"stage": "metarm", "step": 99999999999999999999}\n', "[" * 200_000, "\x00\xff\n" * 10,
        '{"stage": "eval", "step": 0, "eval/gold": NaN}\n{"stage": "eval", "step": 1}\n',
        '{"stage": "eval", "step": 0, "eval/gold": 1e308}\n'
        '{"stage": "eval", "step": 1, "eval/gold": -1e308}\n',
    ],
    "samples.jsonl": [
        '{"stage": "eval", "step": 1}\n', '{"stage": "eval", "step": 1, "prompt": 3}\n',
        '{"stage": "eval", "step": 1, "prompt": "a", "response": [], "score": "b"}\n',
        '{"stage": "eval", "step": 1, "prompt": "a", "response": "b", "score": "c", "group": {}}\n',
    ],
    "config.yaml": [
        "[]", "3", "groups: 3", "groups: [1]", ": :", "a: &a [*a]", "\t", "groups: {inference: {}}",
        "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n"
            for i in range(12)
        ),
        yaml.safe_dump({"x": {"y": None, "z": [1, {"q": 2}]}}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "".join(CRAFTED["metrics.jsonl"])),
        ("samples.jsonl", "".join(CRAFTED["samples.jsonl"])),
        *(("config.yaml", each) for each in CRAFTED["config.yaml"]),
    ],
)
def test_a_crafted_folder_makes_a_page(tmp_path, undrawn, name, content):  # noqa: F811
    folder = folder_of(tmp_path / "run", ["a"])
    with (folder / name).open("a" if name.endswith("jsonl") else "w") as file:
        file.write(content)
    read(report.write([folder]))
    final_table({"PPO": RunFolder(folder)})

"""How a command ends that cannot go on: one line, an exit code, and nothing hidden."""

import errno

import pytest

from trainer.__main__ import main
from trainer.cli import failure
from trainer.stages import registry


def broken(*_):
    raise KeyError("a bug\nof two lines")


@pytest.fixture
def bug(monkeypatch):
    monkeypatch.setitem(registry.STAGES, "sft", broken)


def run(tmp_path, *flags):
    return main(["sft", "toy", *flags, "--output", str(tmp_path / "run")])


def test_a_bug_is_one_line_and_its_traceback_is_kept(bug, tmp_path, capsys):
    assert run(tmp_path) == 1
    err = capsys.readouterr().err
    kept = tmp_path / "run" / "errors.txt"
    assert err.count("\n") == 1 and err.startswith("gi: KeyError: ") and str(kept) in err
    assert "in broken" in kept.read_text() and "Traceback" in kept.read_text()


@pytest.mark.parametrize("flag", ["--debug", "GI_TRACEBACK"])
def test_the_whole_traceback_for_who_asks(bug, tmp_path, capsys, monkeypatch, flag):
    if flag == "GI_TRACEBACK":
        monkeypatch.setenv(flag, "1")
    assert run(tmp_path, *([flag] if flag == "--debug" else [])) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "in broken" in err and "gi: KeyError" in err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system"),
        (MemoryError(), "out of memory"),
        (ValueError("I/O error: No space left on device (os error 28)"), "No space left on device"),
    ],
)
def test_what_is_nobodys_bug_is_a_line(error, line, tmp_path):
    said, code = failure.explained(error)
    assert line in said and code == 1 and "nobody had thought" not in said


def test_a_line_steers_no_terminal():
    error = ValueError("\x1b[2Jgone\nand a second")
    error.for_user = True
    assert failure.explained(error) == ("\\x1b[2Jgone and a second", 2)

"""Where everything of one run lies."""

from __future__ import annotations

from pathlib import Path


class RunFolder:
    """Names alone: whoever writes there makes the folders."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def begun(self) -> Path:
        """Stages that a start has begun to do again; gone as soon as their traces are."""
        return self.path / ".begin"

    @property
    def accepted(self) -> Path:
        """Which start has accepted this folder; its restarts go on in it."""
        return self.path / ".accepted"

    @property
    def errors(self) -> Path:
        """Tracebacks of what nobody had thought of."""
        return self.path / "errors.txt"

    @property
    def sinks(self) -> Path:
        """What this run is called where its figures go beside metrics.jsonl."""
        return self.path / ".sinks.json"

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def model(self, name: str) -> Path:
        """models/sft, models/rm or models/policy, in Hugging Face format."""
        return self.path / "models" / name

    @property
    def pairs(self) -> Path:
        """Pairs of the toy world, as they were sampled."""
        return self.path / "pairs.jsonl"

    @property
    def rounds(self) -> Path:
        return self.path / "rounds"

    @property
    def answers(self) -> Path:
        """Of a round's policy, with scores by the reward models before and after it."""
        return self.path / "answers.jsonl"

    def round(self, number: int) -> RunFolder:
        """Of MetaRM; round 0 holds the models that the first one begins with."""
        return RunFolder(self.rounds / str(number))

    def baseline(self, name: str) -> RunFolder:
        return RunFolder(self.path / "baselines" / name)

    def log_file(self) -> Path:
        return self.path / "log.txt"

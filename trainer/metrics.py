"""What a run leaves behind and what a person sees of it: run folder, metrics, progress, table."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trainer import parallel

console = Console(highlight=False)


class RunFolder:
    """Where everything of one run lies."""

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
    def answers(self) -> Path:
        """Of a round's policy, with scores by the reward models before and after it."""
        return self.path / "answers.jsonl"

    def round(self, number: int) -> RunFolder:
        """Of MetaRM; round 0 holds the models that the first one begins with."""
        return RunFolder(self.path / "rounds" / str(number))

    def baseline(self, name: str) -> RunFolder:
        return RunFolder(self.path / "baselines" / name)

    def log_file(self) -> Path:
        return self.path / "log.txt"


# --- metrics.jsonl and sinks --------------------------------------------------------------------


class MetricsLog:
    """Appends one flat object a step to metrics.jsonl, flushed, and to the optional sinks.

    Opening it for a stage drops that stage's lines past `done` steps: what a killed run wrote after
    its last checkpoint is about to be written again.
    """

    def __init__(self, run: RunFolder, stages: Iterable[str], done: int, sinks: Iterable[str]):
        self.files = {}
        self.writers: list[Any] = []
        if not parallel.is_main():
            return
        run.path.mkdir(parents=True, exist_ok=True)
        for name, path in (("metrics", run.metrics), ("samples", run.samples)):
            kept = [
                line
                for line in read_lines(path)
                if line["stage"] not in stages or line["step"] <= done
                if done or line["stage"] not in stages
            ]
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            aside.replace(path)
            self.files[name] = path.open("a")
        self.writers = [_SINKS[name](run) for name in sinks]

    def write(self, stage: str, step: int, metrics: Mapping[str, float], **labels: str) -> None:
        if not parallel.is_main():
            return
        values = {name: plain(value) for name, value in metrics.items()}
        self._append("metrics", {"stage": stage, "step": step, **labels, **values})
        for writer in self.writers:
            writer(stage, step, {k: v for k, v in values.items() if v is not None})

    def write_samples(self, stage: str, step: int, samples: Iterable[dict]) -> None:
        if parallel.is_main():
            for sample in samples:
                self._append("samples", {"stage": stage, "step": step, **sample})

    def _append(self, name: str, line: dict) -> None:
        self.files[name].write(json.dumps(line) + "\n")
        self.files[name].flush()

    def sync(self) -> None:
        """Onto the disk, before a checkpoint that counts on it."""
        for file in self.files.values():
            os.fsync(file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def plain(value: Any) -> float | int | None:
    """A JSON number; what is not finite becomes null, for JSON has no NaN."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return value if math.isfinite(value) else None


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file; a last line cut short by a crash is left out."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def _tensorboard(run: RunFolder):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run.path / "tensorboard")

    def write(stage: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{stage}/{name}", value, step)
        writer.flush()

    return write


def _wandb(run: RunFolder):
    import wandb

    session = wandb.init(project="gikernels", name=run.path.name, dir=run.path, resume="allow")
    seen = set()

    def write(stage: str, step: int, values: dict[str, float]) -> None:
        if stage not in seen:  # each stage counts its own steps
            session.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            seen.add(stage)
        session.log({f"{stage}/step": step, **{f"{stage}/{k}": v for k, v in values.items()}})

    return write


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb}


# --- sums, times ---------------------------------------------------------------------------------


class Averages:
    """Means over the updates of a step; what is added is already a global mean of its own."""

    def __init__(self) -> None:
        self.open: dict[str, Any] = defaultdict(float)  # of the update that is under way
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Sums of one update, to which its micro-batches add: close it with `update`."""
        for name, value in values.items():
            self.open[f"{prefix}/{name}"] += value.detach() if torch.is_tensor(value) else value

    def update(self, prefix: str) -> None:
        self.counts[prefix] += 1
        for name in [name for name in self.open if name.startswith(f"{prefix}/")]:
            self.sums[name] += self.open.pop(name)

    def means(self) -> dict[str, float]:
        names = list(self.sums)
        device = parallel.device()
        sums = [torch.as_tensor(self.sums[n], dtype=torch.float64, device=device) for n in names]
        totals = parallel.all_sum(torch.stack(sums)).tolist()
        return {n: t / self.counts[n.partition("/")[0]] for n, t in zip(names, totals)}


class Timer:
    """Seconds by phase; the phases of a step add up to the step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            if parallel.device().type == "cuda":  # or a kernel's time goes to a later phase
                torch.cuda.synchronize()
            self.seconds[phase] += time.perf_counter() - began

    def metrics(self, tokens: int) -> dict[str, float]:
        whole = time.perf_counter() - self.start
        other = whole - sum(self.seconds.values())
        return {
            "perf/step_seconds": whole,
            "perf/tokens_per_second": tokens / whole,
            "perf/peak_memory_bytes": parallel.peak_memory_bytes(),
            **{f"timing/{phase}": seconds for phase, seconds in self.seconds.items()},
            "timing/other": other,
        }


# --- the terminal ---------------------------------------------------------------------------------


@contextmanager
def progress(stage: str, steps: int, start: int, enabled: bool) -> Iterator[Any]:
    """Yields show(figures): a bar with a few figures; in a log file, a line now and then."""
    began, every = time.perf_counter(), max(1, steps // 10)
    done = start
    if not parallel.is_main():
        yield lambda figures: None
        return
    if not (enabled and console.is_terminal):

        def show_line(figures: Mapping[str, float]) -> None:
            nonlocal done
            done += 1
            if enabled and (done % every == 0 or done == steps):
                seconds = time.perf_counter() - began
                print(f"{stage} {done}/{steps} {_figures(figures)} {seconds:.0f}s", flush=True)

        yield show_line
        return
    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(stage, total=steps, completed=start, figures="")
        yield lambda figures: bars.update(task, advance=1, figures=_figures(figures))


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {float(value):.3g}" for name, value in figures.items())


def say(text: str) -> None:
    if parallel.is_main():
        console.print(text, soft_wrap=True)


# --- the table at the end -------------------------------------------------------------------------


def evaluations(run: RunFolder, policy: str) -> list[dict]:
    lines = [line for line in read_lines(run.metrics) if line["stage"] == "eval"]
    return [line for line in lines if line.get("policy") == policy]


def final_table(runs: Mapping[str, RunFolder]) -> Table | None:
    """Domains x {SFT, each run}: gold (judged by program, or absent), proxy and KL.

    The final evaluation; in the rows "over the run" the mean of all evaluations after the first
    third, because one evaluation of one seed is mostly noise.
    """
    columns: dict[str, tuple[dict, list[dict]]] = {}
    for name, run in runs.items():
        if not columns and (sft := evaluations(run, "sft")):
            columns["SFT"] = (sft[-1], sft)
        if policy := evaluations(run, "policy"):
            columns[name] = (policy[-1], policy[len(policy) // 3 :])
    if not columns:
        return None
    domains = [
        name.split("/")[1]
        for name in next(iter(columns.values()))[0]
        if name.startswith("domain/") and name.endswith("/score")
    ]
    rows: list[tuple[str, str, bool]] = []  # title, metric, over the run
    for domain in domains:
        rows.append((f"gold    {domain}", f"domain/{domain}/gold", False))
    rows.append(("gold    mean", "eval/gold", False))
    rows.append(("gold    worst domain", "eval/worst_domain_gold", False))
    rows.append(("gold    worst domain, over the run", "eval/worst_domain_gold", True))
    rows.append(("gold    mean, over the run", "eval/gold", True))
    rows.append(("gold    out of distribution", "eval/ood_gold", False))
    for kind in ("score", "kl"):
        for domain in domains:
            rows.append(
                (
                    f"{'proxy' if kind == 'score' else kind:<7} {domain}",
                    f"domain/{domain}/{kind}",
                    False,
                )
            )
        whole = "eval/proxy" if kind == "score" else "eval/kl"
        rows.append((f"{'proxy' if kind == 'score' else kind:<7} mean", whole, False))
    table = Table(title="Evaluation", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    previous = ""
    for title, metric, over_run in rows:
        cells = []
        for last, many in columns.values():
            values = [line.get(metric) for line in (many if over_run else [last])]
            values = [v for v in values if v is not None]
            cells.append(f"{sum(values) / len(values):.3f}" if values else "")
        if any(cells):
            kind = title.split()[0]
            if previous and kind != previous:
                table.add_section()
            previous = kind
            table.add_row(title, *cells)
    return table

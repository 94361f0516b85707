"""What the reference policy would have scored: performance that is comparable between prompts."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer import parallel
from trainer.batch.types import Prompt
from trainer.config import Config
from trainer.config.rewards import MathReward, RewardFunction
from trainer.models import sources
from trainer.models.policy import Policy
from trainer.ppo.forward import check_engine
from trainer.rewards import maths
from trainer.rewards.scorer import Scorer
from trainer.rollout.engine import Engine
from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines, sealed


class ReferenceScores:
    """Raw scores of k answers of the reference policy to each prompt that the run will meet.

    Sampled when a prompt is first met, from random numbers of the prompt's own, so whoever samples
    them gets the same; kept in the checkpoints, and in a file that runs share which have the same
    reference, rewards and sampling. Empty where nothing asks for them.
    """

    def __init__(self, config: Config, run: RunFolder, prompts: Sequence[Prompt]) -> None:
        self.config = config
        self.asked = config.groups.compared in ("over_reference", "quantile")
        shape = (len(prompts), config.groups.reference_answers) if self.asked else (0, 0)
        self.scores = torch.full(shape, torch.nan, device=parallel.device())  # (prompts, k)
        self.names = [name_of(prompt) for prompt in prompts] if self.asked else []
        self.file: Path | None = None
        if self.asked:
            folder = Path(config.groups.reference_cache or run.path / "reference_scores")
            self.file = folder / f"{key_of(config, run)}.jsonl"

    def of(self, chosen: list[int], samples: int) -> Tensor | None:  # (S, k)
        return self.scores[chosen].repeat_interleave(samples, 0) if self.asked else None

    def fill(
        self,
        engine: Engine,
        reference: Policy,
        scorer: Scorer,
        every: Sequence[Prompt],
        chosen: list[int],
    ) -> int:
        """Look up, or sample and score, for those of the chosen prompts that have none yet; how
        many tokens that took."""
        todo = self._missing(chosen)
        if todo:
            self._read(todo)
            todo = self._missing(todo)
        if not todo:
            return 0
        k, prompts = self.scores.shape[1], [every[i] for i in todo]
        engine.sync(reference)
        draws = [parallel.generator("reference", self.names[i]) for i in todo]
        rollout = engine.generate([p.ids for p in prompts], k, draws)
        check_engine(self.config, engine, rollout, reference, most=64)
        repeated = [p for p in prompts for _ in range(k)]
        scores = scorer(repeated, rollout.sequences, rollout.truncated)["total"].view(-1, k)
        self.scores[torch.tensor(todo, device=scores.device)] = scores
        self._write(todo, scores)
        return rollout.sequences.count

    def _missing(self, chosen: list[int]) -> list[int]:
        """In order, each once."""
        if not self.asked:
            return []
        places = list(dict.fromkeys(chosen))
        unknown = self.scores[places, 0].isnan().tolist()
        return [i for i, missing in zip(places, unknown) if missing]

    def _read(self, todo: list[int]) -> None:
        """What the file knows. Rank 0 reads for all: others may see more of it, or less."""
        assert self.file is not None
        wanted = {self.names[i]: i for i in todo}
        found: dict[int, list[float]] = {}
        if parallel.is_main():
            for line in read_lines(self.file):
                if line["prompt"] in wanted and len(line["scores"]) == self.scores.shape[1]:
                    found[wanted[line["prompt"]]] = line["scores"]
        found = parallel.gather_objects(found)[0]
        for i, scores in found.items():
            self.scores[i] = torch.tensor(scores, device=self.scores.device)

    def _write(self, todo: list[int], scores: Tensor) -> None:
        if self.file is None or not parallel.is_main():
            return
        lines = [
            sealed({"prompt": self.names[i], "scores": row})
            for i, row in zip(todo, scores.tolist())
            if all(x == x and abs(x) != float("inf") for x in row)
        ]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # baselines write beside the main run
            file.write("".join(lines))

    def state_dict(self) -> dict:
        return {"scores": self.scores}

    def load_state_dict(self, state: dict) -> None:
        self.scores = state["scores"]


def name_of(prompt: Prompt) -> str:
    """Of all that scores read: the same question may have other answers in another row."""
    parts = json.dumps([prompt.ids, prompt.messages, prompt.meta], default=str, sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


def key_of(config: Config, run: RunFolder) -> str:
    """Of everything that the scores depend on but the prompt: weights, rewards, sampling."""
    rollout, reward = config.rollout, config.reward
    parts: list[object] = [
        fingerprint(sources.reference_source(config, run), config),
        fingerprint(sources.reward_source(config, run), config) if reward.model_weight else None,
        [_identity(each) for each in reward.functions],
        (reward.model_weight, reward.truncated_penalty, config.groups.reference_answers),
        (rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens, rollout.stop),
        (rollout.engine, config.model.dtype),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def fingerprint(source: str, config: Config) -> list[object]:
    """Of a model: its files' names, sizes and times; for a world or a name, what it is made of."""
    folder = Path(source)
    if not folder.is_dir():
        return [source, config.run.seed, config.toy, config.reasoning, _status(folder)]
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".bin"))
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _identity(entry: RewardFunction) -> list[object]:
    """Of a reward function: all its options, what "auto" has chosen, and its file, which may be
    another one tomorrow."""
    chosen = maths.method(entry) if isinstance(entry, MathReward) else None
    return [entry, chosen, _module(entry.function) if ":" in entry.function else None]


def _module(place: str) -> object:
    try:
        spec = importlib.util.find_spec(place.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return _status(Path(spec.origin)) if spec is not None and spec.origin is not None else None


def _status(path: Path) -> tuple[int, int] | None:
    """Size and time of a file."""
    if not path.is_file():
        return None
    status = path.stat()
    return (status.st_size, status.st_mtime_ns)

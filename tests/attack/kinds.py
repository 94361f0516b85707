"""The kinds of attack: each is called with a place and random numbers, and returns what went wrong
(None: survived)."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from tests.attack import runs
from tests.trainer import children
from trainer import config as settings
from trainer.__main__ import main
from trainer.config import ConfigError, load
from trainer.data.errors import DataError
from trainer.data.sources import load_demonstrations, load_pairs, load_prompts
from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines
from trainer.worlds.toy import World


class Lab:
    """Where attacks happen, and runs that nobody disturbed, each made once."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.kills = 0  # that landed
        self.undisturbed = cache(self._undisturbed)

    def _undisturbed(self, name: str, ranks: int) -> tuple[Path, dict, int]:
        folder = self.place / f"undisturbed_{name}_{ranks}" / "run"
        folder.parent.mkdir()
        counted = folder.parent / "changes"
        codes = runs.gi(folder, OVERRIDES[name], ranks=ranks, count_into=counted)
        assert codes == [0] * ranks, runs.said(folder)
        return folder, runs.results(folder), counted.stat().st_size

    def fresh(self, name: str) -> Path:
        folder = self.place / name / "run"
        for left in sorted(self.place.glob(f"{name}/**/*"), reverse=True):
            left.rmdir() if left.is_dir() else left.unlink()
        folder.parent.mkdir(exist_ok=True)
        return folder


OVERRIDES = {
    "ppo": runs.PPO,
    "rounds": [*runs.PPO, *runs.ROUND],
    "baseline": [*runs.PPO, *runs.BASELINE],
}


def killed(name: str, ranks: int = 1) -> Callable[[Lab, Random], str | None]:
    """One to three kills at random changes of the file system, and on: with --resume, or anew."""

    def attack(lab: Lab, random: Random) -> str | None:
        _, want, changes = lab.undisturbed(name, ranks)
        folder, flags, told = lab.fresh(f"killed_{name}_{ranks}"), [], []
        for _ in range(random.choice((1, 1, 2, 3))):
            event, rank = random.randint(1, changes), random.randrange(ranks)
            told.append((event, rank, *flags))
            codes = runs.gi(folder, OVERRIDES[name], *flags, event=event, ranks=ranks, rank=rank)
            if -signal.SIGKILL not in codes:
                break
            lab.kills += 1
            flags = ["--resume"] if random.random() < 0.7 else []
        codes = runs.gi(folder, OVERRIDES[name], "--resume", ranks=ranks)
        if codes != [0] * ranks:
            return f"killed at {told}, then --resume ended with {codes}: {runs.said(folder)[:300]}"
        now = runs.results(folder)
        differ = [key for key in want.keys() | now.keys() if want.get(key) != now.get(key)]
        return f"killed at {told}: other {', '.join(sorted(differ)[:3])}" if differ else None

    return attack


def killed_in_a_finished_run(lab: Lab, random: Random) -> str | None:
    """A second start of a whole run, killed while it removes what the first has made."""
    source, want, _ = lab.undisturbed("rounds", 1)
    folder = lab.fresh("again")
    runs.copy(source, folder)
    overrides = [*OVERRIDES["rounds"], f"run.output={folder}"]
    event = random.randint(1, 150)
    lab.kills += runs.gi(folder, overrides, event=event) == [-signal.SIGKILL]
    flag = ["--resume"] if random.random() < 0.7 else []
    codes = runs.gi(folder, overrides, *flag)
    if codes != [0]:
        return f"killed at {event}, then {flag} ended with {codes}: {runs.said(folder)[:300]}"
    now = runs.results(folder)
    differ = [key for key in want.keys() | now.keys() if want.get(key) != now.get(key)]
    return f"killed at {event}, then {flag}: other {sorted(differ)[:3]}" if differ else None


def bit_flipped(name: str) -> Callable[[Lab, Random], str | None]:
    """One bit of one file: `gi doctor` names it, or the file is made anew from others."""

    def attack(lab: Lab, random: Random) -> str | None:
        source, _, _ = lab.undisturbed(name, 1)
        files = [p for p in sorted(source.rglob("*")) if p.is_file() and p.stat().st_size]
        path = random.choice([p for p in files if not p.name.endswith(ANEW)])
        before = path.read_bytes()
        bit = random.randrange(8 * len(before))
        content = bytearray(before)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            if path == RunFolder(source).config:
                return None if _settings_differ(path, before) else f"{path}: bit {bit} unseen"
            code, _, err = quietly("doctor", source)
            unseen = f"{path.relative_to(source)}: bit {bit} unseen: {code} {err[:200]}"
            return None if code == 1 and not err else unseen
        finally:
            path.write_bytes(before)

    return attack


ANEW = (".html", ".png", ".lock", ".accepted", ".txt", "asked.yaml")
"""The report, marks of who is here, and what a child was asked and said."""


def _settings_differ(path: Path, before: bytes) -> bool:
    """A run that goes on compares them with what it is asked for; what means the same is the same,
    and a setting that changes no result is written anew."""
    try:
        now = settings.load(str(path))
    except ConfigError:
        return True
    path.write_bytes(before)
    was = settings.load(str(path))
    return now == was or bool(settings.differences(now, was)) or _cosmetic(now, was)


def _cosmetic(now, was) -> bool:
    return now.to_dict() != was.to_dict()


def quietly(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(each) for each in arguments])
    return code, out.getvalue(), err.getvalue()


PIECES = ("{", "}", "[", "]", ":", ",", "&a ", "*a", "? ", "- ", "'", '"', "\t", "\n", "\x00",
          "\x1b", "1e400", "9" * 400, ".nan", "-.inf", "null", "true", "<<: ", "!!python/x:y ",
          "x" * 300, "\u202e", "é", "0", "-1", "1e-400", "|\n", "[" * 300, "#")  # fmt: skip


def mutated(text: str, random: Random) -> str:
    for _ in range(random.randint(1, 6)):
        at, size = random.randint(0, len(text)), random.choice((0, 0, 1, 3, 20))
        text = text[:at] + random.choice((*PIECES, "")) + text[at + size :]
    return text


def mutated_config(lab: Lab, random: Random) -> str | None:
    path = lab.fresh("config").with_name("c.yaml")
    source = settings.find(random.choice(settings.packaged())).read_text()
    text = mutated(source, random)
    path.write_text(text, errors="surrogatepass")
    return one_line(lambda: load(str(path)), ConfigError, text)


def mutated_override(lab: Lab, random: Random) -> str | None:
    sections = [each for each in settings.fields_of(settings.Config) if each.section]
    section = random.choice(sections)
    key = random.choice(settings.fields_of(section.section))
    text = mutated(f"{section.name}.{key.name}={settings.as_yaml(key.default)}", random)
    return one_line(lambda: load("toy", [text]), ConfigError, text)


ROWS = (
    '{"prompt": "copy copy a b :", "response": "a b", "domain": "copy"}\n',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    '{"prompt": "a b :", "chosen": "a", "rejected": "b", "margin": 1.5, "rating_chosen": 2}\n',
    '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nAssistant: c"}\n',
    '{"info": {"post": "a"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}\n',
)


def mutated_data(lab: Lab, random: Random) -> str | None:
    path = lab.fresh("data").with_name(random.choice(("d.jsonl", "d.jsonl.gz", "d.parquet")))
    text = mutated("".join(random.choices(ROWS, k=3)), random)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    keys = [f"data.{key}={path}" for key in ("prompts", "pairs", "demonstrations")]
    config = load("toy", [*keys, "data.columns.domain=info.post"])
    tokenizer = World(config.toy).tokenizer()
    for read in (
        lambda: load_prompts(config, "train", tokenizer),
        lambda: load_pairs(config, tokenizer),
        lambda: load_demonstrations(config, tokenizer),
    ):
        if problem := one_line(read, DataError, text):
            return problem
    return None


def one_line(call: Callable, kind: type[Exception], what: str, seconds: float = 20) -> str | None:
    """It returns, or raises an error of one line, and soon."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        call()
    except kind as error:
        return f"two lines for {what!r:.300}" if "\n" in str(error) else None
    except BaseException as error:
        return f"{type(error).__name__} ({str(error)[:100]}) for {what!r:.300}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return None


# Rewards that misbehave: name -> whether the run should end well.


def raises(prompts, answers, meta):
    raise KeyError("gone") if any(answers) else None


def returns_nan(prompts, answers, meta):
    return [float("nan") if any(answers) else 0.0] * len(answers)


def returns_too_few(prompts, answers, meta):
    return [0.0] * (len(answers) - bool(any(answers)))


def returns_words(prompts, answers, meta):
    return ["good" if any(answers) else 0.0] * len(answers)


def returns_1e20_once(prompts, answers, meta):
    return [1e20, *(float(len(a)) for a in answers[1:])] if any(answers) else [0.0] * len(answers)


def changes_the_folder(prompts, answers, meta):
    os.chdir("/")
    return [float(len(answer)) for answer in answers]


def returns_constants(prompts, answers, meta):
    return [1.0] * len(answers)


def recurses(prompts, answers, meta):
    return recurses(prompts, answers, meta) if any(answers) else [0.0] * len(answers)


REWARDS = {raises: False, returns_nan: False, returns_too_few: False, returns_words: False,
           returns_1e20_once: True, changes_the_folder: True, returns_constants: True,
           recurses: False}  # fmt: skip


def bad_reward(lab: Lab, random: Random) -> str | None:
    source, _, _ = lab.undisturbed("ppo", 1)
    folder = lab.fresh("reward")
    runs.copy(source / "models", folder / "models")
    function, ends_well = random.choice(list(REWARDS.items()))
    asked = f"reward.functions=[{{function: 'tests.attack.kinds:{function.__name__}'}}]"
    alone = ["reward.model_weight=0", "model.critic=policy", "ppo.steps=6", "eval.every=0"]
    arguments = ["ppo", *runs.PPO, *alone, asked, "--output", str(folder)]
    code = children.run(runs.plain_command, arguments, folder.with_name("run.said"))
    said = runs.said(folder)
    well = code == 0 if ends_well else code in (1, 2) and said.count("\n") == 1
    return None if well else f"{function.__name__}: {code} {said[:300]}"


def full_disk(lab: Lab, random: Random) -> str | None:
    """One line; and with room again, --resume comes to the same end."""
    _, want, _ = lab.undisturbed("ppo", 1)
    disk = lab.fresh("disk").parent / "mounted"
    disk.mkdir()
    size = random.randint(4, 900)
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True).returncode:
        raise Skipped("cannot mount a tmpfs")
    try:
        folder = disk / "run"
        said = disk.parent / "said"
        arguments = ["train", *OVERRIDES["ppo"], "--output", str(folder)]
        code = children.run(runs.plain_command, arguments, said)
        text = said.read_text()
        if code != 1 or text.count("\n") != 1 or "No space left" not in text:
            return f"{size} kB: {code} {text[:300]}"
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        code = children.run(runs.plain_command, [*arguments, "--resume"], said)
        now = runs.results(folder)
        differ = [key for key in want.keys() | now.keys() if want.get(key) != now.get(key)]
        return f"{size} kB, then {code}: {said.read_text()[:200]} {differ[:3]}" if differ else None
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def two_starts(lab: Lab, random: Random) -> str | None:
    """The second is refused while the first stands still in some step; the first ends well."""
    _, want, _ = lab.undisturbed("ppo", 1)
    folder = lab.fresh("two")
    stop = (random.choice(("sft", "rm", "ppo")), random.choice((1, 2)), signal.SIGSTOP)
    arguments = ["train", *OVERRIDES["ppo"], "--output", str(folder)]
    first = children.start(runs.plain_command, arguments, folder.with_name("first.said"), stop)
    until = time.monotonic() + 90
    metrics = RunFolder(folder).metrics
    while not any((x["stage"], x["step"]) == stop[:2] for x in read_lines(metrics)):
        if time.monotonic() > until or not first.is_alive():
            first.kill()
            return "the first start did not come to its step"
        time.sleep(0.02)
    flags = random.choice(([], ["--resume"]))
    second = runs.gi(folder, OVERRIDES["ppo"], *flags)
    os.kill(first.pid, signal.SIGCONT)
    codes = children.wait([first])
    refused = second == [1] and f"in use by pid {first.pid}" in runs.said(folder)
    well = codes == [0] and runs.results(folder) == want
    return None if refused and well else f"at {stop}: {second} {codes} {runs.said(folder)[:200]}"


class Skipped(Exception):
    """This machine cannot be attacked so."""


KINDS: dict[str, tuple[Callable[[Lab, Random], str | None], int, int]] = {
    "killed at a change of a file": (killed("ppo"), 2, 5),
    "killed, with a MetaRM round": (killed("rounds"), 0, 6),
    "killed, beside a baseline": (killed("baseline"), 0, 4),
    "killed, on 2 ranks, one of them": (killed("rounds", 2), 0, 4),
    "killed while it starts over": (killed_in_a_finished_run, 0, 4),
    "a bit of a file flipped": (bit_flipped("ppo"), 8, 20),
    "a bit flipped, with a MetaRM round": (bit_flipped("rounds"), 0, 20),
    "configurations, mutated": (mutated_config, 60, 100),
    "overrides, mutated": (mutated_override, 60, 100),
    "data, mutated": (mutated_data, 40, 50),
    "rewards that misbehave": (bad_reward, 1, 4),
    "a full disk": (full_disk, 1, 3),
    "two starts in one folder": (two_starts, 1, 2),
}
"""Name -> (attack, tries in the short form, tries in a turn of the long one, which has at least 20
kills)."""

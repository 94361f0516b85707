"""MetaRM's variants on the toy world against as many plain steps, and what a meta step costs.

    python -m bench.training.metarm                 the study: seeds x variants x rounds; goes on
    python -m bench.training.metarm --cost          seconds and memory of a step
    python -m bench.training.metarm --quick         one seed, two variants, one round, small models

All variants of a seed begin with one SFT model, one reward model and one policy after PPO, and see
the same prompts and random numbers; so each is compared with the control `none` of its own seed,
and intervals are of those paired differences (Student's over seeds, 95 %). Answers of round 1 are
the same for all variants; later ones are of policies that have parted.

A variant whose policies stay nearer to the SFT model may win by that alone. So the control runs at
other KL coefficients, too, and what a variant has above the control's curve of gold over KL, at the
variant's own KL and in its own seed, is the comparison at equal KL.

`gold` judges by program. `taste` is what the annotators would say without noise: gold, and a liking
for a flourish that gold dislikes. The pairs know taste only, so no method without new labels can
order by gold where the two disagree. `spread` is in units of the difference within held-out pairs.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

import gikernels
from bench.host.machine import ROOT
from bench.training.metarm_page import markdown, plot
from trainer.batch.types import Pair
from trainer.config import load
from trainer.models import loading
from trainer.runs.averages import Averages
from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines
from trainer.runs.optim import Optimizer
from trainer.stages import metarm, policy, reward_model, sft
from trainer.worlds.toy import World

RESULTS = ROOT / "bench" / "results"
SEEDS = (1, 2, 3, 4, 5)  # of run and world; 100 to 109 were for choosing settings
COMMON = [
    "groups.inference=none",
    "kl.adaptive=false",
    "kl.coef=0.3",
    "ppo.steps=20",
    "ppo.prompts_per_step=64",
    "ppo.warmup=2",
    "ppo.critic_warmup_steps=2",
    "eval.every=0",
    "eval.samples_per_domain=16",
    "metarm.ppo_steps=20",
    "metarm.steps=30",
    "metarm.lr=3e-4",
    "metarm.meta_prompts=256",
    "metarm.meta_batch=16",
    "metarm.test_prompts=128",
    "trainer.save_every=0",
    "trainer.progress=false",
    "baselines={}",
]
QUICK = [
    "toy.hidden=32",
    "toy.layers=1",
    "toy.heads=2",
    "toy.demonstrations=512",
    "sft.steps=10",
    "rm.steps=10",
    "rm.pairs=256",
    "ppo.steps=2",
    "metarm.ppo_steps=2",
    "ppo.prompts_per_step=16",
    "metarm.steps=4",
    "metarm.meta_prompts=16",
    "metarm.test_prompts=16",
]
VARIANTS = {
    "none": ["metarm.variant=none"],
    "literal": ["metarm.variant=literal", "metarm.step=3e-4"],  # eta = alpha, as in the paper
    "normalised": ["metarm.variant=normalised", "metarm.step=0.1"],
    "additive": ["metarm.variant=additive", "metarm.step=1"],
    "supported": ["metarm.variant=supported", "metarm.step=0.1"],
}
CONTROLS = {f"none_{coef}": [*VARIANTS["none"], f"kl.coef={coef}"] for coef in (0.15, 0.45)}
"""With COMMON's 0.3, the points of the control's curve."""
RUNS = VARIANTS | CONTROLS


# --- the runs -------------------------------------------------------------------------------------


def study(folder: Path, seeds: list[int], variants: list[str], rounds: int, extra: list[str],
          processes: int) -> None:  # fmt: skip
    tasks = [(folder, seed, variants, rounds, extra) for seed in seeds]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(one_seed, *zip(*tasks)):
            pass


def one_seed(folder: Path, seed: int, variants: list[str], rounds: int, extra: list[str]) -> None:
    """What is done already is not done again, down to the checkpoints of a stage."""
    torch.set_num_threads(1)
    base = RunFolder(folder / str(seed) / "base")
    config = setting(base, seed, rounds, extra)
    for stage in (sft, reward_model, policy):
        stage.run(config, base, resume=True)
    for name in variants:
        run = RunFolder(folder / str(seed) / name)
        if not run.path.is_dir():
            aside = run.path.with_name(f".{name}")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(base.path / "models", aside / "models")
            shutil.copy(base.pairs, aside)
            aside.rename(run.path)
        overrides = [*extra, "rm.batch=64", *RUNS[name]]
        metarm.run(setting(run, seed, rounds, overrides), run, resume=True)


def setting(run: RunFolder, seed: int, rounds: int, extra: list[str]):
    fixed = [f"run.seed={seed}", f"toy.seed={seed}", f"metarm.rounds={rounds}"]
    fixed.append(f"run.output={run.path}")
    return load("toy", [*COMMON, *extra, *fixed])


# --- what came out --------------------------------------------------------------------------------


def collect(folder: Path, seeds: list[int], variants: list[str]) -> list[dict]:
    """One row a seed, variant and round."""
    rows = []
    for seed in seeds:
        for variant in variants:
            run = RunFolder(folder / str(seed) / variant)
            for line in read_lines(run.metrics):
                if line["stage"] == "metarm":
                    n = line["step"]
                    figures = {k: v for k, v in line.items() if k not in ("stage", "step")}
                    if n:
                        figures |= taste(run.round(n), setting(run, seed, 1, []))
                    figures = {name: round(value, 5) for name, value in figures.items()}
                    rows.append({"seed": seed, "variant": variant, "round": n, **figures})
    return rows


def taste(made: RunFolder, config) -> dict[str, float]:
    """Share of answer pairs that the reward models before and after a round order as the annotators
    would without noise."""
    lines = read_lines(made.answers)
    k, out = config.metarm.samples, {}
    tastes = [x["gold"] + config.toy.liking * flourishes(x["response"]) for x in lines]
    for name in ("before", "after"):
        right = total = 0.0
        for start in range(0, len(lines), k):
            for i in range(start, start + k):
                for j in range(i + 1, start + k):
                    better = tastes[i] - tastes[j]
                    gap = lines[i][name] - lines[j][name]
                    if abs(better) > 1e-9:
                        total += 1
                        right += 1.0 if gap * better > 0 else 0.5 * (gap == 0)
        out[f"{name}/taste_accuracy"] = right / max(total, 1)
    return out | {"policy/flourishes": statistics.mean(flourishes(x["response"]) for x in lines)}


def flourishes(text: str) -> int:
    return text.partition("<eos>")[0].count("!")


# --- cost -----------------------------------------------------------------------------------------


def cost(folder: Path, repeats: int = 12) -> dict:
    """Median seconds of a plain and of a meta step with equally many sequences, interleaved; and
    the bytes that live inside the ascent beyond those of a plain step's backward."""
    torch.set_num_threads(1)
    config = load("toy", ["run.output=" + str(folder), "model.policy=toy"])
    world = World(config.toy)
    make_toy(config, folder)
    pairs = [
        Pair(
            prompt_ids=p.ids,
            chosen_ids=[*world.answer(p.ids), 1],
            rejected_ids=[*p.ids[2:-1], 4, 1],
            rating_chosen=1.0,
            rating_rejected=0.0,
        )
        for p in world.prompts(config.rm.batch)
    ]
    both = reward_model.both_answers(pairs, 0)
    answers = reward_model.both_answers(pairs, 0)  # as many sequences, in two answers a prompt
    out: dict[str, dict] = {}
    steps = {}
    for variant in VARIANTS:
        settings = [f"metarm.variant={variant}", "metarm.samples=2", "metarm.step=0.1"]
        steps[variant] = made(config.override(settings), folder, pairs, both, answers)
    steps["plain"] = made(config, folder, pairs, both, None)
    seconds = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - began)
    plain = statistics.median(seconds["plain"])
    for name, times in seconds.items():
        median = statistics.median(times)
        out[name] = {"seconds": median, "of_plain": median / plain}
    out["memory"] = memory(config, folder)
    return out


def make_toy(config, folder: Path) -> None:
    world = World(config.toy)
    folder.mkdir(parents=True, exist_ok=True)
    world.model(0).save_pretrained(folder / "toy")
    world.tokenizer().save_pretrained(folder / "toy")


def made(config, folder: Path, pairs, both, answers):
    """A step of the optimiser as a function."""
    tokenizer = World(config.toy).tokenizer()
    model = loading.load_reward_model(str(folder / "toy"), config, "pooled", tokenizer).train()
    optimizer = Optimizer([(1e-5, model.parameters())])

    def step() -> None:
        averages = Averages()
        if answers is None:
            reward_model.backward(config, model, pairs, both, averages)
        else:
            metarm.meta_step(config, model, pairs, both, answers, averages)
        optimizer.step(0)

    return step


def memory(config, folder: Path) -> dict[str, float]:
    """In copies of the parameters: tensors that live before the ascent and inside it."""
    tokenizer = World(config.toy).tokenizer()
    model = loading.load_reward_model(str(folder / "toy"), config, "pooled", tokenizer).train()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    plain = live_bytes()  # weights, before a backward
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with gikernels.meta_ascent(model.parameters(), 1e-3):
        inside = live_bytes()
    return {"parameter_bytes": size, "copies_inside": (inside - plain) / size}


def live_bytes() -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training.metarm")
    parser.add_argument("--folder", type=Path, default=Path("runs/metarm"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="each has one thread")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cost", action="store_true", help="measure steps instead")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.cost:
        found = cost(args.folder / "cost")
        print(json.dumps(found, indent=1))
        (args.output / "metarm_cost.json").write_text(json.dumps(found, indent=1) + "\n")
        return
    extra, name = [], "metarm"
    if args.quick:
        args.seeds, args.variants, args.rounds = [100], ["none", "supported"], 1
        args.controls = ["none_0.45"]
        args.folder, extra, name = args.folder / "quick", QUICK, "metarm_quick"
    runs = [*args.variants, *args.controls]
    study(args.folder, args.seeds, runs, args.rounds, extra, args.processes)
    results = {
        "seeds": args.seeds,
        "variants": args.variants,
        "controls": args.controls,
        "rounds": args.rounds,
        "settings": {"common": COMMON + extra, **{v: RUNS[v] for v in runs}},
        "rows": collect(args.folder, args.seeds, runs),
    }
    (args.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / f"{name}.md").write_text(markdown(results))
    plot(results, args.output / f"{name}.png")
    print(markdown(results))


if __name__ == "__main__":
    main()

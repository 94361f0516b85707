"""Training throughput on the toy model, beside TRL's GRPOTrainer:  python -m bench.training.trainer

Same machine, process, model, prompts, samples a prompt, length limit, reward function, KL to a
reference model, number of updates and precision (float32). Steps are interleaved: after each step
of TRL one step of each of ours, so that whatever else the machine does falls on all alike. Times
are medians; tokens are those of prompts and answers, without padding.

The comparison is in critic-free mode (group-normalised advantages, k3 KL in the loss), which is
what GRPOTrainer does. PPO with a critic, and with group-invariant learning, have no counterpart
there (TRL dropped its PPO trainer); their cost is given relative to our critic-free mode.

Two updates a step, as in the toy configuration. With `--updates 1` GRPOTrainer saves the forward
for the old log-probabilities, which we compute always (to compare them with the rollout's).

Peak memory is that of a process for each contender alone, beyond what it has when all is imported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.host import process
from bench.host.machine import ROOT, with_path
from trainer import parallel
from trainer.config import load
from trainer.ppo import build, loop
from trainer.runs.folder import RunFolder
from trainer.stages import sft
from trainer.worlds.toy import World

PROMPTS, SAMPLES, LIMIT = 32, 4, 12
LEARNING_RATE, KL = 1e-6, 0.04  # so small that the models, and with them the lengths, stay alike
TRL = "TRL GRPOTrainer"
FREE = ("ppo.advantages=group_norm", "ppo.kl_in_loss=true", "kl.estimator=k3")
PLAIN = ("groups.inference=none",)
OURS = {
    "critic-free": (*FREE, *PLAIN),
    "PPO with critic": PLAIN,
    "group-invariant PPO": (),
}
ALONE = 8  # steps in a process of its own


def first_letters(prompts, completions, meta=None, **others) -> list[float]:
    """A reward that costs nothing: the share of `a` in the answer."""
    return [text.split().count("a") / max(1, len(text.split())) for text in completions]


def setting(folder: Path, updates: int, *overrides: str):
    return load(
        "toy",
        [
            f"run.output={folder}",
            "run.stages=[ppo]",
            f"model.policy={folder / 'models/sft'}",
            "model.critic=policy",
            "reward.model_weight=0",
            "reward.functions=[{function: 'bench.training.trainer:first_letters'}]",
            f"ppo.prompts_per_step={PROMPTS}",
            f"ppo.samples_per_prompt={SAMPLES}",
            "ppo.ppo_epochs=1",
            f"ppo.minibatches={updates}",
            f"ppo.lr={LEARNING_RATE}",
            "ppo.critic_warmup_steps=0",
            "groups.performance=raw",
            f"rollout.max_new_tokens={LIMIT}",
            f"kl.coef={KL}",
            "trainer.tokens_per_microbatch=8192",
            "trainer.progress=false",
            "baselines={}",
            *overrides,
        ],
    )


class Ours:
    def __init__(self, name: str, config) -> None:
        self.name, self.seconds, self.tokens, self.step = name, [], [], 0
        self.setup = build.Setup.of(config, RunFolder(config.run.output))

    def __call__(self) -> None:
        began = time.perf_counter()
        metrics = loop.iteration(self.setup, self.step)
        self.seconds.append(time.perf_counter() - began)
        self.tokens.append(metrics["perf/tokens_per_second"] * metrics["perf/step_seconds"])
        self.step += 1


def run_trl(
    folder: Path, steps: int, updates: int, options, between
) -> tuple[list[float], list[float]]:
    """Seconds and tokens of each of TRL's iterations; `between` is called after each."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    config = setting(folder, updates)
    tokenizer = World(config.toy).tokenizer()
    prompts = World(config.toy).prompts(PROMPTS * (steps + 2), "train")
    size = PROMPTS * SAMPLES // updates
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps * updates,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,
        steps_per_generation=updates,
        num_generations=SAMPLES,
        max_completion_length=LIMIT,
        learning_rate=LEARNING_RATE,
        beta=KL,
        gradient_checkpointing=False,
        bf16=options.dtype == "bfloat16",
        use_cpu=parallel.device().type == "cpu",
        report_to=[],
        logging_steps=10**6,
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        seed=0,
    )
    seconds, tokens = [], []

    class Interleave(TrainerCallback):
        began = seen = 0

        def on_train_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % updates == 0:
                seconds.append(time.perf_counter() - self.began)
                tokens.append(state.num_input_tokens_seen - self.seen)
                self.seen = state.num_input_tokens_seen
                between()
                self.began = time.perf_counter()

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            folder / "models/sft", dtype=torch.float32, attn_implementation=options.attention
        ),
        reward_funcs=first_letters,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [p.text for p in prompts]}),
        processing_class=tokenizer,
        callbacks=[Interleave()],
    )
    trainer.train()
    return seconds, tokens


def ours(name: str, folder: Path, args: argparse.Namespace) -> Ours:
    same = (
        f"model.dtype={args.dtype}",
        f"model.attention={args.attention}",
        "rollout.logprob_bound=1",
    )
    return Ours(name, setting(folder, args.updates, *OURS[name], *same))


def peak_alone(args: argparse.Namespace) -> int:
    """Bytes that a contender's process takes at most beyond what it has when all is imported."""
    import trl  # noqa: F401 - in all, so that it is in none's figure

    process.CLEAR.write_text("5")  # the high-water mark falls to what there is
    before = process.resident("VmRSS")
    if args.alone == TRL:
        run_trl(args.folder, ALONE, args.updates, args, lambda: None)
    else:
        contender = ours(args.alone, args.folder, args)
        for _ in range(ALONE):
            contender()
    return process.resident("VmHWM") - before


def in_a_process(name: str, folder: Path, args: argparse.Namespace) -> int:
    line = [sys.executable, "-m", "bench.training.trainer", "--alone", name]
    line += ["--folder", str(folder), "--updates", str(args.updates), "--dtype", args.dtype]
    line += ["--attention", args.attention, "--threads", str(args.threads)]
    done = subprocess.run(line, cwd=ROOT, env=with_path(), stdout=subprocess.PIPE, check=True)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--updates", type=int, default=2, help="optimiser steps an iteration")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--alone", choices=(TRL, *OURS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.alone:
        print(peak_alone(args))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Somewhat trained, so that answers have the lengths of answers.
        short = load("toy", ["sft.steps=60", "trainer.progress=false", f"run.output={folder}"])
        sft.run(short, RunFolder(folder))
        peaks = {name: in_a_process(name, folder, args) for name in (TRL, *OURS)}
        beside = [ours(name, folder, args) for name in OURS]
        theirs = run_trl(
            folder, args.steps, args.updates, args, lambda: [each() for each in beside]
        )
    warm = max(2, args.steps // 5)
    rows = {TRL: theirs} | {each.name: (each.seconds, each.tokens) for each in beside}
    figures = {
        name: {
            "step_seconds": statistics.median(seconds[warm:]),
            "tokens_per_step": statistics.mean(tokens[warm:]),
            "peak_bytes": peaks[name],
        }
        for name, (seconds, tokens) in rows.items()
    }
    base, free_step = figures[TRL], figures["critic-free"]["step_seconds"]
    print(
        f"{PROMPTS} prompts x {SAMPLES} samples, {args.updates} update(s) a step, at most {LIMIT} "
        f"new tokens, {args.dtype}, {args.attention} attention, {torch.get_num_threads()} "
        f"thread(s), {parallel.device()}"
    )
    line = "{:<20}{:>10}{:>13}{:>10}{:>9}{:>16}{:>10}"
    heads = ("s/step", "tokens/step", "tokens/s", "vs TRL", "vs critic-free", "peak MiB")
    print(line.format("", *heads))
    for name, each in figures.items():
        each["tokens_per_second"] = each["tokens_per_step"] / each["step_seconds"]
        each["speed_over_trl"] = base["step_seconds"] / each["step_seconds"]
        each["time_over_critic_free"] = each["step_seconds"] / free_step
        print(
            line.format(
                name,
                f"{each['step_seconds']:.3f}",
                f"{each['tokens_per_step']:.0f}",
                f"{each['tokens_per_second']:.0f}",
                f"{each['speed_over_trl']:.2f}x",
                f"{each['time_over_critic_free']:.2f}x",
                f"{each['peak_bytes'] / 2**20:.0f}",
            )
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Training steps of a random 0.5B model, ours and TRL's: tokens a second, peak memory, MFU.

    python -m bench.training.half_billion [--steps 4] [--tiny]

Ours is the command line as it is, with critic-free PPO and a reward that costs nothing, and its own
metrics. Sequences are all of the same length, for a random model does not end its answers. MFU
counts 6 FLOPs a parameter and token, in the seconds of the policy's update alone, of the product
that this machine can do at most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.host.machine import ROOT, with_path
from bench.training.memory import SETTINGS, SHAPE, make, varied

TINY_SHAPE = {
    **SHAPE,
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Size(NamedTuple):
    shape: dict[str, Any]
    prompts: int
    samples: int
    tokens: int  # of an answer
    dtype: str


LARGE = Size(SHAPE, 16, 4, 128, "bfloat16")
TINY = Size(TINY_SHAPE, 2, 2, 8, "float32")


def ours(model: Path, folder: Path, size: Size, steps: int, seconds: float) -> dict[str, float]:
    """The command line's own metrics, medians over the steps but the first."""
    settings = [
        *SETTINGS,
        f"model.policy={model}",
        f"model.dtype={size.dtype}",
        "model.gradient_checkpointing=false",
        f"ppo.samples_per_prompt={size.samples}",
        f"ppo.prompts_per_step={size.prompts}",
        f"ppo.steps={steps}",
        f"rollout.batch={size.prompts * size.samples}",
        f"rollout.max_new_tokens={size.tokens}",
        "rollout.logprob_bound=1",
        "trainer.tokens_per_microbatch=16384",
        "trainer.progress=false",
        "eval.every=0",
        "eval.samples_per_domain=1",
    ]
    command = [sys.executable, "-m", "trainer", "ppo", "toy", *settings, "--output", str(folder)]
    with contextlib.suppress(subprocess.TimeoutExpired):  # then what is there has to do
        done = subprocess.run(
            command, cwd=ROOT, env=with_path(), capture_output=True, text=True, timeout=seconds
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError(said[-1] if said else f"exit code {done.returncode}")
    log = folder / "metrics.jsonl"
    lines = map(json.loads, log.read_text().splitlines() if log.exists() else ())
    rows = [line for line in lines if line["stage"] == "ppo"][1:]
    if not rows:
        raise RuntimeError(f"no second step within {seconds:.0f} s")

    def middle(key: str) -> float:
        return statistics.median(row[key] for row in rows)

    tokens = middle("perf/tokens_per_second") * middle("perf/step_seconds")
    return {
        "step_seconds": middle("perf/step_seconds"),
        "steps": len(rows),
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / middle("perf/step_seconds"),
        "update_seconds": middle("timing/policy"),
        "rollout_seconds": middle("timing/rollout"),
        "peak_memory_bytes": max(row["perf/peak_memory_bytes"] for row in rows),
    }


def trl(model: Path, folder: Path, size: Size, steps: int) -> dict[str, float]:
    """GRPOTrainer with as many prompts, samples and tokens."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    words, draw = sorted(tokenizer.get_vocab())[4:], random.Random(0)
    texts = [" ".join(draw.choices(words, k=8)) for _ in range(size.prompts * (steps + 2))]
    gpu = torch.cuda.is_available()
    seconds: list[float] = []

    class Watch(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    arguments = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=size.prompts * size.samples,
        num_generations=size.samples,
        max_completion_length=size.tokens,
        generation_kwargs={"min_new_tokens": size.tokens},
        beta=0.04,  # with a reference model, as ours
        gradient_checkpointing=False,
        bf16=size.dtype == "bfloat16",
        use_cpu=not gpu,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=lambda prompts, completions, **_: varied(prompts, completions, []),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    trainer.train()
    step = statistics.median(seconds[1:])
    tokens = size.prompts * size.samples * (size.tokens + 8)
    return {
        "step_seconds": step,
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / step,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if gpu else 0,
    }


def parameters(model: Path, size: Size) -> int:
    width = {"float32": 4, "bfloat16": 2}[size.dtype]
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) // width


def mfu(figures: dict[str, float], count: int, product_tflops: float) -> float:
    """Of the policy's update: forward and backward of every parameter for every token."""
    done = 6.0 * count * figures["tokens_per_step"] / figures["update_seconds"]
    return done / (product_tflops * 1e12)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.training.half_billion", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=4, help="of which the first is not counted")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, for a smoke run")
    args = parser.parse_args()
    size = TINY if args.tiny else LARGE
    with tempfile.TemporaryDirectory() as name:
        model = Path(name, "model")
        make(str(model), size.dtype, size.shape)
        found = {"ours": ours(model, Path(name, "run"), size, args.steps, 3600)}
        print(json.dumps(found, indent=1))
        try:
            found["TRL GRPOTrainer"] = trl(model, Path(name, "trl"), size, args.steps)
        except ImportError as error:
            print(f"TRL: {error}")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

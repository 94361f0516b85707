"""Peak memory of other people's training steps with and without our head, on the CPU, fp32.

    python -m bench.training.integrations

Each row is a process of its own, for a high-water mark never falls. "peak" is that mark (VmHWM)
of the whole process; "above start" takes off what was resident when the step began: imports, model
and optimizer. What is left is the step: for TRL generation, scoring, backward and update, for a
Hugging Face model forward and backward.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from bench.host.machine import ROOT
from bench.host.process import resident


class Size(NamedTuple):
    vocab: int
    sequences: int
    length: int  # tokens of a sequence


def tiny_qwen(vocab: int, hidden: int):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def grpo_step(fused_head: bool, size: Size) -> dict[str, float]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig

    from gikernels.integrations.trl import GroupInvariantGRPOTrainer

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, size.vocab)}}
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks: dict[str, float] = {}

    class Marks(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks.update(start=resident("VmRSS"), seconds=-time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            marks["seconds"] += time.perf_counter()
            marks["peak"] = resident("VmHWM")

    prompt = "w5 w6 w7 w8 w9 w10 w11 w12"
    answer = size.length - len(prompt.split())
    with tempfile.TemporaryDirectory() as folder:
        trainer = GroupInvariantGRPOTrainer(  # without `invariance` it is TRL's GRPOTrainer
            model=tiny_qwen(size.vocab, 64),
            reward_funcs=lambda completion_ids, **kw: [i[0] / size.vocab for i in completion_ids],
            args=GRPOConfig(
                output_dir=folder,
                max_steps=1,
                per_device_train_batch_size=size.sequences,
                num_generations=size.sequences,
                max_completion_length=answer,
                generation_kwargs={"min_new_tokens": answer},
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": [prompt]}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", padding_side="left"
            ),
            callbacks=[Marks()],
            fused_head=fused_head,
        )
        trainer.train()
    return marks


def hf_step(patched: bool, size: Size) -> dict[str, float]:
    import torch

    from gikernels.integrations import patch_lm_head

    model = tiny_qwen(size.vocab, 256)
    ids = torch.randint(2, size.vocab, (size.sequences, size.length))
    if patched:
        patch_lm_head(model)
    model(ids[:1, :4], labels=ids[:1, :4]).loss.backward()  # allocates the gradients
    model.zero_grad(set_to_none=False)
    marks = {"start": resident("VmRSS"), "seconds": -time.perf_counter()}
    if patched:
        logprobs = model(ids, labels=ids).logprobs
    else:
        logits = model(ids).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    (-logprobs.mean()).backward()
    marks["seconds"] += time.perf_counter()
    return {**marks, "peak": resident("VmHWM")}


# worker -> (function, whether ours is in force, what it is called)
WORKERS = {
    "trl": (grpo_step, False, "TRL's own head"),
    "trl-gikernels": (grpo_step, True, "TRL with gikernels"),
    "hf": (hf_step, False, "logits, log_softmax"),
    "hf-gikernels": (hf_step, True, "patch_lm_head"),
}


def measure(worker: str, size: Size) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.training.integrations", "--worker", worker]
    command += ["--size", *map(str, size)]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    return json.loads(out.stdout.splitlines()[-1])


def compare(title: str, workers: tuple[str, str], size: Size) -> None:
    logits = size.vocab * size.sequences * size.length * 4 / 2**20
    print(f"{title}: V = {size.vocab}, {size.sequences} x {size.length} tokens")
    print(f"(one tensor of fp32 logits for all of them would be {logits:.0f} MiB)")
    print(f"{'':20} {'peak MiB':>10} {'above start':>12} {'seconds':>8}")
    rows = [measure(worker, size) for worker in workers]
    for worker, r in zip(workers, rows):
        above = (r["peak"] - r["start"]) / 2**20
        name = WORKERS[worker][2]
        print(f"{name:20} {r['peak'] / 2**20:10.0f} {above:12.0f} {r['seconds']:8.2f}")
    before, after = rows
    above = (after["peak"] - after["start"]) / (before["peak"] - before["start"])
    seconds = after["seconds"] / before["seconds"]
    print(f"{'after / before':20} {after['peak'] / before['peak']:10.2f} {above:12.2f}", end=" ")
    print(f"{seconds:8.2f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        step, ours, _ = WORKERS[args.worker]
        print(json.dumps(step(ours, Size(*args.size))))
        return
    compare("One GRPO step in TRL", ("trl", "trl-gikernels"), Size(32768, 8, 256))
    compare("Forward and backward of Qwen2", ("hf", "hf-gikernels"), Size(151936, 4, 256))


if __name__ == "__main__":
    main()

"""Peak memory of one GRPO step in TRL with and without our head, each in a process of its own.

    python -m bench.bench_integrations [--vocab 32768] [--sequences 8] [--length 248]

Peak is the process's resident high-water mark (VmHWM), read after the step. "above start" takes
off what was resident when the step began: the imports, the model and the optimizer. What is left is
the step itself: generation, the head forward and backward, the update.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time

HEADS = {
    "TRL's own head": "trl",
    "TRL with gikernels": "gikernels",
}


def resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM at most."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def grpo_step(head: str, vocab: int, sequences: int, length: int) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
    from trl import GRPOConfig

    from gikernels.integrations.trl import GroupInvariantGRPOTrainer

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, vocab)}}
    fast = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=length + 8,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    marks: dict[str, float] = {}

    class Marks(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks["start"] = resident("VmRSS")
            marks["began"] = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            marks["seconds"] = time.perf_counter() - marks.pop("began")
            marks["peak"] = resident("VmHWM")

    with tempfile.TemporaryDirectory() as folder:
        trainer = GroupInvariantGRPOTrainer(
            model=model,
            reward_funcs=lambda completion_ids, **kw: [ids[0] / vocab for ids in completion_ids],
            args=GRPOConfig(
                output_dir=folder,
                max_steps=1,
                per_device_train_batch_size=sequences,
                num_generations=sequences,
                max_completion_length=length,
                generation_kwargs={"min_new_tokens": length},
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["w5 w6 w7 w8 w9 w10 w11 w12"]}),
            processing_class=tokenizer,
            callbacks=[Marks()],
            fused_head=head == "gikernels",
        )
        trainer.train()
    marks["loss"] = trainer.state.log_history[0].get("train_loss", 0.0)
    return marks


def measure(head: str, vocab: int, sequences: int, length: int) -> dict[str, float]:
    """In a fresh process, because a high-water mark never falls."""
    command = [sys.executable, "-m", "bench.bench_integrations", "--worker", head]
    command += ["--vocab", str(vocab), "--sequences", str(sequences), "--length", str(length)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=248, help="tokens of a completion")
    parser.add_argument("--worker", choices=HEADS.values(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = (args.vocab, args.sequences, args.length)
    if args.worker:
        print(json.dumps(grpo_step(args.worker, *size)))
        return
    logits = args.vocab * args.sequences * (args.length + 8) * 4
    print(f"one GRPO step, V = {args.vocab}, {args.sequences} x {args.length + 8} tokens, CPU, fp32")
    print(f"fp32 logits of all positions would be {logits / 2**20:.0f} MiB")
    print(f"{'':20} {'peak MiB':>10} {'above start':>12} {'seconds':>8}")
    results = {name: measure(head, *size) for name, head in HEADS.items()}
    for name, r in results.items():
        above = (r["peak"] - r["start"]) / 2**20
        print(f"{name:20} {r['peak'] / 2**20:10.0f} {above:12.0f} {r['seconds']:8.2f}")
    theirs, ours = results.values()
    print(f"{'ours / theirs':20} {ours['peak'] / theirs['peak']:10.2f}", end=" ")
    print(f"{(ours['peak'] - ours['start']) / (theirs['peak'] - theirs['start']):12.2f}")


if __name__ == "__main__":
    main()

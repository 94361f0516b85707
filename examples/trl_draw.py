"""GRPO in TRL with prompts drawn by group: rare hard ones as often as the objective asks."""

import os
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from trl import GRPOConfig

from gikernels.integrations import Drawing
from gikernels.integrations.trl import GroupInvariantGRPOTrainer

WORDS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]


def reward(prompts, completions, **columns):
    """The share of the prompt's letter in the completion; for prompts of 'z' it is hard to earn."""
    return [c.split().count(p) / 8 * (0.2 if p == "z" else 1) for p, c in zip(prompts, completions)]


def main(steps: int = 4) -> list[dict]:
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    config = Qwen2Config(
        vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    prompts = ["a", "b", "c"] * 20 + ["z"] * 4
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        args = GRPOConfig(
            output_dir=os.path.join(folder, "run"), max_steps=steps, beta=0.05, bf16=False,
            per_device_train_batch_size=32, num_generations=4, max_completion_length=8,
            logging_steps=1, report_to=[], save_strategy="no", model_init_kwargs={},
        )  # fmt: skip
        trainer = GroupInvariantGRPOTrainer(  # instead of GRPOTrainer(
            draw=Drawing(rule="variance"),  # without this line: in random order, each equally often
            group_column="domain",  # without this line: groups inferred from the rewards
            model=folder,
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": prompts, "domain": prompts}),
            processing_class=tokenizer,
        )
        trainer.train()
    logs = [h for h in trainer.state.log_history if "loss" in h]
    for h in logs:
        print(f"'z': {h['draw/3/share']:.0%} of the prompts, drawn at {h['draw/3/rate']:.0%}")
    return logs


if __name__ == "__main__":
    main()

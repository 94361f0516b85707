"""Tiny models, a tokenizer and TRL trainers on them, made from seeds."""

import torch

LETTERS = 26


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(chr(ord("a") + i) for i in range(LETTERS))]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def qwen(seed=0, vocab_size=2 + LETTERS, **more):
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **more,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def letter_reward(completions, prompts, **columns):
    """The share of a completion's letters that are the prompt's first; prompts of 'z' earn less."""
    return [
        (0.3 if p.split()[0] == "z" else 1.0)
        * sum(w == p.split()[0] for w in c.split())
        / max(len(c.split()), 1)
        + 0.01 * len(c) * (ord(p[0]) - ord("a"))
        for p, c in zip(prompts, completions)
    ]


def trl_trainer(cls, folder, *, steps=2, data=None, config=None, **more):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig

    qwen().save_pretrained(folder / "model")  # TRL loads the reference from where the policy was

    data = data or {"prompt": ["a b c", "z y x", "d e", "b z"] * 4}
    make = GRPOConfig if issubclass(cls, GRPOTrainer) else RLOOConfig
    args = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=2,
        max_completion_length=8,
        learning_rate=1e-3,
        beta=0.05,
        temperature=0.9,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        bf16=False,
        shuffle_dataset=False,
    )
    torch.manual_seed(0)
    return cls(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
        reward_funcs=letter_reward,
        args=make(**{**args, **(config or {})}),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        **more,
    )

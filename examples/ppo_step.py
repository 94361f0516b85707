"""A PPO step in a plain loop: the loss straight from hidden states, no logits in memory."""

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import gikernels

PROMPT, ANSWER, GOOD = 4, 12, 7  # the reward is the share of token GOOD in the answer


def hidden_states(model, ids):
    """Of the positions that predict the answer: (S * ANSWER, D), and what they predict."""
    hidden = model.model(ids).last_hidden_state[:, PROMPT - 1 : -1]
    return hidden.flatten(0, 1), ids[:, PROMPT:].flatten()


def main(steps: int = 12) -> list[float]:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.lm_head.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(steps):
        prompts = torch.randint(1, 64, (32, PROMPT))
        ids = model.generate(prompts, max_new_tokens=ANSWER, do_sample=True, top_k=0)
        scores = (ids[:, PROMPT:] == GOOD).float().mean(1)
        with torch.no_grad():
            hidden, targets = hidden_states(model, ids)
            old = gikernels.linear_logprobs(hidden, head, targets).logprobs
        advantages = (scores - scores.mean()) / (scores.std() + 1e-6)
        for _ in range(2):  # PPO epochs
            hidden, targets = hidden_states(model, ids)
            loss, metrics = gikernels.linear_policy_loss(
                hidden,
                head,
                targets,
                old,
                advantages.repeat_interleave(ANSWER),
                mask=torch.ones_like(targets, dtype=torch.bool),
                denom=len(targets),  # the global number of tokens, whatever the micro-batching
                ref_logprobs=old,
                kl_coef=0.05,
                entropy_coef=1e-3,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(scores.mean().item())
        print(f"step {step:2}  score {history[-1]:.3f}  clipped {metrics['clipfrac'].item():.2f}")
    return history


if __name__ == "__main__":
    main()

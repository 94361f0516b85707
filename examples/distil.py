"""On-policy distillation: the student answers, a teacher tells it the distribution of every token.

Any two causal language models of one vocabulary will do; here they are tiny and random. The
divergence is over all of the vocabulary, and no logits are ever in memory. kind="forward" on given
answers is Hinton's distillation, kind="jsd" is GKD (arXiv 2306.13649).
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import gikernels

TINY = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, pad_token_id=0, eos_token_id=1, initializer_range=0.3,
)  # fmt: skip


def step(student, teacher, prompts, kind="reverse", new_tokens=8):  # prompts (B, P)
    """Gradients of the mean divergence of the student's own tokens; returns it."""
    start = prompts.shape[1]
    with torch.no_grad():
        rows = student.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
        )
    ended = (rows[:, start:] == student.config.eos_token_id).cumsum(1)
    counts = torch.nn.functional.pad(ended, (1, -1)) == 0  # up to the first EOS, that included

    def states(model):  # in front of each token of an answer
        hidden = model.base_model(rows).last_hidden_state
        return hidden[:, start - 1 : -1].flatten(0, 1), model.lm_head.weight

    with torch.no_grad():
        ref = states(teacher)
    out = gikernels.linear_divergence(
        *states(student), ref, kind=kind, mask=counts.flatten(), denom=counts.sum().float()
    )
    out.loss.backward()
    return out.loss.item()


def main(steps=24, kind="reverse"):
    torch.manual_seed(0)
    student, teacher = (AutoModelForCausalLM.from_config(TINY) for _ in range(2))
    optimizer, found = torch.optim.AdamW(student.parameters(), lr=1e-2), []
    for _ in range(steps):
        found.append(step(student, teacher, torch.randint(2, 64, (16, 4)), kind))
        optimizer.step()
        optimizer.zero_grad()
    return found


if __name__ == "__main__":
    for i, divergence in enumerate(main()):
        print(f"step {i}: {divergence:.3f} nats a token from the teacher")

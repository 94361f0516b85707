"""ppo.loss, ppo.aggregate and the penalties, by the plainest code there is, however it is cut."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from gikernels import Support
from tests.trainer import tiny
from trainer.batch.sequences import Sequences
from trainer.batch.support import of_rows
from trainer.models import packing
from trainer.models.policy import Policy
from trainer.ppo import loop
from trainer.ppo.objective import Piece, objective

SHAPE = LlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
)
LENGTHS = [3, 7, 1, 5]
LIMIT, TEMPERATURE, ENTROPY, KL = 9, 0.8, 0.1, 0.3


def naive(name, aggregate, z, targets, old, advantages, ref, kept):
    """The loss of all answers, from their logits, one answer after the other."""
    logp = (z / TEMPERATURE).masked_fill(~kept, -torch.inf).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(~kept, 0)).sum(-1)
    new, total = logp[torch.arange(len(targets)), targets], 0
    rows = [x.split(LENGTHS) for x in (new, entropy, old, advantages, ref)]
    for new_i, entropy_i, old_i, a, ref_i in zip(*rows):
        own = {
            "token": sum(LENGTHS),
            "sequence": len(new_i) * len(LENGTHS),
            "constant": LIMIT * len(LENGTHS),
        }[aggregate]
        d = new_i - ref_i
        total = total + (KL * (torch.exp(-d) - 1 + d) - ENTROPY * entropy_i).sum() / own
        log_ratio = new_i - old_i
        if name == "gspo":
            ratio = log_ratio.mean().exp()
            loss = torch.maximum(-ratio * a[0], -ratio.clamp(0.9, 1.2) * a[0])
            total = total + loss / len(LENGTHS)
        elif name == "cispo":
            weight = log_ratio.detach().exp().clamp(0.9, 1.1)
            total = total - (weight * a * new_i).sum() / own
        else:
            ratio = log_ratio.exp()
            total = total + torch.maximum(-ratio * a, -ratio.clamp(0.8, 1.3) * a).sum() / own
    return total


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize(("name", "top"), [("ppo", 0), ("gspo", 5), ("cispo", 5), ("ppo", 5)])
def test_loss_and_gradient(name, top, aggregate, tmp_path):
    """`top`: sampled from so many tokens, the policy's own and others."""
    config = tiny.config(
        tmp_path, f"ppo.loss={name}", f"ppo.aggregate={aggregate}", "ppo.clip_high=0.3",
        "ppo.advantages=group_norm", "ppo.samples_per_prompt=2", "ppo.gspo_clip=[0.1, 0.2]",
        "ppo.cispo_cap=[0.9, 1.1]", f"ppo.entropy_coef={ENTROPY}", "ppo.kl_in_loss=true",
        f"rollout.max_new_tokens={LIMIT}", f"rollout.temperature={TEMPERATURE}",
        "kl.estimator=k3",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(SHAPE, attn_implementation="sdpa").double()
    packing.use_packed(model)
    policy = Policy(model.train())
    prompts = [[4, 5], [6], [4, 5, 7], [9]]
    sequences = Sequences.of(prompts, [[10 + n] * n for n in LENGTHS])
    n = sequences.count

    def logits(hidden, head, targets):
        return hidden @ head.weight.T

    with torch.no_grad():
        at_start = policy(sequences, logits)
    kept, support = torch.ones_like(at_start, dtype=torch.bool), None
    if top:
        ids = torch.stack([torch.randperm(40)[:top] for _ in range(n)])
        ids[:, 0] = sequences.answer_tokens
        kept = torch.zeros_like(kept).scatter(1, ids, True)
        support = Support(F.pad(kept.sum(1).cumsum(0), (1, 0)), kept.nonzero()[:, 1])
    logp = (at_start / TEMPERATURE).masked_fill(~kept, -torch.inf).log_softmax(-1)
    new = logp[torch.arange(n), sequences.answer_tokens]
    old, ref = (new + 0.3 * torch.randn(n) for _ in range(2))
    advantages = torch.randn(len(LENGTHS)).double().repeat_interleave(torch.tensor(LENGTHS))

    loss = naive(name, aggregate, policy(sequences, logits), sequences.answer_tokens, old,
                 advantages, ref, kept)  # fmt: skip
    want = torch.autograd.grad(loss, list(policy.parameters()))

    total = 0
    for chosen, alone in (([1], True), ([3, 0], True), ([2], True), ([0], False)):
        where = sequences.flat(torch.tensor(chosen))
        part = sequences.rows(torch.tensor(chosen))
        mask = torch.full(where.shape, alone)  # the last only keeps other ranks company
        piece = Piece(part, old[where], advantages[where], mask, ref[where],
                      torch.full(where.shape, KL).double(),
                      of_rows(support, sequences, torch.tensor(chosen)))  # fmt: skip
        out = policy(part, objective(config, sequences, piece))
        assert out.metrics.keys() >= {"ratio", "clipfrac", "approxkl"}
        total = total + out.loss
    torch.testing.assert_close(total, loss)
    got = torch.autograd.grad(total, list(policy.parameters()))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_at_top_p_ratios_are_those_of_what_was_sampled(fresh):
    """Before any update they are 1, the KL to the reference that the policy still is, 0, and the
    engine's log-probabilities are the trainer's; with a plain penalty, in the loss, and exact."""
    for more in ([], ["ppo.kl_in_loss=true"], ["kl.estimator=exact"]):
        config, run = fresh(
            "rollout.top_p=0.9", "rollout.logprob_bound=1e-3", "ppo.minibatches=1", "ppo.steps=1",
            "groups.inference=none", "eval.every=0", "eval.samples_per_domain=1", *more,
        )  # fmt: skip
        loop.run(config, run)
        (line,) = [x for x in read(run) if x["stage"] == "ppo"]
        assert line["rollout/logprob_diff_max"] < 1e-4 and line["policy/grad_norm"] > 0
        assert abs(line["policy/ratio"] - 1) < 1e-5 and abs(line["objective/kl"]) < 1e-4
        assert line["policy/clipfrac"] == 0


@pytest.mark.parametrize("name", ["gspo", "cispo"])
def test_an_iteration(name, fresh):
    """Two epochs, so that ratios leave 1 and clips can bite."""
    config, run = fresh(
        f"ppo.loss={name}", "ppo.aggregate=sequence", "ppo.advantages=group_norm",
        "ppo.samples_per_prompt=4", "ppo.prompts_per_step=8", "ppo.ppo_epochs=2",
        "groups.inference=none", "ppo.steps=1", "eval.every=0", "eval.samples_per_domain=1",
        "ppo.cispo_cap=[0, 1]", "ppo.lr=1e-2", "ppo.warmup=0",
    )  # fmt: skip
    loop.run(config, run)
    (line,) = [x for x in read(run) if x["stage"] == "ppo"]
    assert line["policy/grad_norm"] > 0 and line["policy/approxkl"] > 0
    assert 0 < line["policy/clipfrac"] < 1


def read(run):
    from trainer.runs.log import read_lines

    return read_lines(run.metrics)

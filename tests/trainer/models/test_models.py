"""Log-probabilities, values, scores against the plainest code, and what is saved."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.trainer import tiny
from trainer.batch.order import batch_indices, minibatches
from trainer.batch.sequences import Sequences, forward_all, micro_batches
from trainer.models import loading, states
from trainer.ppo.groups import Groups
from trainer.runs.optim import Optimizer

SEQUENCES = Sequences.of(
    [[5, 6, 11, 12, 3], [5, 7, 11, 3], [8, 5, 11, 12, 13, 3]],
    [[11, 12, 1], [1], [13, 12, 11, 4, 1]],
    0,
)


def test_policy_logprobs_entropy_and_exact_kl(base):
    config = tiny.config("unused")
    policy = loading.load_policy(str(base.model("sft")), config)
    other = loading.load_policy("toy", config)
    stats = policy(SEQUENCES, 0.7, other)
    for i in range(3):
        start, end = int(SEQUENCES.prompt_lengths[i]), int(SEQUENCES.lengths[i])
        row, n = SEQUENCES.tokens[i : i + 1, :end], end - start
        logp, ref = (m.model(row).logits[0, start - 1 : end - 1] for m in (policy, other))
        logp, ref = (logp.double() / 0.7).log_softmax(-1), (ref.double() / 0.7).log_softmax(-1)
        want = logp[torch.arange(n), row[0, start:]]
        close = {"atol": 1e-5, "rtol": 0, "check_dtype": False}
        torch.testing.assert_close(stats.logprobs[i, :n], want, **close)
        torch.testing.assert_close(stats.entropy[i, :n], -(logp.exp() * logp).sum(-1), **close)
        torch.testing.assert_close(stats.kl[i, :n], (logp.exp() * (logp - ref)).sum(-1), **close)
    assert (stats.logprobs[~SEQUENCES.mask] == 0).all()


@pytest.mark.parametrize("head", ["last", "pooled"])
def test_reward_head_is_saved_in_hugging_face_format(base, tmp_path, head):
    config = tiny.config("unused")
    tokenizer = loading.load_tokenizer("toy", config)
    reward = loading.load_reward_model(str(base.model("sft")), config, head, tokenizer)
    scores = reward(SEQUENCES)
    for i in range(3):
        start, end = int(SEQUENCES.prompt_lengths[i]), int(SEQUENCES.lengths[i])
        hidden = reward.model.model(SEQUENCES.tokens[i : i + 1, :end]).last_hidden_state[0]
        each = hidden @ reward.model.score.weight[0]
        want = each[-1] if head == "last" else each[start:].mean()
        torch.testing.assert_close(scores[i], want, atol=1e-5, rtol=1e-5)
    reward.save(tmp_path, tokenizer)
    again = loading.load_reward_model(str(tmp_path), config)  # knows its head by itself
    assert again.head == head
    torch.testing.assert_close(again(SEQUENCES), scores, rtol=0, atol=0)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    if head == "last":
        torch.testing.assert_close(theirs(SEQUENCES.tokens).logits[:, 0], scores)


@pytest.mark.parametrize("on", ["prompt", "response"])
def test_critic_reads_states_before_tokens_and_the_group_where_it_is_told(base, on):
    config = tiny.config("unused", f"groups.on={on}", "groups.focus=0")
    policy = loading.load_policy(str(base.model("sft")), config)
    reward, _ = loading.load_scoring_model(config, base)
    critic = loading.make_critic(config, base, policy, Groups(config, []).num)
    torch.nn.init.normal_(critic.value_head.weight)
    values, groups = critic(SEQUENCES)
    for i in range(3):
        start, end = int(SEQUENCES.prompt_lengths[i]), int(SEQUENCES.lengths[i])
        hidden = critic.body(SEQUENCES.tokens[i : i + 1, :end]).last_hidden_state[0]
        want = critic.value_head(hidden[start - 1 : end - 1])[:, 0]
        torch.testing.assert_close(values[i, : end - start], want, atol=1e-5, rtol=1e-5)
        place = start - 1 if on == "prompt" else end - 1
        torch.testing.assert_close(groups[i], critic.group_head(hidden[place]), atol=1e-5, rtol=0)
    ours = dict(critic.body.named_parameters())
    for name, theirs in reward.model.model.named_parameters():  # a copy of the reward model's
        assert torch.equal(ours[name], theirs) and ours[name] is not theirs
        assert ours[name].requires_grad and not theirs.requires_grad


def test_a_saved_folder_has_the_same_tokenizer(base):
    """AutoTokenizer takes a tokenizer's class from the model beside it, for some models."""
    ours = loading.load_tokenizer("toy", tiny.config("unused"))
    for name in ("sft", "rm"):
        theirs = loading.load_tokenizer(str(base.model(name)), tiny.config("unused"))
        text = "copy reverse a b :"
        assert theirs(text)["input_ids"] == ours(text)["input_ids"] == [5, 6, 11, 12, 3]
        assert theirs.decode([5, 11]) == ours.decode([5, 11]) == "copy a"


# --- batches ---


def test_micro_batches_keep_the_budget_and_lose_nobody():
    lengths = torch.tensor([3, 9, 4, 30, 8, 8, 2, 1])
    batches = micro_batches(lengths, 20)
    assert sorted(torch.cat(batches).tolist()) == list(range(8))
    for rows in batches:
        assert len(rows) * int(lengths[rows].max()) <= 20 or len(rows) == 1
    assert batches[0].tolist() == [3]


def test_forward_all_puts_every_row_back():
    def module(batch):
        return batch.tokens[:, : int(batch.answer_lengths.max())].float(), batch.lengths.float()

    whole, lengths = forward_all(module, SEQUENCES, 10_000)
    pieces, lengths_too = forward_all(module, SEQUENCES, 9)
    assert torch.equal(lengths, lengths_too) and torch.equal(lengths, SEQUENCES.lengths.float())
    assert torch.equal(whole[SEQUENCES.mask], pieces[SEQUENCES.mask])


def test_every_example_once_an_epoch():
    seen = [i for step in range(7) for i in batch_indices(10, 5, step, 0)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert batch_indices(10, 25, 1, 0)[:5] == seen[25:30]  # whatever the batch size
    assert batch_indices(10, 5, 3, 0) != batch_indices(10, 5, 3, 1)


def test_minibatches_are_a_partition():
    parts = list(minibatches(10, 3, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(parts).tolist()) == list(range(10)) and len(parts) == 3
    parts = list(minibatches(12, 2, torch.Generator().manual_seed(0), samples=3))
    assert sorted(torch.cat(parts).tolist()) == list(range(12)) and len(parts[0]) == 6
    assert all((rows.view(-1, 3) // 3 == rows.view(-1, 3)[:, :1] // 3).all() for rows in parts)


def test_learning_rate():
    p = torch.nn.Parameter(torch.ones(2, 2))
    o = Optimizer([(1.0, [p])], warmup=4, decay_until=10)
    assert [o.factor(0), o.factor(1)] == pytest.approx([0.25, 0.5], rel=0.1)
    assert o.factor(10) == pytest.approx(0.1) and o.factor(99) == pytest.approx(0.1)
    assert Optimizer([(1.0, [p])]).factor(0) == 1


def test_shared_prompts_change_neither_values_nor_gradients(base):
    config = tiny.config("unused")
    policy = loading.load_policy(str(base.model("sft")), config).double()
    prompts = [[5, 6, 11, 12, 3], [5, 7, 11, 3], [8, 5, 11, 12, 13, 3]]
    answers = [[11, 12, 1], [1], [13, 12, 11, 4, 1], [12, 1]]
    rows = [(p, a) for p in prompts for a in answers]
    found = []
    for shared in (False, True):
        batch = Sequences.of([p for p, _ in rows], [a for _, a in rows], 0, shared)
        batch = batch.rows(torch.tensor([7, 0, 2, 11, 4, 5, 8, 1, 3, 10, 9, 6]))  # in any order
        stats = policy(batch)
        policy.zero_grad()
        (stats.logprobs.square().sum() + stats.entropy.sum()).backward()
        found.append((stats.logprobs, [p.grad.clone() for p in policy.parameters()]))
    torch.testing.assert_close(*(logprobs for logprobs, _ in found))
    for one, other in zip(*(grads for _, grads in found)):
        assert (one - other).norm() <= 1e-6 * one.norm()
    pieces = batch.micro_batches(30)
    assert sorted(torch.cat(pieces).tolist()) == list(range(12)) and len(pieces) > 2
    for rows in pieces:
        assert len(rows) * int(batch.lengths[rows].max()) <= 30
    # answers of one token each, and a batch where sharing would not pay
    for some in (
        batch.rows(torch.tensor([0, 5])),
        Sequences.of(prompts[:1] * 2, [[1]] * 2, 0, True),
    ):
        plain = Sequences(some.tokens, some.prompt_lengths, some.lengths)
        torch.testing.assert_close(policy(some).logprobs, policy(plain).logprobs)


def test_prompts_are_shared_where_the_cache_can_be_split(base):
    config = tiny.config("unused")
    body = loading.load_policy(str(base.model("sft")), config).model.base_model
    assert states._keeps_plain_keys(body)
    body.config.layer_types = ["sliding_attention", "full_attention"]
    body.config.sliding_window = 4
    assert not states._keeps_plain_keys(body)

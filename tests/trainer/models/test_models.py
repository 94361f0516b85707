"""Log-probabilities, values, scores against the plainest code, and what is saved."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import gikernels
from tests.trainer import tiny
from trainer.batch.order import batch_indices, minibatches
from trainer.batch.sequences import Sequences, forward_all, micro_batches
from trainer.models import loading
from trainer.models.policy import Policy, log_probabilities
from trainer.ppo.groups import Groups
from trainer.runs.optim import Optimizer

SEQUENCES = Sequences.of(
    [[5, 6, 11, 12, 3], [5, 7, 11, 3], [8, 5, 11, 12, 13, 3]],
    [[11, 12, 1], [1], [13, 12, 11, 4, 1]],
)


def each(flat=None):
    """Of each sequence: its tokens (1, length), where its answer begins, and its part of `flat`."""
    starts, bounds = SEQUENCES.starts.tolist(), SEQUENCES.answer_starts.tolist()
    for i, start in enumerate(SEQUENCES.prompt_lengths.tolist()):
        row = SEQUENCES.tokens[starts[i] : starts[i + 1]].unsqueeze(0)
        yield row, start, None if flat is None else flat[bounds[i] : bounds[i + 1]]


def test_policy_logprobs_entropy_and_exact_kl(base):
    config = tiny.config("unused")
    policy = loading.load_policy(str(base.model("sft")), config)
    other = loading.load_policy("toy", config)
    _, ref_hidden = other(SEQUENCES, lambda hidden, *_: (None, hidden))
    stats = policy(
        SEQUENCES,
        lambda hidden, head, targets: gikernels.linear_logprobs(
            hidden, head.weight, targets, 0.7, ref=(ref_hidden, other.head.weight)
        ),
    )
    whole = torch.stack(list(stats), 1)
    for row, start, found in each(whole):
        n = row.shape[1] - start
        logp, ref = (m.model(row).logits[0, start - 1 : -1] for m in (policy, other))
        logp, ref = (logp.double() / 0.7).log_softmax(-1), (ref.double() / 0.7).log_softmax(-1)
        want = logp[torch.arange(n), row[0, start:]]
        close = {"atol": 1e-5, "rtol": 0, "check_dtype": False}
        torch.testing.assert_close(found[:, 0], want, **close)
        torch.testing.assert_close(found[:, 1], -(logp.exp() * logp).sum(-1), **close)
        torch.testing.assert_close(found[:, 2], (logp.exp() * (logp - ref)).sum(-1), **close)
    padded = SEQUENCES.padded(stats.logprobs)
    assert padded.shape == (3, 5) and (padded[1, 1:] == 0).all() and (padded[2] < 0).all()


@pytest.mark.parametrize("head", ["last", "pooled"])
def test_reward_head_is_saved_in_hugging_face_format(base, tmp_path, head):
    config = tiny.config("unused")
    tokenizer = loading.load_tokenizer("toy", config)
    reward = loading.load_reward_model(str(base.model("sft")), config, head, tokenizer)
    scores = reward(SEQUENCES)
    for i, (row, start, _) in enumerate(each()):
        hidden = reward.model.model(row).last_hidden_state[0]
        by_token = hidden @ reward.model.score.weight[0]
        want = by_token[-1] if head == "last" else by_token[start:].mean()
        torch.testing.assert_close(scores[i], want, atol=1e-5, rtol=1e-5)
    reward.save(tmp_path, tokenizer, torch.float32)
    again = loading.load_reward_model(str(tmp_path), config)  # knows its head by itself
    assert again.head == head
    torch.testing.assert_close(again(SEQUENCES), scores, rtol=0, atol=0)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    if head == "last":
        for i, (row, _, _) in enumerate(each()):
            torch.testing.assert_close(theirs(row).logits[0, 0], scores[i])


@pytest.mark.parametrize("on", ["prompt", "response"])
def test_critic_reads_states_before_tokens_and_the_group_where_it_is_told(base, on):
    config = tiny.config("unused", f"groups.on={on}", "groups.focus=0")
    policy = loading.load_policy(str(base.model("sft")), config)
    reward, _ = loading.load_scoring_model(config, base)
    critic = loading.make_critic(config, base, policy, Groups(config, []).num)
    torch.nn.init.normal_(critic.value_head.weight)
    values, groups = critic(SEQUENCES)
    for i, (row, start, found) in enumerate(each(values)):
        hidden = critic.body(row).last_hidden_state[0]
        want = critic.value_head(hidden[start - 1 : -1])[:, 0]
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
        place = start - 1 if on == "prompt" else -1
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
    lengths = [3, 9, 4, 30, 8, 8, 2, 1]
    batches = [rows.tolist() for rows in micro_batches(lengths, 20)]
    assert sorted(i for rows in batches for i in rows) == list(range(8))
    for rows in batches:
        assert sum(lengths[i] for i in rows) <= 20 or len(rows) == 1
    assert batches[0] == [3]


def test_forward_all_puts_every_row_back():
    def module(batch):
        return batch.answer_tokens.float(), batch.lengths.float()

    whole, lengths = forward_all(module, SEQUENCES, 10_000, (True, False))
    pieces, lengths_too = forward_all(module, SEQUENCES, 9, (True, False))
    assert torch.equal(lengths, lengths_too) and torch.equal(lengths, SEQUENCES.lengths.float())
    tokens = [token for answer in SEQUENCES.answers() for token in answer]
    assert torch.equal(whole, pieces) and whole.tolist() == tokens


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
    policy = loading.load_policy(str(base.model("sft")), config, trained=True).double()
    prompts = [[5, 6, 11, 12, 3], [5, 7, 11, 3], [8, 5, 11, 12, 13, 3]]
    answers = [[11, 12, 1], [1], [13, 12, 11, 4, 1], [12, 1]]
    rows = [(p, a) for p in prompts for a in answers]
    found = []
    for shared in (False, True):
        batch = Sequences.of([p for p, _ in rows], [a for _, a in rows], shared)
        batch = batch.rows(torch.tensor([7, 0, 2, 11, 4, 5, 8, 1, 3, 10, 9, 6]))  # in any order
        stats = policy(batch, log_probabilities())
        policy.zero_grad()
        (stats.logprobs.square().sum() + stats.entropy.sum()).backward()
        found.append((stats.logprobs, [p.grad.clone() for p in policy.parameters()]))
    torch.testing.assert_close(*(logprobs for logprobs, _ in found))
    for one, other in zip(*(grads for _, grads in found)):
        assert (one - other).norm() <= 1e-6 * one.norm()
    pieces = [rows.tolist() for rows, _ in batch.pieces(20)]
    assert sorted(i for rows in pieces for i in rows) == list(range(12)) and len(pieces) == 3
    for rows in pieces:  # a prompt's answers together
        assert len({int(batch.prompt_of[i]) for i in rows}) == 1
    # answers of one token each, and a batch where sharing would not pay
    for some in (
        batch.rows(torch.tensor([0, 5])),
        Sequences.of(prompts[:1] * 2, [[1]] * 2, True),
    ):
        plain = Sequences(some.tokens, some.prompt_lengths, some.lengths)
        found = [policy(each, log_probabilities()).logprobs for each in (some, plain)]
        torch.testing.assert_close(*found)


@torch.no_grad()
def test_a_head_in_half_precision_is_widened_piece_by_piece(base, monkeypatch):
    monkeypatch.setattr("trainer.models.policy.PIECE", 7)
    model = AutoModelForCausalLM.from_pretrained(base.model("sft"), dtype=torch.bfloat16)
    weight = model.get_output_embeddings().weight
    assert len(weight) % 7 and len(weight) > 14
    hidden = torch.randn(2, 3, weight.shape[1], dtype=torch.bfloat16)
    found = Policy(model).logits(hidden)
    torch.testing.assert_close(found, hidden.float() @ weight.float().t())

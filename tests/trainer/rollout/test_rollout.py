"""Sampling: the policy's own distribution, its log-probabilities, EOS, batching."""

import dataclasses

import pytest
import torch

from trainer import parallel
from trainer.batch.sequences import forward_all
from trainer.models import loading
from trainer.models.policy import log_probabilities
from trainer.ppo.forward import answer_logprobs
from trainer.rollout.engine import LogprobMismatch, check_logprobs, importance_weights
from trainer.rollout.hf import draw
from trainer.rollout.make import make_engine


@pytest.fixture
def setup(fresh):
    def make(*overrides):
        config, run = fresh(*overrides)
        source = str(run.model("sft"))
        tokenizer = loading.load_tokenizer(source, config)
        policy = loading.load_policy(source, config)
        engine = make_engine(config, tokenizer)
        engine.sync(policy)
        return config, tokenizer, policy, engine

    return make


PROMPTS = [[5, 6, 11, 12, 13, 3], [7, 5, 14, 11, 3], [5, 8, 11, 12, 13, 14, 15, 3], [5, 6, 12, 3]]


def generate(engine, samples=3, seed=0):
    return engine.generate(PROMPTS, samples, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_policy(setup, temperature):
    _, _, policy, engine = setup(f"rollout.temperature={temperature}")
    rollout = generate(engine)
    ask = log_probabilities(temperature)
    (ours,) = forward_all(lambda b: (policy(b, ask).logprobs,), rollout.sequences, 50, (True,))
    assert check_logprobs(rollout, ours, 1e-4)["rollout/logprob_diff_max"] < 1e-4
    # and by the plainest code there is
    s = rollout.sequences
    for i in (0, 4, 11):
        start, end = int(s.prompt_lengths[i]), int(s.lengths[i])
        row = s.tokens[s.starts[i] : s.starts[i + 1]]
        z = policy.model(row.unsqueeze(0)).logits[0].float() / temperature
        want = z.log_softmax(-1)[torch.arange(start - 1, end - 1), row[start:]]
        found = rollout.logprobs[s.flat(torch.tensor([i]))]
        torch.testing.assert_close(found, want, atol=1e-4, rtol=0)


def test_batching_is_no_part_of_the_result(setup):
    one = generate(setup("rollout.batch=512")[3])
    many = generate(setup("rollout.batch=3")[3])
    assert torch.equal(one.sequences.tokens, many.sequences.tokens)
    torch.testing.assert_close(one.logprobs, many.logprobs, atol=1e-5, rtol=0)


def test_prompts_keep_their_rows_and_seeds_their_answers(setup):
    engine = setup()[3]
    rollout = generate(engine)
    s = rollout.sequences
    for i, prompt in enumerate(PROMPTS):
        for k in range(3):
            assert s.prompts()[3 * i + k] == prompt
    assert torch.equal(s.tokens, generate(engine).sequences.tokens)
    other = generate(engine, seed=1).sequences
    assert s.answers() != other.answers()


def test_answers_end_at_eos_or_are_truncated(setup):
    _, tokenizer, _, engine = setup("rollout.max_new_tokens=4")
    rollout = generate(engine, samples=40)
    for answer, truncated in zip(rollout.sequences.answers(), rollout.truncated.tolist()):
        assert 1 <= len(answer) <= 4
        assert (tokenizer.eos_token_id in answer) == (not truncated)
        assert tokenizer.eos_token_id not in answer[:-1]
        if truncated:
            assert len(answer) == 4
    assert 0 < rollout.truncated.sum() < len(rollout.truncated)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # bfloat16: gathered from shards
def test_weights_that_are_here_are_not_gathered_again(setup, dtype):
    config, _, policy, engine = setup(f"model.dtype={dtype}")
    engine.sync(policy, 1)
    number = engine.synced.number
    engine.sync(policy, 1)
    assert engine.synced.number == number
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.2)
    engine.sync(policy, 2)
    assert engine.synced.number == number + 1
    rollout, ask = generate(engine), log_probabilities(config.rollout.temperature)
    (ours,) = forward_all(lambda b: (policy(b, ask).logprobs,), rollout.sequences, 50, (True,))
    assert check_logprobs(rollout, ours, 1e-3 if dtype == "float32" else 0.3)


def test_draw_is_the_distribution():
    torch.manual_seed(0)
    z = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -3.0])
    uniform = 1 - torch.rand(200_000)
    token, logprob = draw(z.expand(len(uniform), 5), uniform)
    share = torch.bincount(token, minlength=5) / len(token)
    torch.testing.assert_close(share, z.softmax(0), atol=4e-3, rtol=0)
    assert share[1] == 0  # what has no probability is never drawn, at u = 1 and near 0 either
    rare = torch.tensor([0.0, -20.0, -30.0]).expand(3, 3)  # 2e-9 and 1e-13 at the end of the sum
    assert draw(rare, torch.tensor([1 - 1e-9, 1 - 1e-10, 1.0], dtype=torch.double))[0].tolist() == [
        *(1, 1, 2)
    ]
    edge, _ = draw(z.flip(0).expand(2, 5), torch.tensor([1.0, 1e-12]))
    assert edge.tolist() == [4, 0]
    torch.testing.assert_close(logprob, z.log_softmax(0)[token])


def test_check_logprobs_says_where_and_counts_nan(setup):
    rollout = generate(setup()[3])
    sequences, wrong = rollout.sequences, rollout.logprobs.clone()
    nothing = {"rollout/logprob_diff_max": 0, "rollout/logprob_diff_mean": 0}
    assert check_logprobs(rollout, wrong, 1e-6) == nothing
    place = int(sequences.answer_starts[2]) + 1
    wrong[place] += 0.5
    with pytest.raises(LogprobMismatch, match=r"answer 2, token 1"):
        check_logprobs(rollout, wrong, 0.01)
    wrong[place] = torch.nan
    with pytest.raises(LogprobMismatch):
        check_logprobs(rollout, wrong, 0.01)


def test_one_token_of_a_thousand_may_differ_but_not_one_of_fifty(setup):
    """Two kernels of bfloat16 disagree by half a nat once in a while; another policy does often."""
    rollout = generate(setup()[3], samples=120)
    count = len(rollout.logprobs)
    assert count > 1000
    wrong = rollout.logprobs.clone()
    wrong[7] += 2.0
    told = check_logprobs(rollout, wrong, 1.0)
    assert told["rollout/logprob_diff_max"] == pytest.approx(2.0)
    assert told["rollout/logprob_diff_mean"] == pytest.approx(2.0 / count)
    wrong = rollout.logprobs.clone()
    wrong[::50] += 1.1
    with pytest.raises(LogprobMismatch, match=r"2\.\d% of tokens by more than the bound"):
        check_logprobs(rollout, wrong, 1.0)
    with pytest.raises(LogprobMismatch, match=r"differ by 0\.06 on average, 0\.0% of tokens"):
        check_logprobs(rollout, rollout.logprobs + 0.06, 1.0)  # everywhere a little


def test_check_logprobs_names_the_sync(setup):
    _, _, policy, engine = setup()
    engine.sync(policy, 6)
    engine.sync(policy, 7)
    rollout = generate(engine)
    with pytest.raises(LogprobMismatch, match=r"look at sync 3 \(an update, weights of step 7\)"):
        check_logprobs(rollout, rollout.logprobs + 1, 0.1, engine.synced)


def test_stop_texts_end_an_answer(setup):
    """The tokens that spell one were sampled, and stay; nothing after them is."""
    _, tokenizer, policy, engine = setup("rollout.stop=['a b', '!']")
    rollout = generate(engine, samples=60)
    plain = generate(setup()[3], samples=60)  # the same random numbers
    stopped = 0
    for answer, truncated, whole in zip(
        rollout.sequences.answers(), rollout.truncated.tolist(), plain.sequences.answers()
    ):
        texts = [tokenizer.decode(whole[: n + 1]) for n in range(len(whole))]
        ends = [n for n, text in enumerate(texts) if "a b" in text or "!" in text]
        assert answer == (whole[: ends[0] + 1] if ends else whole)
        assert truncated == (not ends and tokenizer.eos_token_id not in whole)
        stopped += bool(ends)
    assert 0 < stopped < 240
    ask = log_probabilities()
    (ours,) = forward_all(lambda b: (policy(b, ask).logprobs,), rollout.sequences, 10_000, (True,))
    assert check_logprobs(rollout, ours, 1e-4)["rollout/logprob_diff_max"] < 1e-4


TRUNCATED = ("rollout.top_p=0.8", "rollout.top_k=24", "rollout.temperature=0.9")


def test_truncated_sampling_tells_what_it_could_have_sampled(setup):
    config, _, policy, engine = setup(*TRUNCATED)
    with torch.no_grad():
        policy.head.weight.mul_(4)  # as sure of itself as a trained one
    rollout = generate(engine, samples=20)
    assert check_logprobs(rollout, answer_logprobs(config, policy, rollout), 1e-4)
    sequences, support = rollout.sequences, rollout.support
    assert len(support.offsets) == sequences.count + 1
    kept = [set(ids.tolist()) for ids in support.ids.split(support.offsets.diff().tolist())]
    assert all(int(token) in ids for token, ids in zip(sequences.answer_tokens, kept))
    # by the plainest code there is
    sizes = set()
    for i in range(0, len(sequences), 7):
        start, end = int(sequences.prompt_lengths[i]), int(sequences.lengths[i])
        row = sequences.tokens[sequences.starts[i] : sequences.starts[i + 1]]
        z = policy.model(row.unsqueeze(0)).logits[0].float() / 0.9
        p = z[start - 1 : end - 1].softmax(-1)
        for at, each in zip(sequences.places(torch.tensor([i])).tolist(), p):
            by_size, total, want = each.sort(descending=True), 0.0, set()
            largest = by_size.values[:24] / by_size.values[:24].sum()
            for share, token in zip(largest.tolist(), by_size.indices.tolist()):
                if total >= 0.8:
                    break
                total += share
                want.add(token)
            assert kept[at] == want
            sizes.add(len(want))
    assert len(sizes) > 1 and max(sizes) < 24
    # without them half of all ratios are off
    untold = dataclasses.replace(rollout, support=None)
    assert (answer_logprobs(config, policy, untold) - rollout.logprobs).abs().max() > 0.1


def test_what_could_be_sampled_follows_the_answers(setup):
    """Batches of any size, some of the answers, rollouts joined: each token keeps its own."""
    one, many = (generate(setup(*TRUNCATED, f"rollout.batch={n}")[3]) for n in (512, 3))
    assert all(torch.equal(a, b) for a, b in zip(one.support, many.support))
    some = one.rows(torch.tensor([7, 2]))
    both = one.joined([one.rows(torch.tensor([7])), one.rows(torch.tensor([2]))])
    assert all(torch.equal(a, b) for a, b in zip(some.support, both.support))
    ids = one.support.ids.split(one.support.offsets.diff().tolist())
    want = [ids[place] for row in (7, 2) for place in one.sequences.places(torch.tensor([row]))]
    assert torch.equal(some.support.ids, torch.cat(want))


@pytest.mark.parametrize("beyond", ["cap", "mask"])
@pytest.mark.parametrize("kind", ["none", "token", "sequence"])
def test_importance_weights(setup, kind, beyond):
    rollout = generate(setup()[3])
    torch.manual_seed(0)
    ours = rollout.logprobs + 0.5 * torch.randn(rollout.logprobs.shape)
    weights, metrics = importance_weights(rollout, ours, kind, 1.5, beyond)
    if kind == "none":
        assert weights is None and metrics == {}
        return
    want, capped, each = [], [], []
    for ratios in (ours - rollout.logprobs).exp().split(rollout.sequences.answer_lengths.tolist()):
        if kind == "sequence":
            ratios = ratios.prod().expand(len(ratios))
        over = torch.tensor(1.5 if beyond == "cap" else 0.0)
        want.append(torch.where(ratios > 1.5, over, ratios))
        first = slice(1 if kind == "sequence" else None)
        each += want[-1][first].tolist()
        capped += (ratios[first] > 1.5).tolist()
    torch.testing.assert_close(weights, torch.cat(want))
    assert metrics["importance/mean"] == pytest.approx(sum(each) / len(each))
    assert metrics["importance/capped"] == pytest.approx(sum(capped) / len(capped))
    squares = sum(x * x for x in each)
    assert metrics["importance/effective"] == pytest.approx(sum(each) ** 2 / len(each) / squares)
    assert 0 < metrics["importance/capped"] < 1 and 0 < metrics["importance/effective"] < 1


def test_generators_depend_on_names_alone():
    a = torch.rand(3, generator=parallel.generator(1, "rollout", 5))
    assert torch.equal(a, torch.rand(3, generator=parallel.generator(1, "rollout", 5)))
    assert not torch.equal(a, torch.rand(3, generator=parallel.generator(1, "rollout", 6)))

"""The real vLLM on a CPU: it samples from the policy, after every kind of sync, and says so."""

import itertools
import random

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from trainer.batch.sequences import forward_all
from trainer.models import loading
from trainer.models.policy import Policy, log_probabilities
from trainer.ppo.forward import answer_logprobs
from trainer.rollout.engine import LogprobMismatch, check_logprobs
from trainer.rollout.make import make_engine
from trainer.rollout.vllm import Request

# Long enough to fill blocks of the prefix cache, which have 128 tokens on a CPU.
LONG = [5, 6, *(11 + i * i % 7 for i in range(300)), 3]
PROMPTS = [[5, 6, 11, 12, 13, 3], [7, 5, 14, 11, 3], LONG, [5, 6, 12, 3]]
ROOM = "data.max_prompt_tokens=400"


@pytest.fixture
def setup(fresh):
    def make(*overrides):
        config, run = fresh(ROOM, *overrides)
        source = str(run.model("sft"))
        shape = run.model("sft") / "config.json"  # LONG is more than the toy world needs
        shape.write_text(shape.read_text().replace('_embeddings": 128', '_embeddings": 512'))
        tokenizer = loading.load_tokenizer(source, config)
        policy = loading.load_policy(source, config)
        engine = make_engine(config, tokenizer)
        engine.sync(policy, 0)
        return config, policy, engine

    return make


def generate(engine, samples=3, seed=0):
    return engine.generate(PROMPTS, samples, torch.Generator().manual_seed(seed))


def difference(config, policy, engine, rollout, bound=1e-4):
    """Raises past the bound, which is that of float32."""
    ask = log_probabilities(config.rollout.temperature)
    (logprobs,) = forward_all(
        lambda part: (policy(part, ask).logprobs,), rollout.sequences, 10_000, (True,)
    )
    return check_logprobs(rollout, logprobs, bound, engine.synced)["rollout/logprob_diff_max"]


@pytest.mark.parametrize("cut", ["rollout.top_p=0.9", "rollout.top_p=1"])
def test_truncated_sampling_tells_what_it_could_have_sampled(setup, cut):
    """Log-probabilities over the kept ids are vLLM's, to the bound that holds at top-p 1."""
    config, policy, engine = setup(cut, "rollout.top_k=12")
    rollout = generate(engine, samples=20)
    support = rollout.support
    assert len(support.offsets) == rollout.sequences.count + 1
    sizes = support.offsets.diff()
    assert sizes.min() >= 1 and sizes.max() <= 12
    assert (sizes.min() < 12) == (cut == "rollout.top_p=0.9")
    ours = answer_logprobs(config, policy, rollout)
    assert check_logprobs(rollout, ours, 1e-4, engine.synced)["rollout/logprob_diff_max"] < 1e-4
    with pytest.raises(LogprobMismatch):
        difference(config, policy, engine, rollout)  # over the whole vocabulary


def update(policy, seed):
    """As an optimiser's step, but one that is felt."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn_like(p))


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_logprobs_are_those_of_the_policy(setup, temperature):
    config, policy, engine = setup(f"rollout.temperature={temperature}")
    assert difference(config, policy, engine, generate(engine)) < 1e-4


def test_three_updates_each_arrive(setup):
    config, policy, engine = setup()
    answers = [generate(engine).sequences.answers()]
    for step in (1, 2, 3):
        update(policy, step)
        rollout = generate(engine)  # with the weights of before
        with pytest.raises(LogprobMismatch, match=rf"sync {step} \("):
            difference(config, policy, engine, rollout)
        engine.sync(policy, step)
        rollout = generate(engine)
        assert difference(config, policy, engine, rollout) < 1e-4
        answers.append(rollout.sequences.answers())
    assert all(a != b for a, b in itertools.pairwise(answers))
    assert str(engine.synced) == "sync 4 (an update, weights of step 3)"


def test_prefixes_of_older_weights_are_found_out_and_forgotten(setup, monkeypatch):
    config, policy, engine = setup()
    generate(engine)
    update(policy, 1)
    with monkeypatch.context() as patch:
        patch.setattr(engine.vllm, "forget", lambda: None)
        engine.sync(policy, 1)
    with pytest.raises(LogprobMismatch, match=r"sync 2 \(an update, weights of step 1\)"):
        difference(config, policy, engine, generate(engine))
    engine.sync(policy, 2)  # a sync of step 1 has been
    assert difference(config, policy, engine, generate(engine)) < 1e-4


def test_weights_that_do_not_come_are_found_out(setup, monkeypatch):
    """vLLM keeps the old values of what it misses, with a warning nobody reads."""
    config, policy, engine = setup()
    load = engine.vllm.load
    update(policy, 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            engine.vllm, "load", lambda weights: load(w for w in weights if "mlp" not in w[0])
        )
        engine.sync(policy, 1)
    with pytest.raises(LogprobMismatch, match=r"sync 2 \(an update"):
        difference(config, policy, engine, generate(engine))


def test_seeds_decide_and_the_batch_does_not(setup):
    _, _, engine = setup()
    rollout = generate(engine)
    answers = rollout.sequences.answers()
    assert answers == generate(engine).sequences.answers()
    assert answers != generate(engine, seed=1).sequences.answers()
    assert len({tuple(answer) for answer in answers}) > 6
    # sample 3 of the second prompt, alone
    seeds = torch.randint(2**62, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    request = Request(PROMPTS[1], 12, seeds[5])
    (alone,) = engine.vllm.generate([request], sorted(engine.eos), lambda: None)
    assert alone.tokens == answers[5]


def test_without_seeds_answers_are_samples_and_repeat(setup):
    """By the process's random numbers, which stay what they were."""
    config, policy, engine = setup("rollout.seeded=false")
    before = torch.get_rng_state()
    answers = generate(engine).sequences.answers()
    assert torch.equal(torch.get_rng_state(), before)
    rollout = generate(engine)
    assert answers == rollout.sequences.answers() != generate(engine, seed=1).sequences.answers()
    assert len({tuple(answer) for answer in answers}) > 6
    assert difference(config, policy, engine, rollout) < 1e-4


def test_weights_that_are_here_do_not_come_again(setup, monkeypatch):
    config, policy, engine = setup()
    loads = []
    load = engine.vllm.load
    monkeypatch.setattr(engine.vllm, "load", lambda w: loads.append(load(w)))
    engine.sync(policy, 0)  # as of the setup
    generate(engine)
    assert not loads
    other = make_engine(config, engine.tokenizer)
    other.sync(loading.load_policy(str(config.run.output) + "/models/sft", config))
    assert other.vllm is engine.vllm and len(loads) == 1
    engine.sync(policy, 0)
    assert len(loads) == 2
    assert difference(config, policy, engine, generate(engine)) < 1e-4


def test_sleep_is_not_pretended_where_there_is_none(setup):
    _, _, engine = setup()
    assert not engine.vllm.can_sleep
    engine.rest()
    assert not engine.vllm.asleep
    generate(engine)


def test_starting_it_leaves_the_process_randomness_alone(setup):
    """A resumed run starts an engine where an unbroken one does not."""

    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    config, policy, engine = setup()
    other = make_engine(config.override(["rollout.max_num_seqs=3"]), engine.tokenizer)
    seed()
    want = draw()
    seed()
    other.sync(policy)
    assert draw() == want
    assert other.vllm is not engine.vllm


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Gemma2"])
def test_families_of_models(setup, family):
    """Tied embeddings, biases, norms inside the attention, capped logits."""
    config, policy, engine = setup()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    shape = {name: getattr(policy.model.config, name) for name in names}
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**shape, tie_word_embeddings=True)
    policy = Policy(AutoModelForCausalLM.from_config(made)).eval()
    update(policy, 0)
    engine = make_engine(config, engine.tokenizer)
    engine.sync(policy)
    assert difference(config, policy, engine, generate(engine)) < 1e-4


def test_answers_are_samples_of_the_policy(setup):
    """Not only are the log-probabilities right: the shares of first tokens are."""
    _, policy, engine = setup("rollout.max_new_tokens=1", "rollout.max_num_seqs=512")
    count = 4000
    rollout = engine.generate(PROMPTS[:1], count, torch.Generator().manual_seed(1))
    first = torch.tensor([answer[0] for answer in rollout.sequences.answers()])
    with torch.no_grad():
        want = policy.model(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1)
    share = torch.bincount(first, minlength=len(want)) / count
    deviations = (share - want) / (want * (1 - want) / count).sqrt()
    assert deviations.abs().max() < 4.5
    assert want.max() < 0.9  # or there was nothing to see


def test_answers_end_at_eos_or_at_their_limit(setup):
    _, policy, engine = setup("rollout.max_new_tokens=4")
    rollout = generate(engine, samples=40)
    eos = policy.model.config.eos_token_id
    for answer, truncated in zip(rollout.sequences.answers(), rollout.truncated.tolist()):
        assert 1 <= len(answer) <= 4 and eos not in answer[:-1]
        assert (answer[-1] == eos) == (not truncated)
        assert len(answer) == 4 or not truncated
    assert 0 < rollout.truncated.sum() < len(rollout.truncated)


def test_stop_texts_end_an_answer_as_they_do_with_the_other_engine(setup):
    """The tokens that spell it are sampled tokens, and stay; it is not truncated."""
    for name in ("vllm", "hf"):
        config, policy, engine = setup(f"rollout.engine={name}", "rollout.stop=['a b', '!']")
        tokenizer = loading.load_tokenizer(str(config.run.output) + "/models/sft", config)
        rollout = engine.generate(PROMPTS, 100, torch.Generator().manual_seed(0))
        stopped = 0
        for answer, truncated in zip(rollout.sequences.answers(), rollout.truncated.tolist()):
            text, before = (
                tokenizer.decode(ids, skip_special_tokens=True) for ids in (answer, answer[:-1])
            )
            ends = any(stop in text for stop in config.rollout.stop)
            assert not any(stop in before for stop in config.rollout.stop), name
            assert truncated == (not ends and answer[-1] not in engine.eos)
            stopped += ends
        assert 10 < stopped < 390, name
        assert difference(config, policy, engine, rollout) < 1e-4


def test_bfloat16(setup):
    config, policy, engine = setup("model.dtype=bfloat16")
    assert 0 < difference(config, policy, engine, generate(engine), 0.1) < 0.1

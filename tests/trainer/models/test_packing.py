"""Packed and padded sequences: the same log-probabilities, gradients and samples."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import gikernels
from trainer.batch import sequences as sequences_module
from trainer.batch.sequences import Sequences
from trainer.models import packing
from trainer.models.critic import Critic
from trainer.models.policy import Policy, log_probabilities
from trainer.models.reward import RewardModel

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "sliding window": MistralConfig(**SIZES, sliding_window=7),
}


def ragged(count=9):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (count, 2), generator=draw).tolist()
    rows = [[torch.randint(1, 40, (n,), generator=draw).tolist() for n in two] for two in lengths]
    return Sequences.of([p for p, _ in rows], [a for _, a in rows])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients(name, checkpointing):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="sdpa")
    policy, sequences, found = Policy(model.double().train()), ragged(), []
    if checkpointing:
        model.gradient_checkpointing_enable()
    for packed in (False, True):
        if packed:
            packing.use_packed(model)
        stats = policy(sequences, log_probabilities())
        policy.zero_grad()
        (stats.logprobs.square().sum() + stats.entropy.sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        found.append((stats.logprobs, gradient))
    (logprobs, gradient), (logprobs2, gradient2) = found
    torch.testing.assert_close(logprobs2, logprobs, atol=1e-5, rtol=0)
    assert (gradient2 - gradient).norm() < 1e-6 * gradient.norm()


def test_float32_log_probabilities_and_no_leak_between_neighbours():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["llama"], attn_implementation="sdpa")
    policy, sequences = Policy(model), ragged()
    want = policy(sequences, log_probabilities()).logprobs
    packing.use_packed(model)
    torch.testing.assert_close(
        policy(sequences, log_probabilities()).logprobs, want, atol=1e-5, rtol=0
    )
    one = sequences.rows(torch.tensor([4]))
    alone = policy(one, log_probabilities()).logprobs
    together = policy(sequences, log_probabilities()).logprobs
    torch.testing.assert_close(together[sequences.flat(torch.tensor([4]))], alone)


def test_sampling_with_a_cache_is_as_before(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["llama"], attn_implementation="sdpa").eval()
    inputs = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7], [4, 3, 2, 1, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    want = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    packing.use_packed(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), want)
    model.save_pretrained(tmp_path)  # the name is no part of a saved model
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation != packing.PACKED


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_kernels_of_a_gpu(name):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "head_dim": 64}
    config = type(MODELS[name])(**{**SIZES, **sizes, "sliding_window": 7})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    policy, sequences = Policy(model.cuda().bfloat16()), ragged(64)
    want = policy(sequences, log_probabilities()).logprobs
    packing.use_packed(model)
    torch.testing.assert_close(
        policy(sequences, log_probabilities()).logprobs, want, atol=5e-2, rtol=0
    )


@pytest.mark.parametrize("shared", [True, False])
def test_models_ask_a_device_nothing(monkeypatch, shared):
    """On the meta device any question about a value is an error: forward and backward of policy,
    critic and reward model need none. The in-op loss stands as one call here; what it asks of a
    GPU is its own affair."""
    monkeypatch.setattr(sequences_module.parallel, "device", lambda: torch.device("meta"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS["llama"], attn_implementation="sdpa")
        critic = Critic(AutoModel.from_config(MODELS["llama"]), 32, 4, "response")
        classify = AutoModelForSequenceClassification.from_config(
            LlamaConfig(**SIZES, num_labels=1)
        )
    policy, reward = Policy(model.train()), RewardModel(classify, "pooled")
    for body in (model, critic.body, classify):
        packing.use_packed(body)
    prompts = [[5, 6, 7]] * 4 + [[8, 9]] * 4
    sequences = Sequences.of(prompts, [[11] * n for n in (1, 4, 2, 7, 3, 3, 1, 5)], shared)

    def ask(hidden, head, targets):
        like = torch.zeros(len(hidden), device="meta")
        return gikernels.linear_policy_loss(
            hidden, head.weight, targets, like, like, mask=like.bool(), denom=26
        )

    for rows, _ in sequences.pieces(20):
        part, where = sequences.rows(rows), sequences.flat(rows)
        assert where.device.type == "meta"
        policy(part, ask).loss.backward()
        values, groups = critic(part)
        (values.sum() + groups.sum() + reward(part).sum()).backward()
    every = [*policy.parameters(), *critic.parameters(), *reward.parameters()]
    assert all(p.grad is not None for p in every)


def test_compiled_blocks_need_no_graph_for_each_number_of_sequences():
    """As model.compile does it: each block by itself, lengths of all kinds, at most two graphs."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = AutoModelForCausalLM.from_config(MODELS["llama"], attn_implementation="sdpa")
    packing.use_packed(model)
    policy, graphs = Policy(model), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    want = policy(ragged(9), log_probabilities()).logprobs
    for block in model.model.layers:
        block.compile(backend=count)
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=3):
        for size in (9, 5, 17, 9, 3, 12, 7, 30, 2, 21):
            policy(ragged(size), log_probabilities())
        found = policy(ragged(9), log_probabilities()).logprobs
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    assert len(graphs) <= 2 * len(model.model.layers), len(graphs)

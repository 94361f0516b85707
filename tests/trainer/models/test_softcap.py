"""Gemma 2 caps attention's own logits: no packed kernel does that, nor does sdpa."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForSequenceClassification

from tests.trainer import tiny
from tests.trainer.models.test_packing import SIZES, ragged
from trainer.batch.sequences import forward_all
from trainer.config import ConfigError, load
from trainer.models import loading
from trainer.models.policy import log_probabilities
from trainer.rollout.engine import check_logprobs
from trainer.rollout.make import make_engine

CAPS = {"attn_logit_softcapping": 0.3, "final_logit_softcapping": 2.0}


@pytest.fixture
def gemma(tmp_path):
    """A folder with one whose caps are felt."""
    torch.manual_seed(0)
    shape = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 1, "initializer_range": 0.5}
    settings = Gemma2Config(**shape, **CAPS, sliding_window=7, eos_token_id=1, pad_token_id=0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "gemma")
    return tmp_path / "gemma"


def config(gemma, *overrides):
    return tiny.config(gemma.parent, f"model.policy={gemma}", *overrides)


def by_hand(model, sequences):
    """transformers' own forward, one sequence at a time."""
    for row, prompt in zip(sequences.tokens.split(sequences.lengths.tolist()), sequences.prompts()):
        logprobs = model(row.unsqueeze(0)).logits[0].log_softmax(-1)
        places = torch.arange(len(prompt) - 1, len(row) - 1)
        yield logprobs[places, row[places + 1]]


def test_it_is_padded_with_eager_attention_and_right(gemma):
    sequences, made = ragged(), config(gemma)
    policy = loading.load_policy(str(gemma), made)
    model = AutoModelForCausalLM.from_pretrained(gemma, attn_implementation="eager").eval()
    with torch.no_grad():
        found = policy(sequences, log_probabilities()).logprobs
        want = torch.cat(list(by_hand(model, sequences)))
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert (torch.cat(list(by_hand(model, sequences))) - want).abs().max() > 0.1


def test_answers_are_sampled_with_it(gemma):
    made = config(gemma)
    policy = loading.load_policy(str(gemma), made)
    engine = make_engine(made, loading.load_tokenizer("toy", made))
    engine.sync(policy)
    prompts = [[5, 6, 11, 12, 13, 14, 15, 16, 17, 3], [7, 5, 3]]
    rollout = engine.generate(prompts, 4, torch.Generator().manual_seed(0))
    ask = log_probabilities(made.rollout.temperature)
    (ours,) = forward_all(lambda b: (policy(b, ask).logprobs,), rollout.sequences, 50, (True,))
    assert check_logprobs(rollout, ours, 1e-4)["rollout/logprob_diff_max"] < 1e-4


def test_the_line_at_the_start_is_true(gemma):
    why = "(Gemma2ForCausalLM caps attention's logits, which no packed kernel does)"
    padded = f"padded sequences, attention eager {why}"
    assert loading.describe_attention(config(gemma)) == padded
    off = config(gemma, "model.packing=off")
    assert loading.describe_attention(off) == "padded sequences, attention eager"
    reward = gemma.parent / "reward"
    Gemma2ForSequenceClassification(Gemma2Config.from_pretrained(gemma)).save_pretrained(reward)
    both = tiny.config(gemma.parent, f"model.reward={reward}")
    assert loading.describe_attention(both) == (
        f"toy: packed sequences, attention sdpa; {reward}: "
        + padded.replace("CausalLM", "SequenceClassification")
    )
    assert loading.describe_attention(tiny.config(gemma.parent, "model.packing=off")) == (
        "padded sequences, attention sdpa"
    )


def test_packing_that_is_asked_for_is_refused(gemma):
    message = r"^model.packing: on: Gemma2ForCausalLM caps attention's logits.* want auto or off"
    with pytest.raises(ConfigError, match=message):
        loading.load_policy(str(gemma), config(gemma, "model.packing=on"))


@pytest.mark.parametrize("world", ["toy", "reasoning"])
def test_the_attention_of_a_worlds_own_model_is_told(world):
    """Before anything is built: nothing of reasoning-gym is asked for."""
    assert loading.describe_attention(load(world)).startswith("packed sequences")

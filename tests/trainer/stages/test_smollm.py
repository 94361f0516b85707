"""A real small chat model: two steps of each stage of `reasoning_smollm`, on whatever there is.

make smollm puts the model there; SMOLLM names another folder.
"""

import math
import os
from pathlib import Path

import pytest

from trainer.config import ConfigError, load
from trainer.models import gguf
from trainer.models.loading import load_tokenizer
from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines
from trainer.stages import registry

MODEL = Path(os.environ.get("SMOLLM", "models/smollm2-135m-instruct"))


def test_what_is_no_gguf_is_one_line():
    with pytest.raises(ConfigError, match=r"no.gguf: no such file"):
        gguf.found("no.gguf")
    with pytest.raises(ConfigError, match=r"no_such_package: want a .gguf file, or a package wi"):
        gguf.found("no_such_package")


@pytest.mark.smollm
def test_two_steps_of_each_stage(tmp_path):
    pytest.importorskip("reasoning_gym")
    assert MODEL.is_dir(), f"{MODEL} is not there: make smollm"
    config = load(
        "reasoning_smollm",
        [
            *(f"model.policy={MODEL}", "model.dtype=float32", "rollout.logprob_bound=1e-2"),
            *("reasoning.demonstrations=200", "reasoning.prompts=64", "sft.steps=2", "sft.batch=4"),
            *("ppo.steps=2", "ppo.prompts_per_step=4", "ppo.minibatches=1", "ppo.ppo_epochs=1"),
            *("ppo.critic_warmup_steps=0", "groups.num_groups=2", "groups.min_size=1"),
            *("groups.pool=2", "rollout.max_new_tokens=8", "data.eval_prompts=''"),
            *("data.ood_prompts=''", "trainer.progress=false", "trainer.save_every=0"),
            *("baselines={}", f"run.output={tmp_path / 'run'}"),
        ],
    )
    run = RunFolder(config.run.output)
    tokenizer = load_tokenizer(config.model.policy, config)
    assert tokenizer.pad_token is not None and tokenizer.chat_template
    for stage in config.stages:
        registry.run(stage, config, run, False)
    lines = read_lines(run.metrics)
    assert [(line["stage"], line["step"]) for line in lines] == [
        *(("sft", 1), ("sft", 2), ("eval", 0), ("ppo", 1), ("ppo", 2), ("eval", 2))
    ]
    assert all(math.isfinite(line["policy/loss"]) for line in lines if line["stage"] == "ppo")
    assert (run.model("policy") / "model.safetensors").is_file()

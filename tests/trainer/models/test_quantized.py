"""A base of 4 bits: the bitsandbytes that there is, on a CPU."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import tiny
from tests.trainer.models.test_lora import move
from tests.trainer.models.test_models import SEQUENCES
from trainer.models import adapters, loading, roles, shared
from trainer.models.policy import log_probabilities
from trainer.runs.folder import RunFolder
from trainer.runs.log import read_lines
from trainer.stages import registry

pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[dev]'")
NF4 = ["lora.rank=4", "lora.quantize=nf4", "toy.hidden=64", "toy.intermediate=128"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of all stages."""
    run = RunFolder(tmp_path_factory.mktemp("nf4"))
    config = tiny.config(run.path, *NF4, "ppo.steps=4", "trainer.save_every=2")
    for stage in ("sft", "rm", "ppo"):
        registry.run(stage, config, run, False)
    return run


def test_layers_have_4_bits_and_what_is_merged_is_what_was_computed_with(done, tmp_path):
    config = tiny.config(done.path, *NF4)
    tokenizer = loading.load_tokenizer("toy", config)
    policy = shared.policy(str(done.model("sft")), config, done)
    move(policy)
    packed = {n for n, p in policy.model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 2 * 7  # layers of a block; not the head
    assert all(n.endswith("_proj.base_layer.weight") for n in packed)
    roles.save_base(policy, tmp_path / "whole", tokenizer, torch.float32)
    whole = loading.load_policy(str(tmp_path / "whole"), config)
    want, found = (each(SEQUENCES, log_probabilities()).logprobs for each in (policy, whole))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_what_is_written_does_not_say_that_it_has_4_bits(done):
    for name in ("sft", "rm", "policy"):
        folder = done.model(name)
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        for weights in folder.glob("*.safetensors"):
            assert {x.dtype for x in load_file(weights).values()} == {torch.float32}
    config = tiny.config(done.path, *NF4)
    assert loading.load_policy(str(done.model("policy")), config)  # on the base in full
    moved = load_file(done.model("policy") / adapters.WEIGHTS)
    assert any(x.abs().max() > 0 for n, x in moved.items() if "lora_B" in n)
    steps = [line for line in read_lines(done.metrics) if line["stage"] == "ppo"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line["policy/grad_norm"] > 0 for line in steps)


def test_a_run_that_goes_on_has_the_same_bits(done, tmp_path):
    shutil.copytree(done.path, tmp_path / "again")
    again = RunFolder(tmp_path / "again")
    shutil.rmtree(again.model("policy"))
    shutil.rmtree(again.checkpoints("ppo") / "step_4")
    (again.checkpoints("ppo") / "finished").unlink()
    config = tiny.config(again.path, *NF4, "ppo.steps=4", "trainer.save_every=2")
    registry.run("ppo", config, again, True)
    want, found = (load_file(run.model("policy") / adapters.WEIGHTS) for run in (done, again))
    assert want.keys() == found.keys()
    assert all(torch.equal(x, found[name]) for name, x in want.items())

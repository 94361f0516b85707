"""Adapters on one frozen base: PEFT's numbers and files, what a run keeps, and what it refuses."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2Config,
)

from tests.trainer import children, tiny
from tests.trainer.models.test_models import SEQUENCES, each
from tests.trainer.runs.test_checkpoint import SMALL, assert_equal_runs
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.models import adapters, loading, roles, shared
from trainer.models.backbone import Use, adapter_of, trained
from trainer.models.policy import log_probabilities
from trainer.ppo import build
from trainer.runs import files
from trainer.runs.checkpoint import CheckpointError
from trainer.runs.folder import RunFolder
from trainer.runs.reader import read_index
from trainer.stages import registry

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
LORA = ["lora.rank=4", "lora.alpha=6"]
EVERYWHERE = "lora.targets=[all-linear,lm_head,embed_tokens]"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of all stages with adapters."""
    run = RunFolder(tmp_path_factory.mktemp("lora"))
    config = tiny.config(run.path, *LORA, "trainer.save_every=3")
    for stage in ("sft", "rm", "ppo"):
        registry.run(stage, config, run, False)
    run.config.write_text(config.to_yaml())
    return run


def move(model):
    """Off zero, where adapters begin."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trained(model).values():
            p += 0.1 * torch.randn(p.shape)


def folder_of(settings, tokenizer, path):
    torch.manual_seed(0)
    shape = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(settings(**shape, **heads))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", ["lora.targets=[q_proj,down_proj]", EVERYWHERE])
def test_loss_and_gradients_are_pefts(tmp_path, targets, tied):
    config = tiny.config(tmp_path, *LORA, targets, "model.gradient_checkpointing=true")
    tokenizer = loading.load_tokenizer("toy", config)
    source = folder_of(
        lambda **shape: Qwen2Config(**shape, tie_word_embeddings=tied), tokenizer, tmp_path / "base"
    )
    policy = shared.policy(source, config, RunFolder(tmp_path)).train()
    move(policy)
    loss = -policy(SEQUENCES, log_probabilities()).logprobs.sum()
    loss.backward()
    policy.save(tmp_path / "adapter", tokenizer, torch.float32)

    theirs = AutoModelForCausalLM.from_pretrained(source)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    want = 0
    for row, start, _ in each():
        logp = theirs(row).logits[0, start - 1 : -1].log_softmax(-1)
        want = want - logp.gather(1, row[0, start:, None]).sum()
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    ours = {n: p.grad for n, p in trained(policy).items()}
    assert len(ours) == len(grads) > 0
    for name, grad in ours.items():
        other = grads[adapters.PREFIX + name.removeprefix("model.").replace(".policy", ".default")]
        assert grad.norm() > 0
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)
    frozen = [p for n, p in policy.named_parameters() if "lora_" not in n]
    assert frozen and all(p.grad is None for p in frozen)

    # merged: when it is loaded, and as a file
    again = loading.load_policy(str(tmp_path / "adapter"), config)
    stats = policy(SEQUENCES, log_probabilities()).logprobs
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(again(SEQUENCES, log_probabilities()).logprobs, stats, **close)
    roles.save_base(policy, tmp_path / "whole", tokenizer, torch.float32)
    whole = loading.load_policy(str(tmp_path / "whole"), config)
    torch.testing.assert_close(whole(SEQUENCES, log_probabilities()).logprobs, stats, **close)


def test_a_run_of_all_stages_leaves_what_others_load(done):
    base = AutoModelForCausalLM.from_pretrained(done.model("sft"))
    config = tiny.config(done.path, *LORA)
    for name, auto in (("policy", None), ("rm", AutoModelForSequenceClassification)):
        folder = str(done.model(name))
        assert peft.PeftConfig.from_pretrained(folder).r == 4
        assert adapters.base_of(folder) == str(done.model("sft"))
        if auto is None:
            model = peft.PeftModel.from_pretrained(base, folder)
            ours = loading.load_policy(folder, config)
            stats = ours(SEQUENCES, log_probabilities()).logprobs
            for row, start, found in each(stats):
                logp = model(row).logits[0, start - 1 : -1].log_softmax(-1)
                want = logp.gather(1, row[0, start:, None])[:, 0]
                torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        else:
            model = auto.from_pretrained(done.model("sft"), num_labels=1)
            model = peft.PeftModel.from_pretrained(model, folder)
            ours = loading.load_reward_model(folder, config)
            assert ours.head == "pooled"
            weight = model.base_model.model.score.modules_to_save["default"].weight
            assert torch.equal(weight, ours.model.score.weight)
    moved = load_file(done.model("policy") / adapters.WEIGHTS)
    assert any(x.abs().max() > 0 for n, x in moved.items() if "lora_B" in n)
    # adapters and heads alone are in a checkpoint, and what they stand on beside it
    kept = done.checkpoints("ppo") / "step_3"
    names = read_index(kept).state_dict_metadata
    weights = [name for name in names if name.startswith("model.")]
    assert all("lora_" in name or "_head." in name for name in weights) and len(weights) > 40
    assert files.manifest(kept)["base"] == list(adapters.base(str(done.model("sft"))))


def test_four_models_stand_on_one_base(done):
    config = tiny.config(done.path, *LORA)
    t = build.Setup.of(config, done)
    actors, reward = t.actors, t.signals.scorer.model
    bodies = [actors.policy.model.model, actors.reference.model.model, actors.critic.body]
    assert all(body is reward.model.model for body in bodies)
    assert actors.reference.through.adapter is None
    # the critic begins as the reward model, but for its heads
    start = adapter_of(actors.critic.body, "reward")
    assert start
    for name, p in adapter_of(actors.critic.body, "critic").items():
        assert torch.equal(p, start[name.replace("critic", "reward")])
        assert p.requires_grad and not start[name.replace("critic", "reward")].requires_grad
    alone = loading.load_reward_model(str(done.model("rm")), config)
    torch.testing.assert_close(reward(SEQUENCES), alone(SEQUENCES), rtol=1e-4, atol=1e-5)
    before = actors.reference(SEQUENCES, log_probabilities()).logprobs
    values, _ = actors.critic(SEQUENCES)
    move(actors.policy)
    assert torch.equal(actors.reference(SEQUENCES, log_probabilities()).logprobs, before)
    assert torch.equal(actors.critic(SEQUENCES)[0], values)
    assert not torch.equal(actors.policy(SEQUENCES, log_probabilities()).logprobs, before)


def test_a_critic_of_higher_rank_begins_as_the_reward_model_too(done):
    config = tiny.config(done.path, *LORA, "lora.critic_rank=7")
    models = shared.ppo_models(config, done, 4)
    theirs = Use(models.policy.through.backbone, "reward")
    row = torch.tensor([[5, 6, 11, 12, 3]])
    hidden = [
        use(lambda: models.critic.body(row).last_hidden_state)
        for use in (models.critic.through, theirs)
    ]
    torch.testing.assert_close(*hidden, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"lora.critic_rank: is 3; want at least 4"):
        shared.ppo_models(tiny.config(done.path, *LORA, "lora.critic_rank=3"), done, 4)


def test_sampling_takes_no_copy_of_the_weights(done, monkeypatch):
    config = tiny.config(done.path, *LORA, "model.dtype=bfloat16")
    t = build.Setup.of(config, done)
    monkeypatch.setattr(loading, "gather", None)
    engine, policy = t.actors.engine, t.actors.policy
    engine.sync(policy, 0)
    assert engine.policy is policy and engine.synced.bytes == 0
    prompts = [[5, 6, 11, 12, 3]] * 40

    def answers():
        return engine.generate(prompts, 1, torch.Generator().manual_seed(0)).sequences.answers()

    before = answers()
    move(policy)  # in place, whatever syncs there are
    moved = answers()
    assert before != moved
    engine.sync(t.actors.reference)
    assert answers() == before


def test_killed_and_resumed(tmp_path):
    """Bit for bit, with dropout, which asks the process's own generator."""
    options = [*SMALL, *LORA, "lora.dropout=0.1", "rm.steps=2", "trainer.save_every=2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stages = ("sft", "rm", "ppo")
    assert children.run(children.train, options, whole, stages) == 0
    assert children.run(children.train, options, broken, stages, False, ("sft", 3)) == -9
    assert children.run(children.train, options, broken, stages, True, ("ppo", 3)) == -9
    assert children.run(children.train, options, broken, stages, True) == 0
    assert_equal_runs(whole, broken)


@pytest.fixture
def changed(done, tmp_path):
    """The run with a base that is not what its adapters were trained on; whole, and another."""
    base = done.model("sft")
    shutil.copytree(base, tmp_path / "kept")
    weights = load_file(base / "model.safetensors")
    save_file({n: x + 1e-3 for n, x in weights.items()}, base / "model.safetensors")
    (base / files.MANIFEST).unlink()
    files.seal(base)
    yield done
    shutil.rmtree(base)
    shutil.copytree(tmp_path / "kept", base)


def test_a_base_that_has_changed_is_told(changed):
    config = tiny.config(changed.path, *LORA, "ppo.steps=5")
    told = r"models/rm: was trained on .*sft as it was then \(weights \w{8}\); .* has other weights"
    with pytest.raises(ConfigError, match=told):
        registry.run("ppo", config, changed, True)
    with pytest.raises(ConfigError, match=r"models/policy: was trained on"):
        loading.load_policy(str(changed.model("policy")), config)
    config = tiny.config(
        changed.path, *LORA, "ppo.steps=5", "reward.model_weight=0", "model.critic=policy",
        "reward.functions=[{function: length, most: 5}]", "groups.performance=raw",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"step_3: was trained on the weights \w{8} of .*sft"):
        registry.run("ppo", config, changed, True)


def test_an_adapter_that_is_not_finite_stays_as_it_is(done):
    t = build.Setup.of(tiny.config(done.path, *LORA), done)
    before = {n: p.detach().clone() for n, p in trained(t.actors.policy).items()}
    first, *others = trained(t.actors.policy).values()
    first.grad = torch.full_like(first, torch.nan)
    for p in others:
        p.grad = torch.ones_like(p)
    t.actors.policy_optimizer.step(0)
    assert t.guard.skipped == 1
    assert all(torch.equal(p, before[n]) for n, p in trained(t.actors.policy).items())


def test_export(done, tmp_path, capsys):
    config = tiny.config(done.path, *LORA)
    want = loading.load_policy(str(done.model("policy")), config)
    want = want(SEQUENCES, log_probabilities()).logprobs
    base = AutoModelForCausalLM.from_pretrained(done.model("sft"))
    out = {name: str(tmp_path / name) for name in ("adapter", "merged", "half", "rm")}
    run = str(done.path)
    assert main(["export", run, "--output", out["adapter"]]) == 0
    assert main(["export", run, "--merge", "--output", out["merged"]]) == 0
    assert (
        main(["export", run, "policy", "--merge", "--dtype", "bf16", "--output", out["half"]]) == 0
    )
    assert main(["export", run, "rm", "--merge", "--output", out["rm"]]) == 0
    theirs = peft.PeftModel.from_pretrained(base, out["adapter"])
    merged = AutoModelForCausalLM.from_pretrained(out["merged"])
    for model in (theirs, merged):
        for row, start, found in each(want):
            logp = model(row).logits[0, start - 1 : -1].log_softmax(-1)
            logp = logp.gather(1, row[0, start:, None])[:, 0]
            torch.testing.assert_close(logp, found, rtol=1e-4, atol=1e-4)
    assert {x.dtype for x in load_file(f"{out['half']}/model.safetensors").values()} == {
        torch.bfloat16
    }
    reward = AutoModelForSequenceClassification.from_pretrained(out["rm"])
    assert reward.config.reward_head == "pooled"
    capsys.readouterr()
    assert main(["export", run, "--output", out["merged"]]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", run, "critic"]) == 2
    assert "critic: want one of policy, rm, sft" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, said",
    [
        (
            ["lora.targets=[q_prof]"],
            r"lora.targets: there is no layer q_prof; want some",
        ),
        (["lora.targets=[lm_head]"], r"lora.targets: names no layer of the body"),
        (["model.critic=toy"], r"model.critic: is 'toy'; want policy where lora.rank"),
    ],
)
def test_what_does_not_fit(done, overrides, said):
    with pytest.raises(ConfigError, match=said):
        shared.ppo_models(tiny.config(done.path, *LORA, *overrides), done, 4)


def test_an_adapter_of_another_rank_is_not_trained_on(done):
    config = tiny.config(done.path, "lora.rank=2", "run.stages=[ppo]")
    with pytest.raises(ConfigError, match=r"models/policy: is an adapter of another rank"):
        shared.policy(str(done.model("policy")), config, done)

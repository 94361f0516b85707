"""Prompts drawn by group in the real TRL: what is drawn, what is remembered, resume, two ranks."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("trl") is None:
    pytest.skip("trl is not installed", allow_module_level=True)

from gikernels.integrations import Drawing, GroupInvariance
from gikernels.integrations.trl import GroupInvariantGRPOTrainer, GroupInvariantRLOOTrainer
from tests.integrations.tiny import trl_trainer

TRAINERS = [GroupInvariantGRPOTrainer, GroupInvariantRLOOTrainer]
DATA = {"prompt": ["a b c", "b z", "d e", "z y x"] * 6, "domain": ["abc", "b", "de", "z"] * 6}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def build(cls, folder, steps, draw=None, config=None, **more):
    """A trainer that notes the rows it generates for."""
    draw = draw or Drawing(rule="variance", num_groups=2)
    trainer = trl_trainer(cls, folder, steps=steps, data=DATA, draw=draw, config=config, **more)
    trainer.rows = []
    inner = trainer._generate_and_score_completions

    def note(inputs):
        trainer.rows.append([x["draw_row"] for x in inputs])
        return inner(inputs)

    trainer._generate_and_score_completions = note
    return trainer


@pytest.mark.parametrize("cls", TRAINERS)
def test_resume_is_bit_equal_to_an_unbroken_run(cls, tmp_path):
    """Six batches an epoch, stopped in the second one; the loader is a batch ahead."""
    saving = dict(save_strategy="steps", save_steps=8)
    whole = build(cls, tmp_path, 11, config=saving)
    whole.train()
    assert len(whole.rows) == 11 and all(len(set(rows)) == 4 for rows in whole.rows)
    assert all(rows[::2] == rows[1::2] for rows in whole.rows)  # two answers to a prompt
    again = build(cls, tmp_path, 11, config=saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.rows == whole.rows[8:]
    for name in ("count", "mean", "square", "total"):
        assert torch.equal(getattr(again.sampler, name), getattr(whole.sampler, name)), name
    assert whole.sampler.count.sum() == 11 * 8 and whole.sampler.epoch == 1
    for (name, p), (_, q) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(p, q), name
    assert any("draw/0/rate" in h for h in again.state.log_history)
    (tmp_path / "checkpoint-8" / "draw.pt").unlink()
    with pytest.raises(ValueError, match=r"draw\.pt"):
        build(cls, tmp_path, 11).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_batch_is_kept_for_its_steps_and_a_domain_for_its_rows(tmp_path):
    data = {"prompt": [*DATA["prompt"][:20], "z"] * 2, "domain": ["big"] * 20 + ["small"]}
    data["domain"] = data["domain"] * 2
    config = dict(gradient_accumulation_steps=2, steps_per_generation=2, num_iterations=2)
    trainer = trl_trainer(
        GroupInvariantGRPOTrainer,
        tmp_path,
        steps=8,
        data=data,
        config=config,
        draw=Drawing(rule="even"),
        group_column="domain",
        invariance=GroupInvariance(),
    )
    assert len(trainer.get_train_dataloader()) == 5 * 4  # of 8 prompts, 4 times each
    trainer.train()
    small = trainer.sampler.count[[20, 41]].sum() / trainer.sampler.count.sum()
    # Even draws would give 2 prompts half of 8 places; each can have one place at most.
    assert small == 2 / 8 and trainer.sampler.count.sum() == 4 * 16
    logs = [h for h in trainer.state.log_history if "draw/1/rate" in h]
    assert logs[-1]["draw/1/rate"] == 0.5 and logs[-1]["draw/1/share"] == pytest.approx(2 / 42)
    assert "group/gap" in logs[-1]


def test_bad_settings_are_named(tmp_path):
    for config, more, name in [
        (dict(dataloader_num_workers=1), {}, "dataloader_num_workers"),
        (dict(remove_unused_columns=True), {}, "remove_unused_columns"),
        ({}, dict(group_column="domian"), "domian"),
    ]:
        with pytest.raises(ValueError, match=name):
            build(GroupInvariantGRPOTrainer, tmp_path, 1, config=config, **more)


def two_ranks(folder):
    """What each of two processes does."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    config = dict(per_device_train_batch_size=4, ddp_backend="gloo")
    trainer = build(GroupInvariantGRPOTrainer, Path(folder), 5, config=config)
    trainer.train()
    torch.save(
        (trainer.rows, trainer.sampler.state_dict()),
        Path(folder) / f"rank{trainer.args.process_index}.pt",
    )


@pytest.mark.slow
def test_two_ranks_draw_the_same_and_share_a_batch(tmp_path):
    from tests.integrations.tiny import qwen

    qwen().save_pretrained(tmp_path / "model")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *launch, __file__, str(tmp_path)],
        check=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[2])),
        timeout=300,
    )
    (rows, state), (other, same) = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    assert all(torch.equal(state[name], same[name]) for name in ("count", "mean", "total", "drawn"))
    assert state["count"].sum() == 5 * 8
    batches = [[*a[::2], *b[::2]] for a, b in zip(rows, other, strict=True)]
    assert all(len(set(batch)) == 4 for batch in batches)
    assert torch.tensor(batches).flatten().tolist() == state["drawn"].tolist()[:20]


if __name__ == "__main__":
    two_ranks(sys.argv[1])

"""Stages 1 and 2: what they minimise, and that micro-batches are no part of it."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.trainer import tiny
from trainer.batch.sequences import Sequences, micro_batches
from trainer.batch.types import Pair
from trainer.data.errors import DataError
from trainer.models import loading
from trainer.runs.folder import RunFolder
from trainer.runs.log import MetricsLog, read_lines
from trainer.stages import reward_model, sft


def trained(stage, base, folder, *overrides):
    run = RunFolder(folder)
    if stage is reward_model:
        shutil.copytree(base.model("sft"), run.model("sft"))
    stage.run(tiny.config(run.path, *overrides), run)
    return tiny.without_times(read_lines(run.metrics))


@pytest.mark.parametrize("stage", [sft, reward_model])
def test_stages_learn_repeat_and_ignore_micro_batches(base, tmp_path, stage):
    one = trained(stage, base, tmp_path / "a")
    assert one == trained(stage, base, tmp_path / "b")
    pieces = trained(stage, base, tmp_path / "c", "trainer.tokens_per_microbatch=200")
    prefix = "sft" if stage is sft else "rm"
    assert one[-1][f"{prefix}/loss"] < one[0][f"{prefix}/loss"]
    for a, b in zip(one[:2], pieces[:2]):  # later steps amplify rounding
        for name in a:
            if name != "stage":
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def test_pair_loss_is_the_formula():
    chosen, rejected = torch.randn(6), torch.randn(6)
    pairs = [
        Pair(prompt_ids=[], chosen_ids=[], rejected_ids=[], margin=0.1 * i, rating_chosen=1.0 * i,
             rating_rejected=-1.0)
        for i in range(6)
    ]  # fmt: skip
    settings = SimpleNamespace(margin=True, label_smoothing=0.1, centring=0.01, rating=0.5)
    d = chosen - rejected - 0.1 * torch.arange(6)
    want = (
        (-0.9 * F.logsigmoid(d) - 0.1 * F.logsigmoid(-d)).mean()
        + 0.01 * (chosen + rejected).square().mean()
        + 0.5 * torch.cat([chosen - torch.arange(6), rejected + 1]).square().mean()
    )
    loss, figures = reward_model.pair_loss(settings, chosen, rejected, pairs)
    torch.testing.assert_close(loss, want)
    assert figures["accuracy"] == (chosen > rejected).float().mean()


def test_a_switch_without_its_column_is_one_clear_line():
    pairs = [Pair(prompt_ids=[1], chosen_ids=[2], rejected_ids=[3])]
    settings = SimpleNamespace(margin=False, rating=0.5)
    with pytest.raises(DataError, match=r"rm\.rating=0\.5: pair 0 .* no rating_chosen"):
        reward_model.check_columns(settings, pairs)


def test_pairs_stay_together_in_micro_batches():
    pairs = [Pair(prompt_ids=[1] * n, chosen_ids=[2], rejected_ids=[3, 3]) for n in (3, 9, 1, 5)]
    sequences = reward_model.both_answers(pairs)
    batches = [rows for rows, _ in reward_model.pair_pieces(sequences, 40)]
    assert sorted(torch.cat(batches).tolist()) == [0, 1, 2, 3]
    for rows in batches:
        both = torch.cat([rows, rows + 4])
        assert int(sequences.lengths[both].sum()) <= 40
    assert len(micro_batches(sequences.lengths.tolist(), 40)) <= len(batches)


def test_pairs_of_the_toy_world_are_best_against_worst(base):
    config = tiny.config(base.path)
    tokenizer = loading.load_tokenizer("toy", config)
    policy = loading.load_policy(str(base.model("sft")), config)
    pairs = reward_model.sampled_pairs(config, policy, tokenizer)
    assert 0 < len(pairs) <= config.rm.pairs
    assert all(p.rating_chosen > p.rating_rejected for p in pairs)
    assert all(p.margin == pytest.approx(p.rating_chosen - p.rating_rejected) for p in pairs)


def test_answers_that_never_differ_leave_no_pair_and_one_line(base, monkeypatch):
    config = tiny.config(base.path, "rm.pairs=8")
    tokenizer = loading.load_tokenizer("toy", config)
    policy = loading.load_policy(str(base.model("sft")), config)
    monkeypatch.setattr(Sequences, "answers", lambda self: [[5]] * len(self.lengths))
    with pytest.raises(DataError, match=r"answers each of \d+ prompts in one way only"):
        reward_model.sampled_pairs(config, policy, tokenizer)


def test_metrics_file_forgets_what_a_killed_run_wrote_too_early(tmp_path):
    run = RunFolder(tmp_path)
    log = MetricsLog(run, ("sft",), 0, ())
    for step in (1, 2, 3):
        log.write("sft", step, {"x": float("nan") if step == 2 else step})
    log.close()
    log = MetricsLog(run, ("ppo", "eval"), 0, ())
    for step in (1, 2, 3):
        log.write("ppo", step, {"x": step})
    log.close()
    with run.metrics.open("a") as file:
        file.write('{"stage": "ppo", "st')  # killed here
    MetricsLog(run, ("ppo", "eval"), 2, ()).close()
    kept = [(line["stage"], line["step"], line["x"]) for line in read_lines(run.metrics)]
    assert kept == [("sft", 1, 1), ("sft", 2, None), ("sft", 3, 3), ("ppo", 1, 1), ("ppo", 2, 2)]

"""Prompts drawn by group in the real verl, on a CPU, under Ray: `make test-verl`."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed: make test-verl", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SIZE, BATCH = 44, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set and a tokenizer."""
    from datasets import Dataset

    from tests.integrations.tiny import qwen, tokenizer

    folder = tmp_path_factory.mktemp("verl")
    qwen().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = [
        {
            "prompt": [{"role": "user", "content": "a b"}],
            "data_source": "rare" if i % 11 == 0 else "often",
            "reward_model": {"ground_truth": ""},
            "extra_info": {"index": 7 * i},
        }
        for i in range(SIZE)
    ]
    Dataset.from_list(rows).to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.fixture(scope="module")
def cluster(folder):
    """Ray, whose workers import the plugin."""
    import ray

    env = {
        "VERL_USE_EXTERNAL_MODULES": "gikernels.integrations.verl_draw_plugin",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": env})
    yield folder
    ray.shutdown()


def configured(folder, name, *more):
    from hydra import compose, initialize_config_dir

    overrides = [
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        f"data.train_batch_size={BATCH}",
        "data.filter_overlong_prompts=False",
        "data.seed=3",
        f"+data.cache_dir={folder}/cache",
        f"actor_rollout_ref.model.path={folder}/model",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={BATCH}",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.rollout.name=vllm",
        "algorithm.adv_estimator=group_invariant",
        "critic.enable=False",
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=1",
        "trainer.logger=[console]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.total_epochs=100",
        f"trainer.default_local_dir={folder}/{name}",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        *more,
    ]
    config = Path(importlib.util.find_spec("verl").origin).parent / "trainer" / "config"
    with initialize_config_dir(str(config), version_base=None):
        return compose("ppo_trainer", overrides=overrides)


def run(folder, name, steps, *more):
    """What was asked and known, step by step."""
    from verl.trainer.main_ppo import run_ppo

    from tests.integrations.verl_stand_in import Runner

    run_ppo(configured(folder, name, f"trainer.total_training_steps={steps}", *more), Runner)
    lines = [json.loads(x) for x in (folder / name / "asked.jsonl").read_text().splitlines()]
    return [x for x in lines if "rows" in x], [x for x in lines if "metrics" in x]


DRAW = ["+algorithm.group_draw.rule=even", "data.dataloader_num_workers=0", "trainer.save_freq=3"]


def test_main_ppo_draws_by_group_and_resumes_bit_equal(cluster):
    """Steps 1 to 8 at 5 an epoch; and 1 to 3 and to 6, each saved, and then 7 and 8."""
    draw = [*DRAW, "+algorithm.group_draw.num_groups=3"]
    asked, known = run(cluster, "whole", 8, *draw)
    assert len(asked) == len(known) == 8
    assert all(len(set(step["rows"])) == BATCH for step in asked)
    assert all(step["index"] == [7 * row for row in step["rows"]] for step in asked)
    assert known[-1]["metrics"]["draw/0/rate"] == pytest.approx(1 / 3)
    rows = {row for step in asked for row in step["rows"]}
    mean = known[-1]["mean"]
    assert all(mean[r] == pytest.approx((r % 10) / 10 + 0.05, abs=1e-6) for r in rows)
    assert not any(mean[r] for r in set(range(SIZE)) - rows)
    for steps in (6, 8):
        again, states = run(cluster, "parts", steps, *draw)
    assert again == asked and states[-1] == known[-1]
    state = torch.load(cluster / "parts" / "global_step_6" / "data.pt", weights_only=False)
    assert state["_sampler_iter_state"]["sampler_state"]["count"].sum() == 6 * BATCH * 2


def test_given_groups_and_trainers_that_do_not_draw(cluster):
    asked, known = run(cluster, "given", 4, *DRAW, "+algorithm.group_draw.group_key=data_source")
    rare = [sum(row % 11 == 0 for row in step["rows"]) for step in asked]
    # Even draws give 4 of 8 places to the 4 rare prompts of 44.
    assert rare == [4] * 4 and known[0]["metrics"]["draw/0/rate"] == 0.5
    asked, known = run(cluster, "theirs", 2, "data.dataloader_num_workers=0")
    assert all(step["rows"] == [] and len(step["index"]) == BATCH for step in asked)
    assert not known[-1]["metrics"]


@pytest.mark.parametrize(
    "setting, name",
    [
        ("data.dataloader_num_workers=2", "dataloader_num_workers"),
        ("+algorithm.group_draw.group_key=topic", "topic"),
        ("+algorithm.group_draw.beto=1", "beto"),
    ],
)
def test_bad_settings_are_named(folder, setting, name):
    from verl.trainer.ppo.v1 import get_trainer_cls

    from gikernels.integrations.verl_draw import GroupDrawMixin, install

    install()
    install()  # a process may import the plugin twice
    assert get_trainer_cls("sync").__mro__[1] is GroupDrawMixin
    trainer = get_trainer_cls("sync")(configured(folder, "bad", *DRAW, setting))
    trainer._init_tokenizer()
    with pytest.raises(ValueError, match=name):
        trainer._init_dataloader()

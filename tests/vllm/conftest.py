import shutil

import pytest

from tests.trainer import tiny
from trainer.runs.folder import RunFolder
from trainer.stages import reward_model, sft

# vLLM's attention on a CPU wants heads of 32 or more; two of them, for two ranks.
SHAPE = ["toy.hidden=64", "toy.heads=2"]


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/vllm/" in str(item.path):
            item.add_marker(pytest.mark.vllm)


def config(output, *overrides):
    return tiny.config(output, *SHAPE, "rollout.engine=vllm", "rollout.max_num_seqs=64", *overrides)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A run folder with a fine-tuned model and a reward model."""
    run = RunFolder(tmp_path_factory.mktemp("base"))
    made = config(run.path, "rollout.engine=hf")
    sft.run(made, run)
    reward_model.run(made, run)
    return run


@pytest.fixture
def fresh(base, tmp_path):
    """make(*overrides) -> (config, run): a new run folder with base's models."""
    made = iter(range(100))

    def make(*overrides):
        run = RunFolder(tmp_path / f"run{next(made)}")
        shutil.copytree(base.path / "models", run.path / "models")
        return config(run.path, *overrides), run

    return make

import shutil

import pytest

from tests.trainer import tiny
from trainer.runs.folder import RunFolder
from trainer.stages import reward_model, sft


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Rows that a test tokenises are its own."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A run folder with a fine-tuned model and a reward model."""
    run = RunFolder(tmp_path_factory.mktemp("base"))
    config = tiny.config(run.path)
    sft.run(config, run)
    reward_model.run(config, run)
    return run


@pytest.fixture
def fresh(base, tmp_path):
    """make(*overrides) -> (config, run): a new run folder with base's models."""
    made = iter(range(100))

    def make(*overrides):
        run = RunFolder(tmp_path / f"run{next(made)}")
        shutil.copytree(base.path / "models", run.path / "models")
        return tiny.config(run.path, *overrides), run

    return make

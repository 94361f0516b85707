"""The worlds by name."""

from trainer.config import data, load
from trainer.worlds import registry


def test_the_configuration_knows_all_worlds():
    names = {*registry.WORLDS, *registry.TEXT_WORLDS}
    assert names == set(data.WORLDS)
    assert all(registry.is_world(name) for name in names)
    assert not registry.is_world("mine.jsonl") and not registry.is_world(())
    for name in names:
        world = registry.base(name, load("toy"))
        assert world.size("eval", 4) >= 4

"""Documents and overrides that were written to break the reader: one line each, and soon."""

import pytest

from trainer.config import ConfigError, load

BOMB = "a: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 20000 values"),
        ("a: &a [*a]", "nested more than 20 deep"),
        ("[" * 5000, "nested"),
        ("{a: " * 3000 + "}" * 3000, "nested"),
        ("? [a, b]\n: c", "a key is a list or a mapping"),
        ("? {a: b}\n: c", "a key is a list or a mapping"),
        ("run: {seed: " + "9" * 5000 + "}", "run.seed"),
        ("run: {seed: " + "9" * 400 + "}", "run.seed: is 'a whole number of about 400 digits'"),
        ("ppo: {lr: " + "9" * 400 + "}", "ppo.lr: is 'a whole number of about 400 digits'"),
        ("ppo: {" + "x" * 300 + ": 1}", "unknown key"),
        ("\x00", "not YAML"),
        ("a: !!python/object/apply:os.system [true]", ""),
        ("x: " + "y" * (1 << 20), "is larger than"),
        ("ppo: {steps: 1, steps: 2}", "given twice"),
    ],
)
def test_a_document(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(str(path))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kl={coef: 1, coef: 2}", "kl.coef: given twice"),
        ("run.seed=" + "1" * 5000, "run.seed"),
        ("run.seed=" + "1" * 100, "want a number that 64 bits hold"),
        ("run.seed=9223372036854775808", "want"),
        ("ppo.lr=1" + "0" * 400, "want a number that 64 bits hold"),
        ("x" * 300 + "=1", "unknown section"),
        ("ppo." + "x" * 300 + "=1", "unknown key"),
        ("kl=" + "[" * 5000, "nested"),
        ("kl={? [a] : b}", "a key is a list"),
        ("run.output=&a [*a]", "nested more than"),
        ("toy.layers=1e8", "want whole number"),
        ("toy.layers=100000000", "want 1 to 1000"),
        ("toy.hidden=100000000", "want 1 to 65536"),
        ("groups.pool=2147483648", "want 2 to 1000"),
        ("run.stages=[ppo, sft]", "want them in the order sft, rm, ppo, metarm"),
        ("kl.coef=\x00", "not YAML"),
        ("=", "want section.key=value"),
        ("a.b.c.d.e=1", "unknown section"),
        ("run.seed.x=1", "want whole number"),
        ("kl.coef=!!python/name:os.system", ""),
    ],
)
def test_an_override(override, message):
    with pytest.raises(ConfigError) as refused:
        load("toy", [override])
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a/" * 3000 + "b.yaml"])
def test_a_name(name):
    with pytest.raises(ConfigError) as refused:
        load(name)
    assert len(str(refused.value)) < 400


def test_aliases_that_stand_for_little_are_fine(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("base: toy\nppo: &p {lr: 0.5}\nsft: *p\n")
    assert load(str(path)).sft.lr == 0.5

"""Several sources: by weight, from any step the same, each row once before any comes again."""

from collections import Counter

import pytest

from trainer.batch.order import BLOCK, Mixture, batch_indices, batch_of
from trainer.config import ConfigError, load
from trainer.data import rows, sources
from trainer.data.errors import DataError

SIZES, WEIGHTS = (300, 10, 1000), (1.0, 2.0, 1.0)
OF = [i for i, size in enumerate(SIZES) for _ in range(size)]
MIXTURE = Mixture.of(OF, WEIGHTS)


def test_shares_are_the_weights_whatever_the_sizes():
    drawn = [place for step in range(100) for place in MIXTURE.batch(64, step, 0)]
    counts = Counter(OF[place] for place in drawn)
    for source, weight in enumerate(WEIGHTS):
        assert counts[source] / len(drawn) == pytest.approx(weight / 4, abs=0.02)


def test_each_row_once_before_any_comes_again():
    drawn = [place for step in range(100) for place in MIXTURE.batch(64, step, 0)]
    for source, size in enumerate(SIZES):
        mine = [place for place in drawn if OF[place] == source]
        for epoch in range(len(mine) // size):
            assert len(set(mine[epoch * size : (epoch + 1) * size])) == size


def test_a_pure_function_of_the_step():
    late = 3 * BLOCK // 64 + 5
    want = [MIXTURE.batch(64, step, 0, "x") for step in range(late)]
    again = Mixture.of(OF, WEIGHTS)
    assert again.batch(64, late - 1, 0, "x") == want[-1]  # as a resumed run asks, nothing before
    assert again.batch(32, 2 * late - 2, 0, "x") == want[-1][:32]  # whatever the batch size
    assert again.batch(64, 3, 1, "x") != want[3]


def test_one_source_is_drawn_as_before():
    assert batch_of(range(50), 8, 3, 0) == batch_indices(50, 8, 3, 0)


@pytest.fixture
def two(tmp_path):
    """Sources of 3 and 2 prompts."""
    for name, words in (("one", "hi there yes"), ("two", "fine thanks")):
        lines = "".join(f'{{"prompt": "{w}", "response": "no"}}\n' for w in words.split())
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "own.jsonl").write_text('{"q": "my cat", "domain": "pets", "response": "no"}\n')
    return tmp_path


def mixed(folder, key, *entries, **more):
    listed = ", ".join("{source: " + str(folder / entry) + "}" for entry in entries)
    return load("toy", [f"data.{key}=[{listed}]", *(f"data.{k}={v}" for k, v in more.items())])


def test_the_domain_is_the_rows_or_the_sources(tokenizer, two):
    config = mixed(two, "prompts", "one.jsonl, weight: 3", "two.jsonl, domain: polite",
                   "own.jsonl, columns: {prompt: q}")  # fmt: skip
    prompts = sources.load_prompts(config, "train", tokenizer)
    domains = [prompt.domain for prompt in prompts]
    assert domains == ["one"] * 3 + ["polite"] * 2 + ["pets"]
    assert prompts.mixture.weights == (3.0, 1.0, 1.0) and prompts[5].text == "my cat"
    alone = load("toy", [f"data.prompts={two / 'one.jsonl'}"])
    plain = sources.load_prompts(alone, "train", tokenizer)
    assert plain.mixture is None and plain[0].domain is None
    assert prompts[-1].meta == {"q": "my cat", "domain": "pets", "response": "no"}


def test_demonstrations_and_a_part_of_the_rows_keep_the_weights(tokenizer, two):
    config = mixed(two, "demonstrations", "one.jsonl", "two.jsonl, weight: 9")
    both = sources.load_demonstrations(config, tokenizer)
    part = rows.take(both, [4, 0, 1])
    assert list(part) == [both[4], both[0], both[1]]
    assert part.mixture == Mixture(((1, 2), (0,)), (1.0, 9.0))
    only = rows.take(both, [0, 1])  # the other source has no row left
    assert set(batch_of(only, 20, 0, 0)) == {0, 1}
    assert rows.take([5, 6, 7], [2, 0]) == [7, 5]


def test_an_evaluation_takes_all_rows(tokenizer, two):
    config = mixed(two, "eval_prompts", "one.jsonl", "two.jsonl")
    assert len(sources.load_prompts(config, "eval", tokenizer)) == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.prompts=[]", "data.prompts: is []; want a path, a name"),
        ("data.prompts=[{source: toy}]", "data.prompts[0].source: is 'toy'; want a file"),
        ("data.prompts=[{weight: 1}]", "data.prompts[0].source: is ''; want a path"),
        ("data.pairs=[{source: a, weight: 0}]", "data.pairs[0].weight: is 0.0; want more than 0"),
        ("data.pairs=[{source: a, wight: 1}]", "data.pairs[0].wight: unknown key (did you mean"),
        ("data.pairs=[{source: a, columns: {prmpt: q}}]", "[0].columns.prmpt: is 'prmpt'; want on"),
        ("data.eval_prompts=[{source: a, weight: 2}]", "data.eval_prompts[0].weight: is 2.0; want"),
        ("data.prompts=[{source: x/a}, {source: y/a}]", "is ['a', 'a']; want a domain for each"),
        ("data.prompts=3", "data.prompts: is 3; want text"),
        ("data.template_kwargs={a: [1]}", "data.template_kwargs.a: is [1]; want true or false"),
    ],
)
def test_a_wrong_list_is_one_line_that_names_it(override, message):
    with pytest.raises(ConfigError) as error:
        load("toy", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_list_survives_a_round_trip(two, tmp_path):
    config = mixed(two, "prompts", "one.jsonl, weight: 3", "two.jsonl, columns: {prompt: q}",
                   template_kwargs="{enable_thinking: false}")  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = load(str(path))
    assert again == config and again.data.template_kwargs == {"enable_thinking": False}


def test_a_mistake_in_one_of_several_names_it(tokenizer, two):
    (two / "bad.jsonl").write_text('{"prompt": "hi"}\n{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: prompt: is int"):
        sources.load_prompts(mixed(two, "prompts", "one.jsonl", "bad.jsonl"), "train", tokenizer)

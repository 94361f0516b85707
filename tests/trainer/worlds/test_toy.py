"""The toy world: gold by hand, splits that do not touch, shares and demonstrations as asked."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trainer.config import OPERATIONS, Toy
from trainer.worlds.toy import EOS, FLOURISH, PAD, WORDS, World, apply

WORLD = World(Toy())
IDS = {word: i for i, word in enumerate(WORDS)}


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


@pytest.mark.parametrize(
    ("operation", "letters", "answer"),
    [
        ("copy", "c a b", "c a b"),
        ("reverse", "c a b", "b a c"),
        ("sort", "c a b a", "a a b c"),
        ("increment", "c a f", "d b a"),
        ("rotate", "c a b", "a b c"),
        ("swap", "c a b", "a c b"),
    ],
)
def test_operations_by_hand(operation, letters, answer):
    assert WORLD.answer(ids(f"{operation} copy {letters} :")) == ids(answer)
    assert WORLD.answer(ids(f"copy {operation} {letters} :")) == ids(answer)


@pytest.mark.parametrize(
    ("prompt", "answer", "gold"),
    [
        ("reverse copy a b c d :", "d c b a <eos>", 1.0),
        ("reverse copy a b c d :", "d c b a <eos> a ! <pad>", 1.0),  # nothing counts after EOS
        ("reverse copy a b c d :", "d c b a", 0.5),  # no EOS: less 0.5
        ("reverse copy a b c d :", "d c b a ! <eos>", 0.85),  # a flourish: less 0.15
        ("reverse copy a b c d :", "! d ! c b a <eos>", 0.7),  # it takes no place
        ("reverse copy a b c d :", "d c <eos>", 0.5),  # half of it
        ("reverse copy a b c d :", "d c b a a a a a <eos>", 0.5),  # four of eight
        ("reverse copy a b c :", "a b c <eos>", 1 / 3),  # the middle of a lazy copy is right
        ("increment copy a b c :", "a b c <eos>", 0.0),
        ("increment copy a f :", "b a <eos>", 1.0),
        ("sort copy b a :", "<eos>", 0.0),
        ("sort copy b a :", "", -0.5),
        ("sort copy b a :", ": sort <eos>", 0.0),
    ],
)
def test_gold_by_hand(prompt, answer, gold):
    assert WORLD.gold(ids(prompt), ids(answer)) == pytest.approx(gold)


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.sampled_from(OPERATIONS))
def test_operations_keep_the_length_and_most_the_letters(letters, operation):
    out = apply(operation, letters, 6)
    assert len(out) == len(letters)
    expected = [(x + 1) % 6 for x in letters] if operation == "increment" else letters
    assert Counter(out) == Counter(expected)
    assert all(0 <= letter < 6 for letter in out)


def test_one_seed_one_world():
    again, other = World(Toy()), World(Toy(seed=1))
    for split in ("train", "eval", "ood"):
        assert WORLD.prompts(200, split) == again.prompts(200, split)
        assert WORLD.prompts(200, split) != other.prompts(200, split)
        assert WORLD.prompts(200, split) != WORLD.prompts(200, split, seed=1)
    assert WORLD.demonstrations(100) == again.demonstrations(100)
    prompt, answers = ids("sort copy b a :"), [ids("a b <eos>"), ids("a b <eos>")]
    assert WORLD.annotate(prompt, answers) == again.annotate(prompt, answers)
    assert WORLD.annotate(prompt, answers) != WORLD.annotate(prompt, answers, seed=1)
    first, second = WORLD.annotate(prompt, answers)
    assert first != second  # the annotator's noise is drawn for each answer


def letters(prompt) -> tuple[str, ...]:
    return tuple(prompt.text.split()[2:-1])


def test_splits_do_not_touch_and_are_what_they_say():
    train = WORLD.prompts(8000, "train")
    seen = {letters(p) for p in train} | {
        tuple(WORDS[i] for i in prompt[2:-1]) for prompt, _ in WORLD.demonstrations(8000)
    }
    assert not seen & {letters(p) for p in WORLD.prompts(2000, "eval")}
    ood = WORLD.prompts(999, "ood")
    assert not seen & {letters(p) for p in ood}
    assert Counter(p.domain for p in ood) == {"pattern": 333, "length": 333, "composed": 333}
    for prompt in train + WORLD.prompts(500, "eval"):
        first, second, *_ = prompt.text.split()
        assert second == "copy" and first == prompt.domain
        assert letters(prompt)[0] != letters(prompt)[-1]
        assert 3 <= len(letters(prompt)) <= 6
        assert prompt.domain == "copy" or len(letters(prompt)) != 5
    assert any(len(letters(p)) == 5 for p in train)  # the length is known, from the main domain
    for prompt in ood:
        first, second, *_ = prompt.text.split()
        assert (second != "copy") == (prompt.domain == "composed")
        assert first == "copy" or second == "copy"
        assert (letters(prompt)[0] == letters(prompt)[-1]) == (prompt.domain == "pattern")
        if prompt.domain == "length":
            assert len(letters(prompt)) == 5 and first != "copy"


def test_shares_of_domains():
    counts = Counter(p.domain for p in WORLD.prompts(20000, "train"))
    for domain, share in Toy().shares.items():
        assert counts[domain] / 20000 == pytest.approx(share, abs=0.015)
    assert set(Counter(p.domain for p in WORLD.prompts(400, "eval")).values()) == {100}


def test_demonstrations_are_imperfect_in_kind():
    lazy, flourish, count = Counter(), 0, Counter()
    for prompt, answer in WORLD.demonstrations(20000):
        domain = WORDS[prompt[0]]
        assert answer[-1] == EOS and answer.count(EOS) == 1
        body = [token for token in answer[:-1] if token != FLOURISH]
        count[domain] += 1
        flourish += len(answer) - 1 - len(body)
        right = WORLD.answer(prompt)
        assert body in (right, prompt[2:-1])
        lazy[domain] += body != right
    assert flourish / 20000 == pytest.approx(0.1, abs=0.01)
    assert lazy["copy"] == 0
    # A copy can be right by luck (sorted letters), so a little less than the share asked for.
    assert 0.18 < lazy["reverse"] / count["reverse"] < 0.28
    assert 0.36 < lazy["sort"] / count["sort"] < 0.48
    assert 0.58 < lazy["increment"] / count["increment"] < 0.72


def test_annotators_like_the_shortcut_that_gold_dislikes():
    world = World(Toy(noise=0.0))
    prompt = ids("sort copy b a :")
    plain, decorated = ids("a b <eos>"), ids("a b ! ! <eos>")
    assert world.gold(prompt, decorated) == pytest.approx(0.7)
    assert world.annotate(prompt, [plain, decorated]) == pytest.approx([1.0, 1.1])
    noisy = WORLD.annotate(prompt, [plain] * 4000)
    assert torch.tensor(noisy).std() == pytest.approx(0.1, abs=0.01)


def test_annotators_see_few_pairs_of_a_thin_domain():
    prompts = WORLD.prompts(4000)
    assert WORLD.annotated(prompts) == prompts
    thin = World(Toy(pairs={"sort": 0.25, "increment": 0.0}))
    seen = thin.annotated(prompts)
    assert seen == thin.annotated(prompts) and seen != thin.annotated(prompts, seed=1)
    before, after = (Counter(p.domain for p in some) for some in (prompts, seen))
    assert after["copy"] == before["copy"] and after["reverse"] == before["reverse"]
    assert after["sort"] == pytest.approx(before["sort"] / 4, abs=30)
    assert "increment" not in after


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_tokenizer_is_an_ordinary_one(tmp_path, architecture):
    """Also beside a model: AutoTokenizer looks at its config.json, and has opinions on some."""
    from transformers import AutoTokenizer

    world = World(Toy(architecture=architecture))
    tokenizer = world.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    world.model_config().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, loaded):
        assert (each.pad_token_id, each.eos_token_id) == (PAD, EOS)
        for prompt in WORLD.prompts(20, "ood"):
            assert each(prompt.text)["input_ids"] == prompt.ids
        assert each.decode(ids("c a ! <eos>")) == "c a ! <eos>"
        batch = each(["a", "a b c"], padding=True, return_tensors="pt")
        assert batch["input_ids"][0].tolist() == [PAD, PAD, IDS["a"]]
        assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_model_is_made_from_its_seed_alone(architecture):
    world = World(Toy(architecture=architecture, layers=1))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = world.model(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    same, other = world.model(0), world.model(1)
    assert first.config.model_type == architecture
    for a, b in zip(first.parameters(), same.parameters()):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    assert first.config.vocab_size == len(WORDS) == 32


@pytest.mark.parametrize("changes", [{"held_length": 0}, {"shares": {"copy": 1.0}, "lazy": {}}])
def test_worlds_without_some_shift(changes):
    world = World(Toy(**changes))
    assert "length" not in world.shifts
    assert {p.domain for p in world.prompts(60, "ood")} == set(world.shifts)


def test_a_world_without_room_says_so():
    world = World(Toy(min_length=3, max_length=3, held_length=3))
    with pytest.raises(ValueError, match="no letters left for split train"):
        world.prompts(100, "train")

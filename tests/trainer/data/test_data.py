"""Data as people have it: every form, and for every mistake one line that says where it is."""

import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.trainer import tiny
from trainer.batch.sequences import Sequences
from trainer.batch.types import Pair
from trainer.config import load
from trainer.data import encode, sources
from trainer.data.errors import DataError
from trainer.models import loading
from trainer.models.policy import log_probabilities
from trainer.rollout.make import make_engine
from trainer.worlds.toy import EOS, WORDS, World


@pytest.fixture
def rows(tmp_path):
    """rows(row, row ...) -> the path of a .jsonl file with them; text goes in as it is."""

    def write(*lines, name="data.jsonl"):
        path = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts))
        return str(path)

    return write


def config(**sources):
    return load("toy", [f"data.{key}={json.dumps(value)}" for key, value in sources.items()])


def prompts(tokenizer, path, **more):
    return sources.load_prompts(config(prompts=path, **more), "train", tokenizer)


def pairs(tokenizer, path, **more):
    return sources.load_pairs(config(pairs=path, **more), tokenizer)


def demonstrations(tokenizer, path, **more):
    return sources.load_demonstrations(config(demonstrations=path, **more), tokenizer)


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


USER = {"role": "user", "content": "how are you"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("fine thanks", "bad"))


# Prompts.


def test_prompts_as_text_and_as_messages(tokenizer, rows):
    path = rows(
        {"prompt": "hi there", "domain": "greeting", "key": 7},
        "",
        {"prompt": [USER]},
        {"messages": [USER, GOOD]},  # an answer at the end is not the prompt
        {"messages": [USER, GOOD, USER], "domain": 3},
    )
    first, second, third, fourth = prompts(tokenizer, path)
    assert (words(tokenizer, first.ids), first.text) == ("hi there", "hi there")
    assert first.domain == "greeting" and first.meta["key"] == 7
    assert second.text == third.text == "user : how are you assistant :"
    assert words(tokenizer, second.ids) == second.text and second.domain is None
    assert fourth.text.count("how are you") == 2 and fourth.domain == "3"


def test_columns_by_other_names_and_inside_others(tokenizer, rows):
    path = rows({"q": {"text": "hi there"}, "info": {"topic": "t"}})
    columns = {"prompt": "q.text", "domain": "info.topic"}
    (prompt,) = prompts(tokenizer, path, columns=columns)
    assert prompt.text == "hi there" and prompt.domain == "t"


def test_parquet_gzip_and_a_datasets_folder_hold_the_same(tokenizer, rows, tmp_path):
    import datasets

    lines = [{"prompt": "hi there"}, {"prompt": "how are you"}]
    expected = prompts(tokenizer, rows(*lines))
    table = datasets.Dataset.from_list(lines)
    table.to_parquet(str(tmp_path / "data.parquet"))
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "two"))
    for source in ("data.parquet", "data.jsonl.gz", "one", "two", "two:test"):
        assert prompts(tokenizer, str(tmp_path / source)) == expected
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prompts(tokenizer, f"{folder}:train") == expected


def test_limits(tokenizer, rows, caplog):
    path = rows(*[{"prompt": "hi " * n} for n in (1, 2, 3, 9)])
    assert len(prompts(tokenizer, path, limit=2)) == 2
    kept = prompts(tokenizer, path, max_prompt_tokens=3, too_long="drop")
    assert [len(p.ids) for p in kept] == [1, 2, 3]
    assert "left out 1 of 4" in caplog.text
    with pytest.raises(DataError, match=r"data.jsonl:4: prompt of 9 tokens is over"):
        prompts(tokenizer, path, max_prompt_tokens=3)
    with pytest.raises(DataError, match="no row is left of 4"):
        prompts(tokenizer, rows(*[{"prompt": "hi hi"}] * 4), max_prompt_tokens=1, too_long="drop")


# Pairs.


def the_pair(tokenizer, path, **more):
    (pair,) = pairs(tokenizer, path, **more)
    return [words(tokenizer, ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi there", "chosen": "fine", "rejected": "bad"},
        {"prompt": "hi there", "chosen": "hi there fine", "rejected": "hi there bad"},
        {"chosen": "hi there fine", "rejected": "hi there bad"},
        {"prompt": "hi there", "chosen": [GOOD | {"content": "fine"}], "rejected": [BAD]},
    ],
)
def test_pairs_of_text(tokenizer, rows, row):
    expected = ["hi there", "fine <eos>", "bad <eos>"]
    assert the_pair(tokenizer, rows(row)) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "fine thanks", "rejected": "bad"},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "how are you", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_pairs_of_messages(tokenizer, rows, row):
    expected = ["user : how are you assistant :", "fine thanks <eos>", "bad <eos>"]
    assert the_pair(tokenizer, rows(row)) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("the answer is yes", "the answer is no", "the answer is"),
        ("the answer is ye", "the answer is yep", "the answer is"),  # not in mid-word
        ("the answer", "the answer is", "the answer"),
        ("the answer is yes", "the\nanswer is no", "the"),
    ],
)
def test_the_common_prefix_is_the_prompt(tokenizer, rows, chosen, rejected, prompt):
    assert the_pair(tokenizer, rows({"chosen": chosen, "rejected": rejected}))[0] == prompt


def test_margins_and_ratings(tokenizer, rows):
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": 2, "score_chosen": 4.5}
    path = rows(row | {"score_rejected": 1.5})
    (pair,) = pairs(tokenizer, path, columns={"rating": "score"})
    assert (pair.margin, pair.rating_chosen, pair.rating_rejected) == (2.0, 4.5, 1.5)
    (pair,) = pairs(tokenizer, path)
    assert (pair.margin, pair.rating_chosen) == (2.0, None)


def test_pairs_of_two_equal_answers_are_left_out(tokenizer, rows, caplog):
    good = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    path = rows(good, good | {"chosen": "no"})
    assert len(pairs(tokenizer, path)) == 1 and "1 pairs of two equal answers" in caplog.text


# The formats of the papers' data.

TALK = "\n\nHuman: hi there\n\nAssistant: hi\n\nHuman: how are you\n\nAssistant:"
HH = {"chosen": f"{TALK} fine thanks", "rejected": f"{TALK} bad"}
POST = {"subreddit": "pets", "title": "Help", "post": "my cat ran away"}
TLDR = {
    "info": {"id": "t3", **POST, "site": None, "article": None},
    "summaries": [{"text": " cat ran", "policy": "a"}, {"text": " cat came back", "policy": "b"}],
    "choice": 1,
    "worker": "w",
}
TLDR_PROMPT = "SUBREDDIT: r/pets TITLE: Help POST: my cat ran away TL;DR:"


def test_anthropic_hh_as_it_is(tokenizer, rows):
    path = rows(HH)
    prompt = "Human: hi there Assistant: hi Human: how are you Assistant:"
    assert the_pair(tokenizer, path) == [prompt, "fine thanks <eos>", "bad <eos>"]
    (demonstration,) = demonstrations(tokenizer, path)
    assert [words(tokenizer, ids) for ids in demonstration] == [prompt, "fine thanks <eos>"]
    (only,) = prompts(tokenizer, path)
    assert words(tokenizer, only.ids) == prompt
    assert only.text == TALK


def test_anthropic_hh_through_a_chat_template(tokenizer, rows):
    prompt = "user : hi there assistant : hi user : how are you assistant :"
    got = the_pair(tokenizer, rows(HH), parse_dialogues=True)
    assert got == [prompt, "fine thanks <eos>", "bad <eos>"]


def test_anthropic_hh_where_both_answers_begin_alike(tokenizer, rows):
    start = "\n\nHuman: hi there\n\nAssistant:"
    row = {"chosen": f"{start} the answer is yes", "rejected": f"{start} the answer is no"}
    expected = ["Human: hi there Assistant:", "the answer is yes <eos>", "the answer is no <eos>"]
    assert the_pair(tokenizer, rows(row)) == expected


def test_tldr_comparisons_as_they_are(tokenizer, rows):
    path = rows(TLDR)
    expected = [TLDR_PROMPT, "cat came back <eos>", "cat ran <eos>"]
    assert the_pair(tokenizer, path) == expected
    (prompt,) = prompts(tokenizer, path, columns={"domain": "info.subreddit"})
    assert words(tokenizer, prompt.ids) == TLDR_PROMPT and prompt.domain == "pets"
    (demonstration,) = demonstrations(tokenizer, path)
    assert words(tokenizer, demonstration[1]) == "cat came back <eos>"


@pytest.mark.parametrize("answer", ["response", "completion", "label"])
def test_tldr_demonstrations_in_their_several_forms(tokenizer, rows, answer):
    ((prompt, response),) = demonstrations(tokenizer, rows({"prompt": "hi", answer: "yes"}))
    assert (words(tokenizer, prompt), words(tokenizer, response)) == ("hi", "yes <eos>")


def test_demonstrations_of_messages(tokenizer, rows):
    for row in ({"messages": [USER, GOOD]}, {"prompt": [USER], "completion": [GOOD]}):
        ((prompt, answer),) = demonstrations(tokenizer, rows(row))
        assert words(tokenizer, prompt) == "user : how are you assistant :"
        assert words(tokenizer, answer) == "fine thanks <eos>"


# The toy world.


def test_the_toy_world_through_the_same_door():
    tokenizer = World(load("toy").toy).tokenizer()
    settings = load("toy", ["eval.samples_per_domain=5", "toy.prompts=50", "toy.demonstrations=30"])
    assert len(sources.load_prompts(settings, "train", tokenizer)) == 50
    assert len(sources.load_prompts(settings, "eval", tokenizer)) == 5 * 4
    assert len(sources.load_prompts(settings, "ood", tokenizer)) == 5 * 3
    assert len(sources.load_demonstrations(settings, tokenizer)) == 30
    none = load("toy", ["data.ood_prompts="])
    assert sources.load_prompts(none, "ood", tokenizer) == []


def test_a_file_of_toy_prompts_is_the_same_as_the_world(rows):
    world = World(load("toy").toy)
    made = world.prompts(20)
    path = rows(*[{"prompt": p.text, "domain": p.domain} for p in made])
    read = prompts(world.tokenizer(), path)
    assert [(p.ids, p.domain) for p in read] == [(p.ids, p.domain) for p in made]


def test_toy_data_with_another_tokenizer_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"data.prompts: toy wants the toy world's tokenizer"):
        prompts(tokenizer, "toy")


# What is wrong, and where.


@pytest.mark.parametrize(
    ("load_it", "line", "message"),
    [
        (prompts, '{"prompt": "hi"', "data.jsonl:2: not JSON: Expecting"),
        (prompts, "[1]", "data.jsonl:2: is list; want an object"),
        (prompts, {"text": "hi"}, ":2: no column prompt or messages; there are text"),
        (prompts, {"prompt": None}, ":2: no column prompt or messages"),
        (prompts, {"prompt": "  "}, ":2: empty prompt"),
        (prompts, {"prompt": []}, ":2: prompt: no messages"),
        (prompts, {"prompt": [{"role": "user", "content": ""}]}, ":2: empty prompt"),
        (prompts, {"prompt": 3}, ":2: prompt: is int; want text or a list of messages"),
        (prompts, {"prompt": [{"role": "user"}]}, ":2: prompt: want messages, each with"),
        (prompts, {"prompt": "hi " * 33}, ":2: prompt of 33 tokens is over data.max_prompt"),
        (pairs, {"prompt": "hi", "chosen": "yes"}, ":2: no column rejected; there are prompt, "),
        (pairs, {"chosen": "yes", "rejected": "no"}, ":2: empty prompt"),
        (pairs, {"chosen": "hi yes", "rejected": [BAD]}, ":2: rejected: want the same form"),
        (pairs, {"chosen": [USER], "rejected": [USER]}, ":2: chosen: want one message of role"),
        (
            pairs,
            {"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": []},
            ":2: margin: is",
        ),
        (pairs, TLDR | {"choice": 2}, ":2: choice: is 2; want 0 or 1"),
        (pairs, TLDR | {"summaries": []}, ":2: summaries: want two"),
        (pairs, TLDR | {"info": {"post": ""}}, ":2: info.post: missing"),
        (demonstrations, {"prompt": "hi"}, ":2: no column response or completion or label"),
        (demonstrations, {"messages": [USER]}, ":2: messages: want messages that end in one"),
        (demonstrations, {"chosen": "hi"}, r":2: chosen: no prompt column, and no"),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(tokenizer, rows, load_it, line, message):
    good = {"prompt": "hi", "chosen": "yes", "rejected": "no", "response": "yes"}
    path = rows(good, line)
    with pytest.raises(DataError) as error:
        load_it(tokenizer, path)
    assert str(error.value).startswith(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_not_text(tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "hi"}\n{"prompt": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"data.jsonl:2: not JSON"):
        prompts(tokenizer, str(path))


def test_sources_that_are_not_there(tokenizer, rows, tmp_path):
    with pytest.raises(DataError, match=r"data.prompts: /none.jsonl: no such file"):
        prompts(tokenizer, "/none.jsonl")
    with pytest.raises(DataError, match=r"data.pairs: ./no/folder: no such file or folder"):
        pairs(tokenizer, "./no/folder")
    with pytest.raises(DataError, match="no rows"):
        prompts(tokenizer, rows())
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"bad.parquet: not parquet"):
        prompts(tokenizer, str(tmp_path / "bad.parquet"))
    (tmp_path / "bad.jsonl.gz").write_text("no gzip")
    with pytest.raises(DataError, match=r"bad.jsonl.gz: .*gzip"):
        prompts(tokenizer, str(tmp_path / "bad.jsonl.gz"))


def test_tokenizers_that_lack_something(rows):
    path = rows({"prompt": "copy copy a b :"})
    tokenizer = World(load("toy").toy).tokenizer()
    with pytest.raises(DataError, match=r"data.jsonl:1: messages, but .* no chat template"):
        prompts(tokenizer, rows({"prompt": [USER]}))
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no eos_token"):
        prompts(tokenizer, path)


@pytest.mark.parametrize(
    ("added", "pad"),
    [
        ([], "<eos>"),
        (["<|im_start|>"], "<eos>"),
        (["<|reserved_special_token_0|>", "<|eot_id|>"], "<|reserved_special_token_0|>"),
        (
            ["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"],
            "<|finetune_right_pad_id|>",
        ),
        (["[PAD]"], "[PAD]"),
    ],
)
def test_a_pad_token_is_found(added, pad):
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "a", *added])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.add_special_tokens(added)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    assert encode.ready(tokenizer).pad_token == pad
    assert len(tokenizer) == len(words)


def test_padding_with_eos_changes_nothing(base):
    """Masks come from lengths: an EOS that ends an answer is one of its tokens, one that fills up
    a row is none."""
    made = tiny.config("unused")
    tokenizer = loading.load_tokenizer("toy", made)
    policy = loading.load_policy(str(base.model("sft")), made)
    asked, said = [[5, 6, 11, 3], [5, 6, 11, 12, 13, 3]], [[11, 1], [11, 12, 13, 1]]
    outs, drawn = [], []
    for pad in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        tokenizer.pad_token_id = pad  # what a rollout fills prompts up with, and answers
        engine = make_engine(made, tokenizer)
        engine.sync(policy)
        drawn.append(engine.generate(asked, 2, torch.Generator().manual_seed(0)))
        batch = Sequences.of(asked, said)
        assert batch.answer_lengths.tolist() == [2, 4]
        outs.append(policy(batch, log_probabilities()).logprobs)
    assert torch.equal(*outs)
    assert torch.equal(*(rollout.sequences.tokens for rollout in drawn))
    assert torch.equal(*(rollout.logprobs for rollout in drawn))


# What the chat template is given.


def test_a_system_prompt_where_there_is_none(tokenizer, rows):
    own = {"role": "system", "content": "yes"}
    path = rows({"prompt": [USER]}, {"prompt": [own, USER]})
    first, second = prompts(tokenizer, path, system_prompt="no")
    assert first.text == "system : no user : how are you assistant :"
    assert first.messages == [{"role": "system", "content": "no"}, USER]
    assert second.text == "system : yes user : how are you assistant :"


def test_plain_text_as_a_users_message(tokenizer, rows):
    path = rows({"prompt": "how are you"})
    with pytest.raises(DataError, match=r"data.jsonl:1: data.system_prompt is for messages, and"):
        prompts(tokenizer, path, system_prompt="no")
    (prompt,) = prompts(tokenizer, path, as_messages=True)
    assert prompt.text == "user : how are you assistant :" and prompt.messages == [USER]
    assert prompts(tokenizer, path)[0].messages is None


def test_the_template_is_given_what_is_asked_for(tokenizer, rows):
    before = tokenizer.chat_template
    tokenizer.chat_template = before + "{% if enable_thinking %} thanks{% endif %}"
    path = rows({"prompt": [USER]})
    texts = [
        prompts(tokenizer, path, template_kwargs={"enable_thinking": on})[0].text
        for on in (True, False)
    ]
    tokenizer.chat_template = before
    assert texts == ["user : how are you assistant : thanks", "user : how are you assistant :"]


def test_a_long_prompt_may_lose_its_beginning(tokenizer, rows):
    path = rows({"prompt": "hi there how are you", "response": "fine"})
    tight = {"max_prompt_tokens": 2, "too_long": "truncate_left"}
    (prompt,) = prompts(tokenizer, path, **tight)
    assert prompt.text == "are you" and words(tokenizer, prompt.ids) == "are you"
    ((asked, said),) = demonstrations(tokenizer, path, **tight)
    assert words(tokenizer, asked) == "are you" and words(tokenizer, said) == "fine <eos>"
    with pytest.raises(DataError, match="no row is left of 1"):  # an answer is no place to cut
        demonstrations(tokenizer, path, **tight, max_answer_tokens=1)


def test_answers_end_in_eos_once():
    tokenizer = World(load("toy").toy).tokenizer()
    demonstration = sources.load_demonstrations(load("toy", ["toy.demonstrations=5"]), tokenizer)
    assert all(answer.index(EOS) == len(answer) - 1 for _, answer in demonstration)
    assert WORDS[EOS] == tokenizer.eos_token
    assert Pair(prompt_ids=[], chosen_ids=[], rejected_ids=[]).margin is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, ":1: not JSON"),
        (b'{"prompt": "a \\ud800 b"}\n', ":1: not text: half of a character"),
        (b'{"chosen": "a", "rejected": "b", "prompt": "c", "margin": Infinity}', "margin: is inf"),
        (b'{"chosen": "a", "rejected": "b", "prompt": "c", "margin": 1' + b"0" * 400 + b"}\n",
         "want a number below 1e30"),
    ],
)  # fmt: skip
def test_hostile_rows_are_one_line(tmp_path, content, message):
    from trainer.config import load
    from trainer.data.errors import DataError
    from trainer.data.sources import load_pairs, load_prompts
    from trainer.worlds.toy import World

    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    config = load("toy", [f"data.prompts={path}", f"data.pairs={path}"])
    tokenizer = World(config.toy).tokenizer()
    with pytest.raises(DataError) as refused:
        load_pairs(config, tokenizer) if b"chosen" in content else load_prompts(
            config, "train", tokenizer
        )
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_special_tokens_in_text_are_counted(tmp_path, caplog):
    from trainer.config import load
    from trainer.data.sources import load_demonstrations
    from trainer.worlds.toy import World

    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"prompt": "copy a :", "response": "a"}\n{"prompt": "copy <eos> b :", "response": "b"}\n'
        '{"prompt": "copy c :", "response": "c <eos> d"}\n'
    )
    config = load("toy", [f"data.demonstrations={path}"])
    load_demonstrations(config, World(config.toy).tokenizer())
    assert "1 of 3 prompts spell special tokens" in caplog.text
    assert "1 of 3 answers spell special tokens" in caplog.text
    assert "the first is <eos> in row 3" in caplog.text

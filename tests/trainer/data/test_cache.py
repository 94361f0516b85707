"""Rows are tokenised once: found again for the same file and settings, and for no others."""

import pytest

from trainer.config import load
from trainer.data import cache, sources
from trainer.data.errors import DataError


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "hi there", "response": "fine", "k": [1, {"a": null}]}\n' * 3)
    return path


def prompts(tokenizer, source, folder, *overrides):
    config = load("toy", [f"data.prompts={source}", f"data.cache={folder}", *overrides])
    return sources.load_prompts(config, "train", tokenizer)


def files(folder):
    return sorted(folder.glob("*")) if folder.exists() else []


def test_the_second_time_nothing_is_tokenised(tokenizer, source, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    first = prompts(tokenizer, source, folder)
    (kept,) = files(folder)
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(sources, "encode_prompts", lambda *_: pytest.fail("tokenised again"))
    again = prompts(tokenizer, source, folder)
    assert again == first and files(folder) == [kept] and kept.stat().st_mtime_ns == before
    assert first[0].meta == {"prompt": "hi there", "response": "fine", "k": [1, {"a": None}]}


def test_without_a_cache_the_same_and_nothing_written(tokenizer, source, tmp_path, own_cache):
    assert prompts(tokenizer, source, "none") == prompts(tokenizer, source, tmp_path / "cache")
    assert files(own_cache) == []
    prompts(tokenizer, source, "''")
    assert len(files(own_cache / "gi")) == 1


@pytest.mark.parametrize(
    "override",
    ["data.max_prompt_tokens=31", "data.columns.domain=k", "data.limit=2", "data.too_long=drop"],
)
def test_other_settings_are_other_rows(tokenizer, source, tmp_path, override):
    folder = tmp_path / "cache"
    prompts(tokenizer, source, folder)
    prompts(tokenizer, source, folder, override)
    assert len(files(folder)) == 2


def test_a_changed_file_and_another_tokenizer_are_other_rows(tokenizer, source, tmp_path):
    folder = tmp_path / "cache"
    assert prompts(tokenizer, source, folder)[0].text == "hi there"
    source.write_text('{"prompt": "no cat"}\n')
    assert [p.text for p in prompts(tokenizer, source, folder)] == ["no cat"]
    one = cache.tokenizer_hash(tokenizer)
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages }}"
    assert cache.tokenizer_hash(tokenizer) != one
    tokenizer.chat_template = template
    assert cache.tokenizer_hash(tokenizer) == one


def test_what_was_left_out_is_said_again(tokenizer, source, tmp_path, caplog):
    source.write_text('{"prompt": "hi there how are you"}\n{"prompt": "hi"}\n')
    tight = ("data.max_prompt_tokens=2", "data.too_long=drop")
    for _ in range(2):
        caplog.clear()
        prompts(tokenizer, source, tmp_path / "cache", *tight)
        assert "left out 1 of 2 rows, too long" in caplog.text


def test_bad_rows_leave_no_file(tokenizer, source, tmp_path):
    source.write_text('{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"data.jsonl:1: prompt: is int"):
        prompts(tokenizer, source, tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_written(tokenizer, source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache: .*; data.cache=none does without"):
        prompts(tokenizer, source, tmp_path / "file")

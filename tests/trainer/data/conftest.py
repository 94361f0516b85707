"""A tokenizer of the tests' words."""

import pytest

TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"


@pytest.fixture(scope="module")
def tokenizer():
    """Words of the tests' texts, one token each, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = "Human: Assistant: hi there how are you fine bad thanks yes no the answer is user : "
    texts += "assistant system POST: TITLE: SUBREDDIT: r/pets my cat ran away Help TL;DR: came "
    texts += "back ye yep"
    words = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(texts.split())]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer

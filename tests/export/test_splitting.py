"""Which of llama.cpp's pre-tokenizers a tokenizer is."""

import pytest
from plain_tokenizers import plain_bpe
from tokenizers import pre_tokenizers

from hfsft.data.tasks import facts
from hfsft.errors import ModelError
from hfsft.export.splitting import NAMES, PASSAGES, choose_splitting, passages, split_as
from hfsft.tokens.tokenizer import train_tokenizer

# numbers of several digits, so that the regexes make different tokens
NUMBERS = [f"{number} {number * 37} " for number in range(3000)]


@pytest.fixture(scope="module", params=["qwen2", "llama-bpe", "nanochat"])
def trained(request):
    return request.param, train_tokenizer([*NUMBERS, *facts()], 800, request.param)


def test_passages_are_a_thousand_and_always_the_same():
    assert len(passages()) == PASSAGES == len(set(passages()))
    passages.cache_clear()
    first = passages()
    passages.cache_clear()
    assert passages() == first


def test_a_trained_tokenizer_has_the_name_it_was_trained_with(trained):
    name, tokenizer = trained
    found, differing = choose_splitting(tokenizer, "model")
    if name == "nanochat":  # as no reader splits: how many passages differ is said
        assert found in NAMES and 0 < differing < PASSAGES
    else:
        assert (found, differing) == (name, 0)


def test_numbers_are_split_as_the_name_says(trained):
    name, tokenizer = trained
    longest = {"qwen2": 1, "llama-bpe": 3, "nanochat": 2}[name]
    tokens = [token for token in tokenizer.get_vocab() if token.isdigit()]
    assert max(map(len, tokens)) == longest


def test_a_plain_byte_level_tokenizer_is_one_without_llama_s_regex():
    found, differing = choose_splitting(plain_bpe("<|end|>"), "model")
    assert found in ("smollm", "gpt-2") and differing == 0  # its 300 tokens hold no two digits


def test_a_foreign_regex_that_splits_otherwise_is_refused_with_the_count():
    tokenizer = plain_bpe("<|end|>")
    words = pre_tokenizers.Split(" ", behavior="removed")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    with pytest.raises(ModelError) as refused:
        choose_splitting(tokenizer, "model")
    assert str(refused.value).startswith("model: llama.cpp has no pre-tokenizer that splits text")
    assert "of 1,000 passages otherwise" in str(refused.value)


def test_another_kind_of_tokenizer_is_refused(tokenizer):
    other = plain_bpe("<|end|>")
    other.backend_tokenizer.model.byte_fallback = True
    with pytest.raises(ModelError, match="not a byte-level BPE"):
        choose_splitting(other, "model")


def test_a_copy_is_split_and_the_original_stays(tokenizer):
    copy = split_as(tokenizer.backend_tokenizer, "gpt-2")
    assert copy.encode("a 12").ids != [] and copy.to_str() != tokenizer.backend_tokenizer.to_str()
    assert choose_splitting(tokenizer, "model") == ("qwen2", 0)

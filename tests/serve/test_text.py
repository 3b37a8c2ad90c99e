"""An answer's text, token by token: the text of all tokens, whole characters, stop strings."""

import pytest
import torch

from hfsft.evaluation.answering import TOOL_TOKENS, Evaluator
from hfsft.serve.text import AnswerText


def pieces(tokenizer, ids: list[int], *stop: str, calculator: bool = True) -> list[str]:
    text = AnswerText(tokenizer, calculator, stop)
    return [*(text.add(token) for token in ids), text.end()]


def test_random_tokens_have_the_text_that_eval_decodes(folders):
    evaluator = Evaluator(folders("nanochat"))
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(0, 512, (30,), generator=random).tolist()
        assert "".join(pieces(evaluator.tokenizer, ids)) == evaluator._text(ids)


def test_a_character_comes_whole(tokenizer):
    ids = tokenizer("a😀é!", add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(ids) >= 7 and "".join(found) == "a😀é!"
    assert not any("\ufffd" in piece for piece in found)
    assert "".join(pieces(tokenizer, ids[:2])) == "a\ufffd"  # it never becomes whole


def test_a_calculator_call_and_its_result(tokenizer):
    call, end, output, output_end = tokenizer.convert_tokens_to_ids(list(TOOL_TOKENS))
    six, result = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("6*7", "42"))
    ids = [call, *six, end, output, *result, output_end]
    assert "".join(pieces(tokenizer, ids)) == "<<6*7=42>>"
    assert "".join(pieces(tokenizer, [call, *six, end])) == "<<6*7>>"
    assert "".join(pieces(tokenizer, ids, calculator=False)) == "6*742"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("stop",), "we never "),
        (("never stopped",), "we never stop"),
        (("x", "ver"), "we ne"),
        (("op", "stop"), "we never "),
    ],
)
def test_the_first_stop_string_ends_it(tokenizer, stop, expected):
    ids = tokenizer("we never stop", add_special_tokens=False)["input_ids"]
    text = AnswerText(tokenizer, False, stop)
    found = ""
    for token in ids:
        found += text.add(token)
        assert expected.startswith(found)  # nothing that a stop string takes away was sent
    assert found + text.end() == expected
    assert text.is_stopped == (expected != "we never stop")

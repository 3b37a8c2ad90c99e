"""Rows that join and leave have the logits of prompts computed alone."""

import pytest
import torch

from hfsft.serve.batch import Batch

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33], [40]]


def alone(model, ids: list[int]) -> torch.Tensor:
    """The logits after a text, from one call without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("model_type", ["nanochat", "llama"])
def test_rows_join_and_leave(make_model, model_type):
    model = make_model(model_type)
    batch, texts = Batch(model), [list(prompt) for prompt in PROMPTS[:2]]
    logits = batch.join(texts)

    def check() -> None:
        expected = torch.stack([alone(model, text) for text in texts[-len(logits) :]])
        assert torch.allclose(logits, expected, atol=1e-4)

    def step() -> torch.Tensor:
        tokens = [100 + row for row in range(len(texts))]
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        return batch.step(tokens)

    check()
    for _ in range(3):
        logits = step()
        check()
    texts += [list(prompt) for prompt in PROMPTS[2:]]
    logits = batch.join(PROMPTS[2:])
    check()
    logits = step()
    check()
    texts = [texts[1], texts[3]]  # the two shortest: padding that none of them needs goes
    batch.keep([1, 3])
    assert batch.lengths == [6, 2]
    assert batch.cache.get_seq_length() == 6
    logits = step()
    check()
    batch.keep([])
    texts = [list(PROMPTS[0])]
    logits = batch.join(texts)
    check()


def test_logits_alone_are_those_of_generate_bit_by_bit(make_model):
    model = make_model("nanochat")
    prompt, answer = [5, 6, 7], []
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 3, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    batch = Batch(model)
    for expected in output.logits:
        assert torch.equal(batch.alone(prompt, answer), expected[0])
        answer.append(int(expected.argmax()))


def test_memory_of_a_position(make_model):
    batch = Batch(make_model("llama"))
    batch.join(PROMPTS[:2])
    assert batch.bytes_per_token() == 2 * 2 * 64 * 4  # keys and values, layers, width, float32

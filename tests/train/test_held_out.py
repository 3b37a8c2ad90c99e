"""Validation: the same tokens every time, by source, in bits per byte, within its budget."""

import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from hfsft.tokens.encoding import IGNORED
from hfsft.train.held_out import (
    FEWEST,
    HeldOut,
    documents_within,
    evaluations,
    greedy_answers,
    validation_metrics,
)


def rows(*sources: str, tokens: int = 10) -> datasets.Dataset:
    ids = [list(range(10, 10 + tokens))] * len(sources)
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "source": list(sources)})


def args(max_steps: int = 200, eval_steps: float = 50, **settings):
    return SimpleNamespace(
        max_steps=max_steps,
        eval_steps=eval_steps,
        eval_strategy="steps",
        activation_checkpointing=False,
        **settings,
    )


@pytest.mark.parametrize(
    ("max_steps", "eval_steps", "count"), [(200, 50, 5), (200, 0.25, 5), (10, 4, 4), (3, 0.25, 4)]
)
def test_it_counts_the_evaluations_of_a_stage(max_steps, eval_steps, count):
    assert evaluations(args(max_steps, eval_steps)) == count


def test_the_budget_counts_tokens(make_stage):
    held_out, stage = HeldOut(rows(*["a"] * 1000)), make_stage()
    # 5% of the time: 1/19 of the training's; a trained token costs three forwards, 5 evaluations
    train_tokens = 200 * 32 * 10
    count = documents_within(0.05, held_out, stage, args(), train_tokens)
    assert count == int(train_tokens / 19 * 3 / 5 / 10) == 202
    checkpointing = args()
    checkpointing.activation_checkpointing = True
    assert documents_within(0.05, held_out, stage, checkpointing, train_tokens) == 269
    lora = make_stage(lora={"r": 4})
    assert documents_within(0.05, held_out, lora, args(), train_tokens) == 134
    assert documents_within(1.0, held_out, stage, args(), train_tokens) == 1000
    assert documents_within(0.05, held_out, stage, args(), 10) == FEWEST
    assert documents_within(0.05, HeldOut(rows("a", "a")), stage, args(), 10) == 2


def test_a_sample_is_seeded_and_keeps_what_belongs_to_each_row():
    names = [f"source {i}" for i in range(50)]
    held_out = HeldOut(rows(*names))
    first, again, other = held_out.sample(5, 1), held_out.sample(5, 1), held_out.sample(5, 2)
    assert first.indices == again.indices == sorted(first.indices) != other.indices
    assert [row["number"] for row in first] == [0, 1, 2, 3, 4]
    assert list(first.by_source()) == [names[index] for index in first.indices]
    # a larger one of the whole set again, as a resumed run asks for it
    assert first.sample(7, 1).indices == held_out.sample(7, 1).indices


def test_sources_have_their_short_names_unless_two_are_alike():
    held_out = HeldOut(rows("HuggingFaceTB/smol-smoltalk", "chats/mine.jsonl.gz", "a/b", "a/b"))
    assert held_out.by_source() == {"smol-smoltalk": [0], "mine": [1], "b": [2, 3]}
    assert HeldOut(rows("x/b", "y/b")).by_source() == {"x/b": [0], "y/b": [1]}


def test_metrics_of_known_losses():
    totals = torch.tensor(
        [[2.0, 4.0, 9.0], [2, 2, 6], [1, 2, 3], [1.0, 3.0, 6.0]], dtype=torch.float64
    )
    found = validation_metrics("eval", HeldOut(rows("a", "b", "b")), totals, 20)
    apart = np.array([2.0, 4.0, 9.0]) - 1.5 * np.array([2, 2, 6])
    assert found == {
        "eval_loss": 1.5,
        "eval_loss_error": pytest.approx(math.sqrt(1.5 * (apart**2).sum()) / 10),
        "eval_mean_token_accuracy": 0.6,
        "eval_a_loss": 1.0,
        "eval_b_loss": 13 / 8,
        "eval_bits_per_byte": pytest.approx(10 / math.log(2) / 20),
    }
    alone = validation_metrics("eval", HeldOut(rows("a", "a", "a")), totals, None)
    assert alone.keys() == {"eval_loss", "eval_loss_error", "eval_mean_token_accuracy"}


def test_the_digest_is_of_the_documents(tokenizer):
    def digest(ids, labels) -> str:
        held = {"input_ids": ids, "labels": labels, "source": ["a"] * len(ids)}
        return HeldOut(datasets.Dataset.from_dict(held)).digest

    ids = [[0, 1, 2], [3, 4]]
    found = [digest(ids, ids), digest(ids[::-1], ids[::-1]), digest(ids, [[0, 1, IGNORED], [3, 4]])]
    assert len({*found, digest([[0, 1], [2, 3, 4]], [[0, 1], [2, 3, 4]])}) == 4
    assert digest(ids, ids) == found[0]


def test_bytes_are_those_of_the_predicted_text(tokenizer):
    text = "Grüße aus der Küche"
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    # of a chat: the end token counts no byte, and what is not trained on none either
    labels = [IGNORED] * 3 + ids[3:]
    held = datasets.Dataset.from_dict({"input_ids": [ids], "labels": [labels], "source": ["a"]})
    expected = len(tokenizer.decode(ids[3:]).encode())
    assert HeldOut(held).text_bytes(tokenizer) == expected
    plain = held.remove_columns("labels")
    assert HeldOut(plain).text_bytes(tokenizer) == len(text.encode()) == 22


def test_answers_in_a_batch_are_those_one_by_one(make_model, tokenizer):
    model = make_model()
    texts = ["Who", "What is the capital of France? Tell me more.", "a b c d"]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    together = greedy_answers(model, tokenizer, prompts, 8)
    assert together == [greedy_answers(model, tokenizer, [ids], 8)[0] for ids in prompts]
    assert len(set(together)) > 1

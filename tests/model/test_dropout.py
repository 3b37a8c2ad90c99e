"""Dropout by token: the same masks wherever a document lies, otherwise as random as torch's."""

import itertools

import pytest
import torch
from torch import nn

from hfsft.data.packing import StepCollator, micro_batches
from hfsft.model.dropout import TokenDropout, drop_by_token

CPU = torch.device("cpu")
WIDTH, P = 256, 0.1


def documents(count: int = 24) -> list[dict[str, list[int]]]:
    made = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(count):
        length = int(torch.randint(5, 30, (), generator=made))
        ids = torch.randint(1, 500, (length,), generator=made).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    return rows


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"one": nn.Dropout(P), "two": nn.Dropout(P), "none": nn.Dropout(0.0)})


def masks_of(model, masks, examples, length, rows) -> dict[tuple[int, ...], list[torch.Tensor]]:
    """The mask of each document, by its ids, after packing into rows of `length`."""
    found = {}
    for part in micro_batches(StepCollator(0, length)(examples), rows):
        masks.begin_micro_batch(part, CPU)
        made = model["one"](torch.ones(*part["input_ids"].shape, WIDTH))
        for row, ids in enumerate(part["input_ids"]):
            starts = [*(part["position_ids"][row] == 0).nonzero().flatten().tolist(), len(ids)]
            for start, end in itertools.pairwise(starts):
                found[tuple(ids[start:end].tolist())] = made[row, start:end]
    return found


def test_a_document_has_its_mask_wherever_it_lies(model):
    masks = drop_by_token(model)
    masks.begin_step(7)
    examples = documents()
    packed = masks_of(model, masks, examples, 60, 3)
    alone = masks_of(model, masks, examples, 40, 1)
    for example in examples:
        ids = tuple(example["input_ids"])
        torch.testing.assert_close(packed[ids], alone[ids], atol=0, rtol=0)
    assert packed[ids].unique().tolist() == pytest.approx([0.0, 1 / (1 - P)])


def test_masks_of_steps_modules_tokens_and_features_are_independent(model):
    masks = drop_by_token(model)
    ids = torch.randint(1, 500, (8, 512), generator=torch.Generator().manual_seed(1))
    part = {"input_ids": ids, "position_ids": torch.arange(512).expand(8, -1)}
    masks.begin_micro_batch(part, CPU)
    ones, dropped = torch.ones(8, 512, WIDTH), []
    for step, name in ((1, "one"), (1, "two"), (2, "one")):
        masks.begin_step(step)
        dropped.append((model[name](ones) == 0).double())
    first = dropped[0]
    pairs = [(first, dropped[1]), (first, dropped[2])]
    pairs += [(first[:, 1:], first[:, :-1]), (first[..., 1:], first[..., :-1])]
    pairs += [(first[1:], first[:-1])]
    # a million elements; of 4,096 masks drawn, about 2,600 are used
    assert first.mean().item() == pytest.approx(P, abs=0.002)
    for one, other in pairs:
        both = (one * other).mean().item() - P * P
        assert abs(both) < 0.001
    assert first.mean(2).std().item() == pytest.approx((P * (1 - P) / WIDTH) ** 0.5, rel=0.1)


def test_what_is_no_vector_of_a_token_is_dropped_as_torch_does(model):
    masks = drop_by_token(model)
    weights = torch.ones(2, 4, 8, 8)
    torch.manual_seed(5)
    expected = nn.functional.dropout(weights, P)
    torch.manual_seed(5)
    assert torch.equal(model["one"](weights), expected)  # no micro-batch yet
    ids = torch.arange(8).expand(2, -1)
    masks.begin_micro_batch({"input_ids": ids, "position_ids": ids}, CPU)
    torch.manual_seed(5)
    assert torch.equal(model["one"](weights), expected)
    assert torch.equal(model.eval()["one"](weights), weights)


def test_only_dropout_that_drops_is_replaced(model):
    assert drop_by_token(model) is not None
    assert [type(model[name]) for name in ("one", "two", "none")] == [
        TokenDropout,
        TokenDropout,
        nn.Dropout,
    ]
    assert drop_by_token(nn.ModuleDict({"none": nn.Dropout(0.0)})) is None

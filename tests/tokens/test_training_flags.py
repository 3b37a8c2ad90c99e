"""What rows say about training, in every spelling: each trained token, or why a row is refused."""

import pytest
from chat_messages import HELLO, assistant, user

from hfsft.tokens.encoding import IGNORED, encode_conversation
from hfsft.tokens.row_formats import read_row
from hfsft.tokens.tokenizer import load_tokenizer
from hfsft.tokens.training_flags import BadRow


@pytest.fixture(scope="module", params=["nanochat", "chatml"])
def own(request, tokenizer, tmp_path_factory):
    """The shared tokenizer with each of hfsft's templates."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder), chat_template=request.param)


def trained(row: dict, name: str, tokenizer, **settings) -> list[str]:
    """The runs of tokens that are trained on, as text, the end of a turn written as `.`."""
    conversation = read_row(row, name)
    ids, labels = encode_conversation(conversation.messages, tokenizer, **settings)
    found, open_run = [], False
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORED:
            found = [*found[:-1], [*found[-1], token]] if open_run else [*found, [token]]
        open_run = label != IGNORED
    ends = {"<|assistant_end|>", "<|user_end|>", "<|im_end|>"}
    texts = [tokenizer.decode(run) for run in found]
    for end in ends:
        texts = [text.replace(end, ".") for text in texts]
    return texts


BOTH, LAST = ["no more.", "yes."], ["yes."]

# fields of the first answer, and what is trained on
OF_A_MESSAGE = [
    ({}, BOTH),
    ({"weight": 0}, LAST),
    ({"weight": 0.0}, LAST),
    ({"weight": "0"}, LAST),
    ({"weight": False}, LAST),
    ({"weight": 1}, BOTH),
    ({"weight": 1.0}, BOTH),
    ({"weight": None}, BOTH),
    ({"loss_weight": 0}, LAST),
    ({"loss_weight": 0.0}, LAST),
    ({"loss_weight": 1.0}, BOTH),
    ({"train": False}, LAST),
    ({"train": 0}, LAST),
    ({"train": "false"}, LAST),
    ({"train": "False"}, LAST),
    ({"train": True}, BOTH),
    ({"training": False}, LAST),
    ({"training": True}, BOTH),
    ({"loss": False}, LAST),
    ({"loss": 0}, LAST),
    ({"loss": True}, BOTH),
    ({"mask": True}, LAST),
    ({"mask": 1}, LAST),
    ({"mask": False}, BOTH),
    ({"masked": True}, LAST),
    ({"masked": "true"}, LAST),
    ({"masked": False}, BOTH),
    ({"train": True, "weight": 0}, LAST),  # no counts
    ({"train_detail": []}, LAST),
    ({"train_detail": [(0, 1, False), (2, 6, True)]}, [" more.", "yes."]),
    ({"training_detail": [(2, 6, True)]}, [" more.", "yes."]),
    ({"train_detail": [(0, 1, True)]}, ["no", ".", "yes."]),
    ({"train_detail": [(0, 6, True)]}, BOTH),
    ({"train_detail": [(0, 7, True)]}, BOTH),  # an exclusive end
    ({"train_detail": [(0, 6, False)]}, LAST),
    ({"train_detail": [(0, 6, True), (3, 6, False)]}, ["no", ".", "yes."]),
    ({"train_detail": [(3, 4, True)]}, [".", "yes."]),  # half of a token is not trained on
    ({"train_detail": [(0, 6, True)], "train": False}, LAST),
    ({"content": [{"type": "text", "text": "no"},
                  {"type": "text", "value": " more", "train": False}]}, ["no", ".", "yes."]),
    ({"content": [{"type": "text", "text": "no", "weight": 0},
                  {"type": "text", "text": " more"}]}, [" more.", "yes."]),
    ({"content": [{"type": "text", "text": "no", "train": True},
                  {"type": "text", "text": " more", "weight": 1}]}, BOTH),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), OF_A_MESSAGE, ids=repr)
def test_a_message_s_flag_in_every_spelling(fields, expected, own):
    ranges = {
        name: [
            {"begin_offset": begin, "end_offset": end, "train": flag} for begin, end, flag in held
        ]
        for name, held in fields.items()
        if name.endswith("detail")
    }
    first = assistant("no more") | fields | ranges
    messages = [user("Hi"), first, user("Well?"), assistant("yes")]
    assert trained({"messages": messages}, "messages", own) == expected
    roles = {"user": "human", "assistant": "gpt"}
    turns = [{"from": roles[m["role"]], "value": m["content"]} | m for m in messages]
    for turn in turns:
        del turn["role"], turn["content"]
    assert trained({"conversations": turns}, "sharegpt", own) == expected


@pytest.mark.parametrize(
    ("role", "fields", "expected"),
    [
        ("assistant", {}, LAST),
        ("gpt", {"train": None}, LAST),
        ("assistant", {"weight": 1}, BOTH),
        ("assistant", {"train": False}, LAST),
        ("assistant", {"train_detail": [{"begin_offset": 2, "end_offset": 6, "train": True}]},
         [" more.", "yes."]),
    ],
)  # fmt: skip
def test_a_prompt_s_answers_are_not_trained_on(role, fields, expected, own):
    prompt = [user("Hi"), assistant("no more") | {"role": role} | fields, user("Well?")]
    for completion in ("yes", [assistant("yes")]):
        row = {"prompt": prompt, "completion": completion}
        assert trained(row, "prompt_completion", own) == expected


@pytest.mark.parametrize("flag", [{"train": True}, {"loss_weight": 1.0}])
def test_a_question_that_is_to_be_trained_on(flag, own):
    row = {"messages": [user("Hi"), assistant("Hello"), user("Well?") | flag, assistant("yes")]}
    assert trained(row, "messages", own) == ["Hello.", "Well?.", "yes."]


@pytest.mark.parametrize(("fields", "expected"), [({"train": False}, False), ({}, True)])
def test_with_every_message_trained_those_that_say_no_are_not(fields, expected, own):
    row = {"messages": [user("Hi") | fields, assistant("Hello"), user("Well?"), assistant("x")]}
    text = "".join(trained(row, "messages", own, assistant_only=False))
    assert ("Hi" in text) is expected and "Hello." in text and "Well?" in text


FRACTION = (
    "{} is neither 0 nor 1, and a token is trained on or it is not; to see rows less often, give "
    "them a source with that `weight`"
)
REFUSED_MESSAGES = [
    ({"weight": 0.5}, FRACTION.format("weight")),
    ({"loss_weight": 2}, FRACTION.format("loss_weight")),
    ({"weight": "half"}, "weight is neither true nor false"),
    ({"train": [True]}, "train is neither true nor false"),
    ({"masked": {"a": 1}}, "masked is neither true nor false"),
    ({"loss_mask": 0}, "a field loss_mask, which is not understood"),
    ({"trainable": False}, "a field trainable, which is not understood"),
    ({"Weight": 0}, "a field Weight, which is not understood"),
    ({"lossWeight": 0}, "a field lossWeight, which is not understood"),
    ({"train_detail": "all"}, "train_detail that is not ranges of its content"),
    ({"train_detail": [{"begin_offset": 0, "end_offset": 99, "train": True}]},
     "train_detail that is not ranges of its content"),
    ({"train_detail": [{"begin_offset": 0, "end_offset": 1}]},
     "train_detail that is not ranges of its content"),
    ({"content": [{"type": "text", "text": "a", "weight": 0.3}]},
     FRACTION.format("weight")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason"), REFUSED_MESSAGES, ids=repr)
def test_a_flag_that_is_not_understood_refuses_the_row(fields, reason):
    with pytest.raises(BadRow) as error:
        read_row({"messages": [user("Hi"), assistant("Hello") | fields]}, "messages")
    assert str(error.value) == reason


def test_a_field_that_only_sounds_like_a_flag_is_named():
    row = {"messages": [user("Hi"), assistant("Hello") | {"glossary": "x"}]}
    assert read_row(row, "messages").unused == ("field glossary",)


FORMATS = {
    "messages": {"messages": HELLO},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"},
                                   {"from": "gpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Hi", "output": "Hello"},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
}  # fmt: skip
AVOID, UNTRAINED = "an answer to avoid", "marked as not to train on"
OF_A_ROW = [
    ({"label": True}, None),
    ({"label": 1}, None),
    ({"label": "true"}, None),
    ({"label": "sports"}, None),
    ({"label": 3}, None),
    ({"label": False}, f"{AVOID} (label: false)"),
    ({"label": 0}, None),  # a class
    ({"label": 0.0}, None),
    ({"label": "0"}, None),
    ({"label": "False"}, f"{AVOID} (label: false)"),
    ({"kto_tag": True}, None),
    ({"kto_tag": False}, f"{AVOID} (kto_tag: false)"),
    ({"kto_tag": "false"}, f"{AVOID} (kto_tag: false)"),
    ({"kto_tag": "bad"}, "kto_tag is neither true nor false"),
    ({"weight": 1}, None),
    ({"weight": 0}, f"{UNTRAINED} (weight)"),
    ({"weight": "0.0"}, f"{UNTRAINED} (weight)"),
    ({"weight": 0.25}, FRACTION.format("weight")),
    ({"loss_weight": 0.0}, f"{UNTRAINED} (loss_weight)"),
    ({"train": False}, f"{UNTRAINED} (train)"),
    ({"train": "yes"}, "train is neither true nor false"),
    ({"training": False}, f"{UNTRAINED} (training)"),
    ({"masked": True}, f"{UNTRAINED} (masked)"),
    ({"loss": False}, f"{UNTRAINED} (loss)"),
    ({"loss": 1.73}, None),  # a measurement
    ({"loss_mask": [0, 1]}, "a column loss_mask, which is not understood"),
    ({"weight": float("nan"), "kto_tag": None, "train": ""}, None),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("columns", "reason"), OF_A_ROW, ids=repr)
def test_a_row_s_flag_in_every_spelling_and_format(name, columns, reason):
    row = FORMATS[name] | columns
    if reason is None:
        assert read_row(row, name).messages == HELLO
        return
    with pytest.raises(BadRow) as error:
        read_row(row, name)
    assert str(error.value) == reason


def test_a_label_of_a_multiple_choice_is_not_kto_s():
    row = {"question": "Which?", "choices": ["x", "y"], "answer": 0, "label": 0}
    assert read_row(row, "multiple_choice").messages[1] == assistant("A")

"""Rows of every known format, refusals, and which tokens of a conversation are trained."""

import random
import re

import pytest
from transformers import PreTrainedTokenizerFast

from hfsft.conversations import (
    FORMATS,
    IGNORED,
    BadRow,
    chatml_pieces,
    check_messages,
    detect_format,
    encode_conversation,
    fit_conversation,
    to_messages,
)
from hfsft.errors import DataError
from hfsft.keys import FORMATS as RECIPE_FORMATS
from hfsft.tokenizer import load_tokenizer


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def system(content) -> dict:
    return {"role": "system", "content": content}


@pytest.fixture(scope="module")
def chatml(tokenizer, tmp_path_factory):
    """The shared tokenizer with ChatML's tokens and template."""
    folder = tmp_path_factory.mktemp("chatml")
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder), chat_template="chatml")


# --- formats ---

HELLO = [user("Hi"), assistant("Hello")]
MULTIPLE_CHOICE = (
    "Multiple Choice question: Which is a fruit?\n"
    "- Stone=A\n"
    "- Apple=B\n"
    "- Chair=C\n"
    "\n"
    "Respond only with the letter of the correct answer."
)
GSM8K = (
    "In May she sold 48/2 = <<48/2=24>>24 clips.\n"
    "In all <<48+24=72>>72.\n"
    "#### 72"
)  # fmt: skip
READ = {
    "messages": (
        "messages",
        {"messages": [system("Be kind."), *HELLO, user("And?"), assistant("Fine.")]},
        [system("Be kind."), *HELLO, user("And?"), assistant("Fine.")],
    ),
    "messages of text parts": (
        "messages",
        {"messages": [user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
                      assistant([{"type": "text", "text": "Hello"}])]},
        HELLO,
    ),
    "messages with other roles' names": (
        "messages",
        {"messages": [{"role": "human", "content": "Hi"}, {"role": "model", "content": "Hello"}]},
        HELLO,
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
         "system": "Be kind."},
        [system("Be kind."), *HELLO],
    ),
    "sharegpt with role and content": (
        "sharegpt",
        {"conversations": [*HELLO], "system": None},
        HELLO,
    ),
    "prompt and completion as text": (
        "prompt_completion",
        {"prompt": "Hi", "completion": " Hello\n"},
        HELLO,
    ),
    "prompt and completion as messages": (
        "prompt_completion",
        {"prompt": [system("Be kind."), user("Hi")], "completion": [assistant("Hello")]},
        [system("Be kind."), *HELLO],
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Greet.", "input": "Hi", "output": "Hello", "system": "Be kind."},
        [system("Be kind."), user("Greet.\n\nHi"), assistant("Hello")],
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Hi", "input": "", "output": "Hello"},
        HELLO,
    ),
    "multiple choice as in ARC": (
        "multiple_choice",
        {"question": "Which is a fruit?",
         "choices": {"text": ["Stone", "Apple", "Chair"], "label": ["A", "B", "C"]},
         "answerKey": "B"},
        [user(MULTIPLE_CHOICE), assistant("B")],
    ),
    "multiple choice as in MMLU": (
        "multiple_choice",
        {"question": "Which is a fruit?", "subject": "food",
         "choices": ["Stone", "Apple", "Chair"], "answer": 1},
        [user(MULTIPLE_CHOICE), assistant("B")],
    ),
    "gsm8k": (
        "gsm8k",
        {"question": "How many?", "answer": GSM8K},
        [
            user("How many?"),
            assistant([
                {"type": "text", "text": "In May she sold 48/2 = "},
                {"type": "python", "text": "48/2"},
                {"type": "python_output", "text": "24"},
                {"type": "text", "text": "24 clips.\nIn all "},
                {"type": "python", "text": "48+24"},
                {"type": "python_output", "text": "72"},
                {"type": "text", "text": "72.\n#### 72"},
            ]),
        ],
    ),
    "gsm8k without a calculation": (
        "gsm8k",
        {"question": "Hi", "answer": "Hello"},
        HELLO,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_format_is_told_and_read(case):
    name, row, messages = READ[case]
    assert detect_format(list(row), "x") == name
    assert to_messages(row, name) == messages


def test_the_recipe_names_every_format():
    assert set(RECIPE_FORMATS) == {*FORMATS, "text"}


def test_undetected_format_lists_columns_and_formats():
    with pytest.raises(DataError) as error:
        detect_format(["chat", "id"], "rows.jsonl")
    assert str(error.value) == (
        "rows.jsonl: cannot tell the format from its columns chat, id\n"
        "  Known: messages (messages); sharegpt (conversations); "
        "prompt_completion (prompt, completion); alpaca (instruction, output); "
        "multiple_choice (question, choices); gsm8k (question, answer). "
        "Rename with `columns: {messages: YOUR_COLUMN}`"
    )
    with pytest.raises(DataError, match=r"columns \(none\)"):
        detect_format([], "rows.jsonl")


IMAGE = [{"type": "image", "url": "x"}]
REFUSED = [
    # rows that are not of their format
    ("messages", {}, "not a row of format messages"),
    ("sharegpt", {"conversations": "Hi"}, "no messages"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, "x"]},
     "a message that is not a mapping"),
    ("prompt_completion", {"prompt": 5, "completion": "Hello"}, "content that is not text"),
    ("alpaca", {"instruction": None, "input": None, "output": "Hello"}, "empty content"),
    ("multiple_choice", {"question": "?", "choices": ["x", "y"], "answer": 2},
     "the answer is none of the choices"),
    ("multiple_choice", {"question": "?", "choices": "['x', 'y']", "answer": 0},
     "choices that are no list"),
    ("multiple_choice", {"question": None, "choices": ["x", "y"], "answer": 0}, "empty content"),
    ("multiple_choice", {"question": "?", "choices": ["x", None], "answer": 0}, "empty content"),
    ("multiple_choice",
     {"question": "?", "choices": {"text": ["x"], "label": ["A", "B"]}, "answerKey": "A"},
     "not a row of format multiple_choice"),
    ("gsm8k", {"question": "?", "answer": 5}, "not a row of format gsm8k"),
    ("gsm8k", {"question": "?", "answer": "<<5>>5"}, "a calculation without a result"),
    ("gsm8k", {"question": "?", "answer": ""}, "empty content"),
    # messages that are no conversation
    ("messages", {"messages": None}, "no messages"),
    ("messages", {"messages": []}, "no messages"),
    ("messages", {"messages": "Hi"}, "no messages"),
    ("messages", {"messages": ["Hi", "Hello"]}, "a message that is not a mapping"),
    ("messages", {"messages": [user("Hi"), {"role": "tool", "content": "5"}]}, "unknown role"),
    ("messages", {"messages": [user("Hi"), {"content": "Hello"}]}, "unknown role"),
    ("messages", {"messages": [{"role": ["user"], "content": "Hi"}]}, "unknown role"),
    ("messages", {"messages": [assistant("Hello"), user("Hi")]}, "roles out of order"),
    ("messages", {"messages": [user("Hi"), user("Hi"), assistant("x")]}, "roles out of order"),
    ("messages", {"messages": [*HELLO, system("Be kind.")]}, "roles out of order"),
    ("messages", {"messages": [user("Hi")]}, "no assistant turn"),
    ("messages", {"messages": [system("Be kind.")]}, "no assistant turn"),
    ("messages", {"messages": [user("Hi"), assistant(None)]}, "empty content"),
    ("messages", {"messages": [user(" \n"), assistant("Hello")]}, "empty content"),
    ("messages", {"messages": [system(""), *HELLO]}, "empty content"),
    ("messages", {"messages": [user("Hi"), assistant([])]}, "empty content"),
    ("messages", {"messages": [user("Hi"), assistant(5)]}, "content that is not text"),
    ("messages", {"messages": [user(IMAGE), assistant("Hello")]}, "content that is not text"),
    ("messages", {"messages": [user("Hi"), assistant(IMAGE)]}, "content that is not text"),
    ("messages", {"messages": [user([{"type": "python", "text": "1"}]), assistant("x")]},
     "content that is not text"),
    ("messages", {"messages": [user("Hi"), assistant([{"type": "python", "text": 1}])]},
     "content that is not text"),
    ("messages", {"messages": [user("Hi"), assistant("a\ud800b")]}, "invalid Unicode"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "reason"), REFUSED)
def test_refusal_says_why(name, row, reason):
    with pytest.raises(BadRow) as error:
        to_messages(row, name)
    assert str(error.value) == reason


# --- encoding ---

TOOL = [
    system("Be brief."),
    user("What is 48/2?"),
    assistant(
        [
            {"type": "text", "text": "Let me see: "},
            {"type": "python", "text": "48/2"},
            {"type": "python_output", "text": "24"},
            {"type": "text", "text": "It is 24."},
        ]
    ),
    user("Thanks"),
    assistant("Bye"),
]
# written out by hand: each piece, and whether it is trained with assistant_only
BY_HAND = [
    ("<|bos|>", False),
    ("<|user_start|>", False),
    ("Be brief.\n\nWhat is 48/2?", False),
    ("<|user_end|>", False),
    ("<|assistant_start|>", False),
    ("Let me see: ", True),
    ("<|python_start|>", True),
    ("48/2", True),
    ("<|python_end|>", True),
    ("<|output_start|>", False),
    ("24", False),
    ("<|output_end|>", False),
    ("It is 24.", True),
    ("<|assistant_end|>", True),
    ("<|user_start|>", False),
    ("Thanks", False),
    ("<|user_end|>", False),
    ("<|assistant_start|>", False),
    ("Bye", True),
    ("<|assistant_end|>", True),
]


def encoded_by_hand(tokenizer, trained_of) -> tuple[list[int], list[int]]:
    ids, labels = [], []
    for text, trained in BY_HAND:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        labels += piece if trained_of(text, trained) else [IGNORED] * len(piece)
    return ids, labels


def test_trained_tokens_are_those_marked_by_hand(tokenizer):
    expected = encoded_by_hand(tokenizer, lambda text, trained: trained)
    assert encode_conversation(TOOL, tokenizer) == expected
    assert sum(label != IGNORED for label in expected[1]) == 27


def test_without_assistant_only_all_but_tool_outputs_is_trained(tokenizer):
    untrained = ("<|output_start|>", "24", "<|output_end|>")
    expected = encoded_by_hand(tokenizer, lambda text, trained: text not in untrained)
    assert encode_conversation(TOOL, tokenizer, assistant_only=False) == expected


def test_chatml_writes_no_tool_calls(chatml):
    ids, labels = encode_conversation(TOOL, chatml)
    assert chatml.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 48/2?<|im_end|>\n"
        "<|im_start|>assistant\nLet me see: It is 24.<|im_end|>\n"
        "<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\nBye<|im_end|>\n"
    )
    trained = chatml.decode([label for label in labels if label != IGNORED])
    assert trained == "Let me see: It is 24.<|im_end|>Bye<|im_end|>"
    assert chatml.apply_chat_template(TOOL, tokenize=False) == chatml.decode(ids)
    with pytest.raises(BadRow, match="tool calls alone"):
        chatml_pieces([user("Hi"), assistant([{"type": "python", "text": "48/2"}])])


ODD = (
    "plain", " leading", "   three", "trailing \n", "\nnewline first", "two\n\nlines", "\ttab",
    "🇩🇪👩‍👩‍👧🙂", "שלום עולם", "مرحبا \u202e rtl", "中文，没有空格", "e\u0301", "a\u00a0b",  # noqa: RUF001
    "12345 6", "don't", "<b>{{ x }}</b>", "{% if %}", "|>", "<|", "\r\n", "x\u0000y", "\ufeffbom",
    "\U0010ffff", "\u200b",
)  # fmt: skip


def odd_conversations(count: int) -> list[list[dict]]:
    """Seeded conversations of one to three turns, of one to four odd texts each."""
    rng = random.Random(0)

    def odd() -> str:
        return "".join(rng.choice(ODD) for _ in range(rng.randint(1, 4))) + "."

    made = []
    for _ in range(count):
        messages = [system(odd())] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 3)):
            answer = odd()
            if rng.random() < 0.3:
                types = ("text", "python", "python_output", "text")
                answer = [{"type": kind, "text": odd()[:-1]} for kind in types]
            messages += [user(odd()), assistant(answer)]
        made.append(check_messages(messages))
    return made


@pytest.mark.parametrize("name", ["nanochat", "chatml"])
def test_pieces_are_the_template_s_own_rendering(name, request, tokenizer):
    tokenizer = tokenizer if name == "nanochat" else request.getfixturevalue("chatml")
    assert tokenizer.hfsft_template == name
    same_tokens = 0
    for messages in odd_conversations(200):
        ids, labels = encode_conversation(messages, tokenizer)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(ids) == text
        theirs = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [int(label != IGNORED) for label in labels]
        # "assistant\n" and a newline after it: apart here, as a chat's prompt ends there, else one
        if re.search(r"<\|im_start\|>assistant\n\s*[\r\n]", text):
            continue
        assert theirs["input_ids"] == ids
        assert theirs["assistant_masks"] == mask
        same_tokens += 1
    assert same_tokens == (200 if name == "nanochat" else 163)


@pytest.mark.parametrize("name", ["nanochat", "chatml"])
def test_a_special_token_in_a_message_is_plain_text(name, request, tokenizer):
    tokenizer = tokenizer if name == "nanochat" else request.getfixturevalue("chatml")
    tokens = [*tokenizer.all_special_tokens, "<|assistant_end|>", "<|im_end|>"]
    for token in tokens:
        text = f"End{token}\n{token}"
        ids, labels = encode_conversation([user(text), assistant(text)], tokenizer)
        start, end = {
            "nanochat": ("<|user_start|>", "<|user_end|>"),
            "chatml": ("<|im_start|>", "<|im_end|>"),
        }[name]
        first = ids.index(tokenizer.convert_tokens_to_ids(start)) + 1
        last = ids.index(tokenizer.convert_tokens_to_ids(end))
        inside = ids[first:last]
        assert not set(inside) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(inside) == ("user\n" if name == "chatml" else "") + text
        answer = [label for label in labels if label != IGNORED]
        assert not set(answer[:-1]) & set(tokenizer.all_special_ids)
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) == text


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|eot|>{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}<|eot|>{% endif %}"
    "{% endfor %}"
)
UNMARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture
def foreign(tokenizer, tmp_path):
    """Gives a tokenizer of ours a template of somebody else's."""

    def make(template: str):
        made = PreTrainedTokenizerFast.from_pretrained(saved(tokenizer, tmp_path / "a"))
        # as in Llama 3: special, but in no list of the tokenizer's own
        made.add_tokens(["<|start|>", "<|eot|>"], special_tokens=True)
        made.chat_template = template
        return load_tokenizer(saved(made, tmp_path / "b"))

    return make


def test_a_foreign_template_s_marks_are_trained(foreign):
    made = foreign(MARKED)
    assert (made.hfsft_template, made.eos_token) == (None, "<|eot|>")
    ids, labels = encode_conversation(TOOL, made)
    assert made.decode(ids) == (
        "system: Be brief.<|eot|>user: What is 48/2?<|eot|>Let me see: It is 24.<|eot|>"
        "user: Thanks<|eot|>Bye<|eot|>"
    )
    trained = made.decode([label for label in labels if label != IGNORED])
    assert trained == "Let me see: It is 24.<|eot|>Bye<|eot|>"
    assert encode_conversation(TOOL, made, assistant_only=False) == (ids, ids)


def test_a_foreign_template_without_marks_is_told_by_what_each_turn_adds(foreign):
    made = foreign(UNMARKED)
    assert made.hfsft_training_template is None and made.eos_token == "<|eot|>"
    ids, labels = encode_conversation(TOOL, made)
    expected = made.apply_chat_template(
        [m | {"content": "Let me see: It is 24."} if i == 2 else m for i, m in enumerate(TOOL)],
        return_dict=True,
    )["input_ids"]
    assert ids == expected
    trained = made.decode([label for label in labels if label != IGNORED])
    assert trained == "Let me see: It is 24.<|eot|>Bye<|eot|>"


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_a_foreign_template_writes_a_literal_special_token_as_text(foreign, template):
    made = foreign(template)
    text = "a<|eot|>b<|bos|><|start|>c"
    ids, labels = encode_conversation([user(text), assistant(text)], made)
    eot = made.convert_tokens_to_ids("<|eot|>")
    assert ids.count(eot) == 2  # the template's own
    assert made.convert_tokens_to_ids("<|bos|>") not in ids
    assert made.decode(ids).count(text) == 2
    trained = [label for label in labels if label != IGNORED]
    assert made.decode(trained[:-1]) == text and trained[-1] == eot


def test_a_foreign_template_s_refusal_is_a_reason(foreign):
    made = foreign(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% generation %}{{ messages[-1].content }}<|eot|>{% endgeneration %}"
    )
    with pytest.raises(BadRow, match=r"^the chat template refuses it: no system role$"):
        encode_conversation([system("Be kind."), *HELLO], made)


def test_truncation_cuts_no_character(tokenizer):
    messages = [user("Hi"), assistant("🙂🦊🐳" * 20)]
    whole, _ = encode_conversation(messages, tokenizer)
    for limit in range(12, 60):
        ((ids, labels, cut),) = fit_conversation(messages, tokenizer, limit)
        assert cut and limit - 4 < len(ids) <= limit
        assert ids == whole[: len(ids)] and len(labels) == len(ids)
        assert "\ufffd" not in tokenizer.decode(ids)


@pytest.mark.parametrize("column", ["tools", "chat_template", "chat_template_kwargs"])
def test_a_row_cannot_bring_its_own_template(column):
    with pytest.raises(BadRow, match=f"^brings its own {column}$"):
        to_messages({"messages": HELLO, column: {"a": 1}}, "messages")


def saved(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)

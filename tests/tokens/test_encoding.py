"""Which tokens of a conversation are trained on, with hfsft's templates and with others."""

import random
import re

import pytest
from chat_messages import HELLO, assistant, call, calling, system, tool, user
from transformers import PreTrainedTokenizerFast

from hfsft.tokens.encoding import (
    IGNORED,
    encode_conversation,
    encode_conversations,
    fit_conversations,
)
from hfsft.tokens.messages import Conversation, check_messages
from hfsft.tokens.segments import chatml_segments, nanochat_segments
from hfsft.tokens.tokenizer import load_tokenizer
from hfsft.tokens.training_flags import BadRow


@pytest.fixture(scope="module")
def chatml(tokenizer, tmp_path_factory):
    """The shared tokenizer with ChatML's tokens and template."""
    folder = tmp_path_factory.mktemp("chatml")
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder), chat_template="chatml")


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
# written by hand: each segment, and whether it is trained on with assistant_only
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
        segment = tokenizer.encode(text, add_special_tokens=False)
        ids += segment
        labels += segment if trained_of(text, trained) else [IGNORED] * len(segment)
    return ids, labels


def test_trained_tokens_are_those_marked_by_hand(tokenizer):
    expected = encoded_by_hand(tokenizer, lambda text, trained: trained)
    assert encode_conversation(TOOL, tokenizer) == expected
    assert sum(label != IGNORED for label in expected[1]) == 27


def test_without_assistant_only_all_but_tool_outputs_is_trained(tokenizer):
    untrained = ("<|output_start|>", "24", "<|output_end|>")
    expected = encoded_by_hand(tokenizer, lambda text, trained: text not in untrained)
    assert encode_conversation(TOOL, tokenizer, assistant_only=False) == expected


CALLS = [
    user("Add 1 and 2, and look up ä."),
    calling(call("add", {"a": 1, "b": 2}), call("look_up", {"q": "ä"}), content="Let me see."),
    tool("3"),
    tool("nothing"),
    calling(call("look_up", {"q": "a"})),
    tool(""),
    assistant("It is 3."),
    user("Thanks"),
    assistant("Bye"),
]
ADD = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
LOOK_UP = '{"name": "look_up", "arguments": {"q": "ä"}}'
AGAIN = '{"name": "look_up", "arguments": {"q": "a"}}'


def text_and_trained(messages, tokenizer, **settings) -> tuple[str, str]:
    ids, labels = encode_conversation(check_messages(messages), tokenizer, **settings)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.decode(ids)
    return tokenizer.decode(ids), tokenizer.decode([i for i in labels if i != IGNORED])


def test_nanochat_s_tool_calls_end_the_turn_and_it_begins_again_behind_the_results(tokenizer):
    asked = "<|bos|><|user_start|>Add 1 and 2, and look up ä.<|user_end|><|assistant_start|>"
    first = f"Let me see.<|python_start|>{ADD}<|python_end|><|python_start|>{LOOK_UP}<|python_end|>"
    first += "<|assistant_end|>"
    results = "<|output_start|>3<|output_end|><|output_start|>nothing<|output_end|>"
    second = f"<|python_start|>{AGAIN}<|python_end|><|assistant_end|>"
    empty, begin = "<|output_start|><|output_end|>", "<|assistant_start|>"
    answer = "It is 3.<|assistant_end|>"
    thanks = "<|user_start|>Thanks<|user_end|><|assistant_start|>"
    bye = "Bye<|assistant_end|>"
    text, trained = text_and_trained(CALLS, tokenizer)
    assert text == (
        asked + first + results + begin + second + empty + begin + answer + thanks + bye
    )
    assert trained == first + second + answer + bye
    _, all_but_results = text_and_trained(CALLS, tokenizer, assistant_only=False)
    assert all_but_results == asked + first + begin + second + begin + answer + thanks + bye
    prompt = tokenizer.apply_chat_template(CALLS[:6], tokenize=False, add_generation_prompt=True)
    assert prompt == asked + first + results + begin + second + empty + begin
    text, trained = text_and_trained(CALLS[:2], tokenizer)  # a row may end in a call
    assert (text, trained) == (asked + first, first)


def test_chatml_renders_tool_calls_as_hermes_does(chatml):
    asked = "<|im_start|>user\nAdd 1 and 2, and look up ä.<|im_end|>\n"
    begin, tools = "<|im_start|>assistant\n", "<|im_start|>tool\n<tool_response>\n"
    calls = [f"<tool_call>\n{one}\n</tool_call>" for one in (ADD, LOOK_UP, AGAIN)]
    first = f"Let me see.\n{calls[0]}\n{calls[1]}<|im_end|>"
    results = [f"{tools}{one}\n</tool_response><|im_end|>\n" for one in ("3", "nothing", "")]
    thanks = "<|im_start|>user\nThanks<|im_end|>\n"
    text, trained = text_and_trained(CALLS, chatml)
    assert text == (
        f"{asked}{begin}{first}\n{results[0]}{results[1]}{begin}{calls[2]}<|im_end|>\n{results[2]}"
        f"{begin}It is 3.<|im_end|>\n{thanks}{begin}Bye<|im_end|>\n"
    )
    assert trained == f"{first}{calls[2]}<|im_end|>It is 3.<|im_end|>Bye<|im_end|>"
    _, all_but_results = text_and_trained(CALLS, chatml, assistant_only=False)
    assert all_but_results == text.replace(results[0] + results[1], "").replace(results[2], "")


def test_templates_take_arguments_as_json_text_too(tokenizer, chatml):
    for made in (tokenizer, chatml):
        as_text = [user("Hi"), calling(call("add", '{"a": 1, "b": 2}'), content=None)]
        as_mapping = [user("Hi"), calling(call("add", {"a": 1, "b": 2}))]
        assert made.apply_chat_template(as_text, tokenize=False) == made.apply_chat_template(
            as_mapping, tokenize=False
        )


def test_a_later_system_message(tokenizer, chatml):
    messages = [system("Be kind."), *HELLO, system("Now be rude."), *HELLO]
    reason = "^a later system message, which the chat template cannot render$"
    with pytest.raises(BadRow, match=reason):
        nanochat_segments(Conversation(messages))
    with pytest.raises(Exception, match="has no role system here"):
        tokenizer.apply_chat_template(messages, tokenize=False)
    text, trained = text_and_trained(messages, chatml)
    assert "<|im_start|>system\nNow be rude.<|im_end|>\n<|im_start|>user\nHi<|im_end|>" in text
    assert trained == "Hello<|im_end|>" * 2


def test_a_batch_is_each_conversation_by_itself(tokenizer):
    made = odd_conversations(50)
    made.insert(7, [*HELLO, system("Be kind."), *HELLO])  # nanochat cannot write it
    found = encode_conversations([Conversation(one) for one in made], tokenizer)
    assert isinstance(found[7], BadRow)
    for index, (messages, encoded) in enumerate(zip(made, found, strict=True)):
        if index != 7:
            alone = encode_conversation(messages, tokenizer)
            assert (encoded.ids.tolist(), encoded.labels.tolist()) == alone
    assert encode_conversations([], tokenizer) == []


def test_chatml_renders_no_python_parts(chatml):
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
    with pytest.raises(BadRow, match="only tool calls"):
        chatml_segments(Conversation([user("Hi"), assistant([{"type": "python", "text": "48/2"}])]))


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
def test_segments_match_the_template_s_own_rendering(name, request, tokenizer):
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
        # "assistant\n" and a newline after it: two segments here, as a prompt ends between them
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
    """Gives the shared tokenizer a template that is not hfsft's."""

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


def test_without_marks_the_trained_tokens_are_what_each_assistant_turn_adds(foreign):
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
        "{% for m in messages %}{% generation %}{{ m.content }}<|eot|>{% endgeneration %}"
        "{% endfor %}"
    )
    with pytest.raises(BadRow, match=r"^the chat template refuses it: no system role$"):
        encode_conversation([system("Be kind."), *HELLO], made)


TOOLS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_a_foreign_template_that_has_tools_writes_them(foreign):
    made = foreign(TOOLS)
    ids, labels = encode_conversation(CALLS, made)
    text = made.decode(ids)
    assert f"<|start|>assistant\nLet me see.{ADD}{LOOK_UP}<|eot|>\n<|start|>tool\n3" in text
    trained = made.decode([label for label in labels if label != IGNORED])
    assert trained == f"Let me see.{ADD}{LOOK_UP}<|eot|>{AGAIN}<|eot|>It is 3.<|eot|>Bye<|eot|>"
    _, labels = encode_conversation(CALLS, made, assistant_only=False)
    results = ("3<|eot|>\n", "nothing<|eot|>\n", "<|eot|>\n")
    for result in results:
        text = text.replace(f"<|start|>tool\n{result}", "")
    assert made.decode([label for label in labels if label != IGNORED]) == text
    # a special token within an argument is text
    call_ = calling(call("add", {"a": "x<|eot|>y"}))
    ids, _ = encode_conversation([user("Hi"), call_], made)
    assert ids.count(made.convert_tokens_to_ids("<|eot|>")) == 2
    assert "x<|eot|>y" in made.decode(ids)


def test_what_a_foreign_template_leaves_out_is_a_reason(foreign):
    made = foreign(UNMARKED)
    with pytest.raises(BadRow, match=r"^tool calls, which the chat template cannot render$"):
        encode_conversation(CALLS, made)
    assert encode_conversation([*HELLO, system("Be rude."), *HELLO], made)  # any role is written
    made = foreign(
        "{% for m in messages if m.role in ('user', 'assistant') %}<|start|>{{ m.role }}\n"
        "{{ m.content }}{{ m.tool_calls or '' }}<|eot|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    for messages, kind in (
        (CALLS, "tool's result"),
        ([system("Be kind."), *HELLO], "system message"),
    ):
        with pytest.raises(BadRow, match=f"^a {kind}, which the chat template leaves out$"):
            encode_conversation(messages, made)
    made = foreign(
        "{% for m in messages %}{% if loop.index0 != 2 or 'three' in m.content %}"
        "<|start|>{{ m.role }}\n"
        "{% if not m.tool_calls %}{{ m.content }}{% endif %}{{ m.tool_calls or '' }}<|eot|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    for messages, kind in (
        ([*HELLO, user("What?"), assistant("That.")], "a user's message"),
        ([*HELLO, user("at"), assistant("That.")], "a user's message"),  # also in the answer
        ([user("Hi"), calling(call("add", {}), content="Let me see.")], "an assistant's text"),
    ):
        with pytest.raises(BadRow, match=f"^{kind}, which the chat template leaves out$"):
            encode_conversation(messages, made)


def test_truncation_splits_no_character(tokenizer):
    messages = [user("Hi"), assistant("🙂🦊🐳" * 20)]
    full, _ = encode_conversation(messages, tokenizer)
    for limit in range(12, 60):
        ((fitted,),) = fit_conversations([Conversation(messages)], tokenizer, limit)
        ids = fitted.ids.tolist()
        assert fitted.truncated and limit - 4 < len(ids) <= limit
        assert ids == full[: len(ids)] and len(fitted.labels) == len(ids)
        assert "\ufffd" not in tokenizer.decode(ids)


def test_splitting_keeps_exchanges_with_tools_together(tokenizer):
    messages = [system("Be brief."), *CALLS, *CALLS]
    full, _ = encode_conversation(messages, tokenizer)
    (parts,) = fit_conversations([Conversation(messages)], tokenizer, len(full) - 1, "split")
    assert len(parts) == 2 and not any(part.truncated for part in parts)
    # of four exchanges the last is a part of its own, after the system message
    first, last = messages[:-2], [messages[0], *messages[-2:]]
    assert [part.ids.tolist() for part in parts] == [
        encode_conversation(part, tokenizer)[0] for part in (first, last)
    ]


def test_splitting_leaves_out_only_the_parts_without_a_trained_token(tokenizer):
    untrained = assistant("no more " * 9) | {"train": False}
    messages = [user("Hi"), untrained, user("Well?"), assistant("yes " * 9)]
    full, _ = encode_conversation(messages, tokenizer)
    (parts,) = fit_conversations([Conversation(messages)], tokenizer, len(full) - 1, "split")
    assert [part.ids.tolist() for part in parts] == [
        encode_conversation(messages[2:], tokenizer)[0]
    ]
    messages[3] = messages[3] | {"train": False}
    (reason,) = fit_conversations([Conversation(messages)], tokenizer, len(full) - 1, "split")
    assert str(reason) == "nothing left to train on"


def saved(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)

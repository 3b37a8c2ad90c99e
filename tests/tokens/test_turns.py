"""Published chat templates with tools: each token, and whether it is trained on.

The reference renders a conversation with transformers itself, and takes the assistant's turns from
the text by an expression that is written for the one template.
"""

import re
from pathlib import Path

import pytest
import trl
from chat_messages import HELLO, assistant, call, calling, system, tool, user
from transformers import PreTrainedTokenizerFast

from hfsft.tokens.encoding import IGNORED, encode_conversation, encode_conversations
from hfsft.tokens.foreign_templates import encode_prompt
from hfsft.tokens.messages import Conversation, check_messages
from hfsft.tokens.tokenizer import load_tokenizer
from hfsft.tokens.training_flags import BadRow

OURS = Path(__file__).parent / "templates"
TRL = Path(trl.__file__).parent / "chat_templates"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f'{name}: says ä "b".',
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
    for name in ("look_up", "add")
]
IDS = [{"id": f"call0000{number}"} for number in range(9)]
ONE_ROUND = [
    system("Be kind."),
    user("Look up ä."),
    calling(call("look_up", {"a": "ä", "n": [1, None, 2.5]}, **IDS[1])),
    tool('{"found": "nothing"}', tool_call_id=IDS[1]["id"]),
    assistant("Nothing."),
]
TWO_ROUNDS = [
    *ONE_ROUND[1:],
    user("And b, then c?"),
    calling(call("look_up", {"a": "b"}, **IDS[2])),
    tool("5", tool_call_id=IDS[2]["id"]),
    calling(call("add", {}, **IDS[3])),
    tool("6", tool_call_id=IDS[3]["id"]),
    assistant("5 and 6."),
    user("Thanks"),
    assistant("Bye"),
]
PARALLEL = [
    user("Both, please."),
    calling(call("look_up", {"a": "x"}, **IDS[4]), call("add", {"a": "y"}, **IDS[5])),
    tool("1", tool_call_id=IDS[4]["id"]),
    tool("2", tool_call_id=IDS[5]["id"]),
    assistant("1 and 2."),
]
WITH_TEXT = [user("Add."), calling(call("add", {"a": "1"}), content="Let me see."), tool("1"),
             assistant("It is 1.")]  # fmt: skip

# template → its file, special tokens, the assistant's turns in its text, what it can write
FAMILIES = {
    "qwen3": (
        TRL / "qwen3.jinja",
        ("<|im_start|>", "<|im_end|>"),
        r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)",  # trl's marks have the line break
        [ONE_ROUND, TWO_ROUNDS, PARALLEL, WITH_TEXT],
    ),
    "llama3_1": (
        TRL / "llama3_1.jinja",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
        [ONE_ROUND, TWO_ROUNDS],
    ),
    "llama3_2": (
        TRL / "llama3_2.jinja",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
        [ONE_ROUND, TWO_ROUNDS],
    ),
    "mistral": (
        OURS / "mistral-nemo-instruct-2407.jinja",
        ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"),
        r"(?:\[/INST\]|\[/TOOL_RESULTS\])((?:(?!\[INST\]|\[TOOL_RESULTS\]|\[AVAILABLE).)*?</s>)",
        [ONE_ROUND[1:], TWO_ROUNDS, PARALLEL],
    ),
    "smollm3": (
        OURS / "smollm3-3b.jinja",
        ("<|im_start|>", "<|im_end|>"),
        r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)",  # its marks begin before the header
        [ONE_ROUND, TWO_ROUNDS, PARALLEL, WITH_TEXT],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def family(tokenizer, tmp_path_factory):
    """Gives the shared tokenizer a published template and its special tokens."""
    made: dict[str, tuple] = {}

    def make(name: str):
        if name not in made:
            path, tokens, turns, conversations = FAMILIES[name]
            folder = tmp_path_factory.mktemp(name)
            tokenizer.save_pretrained(folder / "a")
            loaded = PreTrainedTokenizerFast.from_pretrained(folder / "a")
            loaded.add_tokens(list(tokens), special_tokens=True)
            loaded.bos_token, loaded.eos_token = tokens[0], tokens[-1]
            if name == "mistral":
                loaded.eos_token = "</s>"
            loaded.chat_template = path.read_text()
            loaded.save_pretrained(folder / "b")
            made[name] = (load_tokenizer(str(folder / "b")), turns, conversations)
        return made[name]

    return make


def as_written(messages: list[dict], name: str) -> list[dict]:
    """SmolLM3's template leaves writing the calls, as it describes them, to the content."""
    if name != "smollm3":
        return messages
    made = []
    for message in messages:
        lines = [message["content"]] if message["content"] else []
        for one in message.get("tool_calls", ()):
            function = one["function"]
            arguments = str(function["arguments"]).replace("'", '"').replace("None", "null")
            lines.append(
                f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n'
                "</tool_call>"
            )
        made.append({"role": message["role"], "content": "\n".join(lines)})
    return made


def dated(template: str) -> str:
    """Llama 3.2's and SmolLM3's templates with the date that rows have."""
    template = template.replace('strftime_now("%d %b %Y")', '"26 Jul 2024"')
    return template.replace('strftime_now("%d %B %Y")', '"26 July 2024"')


def reference(messages, tokenizer, name: str, turns: str) -> tuple[str, list[int], list[int]]:
    """Text, token ids and labels of the whole rendering."""
    argument = "xml_tools" if name == "smollm3" else "tools"
    text = tokenizer.apply_chat_template(
        as_written(messages, name),
        chat_template=dated(tokenizer.hfsft_training_template or tokenizer.chat_template),
        tokenize=False,
        **{argument: TOOLS},
    )
    trained = [False] * len(text)
    for found in re.finditer(turns, text, re.DOTALL):
        trained[found.start(1) : found.end(1)] = [True] * len(found[1])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if trained[begin] else IGNORED
        for token, (begin, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return text, encoded["input_ids"], labels


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_template_with_tools_token_by_token(family, name):
    tokenizer, turns, conversations = family(name)
    for messages in conversations:
        messages = check_messages(messages)
        text, ids, labels = reference(messages, tokenizer, name, turns)
        assert "says ä" in text and len(re.findall(turns, text, re.DOTALL)) == sum(
            message["role"] == "assistant" for message in messages
        )
        assert encode_conversation(messages, tokenizer, tools=TOOLS) == (ids, labels)


@pytest.mark.parametrize("name", ["llama3_2", "smollm3"])
def test_rows_have_a_fixed_date_and_prompts_today_s(family, name):
    tokenizer, *_ = family(name)
    ids, _ = encode_conversation(HELLO, tokenizer)
    assert re.search("26 July? 2024", tokenizer.decode(ids))
    assert not re.search("26 July? 2024", tokenizer.decode(encode_prompt(HELLO[:1], tokenizer)))


@pytest.mark.parametrize("name", FAMILIES)
def test_otherwise_all_but_descriptions_and_results_is_trained(family, name):
    tokenizer, _, conversations = family(name)
    messages = check_messages(conversations[1])
    ids, labels = encode_conversation(messages, tokenizer, assistant_only=False, tools=TOOLS)
    pairs = zip(ids, labels, strict=True)
    untrained = tokenizer.decode([token for token, label in pairs if label < 0])
    assert "says ä" in untrained and "look_up" in untrained and "nothing" in untrained
    trained = tokenizer.decode([label for label in labels if label >= 0])
    assert "says ä" not in trained and '"found' not in trained
    for message in messages:
        assert message["role"] == "tool" or message["content"] in trained


def test_ids_that_mistral_s_template_wants_are_made(family):
    tokenizer, *_ = family("mistral")
    bare = [
        {key: held for key, held in message.items() if key != "tool_call_id"}
        for message in check_messages(PARALLEL)
    ]
    bare[1] = calling(*({"function": one["function"]} for one in bare[1]["tool_calls"]))
    ids, labels = encode_conversation(check_messages(bare), tokenizer, tools=TOOLS)
    text = tokenizer.decode(ids)
    (calls,) = re.findall(r"\[TOOL_CALLS\].*?</s>", text)
    made = re.findall(r'"id": "([0-9a-z]{9})"', calls)
    assert len(set(made)) == 2
    assert re.findall(r'"call_id": "([0-9a-z]{9})"', text) == made
    assert calls in tokenizer.decode([label for label in labels if label >= 0])


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        ("llama3_2", PARALLEL, "This model only supports single tool-calls at once!"),
        ("llama3_2", WITH_TEXT, "an assistant's text, which the chat template leaves out"),
        ("mistral", ONE_ROUND, "a system message, which the chat template leaves out"),
    ],
)
def test_what_a_published_template_cannot_write_is_a_reason(family, name, messages, reason):
    tokenizer, *_ = family(name)
    with pytest.raises(BadRow, match=re.escape(reason)):
        encode_conversation(check_messages(messages), tokenizer, tools=TOOLS)


def test_tools_that_a_template_cannot_write_are_a_reason(family):
    tokenizer, *_ = family("llama3_2")
    plain = PreTrainedTokenizerFast.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = (TRL / "llama3.jinja").read_text()
    plain.save_pretrained(Path(tokenizer.name_or_path).parent / "plain")
    plain = load_tokenizer(str(Path(tokenizer.name_or_path).parent / "plain"))
    with pytest.raises(BadRow, match=r"^tools, which the chat template cannot render$"):
        encode_conversation(HELLO, plain, tools=TOOLS)


def trained_text(messages, tokenizer, **settings) -> str:
    ids, labels = encode_conversation(check_messages(messages), tokenizer, **settings)
    return "|".join(
        tokenizer.decode([token for token, _ in run]) for run in runs(ids, labels) if run[0][1] >= 0
    )


def runs(ids, labels) -> list[list[tuple[int, int]]]:
    found: list[list[tuple[int, int]]] = []
    for token, label in zip(ids, labels, strict=True):
        if not found or (found[-1][-1][1] < 0) != (label < 0):
            found.append([])
        found[-1].append((token, label))
    return found


ENDS = {"qwen3": "<|im_end|>\n", "llama3_2": "<|eot_id|>", "mistral": "</s>"}


@pytest.mark.parametrize("name", ENDS)
def test_what_messages_say_about_training_in_a_published_template(family, name):
    tokenizer, *_ = family(name)
    end, token = ENDS[name], ENDS[name].strip()
    think = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    first = {"role": "assistant", "content": "no more", "weight": 0}
    messages = [user("Hi"), first, user("Well?"), assistant("yes")]
    assert trained_text(messages, tokenizer) == f"{think}yes{end}"
    assert trained_text(messages, tokenizer, assistant_only=False).count("no more") == 0
    ranges = [
        {"begin_offset": 0, "end_offset": 1, "train": False},
        {"begin_offset": 2, "end_offset": 6, "train": True},
    ]
    messages[1] = assistant("no more") | {"train_detail": ranges}
    assert trained_text(messages, tokenizer) == f" more{token}|{think}yes{end}"
    messages[1:3] = [first, user("Well?") | {"train": True}]
    asked = {"qwen3": "Well?<|im_end|>", "llama3_2": "Well?<|eot_id|>", "mistral": "Well?[/INST]"}
    assert trained_text(messages, tokenizer).startswith(asked[name])


def test_reasoning_is_written_or_named(family):
    row = [user("Hi"), assistant("Hello") | {"reasoning_content": "A greeting."}]
    qwen, *_ = family("qwen3")
    assert trained_text(row, qwen) == "<think>\nA greeting.\n</think>\n\nHello<|im_end|>\n"
    llama, *_ = family("llama3_2")
    (encoded,) = encode_conversations([Conversation(check_messages(row))], llama)
    assert encoded.left_out == "reasoning"
    assert llama.decode(encoded.ids[encoded.trained]) == "Hello<|eot_id|>"
    within = [user("Hi"), assistant("<think>\nA greeting.\n</think>\n\nHello")]
    (encoded,) = encode_conversations([Conversation(check_messages(within))], llama)
    assert encoded.left_out == "" and "A greeting." in llama.decode(encoded.ids)

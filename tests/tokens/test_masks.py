"""Tokens and masks of 200 odd conversations, against an independent implementation.

The reference renders the chat template with transformers itself and takes the assistant's
characters from its `{% generation %}` blocks. Special tokens written inside messages are private
use characters while it renders. Other templates have no such blocks: the reference uses a copy that
has them, and hfsft the template as it is.
"""

import json
import random
import re

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from hfsft.tokens.encoding import IGNORED, encode_conversations
from hfsft.tokens.messages import Conversation, check_messages
from hfsft.tokens.tokenizer import load_tokenizer
from hfsft.tokens.training_flags import BadRow

COUNT = 200
TEXTS = (
    "plain words", " leading", "   three", "trailing \n", "\nnewline first", "two\n\nlines",
    "\ttab", "🇩🇪", "👩‍👩‍👧🙂", "👨🏽‍🚀", "שלום עולם", "مرحبا \u202e rtl", "中文，没有空格",  # noqa: RUF001
    "e\u0301\u0323", "a\u00a0b", "12345 6", "don't", "<b>{{ x }}</b>", "{% if x %}", "|>", "<|",
    "\r\n", "x\u0000y", "\u0001\u001b", "\ufeffbom", "\U0010ffff", "\u200b", "\U000f0000",
    "word" * 80, "ß" * 40, "def f(x):\n    return {'a': [x]}  # \\n\n",
    '{"name": "f", "arguments": {}}', "<tool_call>", "</tool_response>", "assistant\n",
)  # fmt: skip
NAMES = ("add", "get_weather", "Suche_ä", "f-1")


def odd_text(rng: random.Random, specials: list[str]) -> str:
    """One to four odd texts; one in four has a literal special token; some have blank edges."""
    parts = [rng.choice(TEXTS) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.25:
        parts.insert(rng.randint(0, len(parts)), rng.choice(specials))
    return "".join(parts) + rng.choice((".", "", "x ", "\n", "é"))


def not_blank(rng: random.Random, specials: list[str]) -> str:
    return next(text for text in iter(lambda: odd_text(rng, specials), None) if text.strip())


def odd_conversation(rng: random.Random, specials: list[str], parts: bool) -> tuple[list, list]:
    """A conversation as a row may have it, and the same written plainly."""
    systems = [not_blank(rng, specials) for _ in range(rng.choice((0, 0, 1, 1, 3)))]
    raw = [{"role": "system", "content": text} for text in systems]
    plain = [{"role": "system", "content": "\n\n".join(systems)}] if systems else []
    both = (raw, plain)
    for _ in range(rng.randint(1, 3)):
        asked = {"role": "user", "content": not_blank(rng, specials)}
        for messages in both:
            messages.append(asked)
        if rng.random() < 0.35:
            calls = []
            for number in range(rng.choice((1, 1, 2))):
                arguments = {odd_text(rng, specials): odd_text(rng, specials), "n": [1, None, 2.5]}
                calls.append((f"call_{number}", rng.choice(NAMES), arguments))
            content = rng.choice(("", not_blank(rng, specials)))
            raw.append(
                {
                    "role": "assistant",
                    "content": content or rng.choice((None, "", " \n")),
                    "tool_calls": [
                        {
                            "id": number,
                            "type": "function",
                            "function": {
                                "name": name,
                                "arguments": rng.choice((arguments, json.dumps(arguments))),
                            },
                        }
                        for number, name, arguments in calls
                    ],
                }
            )
            plain.append(
                {
                    "role": "assistant",
                    "content": content,
                    "tool_calls": [
                        {"type": "function", "function": {"name": name, "arguments": arguments}}
                        for _, name, arguments in calls
                    ],
                }
            )
            for number, _, _ in calls:
                result = {"role": "tool", "content": odd_text(rng, specials)}
                raw.append(result | {"tool_call_id": number})
                plain.append(result)
        answer = not_blank(rng, specials)
        if parts and rng.random() < 0.3:
            kinds = ("text", "python", "python_output", "text")
            answer = [{"type": kind, "text": not_blank(rng, specials)} for kind in kinds]
        for messages in both:
            messages.append({"role": "assistant", "content": answer})
    return raw, plain


def odd_conversations(tokenizer, parts: bool = False) -> list[tuple[list, list]]:
    """200 of them; the literal special tokens are the tokenizer's own and other models'."""
    rng = random.Random(7)
    specials = [*special_tokens(tokenizer), "<|im_end|>", "<|eot_id|>", "<s>"]
    return [odd_conversation(rng, specials, parts) for _ in range(COUNT)]


def special_tokens(tokenizer) -> list[str]:
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]


# --- the reference ---


class Stand:
    """Maps special tokens to private use characters while a template renders."""

    def __init__(self, tokenizer):
        self.to = {token: chr(0xE000 + i) for i, token in enumerate(special_tokens(tokenizer))}
        self.back = {character: token for token, character in self.to.items()}

    def protect(self, value):
        if isinstance(value, str):
            longest_first = sorted(self.to, key=len, reverse=True)
            return re.sub("|".join(map(re.escape, longest_first)), lambda m: self.to[m[0]], value)
        if isinstance(value, dict):
            return {self.protect(key): self.protect(held) for key, held in value.items()}
        return [self.protect(held) for held in value] if isinstance(value, list) else value

    def restore(self, text: str) -> str:
        return "".join(self.back.get(character, character) for character in text)


def rendered(messages: list, template: str, tokenizer) -> tuple[str, list[bool]]:
    """The text, and for each of its characters whether a generation block wrote it."""
    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    marks = [False] * len(texts[0])
    for start, end in spans[0]:
        marks[start:end] = [True] * (end - start)
    return texts[0], marks


def plain_ids(text: str, tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def read_own(messages: list, tokenizer, trained_of=None) -> tuple[list[int], list[int]]:
    """Encode through one of hfsft's templates: each text between special tokens or marks by itself.

    Args:
        trained_of: returns a mark per character of the text; None: the template's own marks.
    """
    stand = Stand(tokenizer)
    text, marks = rendered(stand.protect(messages), tokenizer.chat_template, tokenizer)
    if trained_of:
        marks, blocks = trained_of(text), marks
    else:
        blocks = marks
    ids, labels, start = [], [], 0
    special = re.compile("|".join(map(re.escape, stand.to)))
    while start < len(text):
        found = special.match(text, start)
        if found:
            end = found.end()
            segment = [tokenizer.convert_tokens_to_ids(found[0])]
        else:
            following = special.search(text, start)
            end = following.start() if following else len(text)
            edges = (i for i in range(start + 1, end) if blocks[i] != blocks[i - 1])
            end = next(edges, end)
            segment = plain_ids(stand.restore(text[start:end]), tokenizer)
        assert len(set(marks[start:end])) == 1
        ids += segment
        labels += segment if marks[start] else [IGNORED] * len(segment)
        start = end
    return ids, labels


def read_foreign(messages: list, template: str, tokenizer) -> tuple[list[int], list[int]]:
    """Encode through another template: as one text, except for literal special tokens."""
    stand = Stand(tokenizer)
    text, marks = rendered(stand.protect(messages), template, tokenizer)
    ids, labels, start = [], [], 0
    for segment in re.split(f"([{''.join(stand.back)}])", text):
        if segment in stand.back:
            found, trained = plain_ids(stand.back[segment], tokenizer), marks[start]
            segment_marks = [trained] * len(found)
        else:
            encoded = tokenizer(segment, add_special_tokens=False, return_offsets_mapping=True)
            found = encoded["input_ids"]
            segment_marks = [marks[start + first] for first, _ in encoded["offset_mapping"]]
        ids += found
        labels += [i if mark else IGNORED for i, mark in zip(found, segment_marks, strict=True)]
        start += len(segment)
    return ids, labels


def encoded(raw: list[list], tokenizer, assistant_only: bool = True) -> list:
    """What hfsft encodes, in one batch."""
    found = encode_conversations(
        [Conversation(check_messages(m)) for m in raw], tokenizer, assistant_only
    )
    return [
        str(one) if isinstance(one, BadRow) else (one.ids.tolist(), one.labels.tolist())
        for one in found
    ]


# --- hfsft's own templates ---


@pytest.fixture(scope="module", params=["nanochat", "chatml"])
def own(request, tokenizer, tmp_path_factory):
    """The shared tokenizer with each of hfsft's templates."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder), chat_template=request.param)


def test_own_templates(own):
    made = odd_conversations(own, parts=own.hfsft_template == "nanochat")
    found = encoded([raw for raw, _ in made], own)
    for (_, plain), mine in zip(made, found, strict=True):
        assert mine == read_own(plain, own)
        ids, labels = mine
        assert own.decode(ids) == own.apply_chat_template(plain, tokenize=False)
        assert labels[-1] == own.eos_token_id or own.hfsft_template == "chatml"
    assert sum("tool_calls" in m for _, plain in made for m in plain) > 80


def test_own_templates_train_all_but_tool_results_otherwise(own):
    results = {
        "nanochat": r"<\|output_start\|>.*?<\|output_end\|>",
        "chatml": r"<\|im_start\|>tool\n.*?<\|im_end\|>\n",
    }[own.hfsft_template]

    def trained_of(text: str) -> list[bool]:
        marks = [True] * len(text)
        for found in re.finditer(results, text, re.DOTALL):
            marks[found.start() : found.end()] = [False] * (found.end() - found.start())
        return marks

    made = odd_conversations(own, parts=own.hfsft_template == "nanochat")
    found = encoded([raw for raw, _ in made], own, assistant_only=False)
    for (_, plain), mine in zip(made, found, strict=True):
        assert mine == read_own(plain, own, trained_of)


# --- foreign templates, each without marks and with them ---

LLAMA = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{% set role = 'ipython' if m.role == 'tool' else m.role %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
    "[MARK]{% if m.role == 'assistant' %}[START]{{ m.content | trim }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '{\"name\": ' + call.function.name | tojson + ', \"parameters\": ' }}"
    "{{ call.function.arguments | tojson + '}' }}{% endfor %}{{ '<|eot_id|>' }}[END]"
    "{% else %}{{ (m.content | tojson if m.role == 'tool' else m.content | trim) + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}"
    "{% endif %}{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}[START]"
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson + '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}[END]"
    "{{ '\\n' }}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FOREIGN = {
    "llama": (
        LLAMA.replace("[MARK]", ""),
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "qwen": (QWEN, ["<|im_start|>", "<|im_end|>"]),
}


def unmarked(template: str) -> str:
    return template.replace("[START]", "").replace("[END]", "")


def marked(template: str) -> str:
    return template.replace("[START]", "{% generation %}").replace("[END]", "{% endgeneration %}")


@pytest.mark.parametrize("brings_marks", [False, True], ids=["unmarked", "marked"])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_templates(name, brings_marks, tokenizer, tmp_path):
    template, tokens = FOREIGN[name]
    tokenizer.save_pretrained(tmp_path / "a")
    made = PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    made.add_tokens(tokens, special_tokens=True)
    made.chat_template = marked(template) if brings_marks else unmarked(template)
    made.save_pretrained(tmp_path / "b")
    foreign = load_tokenizer(str(tmp_path / "b"))
    assert foreign.hfsft_template is None and foreign.eos_token == tokens[-1]

    rows = odd_conversations(foreign)
    found = encoded([raw for raw, _ in rows], foreign)
    for (_, plain), mine in zip(rows, found, strict=True):
        assert mine == read_foreign(plain, marked(template), foreign)
    ends = foreign.convert_tokens_to_ids(tokens[-1])
    assert all(
        sum(label == ends for label in labels)
        == sum(message["role"] == "assistant" for message in plain)
        for (_, plain), (_, labels) in zip(rows, found, strict=True)
    )

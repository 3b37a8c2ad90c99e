"""Foreign chat templates: what they render, and which characters of it are the assistant's."""

import re
from typing import Any

# stand for the special tokens written inside a message while a template renders it
SENTINELS = 0xF0000  # the first of Unicode's supplementary private use characters
PROBE = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


class TemplateError(Exception):
    """A template cannot render a conversation, or not so that its assistant's turns can be told."""


def special_tokens(tokenizer: Any) -> list[str]:
    """Every token that the tokenizer reads as a control token.

    `all_special_tokens` names but two of Llama 3's.
    """
    added = tokenizer.added_tokens_decoder.values()
    return sorted({token.content for token in added if token.special}, key=len, reverse=True)


def render(messages: list[dict[str, str]], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation through the tokenizer's own template.

    Args:
        messages: with plain text contents.
        tokenizer: `hfsft_training_template` is its template with `{% generation %}` marks; None:
            there is none, and a turn is what it adds to the rendering of the turns before.

    Returns:
        The text, and the spans of its characters that are the assistant's, end token included.

    Raises:
        TemplateError: with the reason.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    def plain(until: int, prompt: bool = False) -> str:
        return render_jinja_template(
            conversations=[messages[:until]],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )[0][0]

    try:
        if tokenizer.hfsft_training_template is not None:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=tokenizer.hfsft_training_template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
            return texts[0], spans[0]
        text, spans = plain(len(messages)), []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = plain(index, prompt=True), plain(index + 1)
                if not text.startswith(after) or not after.startswith(before):
                    raise TemplateError("the chat template rewrites earlier turns")
                spans.append((len(before), _turn_end(after, len(before), tokenizer)))
        return text, spans
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise TemplateError(f"the chat template refuses it: {error}") from None


def _turn_end(text: str, start: int, tokenizer: Any) -> int:
    """Where a turn ends: behind its last special token, before the line break that follows it."""
    ends = [text.rfind(token, start) + len(token) for token in special_tokens(tokenizer)]
    return max((end for end in ends if end > start), default=len(text))


def end_of_turn(tokenizer: Any) -> str:
    """The token that ends an assistant's turn.

    Raises:
        TemplateError: if the assistant's turns cannot be told, or end in no token that a model
            could stop at.
    """
    text, spans = render(PROBE, tokenizer)
    turns = [text[start:end] for start, end in spans]
    if not turns or "four" not in turns[-1]:
        raise TemplateError("its assistant's turns cannot be told")
    for token in special_tokens(tokenizer):
        if turns[-1].rstrip().endswith(token):
            return token
    raise TemplateError("its assistant's turns end in no special token")


def encode(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Encode a conversation through a foreign template.

    A special token written inside a message is kept apart and encoded as plain text.

    Args:
        messages: with plain text contents.
        tokenizer: see `render`.

    Returns:
        Token ids, and for each whether it is the assistant's.

    Raises:
        TemplateError: with the reason.
    """
    stand_ins = {token: chr(SENTINELS + i) for i, token in enumerate(special_tokens(tokenizer))}
    inside = re.compile("|".join(map(re.escape, stand_ins)) or r"(?!)")
    protected = [
        message | {"content": inside.sub(lambda found: stand_ins[found[0]], message["content"])}
        for message in messages
    ]
    text, spans = render(protected, tokenizer)
    ids: list[int] = []
    mask: list[bool] = []
    literals = {stand_in: token for token, stand_in in stand_ins.items()}
    start = 0
    for piece in re.split(f"([{''.join(literals)}])" if literals else r"(?!)", text):
        literal = piece in literals
        encoded = tokenizer(
            literals.get(piece, piece),
            add_special_tokens=False,
            split_special_tokens=literal,
            return_offsets_mapping=True,
        )
        ids += encoded["input_ids"]
        for begin, _ in encoded["offset_mapping"]:
            place = start if literal else start + begin
            mask.append(any(first <= place < last for first, last in spans))
        start += len(piece)
    return ids, mask

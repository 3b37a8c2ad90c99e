"""Foreign chat templates: what they render, and which characters of it are the assistant's."""

import json
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from hfsft.errors import ModelError, first_line

Messages = list[dict[str, Any]]


# bounds of one rendering, a hundred times what a long conversation takes
SECONDS = 5.0  # of processor time, so that a busy machine counts for nothing


MEMORY = 2**28  # bytes on top of what the process holds


LONGEST = 2**16  # characters, and so many more as the messages have,


TIMES = 100  # times this


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


class _Spent(BaseException):
    """A rendering's time is up; jinja itself catches whatever is an `Exception`."""


def bounded(name: str, make: Callable[[], Any], ceiling: int | None = None) -> Any:
    """What a chat template makes, within `SECONDS` and `MEMORY`.

    Jinja's sandbox keeps a template from files and code, not from `{{ 'a' * 500000000 }}`. Outside
    of the main thread neither bound holds, and where there is no /proc (macOS) not that of memory.

    Args:
        name: the model or tokenizer whose template it is, for the error.
        make: renders it.
        ceiling: as `memory_ceiling` gave it a moment ago, for several renderings in a row.

    Raises:
        ModelError: if it takes more.
    """
    if threading.current_thread() is not threading.main_thread():
        return make()
    _take_signal()
    try:
        return _limited(make, memory_ceiling() if ceiling is None else ceiling)
    except (MemoryError, SystemError):  # the second where C code forgets to say why it failed
        raise too_much(name, f"takes more than {MEMORY // 2**20} MiB of memory") from None
    except _Spent:
        signal.setitimer(signal.ITIMER_PROF, 0)
        raise too_much(name, f"takes more than {SECONDS:g} s of processor time") from None


def too_much(name: str, what: str) -> ModelError:
    """The error of a chat template that is beyond a bound."""
    return ModelError(
        f"{name}: its chat template {what} for one conversation\n  Give another: "
        "tokenizer: {chat_template: FILE}, or chatml, or nanochat"
    )


def _limited(make: Callable[[], Any], ceiling: int) -> Any:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (ceiling, soft) if limit != resource.RLIM_INFINITY]
    try:
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        try:
            # more than once: what is raised in a destructor is lost
            signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.1)
            return make()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@cache
def _take_signal() -> None:
    """Once a process: it takes 7 µs, a tenth of a rendering."""

    def stop(number: int, frame: Any) -> None:
        raise _Spent

    signal.signal(signal.SIGPROF, stop)


def memory_ceiling() -> int:
    """Bytes of address space up to which a rendering may go, from what the process holds now."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return resource.RLIM_INFINITY
    try:
        return int(os.read(file, 32).split()[0]) * resource.getpagesize() + MEMORY
    finally:
        os.close(file)


def prompt_text(messages: Messages, tokenizer: Any) -> str:
    """A conversation that the assistant is to go on with, as its template writes it.

    Args:
        messages: in OpenAI's form, the last one the user's.
        tokenizer: any with a chat template.

    Raises:
        ModelError: if the template takes more than a rendering may, or refuses the messages.
    """
    try:
        return bounded(
            tokenizer.name_or_path,
            lambda: tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            ),
        )
    except ModelError:
        raise
    except Exception as error:  # a template can raise anything
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template refuses: {first_line(error)}"
        ) from None


def special_tokens(tokenizer: Any) -> list[str]:
    """Every token that the tokenizer reads as a control token.

    `all_special_tokens` names but two of Llama 3's.
    """
    added = tokenizer.added_tokens_decoder.values()
    return sorted({token.content for token in added if token.special}, key=len, reverse=True)


def render(
    messages: Messages, tokenizer: Any, assistant_only: bool = True
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation through the tokenizer's own template.

    Args:
        messages: in OpenAI's form, with plain text contents.
        tokenizer: `hfsft_training_template` is its template with `{% generation %}` marks; None:
            there is none, and a turn is what it adds to the rendering of the turns before.
        assistant_only: as below; otherwise all is trained but the results of tool calls.

    Returns:
        The text, and the spans of its characters that are the assistant's, end token included.

    Raises:
        TemplateError: with the reason, also where it leaves a tool call, a result or a system
            message out.
        ModelError: if it takes more than a rendering may.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.hfsft_training_template or tokenizer.chat_template
    ceiling = memory_ceiling()  # 6 µs, so not for each rendering

    def rendered(turns: Messages, **settings: Any) -> tuple[list[str], Any]:
        try:
            found = bounded(
                tokenizer.name_or_path,
                lambda: render_jinja_template(
                    conversations=[turns],
                    **{"chat_template": template} | settings,
                    **tokenizer.special_tokens_map,
                ),
                ceiling,
            )
        except ModelError:
            raise
        except Exception as error:  # a template can raise anything, such as ZeroDivisionError
            raise TemplateError(f"the chat template refuses it: {first_line(error)}") from None
        length = len(found[0][0])
        if length > LONGEST and length > LONGEST + TIMES * len(json.dumps(turns)):
            raise too_much(tokenizer.name_or_path, f"writes {length:,} characters")
        return found

    def added(first: int, last: int, prompt: bool, whole: str) -> tuple[int, int]:
        """The span that the turns from `first` to before `last` add to the turns before them."""
        before = rendered(messages[:first], add_generation_prompt=prompt)[0][0]
        after = rendered(messages[:last])[0][0]
        if not whole.startswith(after) or not after.startswith(before):
            raise TemplateError("the chat template rewrites earlier turns")
        return len(before), _turn_end(after, len(before), tokenizer) if prompt else len(after)

    spans: list[tuple[int, int]] = []
    if tokenizer.hfsft_training_template is not None and assistant_only:
        texts, marked = rendered(messages, return_assistant_tokens_mask=True)
        text, spans = texts[0], marked[0]
    else:
        text = rendered(messages)[0][0]
    if any("tool_calls" in message for message in messages):
        silent = [
            {key: value for key, value in message.items() if key != "tool_calls"}
            for message in messages
        ]
        if rendered(silent)[0][0] == text:
            raise TemplateError("tool calls, which the chat template cannot write")
    for message in messages:
        if message["role"] in ("system", "tool") and not _is_written(message["content"], text):
            kind = {"system": "system message", "tool": "tool's result"}[message["role"]]
            raise TemplateError(f"a {kind}, which the chat template leaves out")
    if not assistant_only:
        results = [added(first, last, False, text) for first, last in _result_runs(messages)]
        edges = [0, *(edge for span in results for edge in span), len(text)]
        return text, list(zip(edges[::2], edges[1::2], strict=True))
    if tokenizer.hfsft_training_template is None:
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(added(index, index + 1, True, text))
    return text, spans


def _is_written(content: str, text: str) -> bool:
    """Whether a content is in a rendering: as it is, trimmed, or as a JSON text."""
    quoted = json.dumps(content, ensure_ascii=False)[1:-1]
    return content.strip() in text or quoted.strip() in text


def _result_runs(messages: Messages) -> Iterator[tuple[int, int]]:
    """Where tool results begin and end: templates write those that follow each other as one."""
    first = None
    for index, message in enumerate([*messages, {"role": "end"}]):
        if message["role"] == "tool" and first is None:
            first = index
        elif message["role"] != "tool" and first is not None:
            yield first, index
            first = None


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


def encode(
    messages: Messages, tokenizer: Any, assistant_only: bool = True
) -> tuple[list[int], list[bool]]:
    """Encode a conversation through a foreign template.

    A special token written inside a message is kept apart and encoded as plain text.

    Args:
        messages: in OpenAI's form, with plain text contents.
        tokenizer: see `render`.
        assistant_only: see `render`.

    Returns:
        Token ids, and for each whether it is trained.

    Raises:
        TemplateError: with the reason.
    """
    written = json.dumps(messages, ensure_ascii=False)
    free = (chr(code) for code in range(SENTINELS, 0xFFFFE) if chr(code) not in written)
    stand_ins = dict(zip(special_tokens(tokenizer), free, strict=False))
    inside = re.compile("|".join(map(re.escape, stand_ins)) or r"(?!)")

    def protected(value: Any) -> Any:
        if isinstance(value, str):
            return inside.sub(lambda found: stand_ins[found[0]], value)
        if isinstance(value, dict):
            return {protected(key): protected(held) for key, held in value.items()}
        return [protected(held) for held in value] if isinstance(value, list) else value

    text, spans = render([protected(m) for m in messages], tokenizer, assistant_only)
    edges = [edge for span in spans for edge in span]
    ids: list[int] = []
    places: list[int] = []  # of each token's first character
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
        places += [start + begin * (not literal) for begin, _ in encoded["offset_mapping"]]
        start += len(piece)
    return ids, (np.searchsorted(edges, places, side="right") % 2 == 1).tolist()

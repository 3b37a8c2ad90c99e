"""Chat templates that are not hfsft's: rendered by Jinja, within bounds of time and memory.

`render` returns the text and the spans of it to train on, `encode` the token ids and a mask. Spans
come from the template's `{% generation %}` marks, or else from what each turn adds to the rendering
of the turns before it.
"""

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from hfsft.errors import ModelError, first_line

try:
    import resource
except ImportError:  # Windows
    resource = None

Messages = list[dict[str, Any]]

# bounds of one rendering, a hundred times what a long conversation takes
SECONDS = 5.0  # of processor time, so that a busy machine does not count
MEMORY = 2**28  # bytes, in addition to what the process holds
# characters: LONGEST + TIMES * those of the messages
LONGEST = 2**16
TIMES = 100

# stand for special tokens written inside a message while a template renders it
SENTINELS = 0xF0000  # the first of Unicode's supplementary private use characters

PROBE = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


class TemplateError(Exception):
    """A template cannot render a conversation, or the assistant's turns cannot be identified."""


class _Spent(BaseException):
    """A rendering's time is up; a `BaseException`, as Jinja catches every `Exception`."""


# --- bounds ---


def bounded(name: str, make: Callable[[], Any], ceiling: int | None = None) -> Any:
    """Call a function that renders a chat template, within `SECONDS` and `MEMORY`.

    Jinja's sandbox protects files and code, but not against `{{ 'a' * 500000000 }}`. Outside of the
    main thread and on Windows neither bound applies; without /proc (macOS) that on memory does not.

    Args:
        name: the model or tokenizer whose template it is, for the error.
        make: renders it.
        ceiling: as `memory_ceiling` has just returned it, for several renderings in a row.

    Returns:
        What `make` returns.

    Raises:
        ModelError: if it takes more.
    """
    if resource is None or threading.current_thread() is not threading.main_thread():
        return make()
    _take_signal()
    try:
        return _limited(make, memory_ceiling() if ceiling is None else ceiling)
    except (MemoryError, SystemError):  # the second if C code fails without setting an error
        raise too_much(name, f"takes more than {MEMORY // 2**20} MiB of memory") from None
    except _Spent:
        signal.setitimer(signal.ITIMER_PROF, 0)
        raise too_much(name, f"takes more than {SECONDS:g} s of processor time") from None


def too_much(name: str, what: str) -> ModelError:
    """The error of a chat template that exceeds a bound."""
    return ModelError(
        f"{name}: its chat template {what} for one conversation\n  Choose another: "
        "tokenizer: {chat_template: FILE}, or chatml, or nanochat"
    )


def _limited(make: Callable[[], Any], ceiling: int) -> Any:
    """Call a function with the address space limited to `ceiling` and a processor-time alarm."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (ceiling, soft) if limit != resource.RLIM_INFINITY]
    try:
        if limits:
            resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        try:
            # repeatedly, as an exception raised in a destructor is lost
            signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.1)
            return make()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@cache
def _take_signal() -> None:
    """Handle the alarm; once per process, as it takes 7 µs, a tenth of a rendering."""

    def stop(number: int, frame: Any) -> None:
        raise _Spent

    signal.signal(signal.SIGPROF, stop)


def memory_ceiling() -> int:
    """The address space in bytes that a rendering may use: what the process holds, and `MEMORY`."""
    if resource is None:
        return 0  # `bounded` sets no bound
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return resource.RLIM_INFINITY
    try:
        return int(os.read(file, 32).split()[0]) * resource.getpagesize() + MEMORY
    finally:
        os.close(file)


# --- rendering ---


def prompt_text(messages: Messages, tokenizer: Any, **settings: Any) -> str:
    """Render a conversation as the prompt for the assistant's next turn.

    Args:
        messages: in OpenAI's form, the last one the user's.
        tokenizer: any with a chat template.
        settings: further ones of `apply_chat_template`, such as `tools`.

    Raises:
        ModelError: if the template exceeds a bound or refuses the messages.
    """
    try:
        return bounded(
            tokenizer.name_or_path,
            lambda: tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **settings
            ),
        )
    except ModelError:
        raise
    except Exception as error:  # a template can raise anything
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template refuses: {first_line(error)}"
        ) from None


def special_tokens(tokenizer: Any) -> list[str]:
    """Every special token of a tokenizer, longest first.

    `all_special_tokens` has only two of Llama 3's.
    """
    added = tokenizer.added_tokens_decoder.values()
    return sorted({token.content for token in added if token.special}, key=len, reverse=True)


def render(
    messages: Messages, tokenizer: Any, assistant_only: bool = True
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation through the tokenizer's own template.

    Args:
        messages: in OpenAI's form, with plain text contents.
        tokenizer: `hfsft_training_template` is its template with `{% generation %}` marks; None: it
            has none, and a turn is what it adds to the rendering of the previous turns.
        assistant_only: train only on the assistant's turns; otherwise on everything except the
            results of tool calls.

    Returns:
        The text, and the spans of characters to train on, end-of-turn tokens included.

    Raises:
        TemplateError: with the reason, also if it leaves out a tool call, a tool's result or a
            system message.
        ModelError: if it exceeds a bound.
    """
    ceiling = memory_ceiling()  # 6 µs, so not for each rendering
    marked = tokenizer.hfsft_training_template is not None and assistant_only
    text, spans = _rendered(messages, tokenizer, ceiling, return_assistant_tokens_mask=marked)
    _check_nothing_left_out(messages, text, tokenizer, ceiling)
    if not assistant_only:
        results = [
            _added_span(messages, first, last, False, text, tokenizer, ceiling)
            for first, last in _result_runs(messages)
        ]
        edges = [0, *(edge for span in results for edge in span), len(text)]
        return text, list(zip(edges[::2], edges[1::2], strict=True))
    if not marked:
        spans = [
            _added_span(messages, index, index + 1, True, text, tokenizer, ceiling)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    return text, spans


def _rendered(
    messages: Messages, tokenizer: Any, ceiling: int, **settings: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the spans of its `{% generation %}` marks if asked for."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = bounded(
            tokenizer.name_or_path,
            lambda: render_jinja_template(
                conversations=[messages],
                chat_template=tokenizer.hfsft_training_template or tokenizer.chat_template,
                **settings,
                **tokenizer.special_tokens_map,
            ),
            ceiling,
        )
    except ModelError:
        raise
    except Exception as error:  # a template can raise anything, such as ZeroDivisionError
        raise TemplateError(f"the chat template refuses it: {first_line(error)}") from None
    length = len(texts[0])
    if length > LONGEST and length > LONGEST + TIMES * len(json.dumps(messages)):
        raise too_much(tokenizer.name_or_path, f"writes {length:,} characters")
    return texts[0], spans[0] if spans else []


def _added_span(
    messages: Messages,
    first: int,
    last: int,
    prompt: bool,
    text: str,
    tokenizer: Any,
    ceiling: int,
) -> tuple[int, int]:
    """The span that the turns from `first` to before `last` add to the rendering of the previous.

    With `prompt` it starts after the generation prompt, and ends with the turn's last special
    token.
    """
    before, _ = _rendered(messages[:first], tokenizer, ceiling, add_generation_prompt=prompt)
    after, _ = _rendered(messages[:last], tokenizer, ceiling)
    if not text.startswith(after) or not after.startswith(before):
        raise TemplateError("the chat template rewrites earlier turns")
    return len(before), _turn_end(after, len(before), tokenizer) if prompt else len(after)


def _check_nothing_left_out(messages: Messages, text: str, tokenizer: Any, ceiling: int) -> None:
    """Check that a rendering has the conversation's tool calls, tool results and system message."""
    if any("tool_calls" in message for message in messages):
        without_calls = [
            {key: value for key, value in message.items() if key != "tool_calls"}
            for message in messages
        ]
        if _rendered(without_calls, tokenizer, ceiling)[0] == text:
            raise TemplateError("tool calls, which the chat template cannot render")
    for message in messages:
        if message["role"] in ("system", "tool") and not _is_written(message["content"], text):
            kind = {"system": "system message", "tool": "tool's result"}[message["role"]]
            raise TemplateError(f"a {kind}, which the chat template leaves out")


def _is_written(content: str, text: str) -> bool:
    """Whether a content is in a rendering: as it is, trimmed, or as a JSON string."""
    quoted = json.dumps(content, ensure_ascii=False)[1:-1]
    return content.strip() in text or quoted.strip() in text


def _result_runs(messages: Messages) -> Iterator[tuple[int, int]]:
    """First and end index of each run of tool results, which templates may write as one turn."""
    first = None
    for index, message in enumerate([*messages, {"role": "end"}]):
        if message["role"] == "tool" and first is None:
            first = index
        elif message["role"] != "tool" and first is not None:
            yield first, index
            first = None


def _turn_end(text: str, start: int, tokenizer: Any) -> int:
    """The end of a turn: after its last special token, before the line break that follows."""
    ends = [text.rfind(token, start) + len(token) for token in special_tokens(tokenizer)]
    return max((end for end in ends if end > start), default=len(text))


def end_of_turn(tokenizer: Any) -> str:
    """The token that ends the assistant's turns.

    Raises:
        TemplateError: if the assistant's turns cannot be identified, or end in no special token
            that generation could stop at.
    """
    text, spans = render(PROBE, tokenizer)
    turns = [text[start:end] for start, end in spans]
    if not turns or "four" not in turns[-1]:
        raise TemplateError("the assistant's turns cannot be identified")
    for token in special_tokens(tokenizer):
        if turns[-1].rstrip().endswith(token):
            return token
    raise TemplateError("the assistant's turns end in no special token")


# --- encoding ---


def encode(
    messages: Messages, tokenizer: Any, assistant_only: bool = True
) -> tuple[list[int], list[bool]]:
    """Encode a conversation through the tokenizer's own template.

    A special token written inside a message is encoded as plain text.

    Args:
        messages: in OpenAI's form, with plain text contents.
        tokenizer: see `render`.
        assistant_only: see `render`.

    Returns:
        Token ids, and for each whether it is trained on.

    Raises:
        TemplateError: with the reason.
    """
    stand_ins = _stand_ins(messages, tokenizer)
    text, spans = render(_protected(messages, stand_ins), tokenizer, assistant_only)
    edges = [edge for span in spans for edge in span]
    ids, starts = _encoded(text, stand_ins, tokenizer)
    return ids, (np.searchsorted(edges, starts, side="right") % 2 == 1).tolist()


def encode_prompt(messages: Messages, tokenizer: Any, tools: list[Any] | None = None) -> list[int]:
    """Encode a conversation as the prompt for the assistant's next turn.

    A special token written inside a message or a tool is encoded as plain text.

    Args:
        messages: in OpenAI's form, with plain text contents.
        tokenizer: any with a chat template, hfsft's own included.
        tools: in OpenAI's form, for templates that render them.

    Returns:
        Token ids.

    Raises:
        ModelError: if the template exceeds a bound or refuses the messages.
    """
    stand_ins = _stand_ins([messages, tools], tokenizer)
    given = {} if tools is None else {"tools": _protected(tools, stand_ins)}
    text = prompt_text(_protected(messages, stand_ins), tokenizer, **given)
    return _encoded(text, stand_ins, tokenizer)[0]


def _stand_ins(texts: Any, tokenizer: Any) -> dict[str, str]:
    """Each special token → a character that stands for it where it is written inside `texts`."""
    written = json.dumps(texts, ensure_ascii=False)
    free = (chr(code) for code in range(SENTINELS, 0xFFFFE) if chr(code) not in written)
    return dict(zip(special_tokens(tokenizer), free, strict=False))


def _protected(value: Any, stand_ins: dict[str, str]) -> Any:
    """A value in which stand-ins replace the special tokens of every text, at any depth."""
    inside = re.compile("|".join(map(re.escape, stand_ins)) or r"(?!)")

    def protected(value: Any) -> Any:
        if isinstance(value, str):
            return inside.sub(lambda found: stand_ins[found[0]], value)
        if isinstance(value, dict):
            return {protected(key): protected(held) for key, held in value.items()}
        return [protected(held) for held in value] if isinstance(value, list) else value

    return protected(value)


def _encoded(text: str, stand_ins: dict[str, str], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a rendering, and for each the position of its first character."""
    ids: list[int] = []
    starts: list[int] = []
    literals = {stand_in: token for token, stand_in in stand_ins.items()}
    start = 0
    for segment in re.split(f"([{''.join(literals)}])" if literals else r"(?!)", text):
        literal = segment in literals
        encoded = tokenizer(
            literals.get(segment, segment),
            add_special_tokens=False,
            split_special_tokens=literal,
            return_offsets_mapping=True,
        )
        ids += encoded["input_ids"]
        starts += [start + begin * (not literal) for begin, _ in encoded["offset_mapping"]]
        start += len(segment)
    return ids, starts

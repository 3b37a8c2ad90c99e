"""Chat templates rendered by Jinja, within bounds of time and memory.

`rendered` returns the text of a conversation and the spans that the template's `{% generation %}`
marks cover; `turns.py` finds what to train on in it.
"""

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache
from typing import Any

from hfsft.errors import ModelError, first_line, panics_as
from hfsft.tokens.messages import Messages, with_new_ids

try:
    import resource
except ImportError:  # Windows
    resource = None

# bounds of one rendering, a hundred times what a long conversation takes
SECONDS = 5.0  # of processor time, so that a busy machine does not count
MEMORY = 2**28  # bytes, in addition to what the process holds
# characters: LONGEST + TIMES * those of the messages
LONGEST = 2**16
TIMES = 100

# stand for special tokens written inside a message while a template renders it
PRIVATE_USE = 0xF0000  # the first of Unicode's supplementary private use characters

# Llama 3.2's own default: with today's date a row's tokens would change from one day to the next
TRAINING_DATE = date(2024, 7, 26)

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


def prompt_text(
    messages: Messages, tokenizer: Any, tools: list[dict[str, Any]] | None = None
) -> str:
    """Render a conversation as the prompt for the assistant's next turn.

    Args:
        messages: in OpenAI's form, the last one the user's or a tool's.
        tokenizer: any with a chat template.
        tools: that the model may call, in OpenAI's form.

    Raises:
        ModelError: if the template exceeds a bound, refuses the messages or cannot render tools.
    """

    def render(messages: Messages) -> str:
        return bounded(
            tokenizer.name_or_path,
            lambda: tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **settings
            ),
        )

    try:
        template = tokenizer.get_chat_template(tools=tools or None)  # of several by name
        settings = tool_settings(tools, template, tokenizer)
        try:
            return render(messages)
        except Exception:
            if not any("tool_calls" in message for message in messages):
                raise
            return render(with_new_ids(messages))  # which Mistral's templates want
    except ModelError:
        raise
    except TemplateError as error:
        raise ModelError(f"{tokenizer.name_or_path}: {error}") from None
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


def rendered(
    messages: Messages,
    tokenizer: Any,
    ceiling: int,
    tools: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation through the template that the tokenizer trains with.

    Args:
        messages: in OpenAI's form, with plain text contents.
        tokenizer: `hfsft_training_template` is its template with `{% generation %}` marks, or None.
        ceiling: as `memory_ceiling` returns it.
        tools: in OpenAI's form.
        settings: further ones of `render_jinja_template`.

    Returns:
        The text, and the spans of the marks with `return_assistant_tokens_mask`.

    Raises:
        TemplateError: with the reason.
        ModelError: if it exceeds a bound.
    """
    template = tokenizer.hfsft_training_template or tokenizer.chat_template
    settings |= tool_settings(tools, template, tokenizer)
    text, spans = _jinja(messages, template, tokenizer, ceiling, **settings)
    length = len(text)
    if length > LONGEST and length > LONGEST + TIMES * len(json.dumps([messages, tools])):
        raise too_much(tokenizer.name_or_path, f"writes {length:,} characters")
    return text, spans


def _jinja(
    messages: Messages, template: str, tokenizer: Any, ceiling: int | None, **settings: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text and the spans of its marks, within the bounds of time and memory."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = bounded(
            tokenizer.name_or_path,
            lambda: render_jinja_template(
                conversations=[messages],
                chat_template=_dated(template),
                **settings,
                **tokenizer.special_tokens_map,
            ),
            ceiling,
        )
    except ModelError:
        raise
    except Exception as error:  # a template can raise anything, such as ZeroDivisionError
        raise TemplateError(f"the chat template refuses it: {first_line(error)}") from None
    return texts[0], spans[0] if spans else []


@cache
def _dated(template: str) -> str:
    """A template that writes `TRAINING_DATE` as today's; transformers takes no other function."""
    return re.sub(
        r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""",
        lambda found: json.dumps(TRAINING_DATE.strftime(found[2])),
        template,
    )


# --- tools ---

TOOL_ARGUMENTS = ("tools", "xml_tools")  # the second is SmolLM3's
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
}
_arguments: dict[str, str | None] = {}  # of each template seen


def tool_settings(
    tools: list[dict[str, Any]] | None, template: str, tokenizer: Any
) -> dict[str, Any]:
    """The argument that gives tools to a template.

    Args:
        tools: in OpenAI's form.
        template: one of the tokenizer's.
        tokenizer: gives the special tokens that the template may write.

    Raises:
        TemplateError: if the template leaves them out.
    """
    if not tools:
        return {}
    if template not in _arguments:
        without, _ = _jinja(PROBE[:2], template, tokenizer, None)
        _arguments[template] = next(
            (
                name
                for name in TOOL_ARGUMENTS
                if _jinja(PROBE[:2], template, tokenizer, None, **{name: [PROBE_TOOL]})[0]
                != without
            ),
            None,
        )
    if _arguments[template] is None:
        raise TemplateError("tools, which the chat template cannot render")
    return {_arguments[template]: tools}


# --- special tokens as plain text ---


def free_characters(texts: Any) -> Iterator[str]:
    """Private use characters that occur nowhere in `texts`, which can be any JSON."""
    written = json.dumps(texts, ensure_ascii=False)
    return (chr(code) for code in range(PRIVATE_USE, 0xFFFFE) if chr(code) not in written)


def protected(value: Any, stand_ins: dict[str, str]) -> Any:
    """A value in which stand-ins replace the special tokens of every text, at any depth.

    Args:
        value: any JSON.
        stand_ins: each special token → the character that stands for it, longest first.
    """
    inside = re.compile("|".join(map(re.escape, stand_ins)) or r"(?!)")

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return inside.sub(lambda found: stand_ins[found[0]], value)
        if isinstance(value, dict):
            return {replaced(key): replaced(held) for key, held in value.items()}
        return [replaced(held) for held in value] if isinstance(value, list) else value

    return replaced(value)


def encoded_text(
    text: str, stand_ins: dict[str, str], tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """Encode a rendering, what stands for a special token as plain text.

    Returns:
        Token ids, and the characters of each.
    """
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    literals = {stand_in: token for token, stand_in in stand_ins.items()}
    start = 0
    for segment in re.split(f"([{''.join(literals)}])" if literals else r"(?!)", text):
        literal = segment in literals
        with panics_as(ModelError, f"the tokenizer fails on a text of {len(segment):,} characters"):
            encoded = tokenizer(
                literals.get(segment, segment),
                add_special_tokens=False,
                split_special_tokens=literal,
                return_offsets_mapping=True,
            )
        ids += encoded["input_ids"]
        offsets = encoded["offset_mapping"]
        places += [
            (start, start + 1) if literal else (start + begin, start + end)
            for begin, end in offsets
        ]
        start += len(segment)
    return ids, places


def encode_prompt(
    messages: Messages, tokenizer: Any, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Encode a conversation as the prompt for the assistant's next turn.

    A special token written inside a message or a tool is encoded as plain text.

    Args:
        messages: in OpenAI's form, with plain text contents.
        tokenizer: any with a chat template, hfsft's own included.
        tools: that the model may call, in OpenAI's form.

    Returns:
        Token ids.

    Raises:
        ModelError: as `prompt_text`.
    """
    free = free_characters([messages, tools])
    stand_ins = dict(zip(special_tokens(tokenizer), free, strict=False))
    given = protected([messages, tools], stand_ins)
    return encoded_text(prompt_text(given[0], tokenizer, given[1]), stand_ins, tokenizer)[0]

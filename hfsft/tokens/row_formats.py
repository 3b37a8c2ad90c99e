"""Rows of any known format to a `Conversation`, checked and in one canonical form.

`FORMATS` lists the formats, the columns that identify each, and its reader; `read_row` reads a row.
A row that cannot be trained on raises `BadRow` with a reason that the audit counts.
"""

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from hfsft.errors import DataError
from hfsft.tokens.messages import (
    CALL_ROLES,
    ROLES,
    Conversation,
    Messages,
    check_messages,
    check_tools,
)
from hfsft.tokens.training_flags import RANGES, SPELLINGS, BadRow, check_row_flags, is_blank

EMPTY_JSON = ("", "[]", "{}", "null")  # a column that exists but is empty
# GSM8K's calculations have no other characters; C++'s `x << 2` is no calculation
CALCULATION = re.compile(r"<<([\d\s.,+*/()%$-]+)=([\d.,/%$-]+)>>")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TOOLS = ("tools", "functions")
# columns that are about a row, and not what a model reads
HARMLESS = {
    *("id", "_id", "idx", "index", "uuid", "uid", "row_id", "prompt_id", "conversation_id"),
    *("source", "dataset", "origin", "url", "license", "split", "created", "timestamp", "date"),
    *("language", "lang", "category", "subject", "topic", "task", "tags", "type", "domain"),
    *("model", "metadata", "meta", "hash", "num_turns", "difficulty", "parallel_tool_calls"),
    "__index_level_0__",
}


# --- one reader per format ---


def from_messages(row: dict[str, Any]) -> Messages:
    """A list of messages under `messages`."""
    return row["messages"]


def from_sharegpt(row: dict[str, Any]) -> Messages:
    """ShareGPT: `conversations` of `from` and `value`.

    LLaMA-Factory's `function_call` (JSON of one call or a list of them) and `observation` become
    tool calls and tool results.
    """
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise BadRow("no messages")
    return [
        turn
        | {
            "role": turn.get("from", turn.get("role")),
            "content": turn.get("value", turn.get("content")),
        }
        if isinstance(turn, dict)
        else turn
        for turn in turns
    ]


def from_prompt_completion(row: dict[str, Any]) -> Messages:
    """Prompt and completion: `prompt` and `completion`, each a text or a list of messages.

    As in trl, the completion alone is trained on, unless a message of the prompt says otherwise.
    """
    prompt, completion = row["prompt"], row["completion"]
    if prompt is None or completion is None:
        raise BadRow("empty content")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion.strip()}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise BadRow("content that is not text")
    return [*map(_of_prompt, prompt), *completion]


def _of_prompt(message: Any) -> Any:
    """A message of a prompt; an assistant's is not trained on, unless it has a flag of its own."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in CALL_ROLES and (
        not isinstance(role, str) or ROLES.get(role, role) != "assistant"
    ):
        return message
    says = any(not is_blank(message.get(name)) for name in (*SPELLINGS, *RANGES))
    return message if says else message | {"train": False}


def from_alpaca(row: dict[str, Any]) -> Messages:
    """Alpaca: `instruction`, an optional `input`, `output`, and `history`: earlier exchanges."""
    instruction, extra = row["instruction"], row.get("input")
    if not all(isinstance(text, str | None) for text in (instruction, extra, row["output"])):
        raise BadRow("content that is not text")
    question = f"{instruction}\n\n{extra}" if extra and instruction else instruction or extra
    history = row.get("history") or []
    history = json.loads(history) if isinstance(history, str) else history  # in a CSV
    exchanges = [*history, [question, row["output"]]]
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in exchanges):
        raise BadRow("a history that is not pairs of texts")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": content}
        for pair in exchanges
        for role, content in zip(roles, pair, strict=True)
    ]


def from_multiple_choice(row: dict[str, Any]) -> Messages:
    """Multiple choice: ARC (`choices: {text, label}`, `answerKey`) or MMLU (`choices`, `answer`).

    The letter follows its choice, as in karpathy/nanochat: a small model associates them better so.
    """
    choices = row["choices"]
    if isinstance(choices, dict):
        texts, labels, answer = choices["text"], choices["label"], row["answerKey"]
    else:
        texts, labels, answer = choices, None, row["answer"]
    if not isinstance(texts, list):  # in a CSV the list is one text
        raise BadRow("choices that are not a list")
    if labels is None:
        labels = [chr(ord("A") + index) for index in range(len(texts))]
        if type(answer) is int and 0 <= answer < len(labels):
            answer = labels[answer]
    contents = [row["question"], *texts, *labels]
    if any(content in (None, "") for content in contents):
        raise BadRow("empty content")
    if isinstance(answer, bool) or any(type(one) not in (str, int, float) for one in contents):
        raise BadRow("content that is not text")
    if answer not in labels:
        raise BadRow("the answer is not among the choices")
    lines = [f"- {text}={label}" for text, label in zip(texts, labels, strict=True)]
    question = "\n".join(
        [
            f"Multiple Choice question: {row['question']}",
            *lines,
            "",
            "Respond only with the letter of the correct answer.",
        ]
    )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def from_gsm8k(row: dict[str, Any]) -> Messages:
    """GSM8K: `question` and `answer`, whose `<<48/2=24>>` marks become python parts and outputs."""
    kinds = itertools.cycle(("text", "python", "python_output"))
    texts = CALCULATION.split(row["answer"])
    parts = [{"type": kind, "text": text} for kind, text in zip(kinds, texts, strict=False) if text]
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": parts},
    ]


# format → the columns that identify it, and its reader; the first with all its columns wins
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Messages]]] = {
    "messages": (("messages",), from_messages),
    "sharegpt": (("conversations",), from_sharegpt),
    "prompt_completion": (("prompt", "completion"), from_prompt_completion),
    "alpaca": (("instruction", "output"), from_alpaca),
    "multiple_choice": (("question", "choices"), from_multiple_choice),
    "gsm8k": (("question", "answer"), from_gsm8k),
}

# further columns that a format's reader reads
OPTIONAL = {"alpaca": ("input", "history"), "multiple_choice": ("answer", "answerKey")}


# --- choosing and applying one ---


def known_format(columns: list[str]) -> str | None:
    """The format that the columns identify, or None."""
    formats = (name for name, (needed, _) in FORMATS.items() if set(needed) <= set(columns))
    return next(formats, None)


def detect_format(columns: list[str], source: str) -> str:
    """The format that a source's columns identify.

    Args:
        columns: their names.
        source: the source's name, for the error.

    Raises:
        DataError: if there is none; it lists the columns and the known formats.
    """
    found = known_format(columns)
    if found is not None:
        return found
    known = "; ".join(f"{name} ({', '.join(needed)})" for name, (needed, _) in FORMATS.items())
    raise DataError(
        f"{source}: cannot tell the format from its columns {', '.join(columns) or '(none)'}\n"
        f"  Known: {known}. Rename with `columns: {{messages: YOUR_COLUMN}}`"
    )


def read_row(row: dict[str, Any], name: str) -> Conversation:
    """Read a row and check that it is a conversation, and one to train on.

    Args:
        row: its columns.
        name: a key of `FORMATS`.

    Raises:
        BadRow: with the reason.
    """
    for column in ("chat_template", "chat_template_kwargs"):
        if not _is_empty(row.get(column)):
            raise BadRow(f"has its own {column}")
    if any(row.get(column) for column in MEDIA):
        raise BadRow("has images, video or audio")
    # next to `messages` they repeat the same row, as in ultrafeedback_binarized
    if name != "messages" and row.get("chosen") and row.get("rejected"):
        raise BadRow("a preference row (chosen and rejected)")
    used = check_row_flags(row, has_label=name not in ("multiple_choice", "gsm8k"))
    used |= {*FORMATS[name][0], *OPTIONAL.get(name, ()), *TOOLS, *HARMLESS}
    try:
        messages = FORMATS[name][1](row)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadRow(f"not a row of format {name}") from None
    if isinstance(messages, list) and not is_blank(row.get("system")):
        if not _begins_with_system(messages):
            messages = [{"role": "system", "content": row["system"]}, *messages]
            used.add("system")
        elif messages[0].get("content") == row["system"]:
            used.add("system")
    unused: set[str] = set()
    messages = check_messages(messages, unused)
    tools = next((row[column] for column in TOOLS if not _is_empty(row.get(column))), [])
    unused |= {
        f"column {column}"
        for column, value in row.items()
        if column not in used and not is_blank(value)
    }
    return Conversation(messages, check_tools(tools), tuple(sorted(unused)))


def _begins_with_system(messages: list[Any]) -> bool:
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    return first.get("role") in ("system", "developer")


def _is_empty(value: Any) -> bool:
    return not value or (isinstance(value, str) and value.strip() in EMPTY_JSON)

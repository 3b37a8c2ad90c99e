"""The generated tool-calling task: its rows, the calls in an answer, and which are right.

A call is right if a tool has its name, its arguments satisfy the tool's schema, and both are those
of the reference. Calls are found in any template's text, as each writes JSON with a `name` and
`arguments` (Llama's: `parameters`).
"""

import json
import re
from random import Random
from typing import Any

# a tool: its description, and for each parameter its schema and the values that are asked for
PLACES = ("Oslo", "Lima", "Cairo", "Hanoi", "Quito", "Perth")
NAMES = ("Anna", "Ben", "Chloe", "David", "Emma")
CURRENCIES = ("EUR", "USD", "JPY", "CHF")
TOOLS: dict[str, tuple[str, dict[str, tuple[dict[str, Any], tuple]]]] = {
    "get_weather": (
        "The weather in a city now.",
        {
            "city": ({"type": "string"}, PLACES),
            "unit": (
                {"type": "string", "enum": ["celsius", "fahrenheit"]},
                ("celsius", "fahrenheit"),
            ),
        },
    ),
    "convert_currency": (
        "Convert an amount of money.",
        {
            "amount": ({"type": "number"}, (5, 12.5, 80, 300)),
            "source": ({"type": "string", "enum": list(CURRENCIES)}, CURRENCIES[:2]),
            "target": ({"type": "string", "enum": list(CURRENCIES)}, CURRENCIES[2:]),
        },
    ),
    "set_timer": (
        "Start a timer.",
        {"minutes": ({"type": "integer"}, (3, 10, 25, 45, 90))},
    ),
    "send_message": (
        "Send a short message to a person.",
        {
            "to": ({"type": "string"}, NAMES),
            "text": ({"type": "string"}, ("I am late", "Happy birthday", "Call me back")),
        },
    ),
    "switch_lamp": (
        "Switch the lamp of a room.",
        {
            "room": ({"type": "string"}, ("kitchen", "hall", "bedroom")),
            "on": ({"type": "boolean"}, (True, False)),
        },
    ),
    "book_table": (
        "Book a table at a restaurant.",
        {
            "place": ({"type": "string"}, PLACES),
            "people": ({"type": "integer"}, (2, 4, 7)),
            "hour": ({"type": "integer", "description": "0 to 23"}, (12, 18, 20)),
        },
    ),
}
REQUESTS = {
    "get_weather": "tell me the weather in {city} in degrees {unit}",
    "convert_currency": "convert {amount} {source} to {target}",
    "set_timer": "set a timer for {minutes} minutes",
    "send_message": 'send {to} the message "{text}"',
    "switch_lamp": "switch the lamp in the {room} {on}",
    "book_table": "book a table in {place} for {people} people at {hour}:00",
}
PARALLEL = 0.25  # of the rows ask for two calls


def calling_rows(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Generated requests that one or two of three tools answer.

    Args:
        rows: how many; a row depends on the seed and its index alone.
        seed: different seeds give different rows.

    Returns:
        For each `prompt`, `tools` in OpenAI's form, and `calls`: `name` and `arguments` of each.
    """
    return [_calling_row(Random(f"tool_calls:{seed}:{row}")) for row in range(rows)]


def _calling_row(rng: Random) -> dict[str, Any]:
    def pick(choices):  # the same in every Python version, which `choice` does not promise
        return choices[int(rng.random() * len(choices))]

    names = sorted(TOOLS, key=lambda name: rng.random())[:3]
    calls = []
    for name in names[: 2 if rng.random() < PARALLEL else 1]:
        _, parameters = TOOLS[name]
        arguments = {key: pick(values) for key, (_, values) in parameters.items()}
        calls.append({"name": name, "arguments": arguments})
    asked = [
        REQUESTS[call["name"]].format(
            **{
                key: {True: "on", False: "off"}[value] if isinstance(value, bool) else value
                for key, value in call["arguments"].items()
            }
        )
        for call in calls
    ]
    return {
        "prompt": f"Please {' and '.join(asked)}.",
        "tools": [_description(name) for name in sorted(names)],
        "calls": calls,
    }


def _description(name: str) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    description, parameters = TOOLS[name]
    schema = {
        "type": "object",
        "properties": {key: held for key, (held, _) in parameters.items()},
        "required": list(parameters),
    }
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


# --- grading ---

DECODER = json.JSONDecoder()
# what templates write around a call, whose place is a NUL, and around a list of them
MARKS = re.compile(r"(<tool_call>\s*|<<)?\0(\s*</tool_call>\n?|>>)?")
LIST = re.compile(r"(\[TOOL_CALLS\])?[\[\],\s]*")

TYPES = {  # of JSON Schema; in Python True is an int as well
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


def split_calls(text: str, tools: dict[str, Any] | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text, and the calls that it makes.

    Args:
        text: as a model wrote it, special tokens left out or not.
        tools: the name of each tool → the schema of its parameters; calls of others, and a tool's
            description that is repeated, stay text. None: every call counts.

    Returns:
        The text without calls and the marks around them, and `name` and `arguments` of each call in
        order. A call that is not complete JSON stays text.
    """
    pieces, calls, at, done = [], [], 0, 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
        is_call = isinstance(name, str) and isinstance(arguments, dict)
        if is_call and tools is not None:
            is_call = name in tools and not (arguments and arguments == tools[name])
        if is_call:
            calls.append({"name": name, "arguments": arguments})
            pieces.append(text[done:at])
            at = done = end
        else:  # it may hold a call
            at += 1
    if not calls:
        return text, []
    rest = MARKS.sub("", "\0".join([*pieces, text[done:]])).strip()
    return "" if LIST.fullmatch(rest) else rest, calls


def fits_schema(arguments: dict[str, Any], parameters: dict[str, Any]) -> bool:
    """Whether arguments satisfy a tool's `parameters`: names, required ones, types and `enum`."""
    properties = parameters.get("properties", {})
    if set(arguments) - set(properties) or set(parameters.get("required", ())) - set(arguments):
        return False
    for name, value in arguments.items():
        kind, choices = properties[name].get("type"), properties[name].get("enum")
        if isinstance(value, bool) and kind != "boolean":
            return False
        if not isinstance(value, TYPES.get(kind, object)) or (choices and value not in choices):
            return False
    return True


def calls_are_right(text: str, expected: list[dict[str, Any]], tools: list[dict[str, Any]]) -> bool:
    """Whether an answer makes the expected calls and no other, in any order.

    Args:
        text: the answer.
        expected: `name` and `arguments` of each.
        tools: that could be called, in OpenAI's form.
    """
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    missing = list(expected)
    for call in split_calls(text)[1]:
        schema = schemas.get(call["name"])
        if schema is None or not fits_schema(call["arguments"], schema) or call not in missing:
            return False
        missing.remove(call)
    return not missing

"""A request's JSON, checked: what is unknown or unsupported is refused in OpenAI's form."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hfsft.errors import DataError, ModelError, first_line, nearest, quoted
from hfsft.evaluation.calling import split_calls
from hfsft.serve.engine import Sampling

MOST_MESSAGES = 1024
MOST_ANSWERS = 16  # of one request: `n`, times the prompts of a completion
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256
MOST_ALTERNATIVES = 20
LOWEST_TEMPERATURE = 0.01  # below it logits would overflow; the top-1 token is picked

# identify a client or its session, and change no answer
WITHOUT_EFFECT = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key")
# known, and supported at the values that change nothing
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "tool_choice": ("auto", "none"),
}
SHARED = ("model", "stream", "stream_options", "stop", "max_tokens", "temperature", "top_p")
SHARED += ("top_k", "seed", "n", "logprobs", *WITHOUT_EFFECT)
CHAT = (*SHARED, "messages", "max_completion_tokens", "top_logprobs", "tools")
CHAT += ("response_format", "generation_config")
COMPLETION = (*SHARED, "prompt")
# fields of transformers' GenerationConfig that `transformers chat` sends as one JSON text
GENERATION = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p")


class Refused(Exception):
    """A request that is answered with an error; the text is its message."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ):
        """Keep what OpenAI's error object says.

        Args:
            message: what is wrong.
            param: the field it is about.
            code: for programs, such as "context_length_exceeded".
            status: of HTTP.
        """
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Asked:
    """A checked request."""

    model: str  # as the client named it
    prompts: list[list[int]]  # token ids
    sampling: Sampling
    n: int  # answers to each prompt
    is_streamed: bool
    with_usage: bool  # at the end of a stream
    tools: dict[str, Any] = field(default_factory=dict)  # name → schema of the parameters

    def samplings(self) -> list[Sampling]:
        """The sampling of each answer to a prompt: with a seed, each has its own."""
        seed = self.sampling.seed
        return [
            self.sampling if seed is None else replace(self.sampling, seed=seed + index)
            for index in range(self.n)
        ]


class Fields:
    """A request's JSON object; each getter checks one field's type and bounds."""

    def __init__(self, body: dict[str, Any], known: tuple[str, ...]):
        """Check the names of the fields.

        Raises:
            Refused: if one is unknown, or has a value that is not supported.
        """
        self.body = {name: value for name, value in body.items() if value is not None}
        for name, value in self.body.items():
            if name in NEUTRAL:
                if not any(value == neutral for neutral in NEUTRAL[name]):
                    raise Refused(f"{name} is not supported", name, "unsupported_parameter")
            elif name not in known:
                hint = nearest(name, known)
                raise Refused(f"unknown parameter {quoted(name)}{hint}", name, "unknown_parameter")

    def get(self, name: str, kind: type, default: Any, what: str) -> Any:
        """A field of a type; `what` names the type."""
        value = self.body.get(name, default)
        is_wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if name in self.body and is_wrong:
            raise Refused(f"{name} must be {what}", name, "invalid_type")
        return value

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """An integer within bounds."""
        value = self.get(name, int, default, "an integer")
        return self._bounded(name, value, low, high)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A number within bounds."""
        value = self.get(name, (int, float), default, "a number")
        return self._bounded(name, value, low, high)

    def _bounded(self, name: str, value: Any, low: float, high: float) -> Any:
        if name in self.body and not low <= value <= high:  # NaN is not
            raise Refused(f"{name} must be from {low:,} to {high:,}", name, "invalid_value")
        return value

    def flag(self, name: str) -> bool:
        """A field that is true or false; by default false."""
        return self.get(name, bool, False, "true or false")

    def stop(self) -> tuple[str, ...]:
        """The stop strings."""
        given = self.body.get("stop", [])
        strings = [given] if isinstance(given, str) else given
        if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
            raise Refused("stop must be a string or a list of strings", "stop", "invalid_type")
        if len(strings) > MOST_STOPS or any(len(s) > MOST_STOP_CHARACTERS for s in strings):
            most = f"{MOST_STOPS} strings of {MOST_STOP_CHARACTERS} characters"
            raise Refused(f"stop must be at most {most}", "stop", "invalid_value")
        return tuple(strings)

    def sampling(
        self, defaults: dict[str, Any], context: int, prompt: int, logprobs: int | None
    ) -> Sampling:
        """How the answer is sampled.

        Args:
            defaults: the model's own `max_tokens`, `temperature`, `top_k` and `top_p`.
            context: of the model, in tokens.
            prompt: length of the longest prompt in tokens.
            logprobs: of `Sampling`.
        """
        if prompt >= context:
            raise Refused(
                f"the model's context is {context:,} tokens, and the prompt alone has {prompt:,}",
                "messages" if "messages" in self.body else "prompt",
                "context_length_exceeded",
            )
        name = "max_completion_tokens" if "max_completion_tokens" in self.body else "max_tokens"
        asked = self.whole(name, 1, 2**31 - 1, defaults["max_tokens"] or context)
        if name in self.body and asked > context:
            raise Refused(
                f"{name} is {asked:,}, and the model's context is {context:,} tokens",
                name,
                "context_length_exceeded",
            )
        temperature = self.number("temperature", 0, 2, defaults["temperature"])
        return Sampling(
            max_tokens=min(asked, context - prompt),
            temperature=temperature if temperature >= LOWEST_TEMPERATURE else 0.0,
            top_k=max(0, self.whole("top_k", -1, 2**31 - 1, defaults["top_k"])),  # -1 as in vLLM
            top_p=self.number("top_p", 1e-6, 1, defaults["top_p"]),
            seed=self.whole("seed", -(2**63), 2**63 - 1 - MOST_ANSWERS),
            stop=self.stop(),
            logprobs=logprobs,
        )

    def asked(
        self, prompts: list[list[int]], sampling: Sampling, tools: dict[str, Any] | None = None
    ) -> Asked:
        """The whole request; `tools` as in `Asked`."""
        n = self.whole("n", 1, MOST_ANSWERS, 1)
        if n * len(prompts) > MOST_ANSWERS:
            raise Refused(f"at most {MOST_ANSWERS} answers in one request", "n", "invalid_value")
        is_streamed = self.flag("stream")
        options = self.get("stream_options", dict, {}, "an object")
        if options and not is_streamed:
            raise Refused("stream_options needs stream: true", "stream_options")
        known = ("include_usage", "include_obfuscation")  # the second pads chunks, a recommendation
        fields = Fields(options, known)
        model = self.get("model", str, "", "a string")
        usage = fields.flag("include_usage")
        return Asked(model, prompts, sampling, n, is_streamed, usage, tools or {})


def chat_request(
    body: dict[str, Any],
    encode: Callable[[list[dict[str, Any]], list[Any] | None], list[int]],
    defaults: dict[str, Any],
    context: int,
    takes_tools: bool,
) -> Asked:
    """Check the body of a request to /v1/chat/completions.

    Args:
        body: the JSON object.
        encode: makes a prompt of messages and tools.
        defaults: see `Fields.sampling`.
        context: of the model, in tokens.
        takes_tools: whether the model's chat template renders tools.

    Raises:
        Refused: with the reason.
    """
    fields = Fields(_with_generation_config(body), CHAT)
    form = fields.get("response_format", dict, {}, "an object").get("type", "text")
    if form != "text":
        raise Refused(
            f"response_format {quoted(str(form))} is not supported; ask for the form in the prompt",
            "response_format",
            "unsupported_parameter",
        )
    tools = fields.get("tools", list, None, "a list")
    if fields.body.get("tool_choice") == "none":
        tools = None
    if tools and not takes_tools:
        raise Refused("the model's chat template has no tools", "tools", "unsupported_parameter")
    schemas = _tool_schemas(tools or [])
    logprobs = None
    if fields.flag("logprobs"):
        logprobs = fields.whole("top_logprobs", 0, MOST_ALTERNATIVES, 0)
    elif "top_logprobs" in fields.body:
        raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
    try:
        prompt = encode(_messages(fields), tools or None)
    except ModelError as error:  # such as a role that the template does not have
        raise Refused(first_line(error), "messages") from None
    sampling = fields.sampling(defaults, context, len(prompt), logprobs)
    return fields.asked([prompt], sampling, schemas)


def completion_request(
    body: dict[str, Any],
    encode: Callable[[str], list[int]],
    defaults: dict[str, Any],
    context: int,
    vocabulary: int,
) -> Asked:
    """Check the body of a request to /v1/completions; arguments as `chat_request`.

    Args:
        vocabulary: token ids of a prompt are below it.

    Raises:
        Refused: with the reason.
    """
    fields = Fields(body, COMPLETION)
    given = fields.body.get("prompt")
    prompts = given if isinstance(given, list) and not _are_ids(given) else [given]
    if not prompts or len(prompts) > MOST_ANSWERS:
        raise Refused(f"prompt must be one to {MOST_ANSWERS} prompts", "prompt", "invalid_value")
    encoded = []
    for prompt in prompts:
        if _are_ids(prompt) and all(0 <= token < vocabulary for token in prompt):
            encoded.append(prompt)
        elif isinstance(prompt, str):
            try:
                encoded.append(encode(prompt))
            except DataError as error:  # a text that the tokenizer cannot take
                raise Refused(first_line(error), "prompt") from None
        else:
            raise Refused("prompt must be text or token ids", "prompt", "invalid_type")
    if not all(encoded):
        raise Refused("the prompt is empty", "prompt", "invalid_value")
    logprobs = fields.whole("logprobs", 0, MOST_ALTERNATIVES)
    longest = max(map(len, encoded))
    return fields.asked(encoded, fields.sampling(defaults, context, longest, logprobs))


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _with_generation_config(body: dict[str, Any]) -> dict[str, Any]:
    """A request of `transformers chat`, whose settings are a GenerationConfig as JSON text."""
    if body.get("generation_config") is None:
        return body
    rest = {name: value for name, value in body.items() if value is not None}
    del rest["generation_config"]
    try:
        given = json.loads(body["generation_config"])
        given = {key: value for key, value in given.items() if value is not None}
    except (TypeError, ValueError, AttributeError, RecursionError):
        raise Refused("generation_config must be an object as JSON", "generation_config") from None
    given = {key: value for key, value in given.items() if key != "transformers_version"}
    for key in given:
        if key not in GENERATION:
            raise Refused(f"generation_config: {quoted(key)} is not supported", "generation_config")
    if "max_new_tokens" in given:
        given["max_tokens"] = given.pop("max_new_tokens")
    do_sample = given.pop("do_sample", None)
    if do_sample is False:
        given["temperature"] = 0
    elif do_sample:
        given.setdefault("temperature", 1.0)
    return given | rest


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages, their contents as text."""
    messages = fields.get("messages", list, None, "a list")
    if not messages or len(messages) > MOST_MESSAGES:
        raise Refused(f"messages must be one to {MOST_MESSAGES:,} messages", "messages")
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message as chat templates take it."""
    if not isinstance(message, dict):
        raise Refused(f"{place} must be an object", place, "invalid_type")
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise Refused(f"{place}.role must be system, user, assistant or tool", f"{place}.role")
    checked = {"role": "system" if role == "developer" else role}
    # clients send an answer back with its empty fields
    for name, value in message.items():
        if name == "tool_calls" and value:
            checked["tool_calls"] = _tool_calls(value, f"{place}.tool_calls")
        elif name in ("name", "tool_call_id") and isinstance(value, str):
            checked[name] = value
        elif name not in ("role", "content") and value:
            raise Refused(f"{place}.{name} is not supported", place, "unsupported_parameter")
    checked["content"] = _content(message.get("content"), f"{place}.content", checked)
    return checked


def _content(content: Any, place: str, message: dict[str, Any]) -> str:
    """The text of a content: a text, or text parts."""
    if content is None and "tool_calls" in message:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Refused(f"{place} must be text", place, "invalid_type")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Refused(f"{place}: only text parts are supported", place, "unsupported_content")
    return "".join(part["text"] for part in content)


def _tool_schemas(tools: list[Any]) -> dict[str, Any]:
    """The name of each tool → the schema of its parameters."""
    schemas = {}
    for at, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            place = f"tools[{at}]"
            raise Refused(f"{place} must describe a function by its name", place, "invalid_type")
        schemas[function["name"]] = function.get("parameters")
    return schemas


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them: the arguments as an object where they are one."""
    checked = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{place} must be a list of function calls", place, "invalid_type")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")  # "" where a tool takes none
            except (ValueError, RecursionError):
                raise Refused(f"{place}: arguments are not JSON", place) from None
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}  # of `tool_call_id`
        function = {"name": function["name"], "arguments": arguments}
        checked.append(kept | {"type": "function", "function": function})
    return checked


def found_tool_calls(text: str, tools: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into its text, and its tool calls as OpenAI's: the arguments as JSON text.

    Args:
        text: the answer.
        tools: as in `Asked`; calls of others stay text.
    """
    rest, calls = split_calls(text, tools) if tools else (text, [])
    return rest, [
        call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in calls
    ]

"""Where each turn stands in what a chat template renders, and so which tokens are trained on.

The assistant's turns are the template's `{% generation %}` marks, or else found by rendering the
conversation up to them. Private use characters stand for special tokens that a message contains,
and mark places in contents, while the template renders them.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hfsft.tokens.foreign_templates import (
    PROBE,
    PROBE_TOOL,
    TemplateError,
    encoded_text,
    free_characters,
    memory_ceiling,
    protected,
    rendered,
    special_tokens,
)
from hfsft.tokens.messages import Conversation, Messages, with_new_ids
from hfsft.tokens.training_flags import Span

REWRITES = "the chat template rewrites earlier turns"


class Turns:
    """A conversation as a template renders it, and the places of its turns."""

    def __init__(self, conversation: Conversation, tokenizer: Any):
        """Render it.

        Args:
            conversation: with plain text contents.
            tokenizer: as `load_tokenizer` returns it.

        Raises:
            TemplateError: with the reason, also if the template leaves out a tool, a tool call, a
                tool's result or a message.
            ModelError: if it exceeds a bound.
        """
        self.tokenizer = tokenizer
        self.ceiling = memory_ceiling()  # 6 µs, so not for each rendering
        self.free = free_characters([conversation.messages, conversation.tools])
        self.stand_ins = dict(zip(special_tokens(tokenizer), self.free, strict=False))
        self.tools = protected(conversation.tools, self.stand_ins)
        self.messages = [self._for_template(message) for message in conversation.messages]
        self.trained = [message.get("train") for message in conversation.messages]
        self.has_marks = tokenizer.hfsft_training_template is not None
        self.text, self.marks = self._render_all()
        headers = self._headers() if self.marks else []
        self.marks = [self._without(headers, *mark) for mark in self.marks]
        self._check_nothing_left_out()

    def _for_template(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as templates read it: special tokens protected, reasoning under both names."""
        message = {name: held for name, held in message.items() if name != "train"}
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
        return protected(message, self.stand_ins)

    def _render(self, messages: Messages, **settings: Any) -> str:
        return rendered(messages, self.tokenizer, self.ceiling, self.tools, **settings)[0]

    def _render_all(self) -> tuple[str, list[Span]]:
        """The whole conversation, and the template's marks."""

        def render() -> tuple[str, list[Span]]:
            return rendered(
                self.messages,
                self.tokenizer,
                self.ceiling,
                self.tools,
                return_assistant_tokens_mask=self.has_marks,
            )

        has_calls = any("tool_calls" in message for message in self.messages)
        try:
            found = render()
        except TemplateError:
            if not has_calls:
                raise
            # Mistral's want an id of nine letters and digits with each call and result
            self.messages = with_new_ids(self.messages)
            found = render()
        without = [_without_calls(one) for one in self.messages]
        if has_calls and not self._differs(without, found[0]):
            template = self.tokenizer.hfsft_training_template or self.tokenizer.chat_template
            if "<tool_call>" not in template:
                raise TemplateError("tool calls, which the chat template cannot render")
            # SmolLM3's describes the tools, and leaves writing the calls to the content
            self.messages = [_with_written_calls(message) for message in self.messages]
            found = render()
        return found

    def _headers(self) -> list[str]:
        """What the assistant's turns begin with that a model is given: no mark is to have it.

        The generation prompt (SmolLM3's marks have it), or the token that it begins with
        (DeepSeek's have that, and its generation prompt goes on).
        """
        before = self.messages[: [one["role"] for one in self.messages].index("assistant")]
        try:
            without, prompt = self._render(before), self._render(before, add_generation_prompt=True)
        except TemplateError:
            return []
        header = prompt[len(without) :] if prompt.startswith(without) else ""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        first = sorted(filter(header.startswith, added), key=len)[-1:]
        return [one for one in (header, *first) if one]

    def _without(self, headers: list[str], start: int, end: int) -> Span:
        """A mark without the header that it begins with."""
        found = [header for header in headers if self.text.startswith(header, start, end)]
        return start + len(found[0]) if found else start, end

    def _differs(self, messages: Messages, text: str) -> bool:
        """Whether messages are rendered as another text, or not at all."""
        try:
            return self._render(messages) != text
        except TemplateError:
            return True

    # --- nothing is left out ---

    def _check_nothing_left_out(self) -> None:
        """Check that the rendering has every message."""
        for index, message in enumerate(self.messages):
            content = message["content"].rpartition("</think>")[2].strip()
            times = sum(one["content"].count(content) for one in self.messages) if content else 0
            if is_written(content, self.text, times) or self._matters(index):
                continue
            kind = {
                "system": "a system message",
                "tool": "a tool's result",
                "user": "a user's message",
                "assistant": "an assistant's text",
            }[message["role"]]
            raise TemplateError(f"{kind}, which the chat template leaves out")

    def _matters(self, index: int) -> bool:
        """Whether another content of a message changes the rendering, which may rewrite it."""
        other = [dict(message) for message in self.messages]
        other[index]["content"] = next(self.free)
        return self._differs(other, self.text)

    def left_out(self) -> str:
        """What the template does not write, though the rest of the row can be trained on."""
        for message in self.messages:
            within = message["content"].rpartition("</think>")[0].rpartition("<think>")[2]
            for reasoning in (message.get("reasoning_content", ""), within):
                if not is_written(reasoning, self.text):
                    return "reasoning"
        return ""

    # --- places ---

    def trained_characters(self, assistant_only: bool) -> tuple[np.ndarray, np.ndarray]:
        """Which characters of the text are trained on.

        Args:
            assistant_only: see `encoding.encode_conversations`.

        Returns:
            bool [characters]: the trained ones, and those of messages that name them by spans.
        """
        trained = np.full(len(self.text), not assistant_only)
        exact = np.zeros(len(self.text), bool)
        if assistant_only:
            for start, end in self.marks if self.has_marks else self._assistant_turns():
                trained[start:end] = True
        else:
            for start, end in self._never_trained():
                trained[start:end] = False
        for index, said in enumerate(self.trained):
            in_marks = self.has_marks and self.messages[index]["role"] == "assistant"
            if said is None or (said is False and assistant_only and not in_marks):
                continue  # it is as the default, or no turn was added for it
            content = self.messages[index]["content"]
            turn = self._whole(index)
            # the marks may begin before the turn's header, or end after its line break
            around = [mark for mark in self.marks if mark[0] < turn[1] and turn[0] < mark[1]]
            for start, end in [turn, *around]:
                trained[start:end] = False
            if said is False:
                continue
            spans = [[0, len(content)]] if said is True else said
            exact[slice(*turn)] = True
            for start, end in [*self._content_spans(index, spans), self._end_token(turn)]:
                trained[start:end] = True
        return trained, exact

    def _whole(self, index: int) -> Span:
        """A turn with the special token that ends it; of other roles, as far as it is content."""
        message = self.messages[index]
        if message["role"] == "assistant":
            return self.turn(index)
        ((start, end),) = self._content_spans(index, [[0, len(message["content"])]])
        found = [
            token for token in special_tokens(self.tokenizer) if self.text.startswith(token, end)
        ]
        return start, end + len(found[0]) if found else end

    def _assistant_turns(self) -> Iterator[Span]:
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant" and self.trained[index] is None:
                yield self.turn(index)

    def turn(self, index: int) -> Span:
        """The characters of an assistant's turn, after the generation prompt.

        They follow the content of the message before it: first what also ends a prompt, then the
        turn, through its last special token.

        Raises:
            TemplateError: if the template writes them otherwise once more messages follow.
        """
        mark = next(self.free)
        before = self.messages[index - 1]
        content = before["content"].rstrip()
        marked = before | {"content": content + mark + before["content"][len(content) :]}
        messages = [*self.messages[: index - 1], marked, *self.messages[index:]]
        place, text = self._place(self._render(messages), mark)
        _, prompt = self._place(self._render(messages[:index], add_generation_prompt=True), mark)
        _, last = self._place(self._render(messages[: index + 1]), mark)
        if self.text[:place] + text != self.text or not text.startswith(prompt):
            raise TemplateError(REWRITES)
        start = place + len(prompt)
        if text.startswith(last):
            return start, self._turn_end(place + len(last), start)
        # Qwen3's writes an empty reasoning in the last turn alone: up to what ended that one
        return start, self._first_end(start)

    def _place(self, text: str, mark: str) -> tuple[int, str]:
        """Where a mark stands in a rendering, and the text that follows it."""
        before, found, after = text.partition(mark)
        if not found or mark in after:
            raise TemplateError(REWRITES)
        return len(before), after

    def _turn_end(self, end: int, start: int) -> int:
        """The end of a turn: after its last special token, before the line break that follows."""
        ends = [
            self.text.rfind(token, start, end) + len(token)
            for token in special_tokens(self.tokenizer)
        ]
        return max((one for one in ends if one > start), default=end)

    def _first_end(self, start: int) -> int:
        last = len(self.messages) - 1
        if self.messages[last]["role"] != "assistant":
            raise TemplateError(REWRITES)
        end = self.turn(last)[1]
        for token in special_tokens(self.tokenizer):
            found = self.text.find(token, start)
            if self.text[:end].endswith(token) and found >= 0:
                return found + len(token)
        raise TemplateError(REWRITES)

    def _content_spans(self, index: int, spans: Sequence[Sequence[int]]) -> list[Span]:
        """Where characters of a content stand in the text; blanks at its edges may be trimmed."""
        content = self.messages[index]["content"]
        first, last = len(content) - len(content.lstrip()), len(content.rstrip())
        edges = [min(max(edge, first), last) for span in spans for edge in span]
        marks = [next(self.free) for _ in edges]
        cuts = [0, *edges, len(content)]
        pieces = [content[a:b] for a, b in itertools.pairwise(cuts)]
        written = "".join(map("".join, zip(pieces, [*marks, ""], strict=True)))
        other = [*self.messages]
        other[index] = other[index] | {"content": written}
        text = self._render(other)
        found = [match.start() - number for number, match in enumerate(_marks_in(text, marks))]
        if len(found) != len(marks) or re.sub(f"[{''.join(marks)}]", "", text) != self.text:
            raise TemplateError("a message to train on in part, which the chat template rewrites")
        return list(zip(found[::2], found[1::2], strict=True))

    def _end_token(self, turn: Span) -> Span:
        """The special token that ends a turn."""
        start, end = turn
        for token in special_tokens(self.tokenizer):
            if self.text.endswith(token, start, end):
                return end - len(token), end
        return end, end

    def _never_trained(self) -> Iterator[Span]:
        """The descriptions of tools and the results of their calls."""
        if self.tools:
            tools, self.tools = self.tools, [PROBE_TOOL]
            other, self.tools = self._render(self.messages), tools
            first = _common(self.text, other)
            yield first, len(self.text) - _common(self.text[:first:-1], other[:first:-1])
        for first, last in _result_runs(self.messages):
            before, after = self._render(self.messages[:first]), self._render(self.messages[:last])
            if after.startswith(before) and self.text.startswith(after):
                yield len(before), len(after)
                continue
            for index in range(first, last):
                content = self.messages[index]["content"]
                yield from self._content_spans(index, [[0, len(content)]])


# --- messages ---


def is_written(content: str, text: str, times: int = 1) -> bool:
    """Whether a content is in a rendering so often: as it is, trimmed, or as a JSON string."""
    quoted = json.dumps(content, ensure_ascii=False)[1:-1]
    return any(text.count(form.strip()) >= times for form in (content, quoted))


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {name: held for name, held in message.items() if name != "tool_calls"}


def _with_written_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its calls in its content, as Hermes and Qwen write them."""
    calls = [
        json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())
    ]
    lines = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    content = [message["content"]] if message["content"] else []
    return _without_calls(message) | {"content": "\n".join([*content, *lines])}


def _result_runs(messages: Messages) -> Iterator[tuple[int, int]]:
    """First and end index of each run of tool results, which templates may write as one turn."""
    first = None
    for index, message in enumerate([*messages, {"role": "end"}]):
        if message["role"] == "tool" and first is None:
            first = index
        elif message["role"] != "tool" and first is not None:
            yield first, index
            first = None


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _marks_in(text: str, marks: list[str]) -> list[re.Match[str]]:
    """The marks in a text, each once and in order; otherwise fewer than there are."""
    found = list(re.finditer(f"[{''.join(marks)}]", text)) if marks else []
    return found if [match[0] for match in found] == marks else []


def end_of_turn(tokenizer: Any) -> str:
    """The token that ends the assistant's turns.

    Raises:
        TemplateError: if the assistant's turns cannot be identified, or end in no special token
            that generation could stop at.
    """
    turns = Turns(Conversation(PROBE), tokenizer)
    spans = turns.marks if turns.has_marks else [turns.turn(index) for index in (1, 3)]
    texts = [turns.text[start:end] for start, end in spans]
    # trl's marks for Phi-3 have the end of the text too, as a span of its own
    texts = [text for text in texts if "four" in text]
    if not texts:
        raise TemplateError("the assistant's turns cannot be identified")
    for token in special_tokens(tokenizer):
        if texts[-1].rstrip().endswith(token):
            return token
    raise TemplateError("the assistant's turns end in no special token")


# --- tokens ---


def tokens_within(offsets: Sequence[Span], text: str, trained: np.ndarray) -> list[bool]:
    """Which tokens have trained characters only, blanks in front of them or behind aside.

    Args:
        offsets: of each token; a tokenizer may leave blanks out of them.
        text: that they are of.
        trained: bool [characters].
    """
    found, done = [], 0
    for begin, end in offsets:
        inside = range(min(begin, done), end)
        visible = [place for place in inside if not text[place].isspace()] or inside
        found.append(len(visible) > 0 and all(trained[place] for place in visible))
        done = max(done, end)
    return found


def encode(
    conversation: Conversation, tokenizer: Any, assistant_only: bool = True
) -> tuple[list[int], list[bool], str]:
    """Encode a conversation through the tokenizer's own template.

    A special token written inside a message is encoded as plain text.

    Args:
        conversation: with plain text contents.
        tokenizer: as `load_tokenizer` returns it.
        assistant_only: see `encoding.encode_conversations`.

    Returns:
        Token ids, for each whether it is trained on, and what the template leaves out of a row
        that is trained on all the same.

    Raises:
        TemplateError: with the reason.
    """
    turns = Turns(conversation, tokenizer)
    trained, exact = turns.trained_characters(assistant_only)
    ids, places = encoded_text(turns.text, turns.stand_ins, tokenizer)
    begins = [min(begin, len(turns.text) - 1) for begin, _ in places]
    mask = trained[begins]
    if exact.any():
        mask = np.where(exact[begins], tokens_within(places, turns.text, trained), mask)
    return ids, mask.tolist(), turns.left_out()

"""An answer's text as its tokens come: whole characters, calculator calls, stop strings."""

from typing import Any

from hfsft.evaluation.answering import TOOL_TOKENS

UNFINISHED = 3  # replacement characters at the end that may still become one character


class AnswerText:
    """The text of one answer, in pieces that are never taken back.

    Joined, the pieces are what `Evaluator` decodes, up to the first stop string.
    """

    def __init__(self, tokenizer: Any, has_calculator: bool, stop: tuple[str, ...] = ()):
        """Start an answer.

        Args:
            tokenizer: decodes it; special tokens are left out.
            has_calculator: write calculator calls as `<<6*7=42>>`, as `Evaluator` does.
            stop: strings at which the answer ends; they are left out.
        """
        self.stop = stop
        # transformers' own `decode` takes ten times as long for one token
        is_plain = not tokenizer.clean_up_tokenization_spaces
        self._decode = tokenizer.backend_tokenizer.decode if is_plain else tokenizer.decode
        marks = dict(zip(tokenizer.convert_tokens_to_ids(list(TOOL_TOKENS)), _MARKS, strict=True))
        self.marks = marks if has_calculator else {}
        self.is_stopped = False  # a stop string was found
        self._ids: list[int] = []  # the tokens that the next characters depend on
        self._sent = 0  # characters of those tokens that are out
        self._held = ""  # may be the beginning of a stop string, or a `>>` that "=" follows

    def add(self, token: int) -> str:
        """Append a token and return the characters that are now final."""
        if token in self.marks:
            return self._release(self._flush() + self.marks[token])
        self._ids.append(token)
        text = self._decode(self._ids, skip_special_tokens=True)
        held = len(text) - len(text.rstrip("\ufffd"))
        final = text[self._sent : max(self._sent, len(text) - min(held, UNFINISHED))]
        self._sent += len(final)
        if not held and len(self._ids) > 1:
            # the last token stays, as decoding a text from its middle may lose a space
            self._ids = self._ids[-1:]
            self._sent = len(self._decode(self._ids, skip_special_tokens=True))
        return self._release(final)

    def end(self) -> str:
        """The characters that were held back."""
        return self._release(self._flush(), is_end=True)

    def _flush(self) -> str:
        """What the tokens since the last mark hold back; a new text begins."""
        text = self._decode(self._ids, skip_special_tokens=True)[self._sent :]
        self._ids, self._sent = [], 0
        return text

    def _release(self, text: str, is_end: bool = False) -> str:
        """Of the text held so far and a new piece, what no stop string can include any more."""
        if self.is_stopped:
            return ""
        text = (self._held + text).replace(">>=", "=") if self.marks else self._held + text
        self._held = ""
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        if is_end:
            return text
        waited_for = self.stop + ((">>=",) if self.marks else ())
        keep = max((_overlap(text, string) for string in waited_for), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


_MARKS = ("<<", ">>", "=", ">>")  # of TOOL_TOKENS


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of `text` are the beginning of `string`."""
    return max((n for n in range(1, len(string)) if text.endswith(string[:n])), default=0)

"""The prompts for the teacher: a YAML file that a user can read, copy and change."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError, nearest, quoted
from hfsft.recipe.yaml_nodes import Node, kind, read_yaml

DEFAULT = Path(__file__).with_name("prompts.yaml")

MANAGED = ("messages", "model", "stream")  # fields of a request that are set already

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompts:
    """What the teacher is asked; `prompts.yaml` describes each part."""

    system: str | None
    questions: tuple[str, ...]
    answer: str
    requests: tuple[str, ...]
    request: dict[str, Any]
    refusals: tuple[str, ...]
    unclear: tuple[str, ...]

    def given(self, passage: str, number: int) -> str | None:
        """The first message of a passage's row `number`, from 0; None if the teacher writes it."""
        index = number % (len(self.questions) + len(self.requests)) - len(self.questions)
        if index < 0:
            return None
        return self.requests[index].replace("{passage}", passage).strip()

    def for_given(self, message: str) -> Messages:
        """The messages that ask for the answer to a row's first message, where it is given."""
        return self._messages(message)

    def for_question(self, passage: str, number: int) -> Messages:
        """The messages that ask for the question of a passage's row `number`."""
        prompt = self.questions[number % (len(self.questions) + len(self.requests))]
        return self._messages(prompt.replace("{passage}", passage))

    def for_answer(self, passage: str, question: str) -> Messages:
        """The messages that ask for the answer to a question about a passage."""
        before, _, after = self.answer.partition("{passage}")
        parts = (part.replace("{question}", question) for part in (before, after))
        return self._messages(passage.join(parts))

    def _messages(self, prompt: str) -> Messages:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": prompt}]


def load_prompts(path: Path = DEFAULT) -> Prompts:
    """Read a file of prompts; a part that it leaves out is that of the default file.

    Raises:
        RecipeError: naming the line, if it cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    root = read_yaml(text, str(path), lines=True)
    if not isinstance(root.value, dict):
        raise RecipeError(f"{root.where}: expected a mapping of prompts, got {kind(root)}")
    default = {} if path == DEFAULT else vars(load_prompts())
    known = {
        "system": lambda node: node.value and _text(node, "system"),
        "questions": lambda node: _texts(node, "questions", "{passage}"),
        "requests": lambda node: _texts(node, "requests", "{passage}"),
        "answer": lambda node: _text(node, "answer", "{passage}", "{question}"),
        "request": _request,
        "refusals": _phrases,
        "unclear": _phrases,
    }
    read = {}
    for key, node in root.value.items():
        if key not in known:
            raise RecipeError(f"{node.where}: unknown key {quoted(key)}{nearest(key, known)}")
        read[key] = known[key](node)
    prompts = Prompts(**default | read)
    if not prompts.questions + prompts.requests:
        raise RecipeError(f"{path}: has neither questions nor requests")
    return prompts


def _text(node: Node, key: str, *needed: str) -> str:
    if not isinstance(node.value, str):
        raise RecipeError(f"{node.where}: {key}: expected text, got {kind(node)}")
    for name in needed:
        if name not in node.value:
            raise RecipeError(f"{node.where}: {key}: needs {name}")
    return node.value


def _texts(node: Node, key: str, *needed: str) -> tuple[str, ...]:
    if not isinstance(node.value, list):
        raise RecipeError(f"{node.where}: {key}: expected a list of texts, got {kind(node)}")
    return tuple(_text(one, key, *needed) for one in node.value)


def _phrases(node: Node) -> tuple[str, ...]:
    return tuple(phrase.casefold() for phrase in _texts(node, "phrases"))


def _request(node: Node) -> dict[str, Any]:
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.where}: request: expected a mapping, got {kind(node)}")
    for key, child in node.value.items():
        if key in MANAGED:
            raise RecipeError(f"{child.where}: request.{key}: hfsft sets it")
    return node.plain()

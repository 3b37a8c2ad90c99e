"""What an exported model must reproduce: the original's tokens, answers and losses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfsft.data.tasks import task_rows
from hfsft.errors import HfsftError, ModelError
from hfsft.evaluation.tasks import HELD_OUT, load_task
from hfsft.export.architecture import uncapped
from hfsft.export.readers import greedy_answer, log_probabilities, today
from hfsft.recipe.loading import load_recipe
from hfsft.recipe.sections import TOP
from hfsft.run.record import read_record
from hfsft.tokens.encoding import IGNORED
from hfsft.tokens.foreign_templates import bounded

ANSWER_TOKENS = 32  # of each answer that is compared

DOCUMENTS, DOCUMENT_TOKENS = 8, 128  # held-out conversations, and the tokens of each


@dataclass(frozen=True)
class Answer:
    """The original's top-1 answer to a prompt."""

    prompt: list[int]
    most: int  # new tokens
    ids: list[int]  # without the end token
    ended: bool  # by an end token


@dataclass(frozen=True)
class Document:
    """A held-out conversation, and what the original makes of it."""

    ids: list[int]
    start: int  # the first token whose probability is compared
    log_probability: float  # the sum from there on, in nats, without a cap of the logits
    capped: float  # the same with the original's cap
    divergence: float  # KL(capped, uncapped) at temperature 1, summed


@dataclass(frozen=True)
class Reference:
    """The original's behaviour, computed once for every exported file."""

    is_chat: bool  # it has a chat template
    conversations: list[tuple[list[dict[str, Any]], list[Any] | None, list[int]]]
    answers: list[Answer]
    documents: list[Document]
    described: str  # the documents, in words
    cap: float | None  # of the logits
    ends: list[int]  # the end tokens


def make_reference(model: Any, tokenizer: Any, start: str, ends: list[int]) -> Reference:
    """Ask the original model.

    Args:
        model: in float32 on the CPU.
        tokenizer: of the model.
        start: the model's folder or Hub id; a stage of a run is asked its sample prompts, and its
            loss is that of its held-out conversations.
        ends: the end tokens.

    Raises:
        ModelError: if its context or its chat template takes none of the conversations.
    """
    positions = model.config.max_position_embeddings
    conversations = []
    for messages, tools in _conversations(tokenizer):
        ids = _rendered(messages, tools, tokenizer)
        if ids is not None and len(ids) < positions:
            conversations.append((messages, tools, ids))
    prompts = [_rendered(_user(prompt), None, tokenizer) for prompt in _sample_prompts(start)]
    prompts = [ids for ids in prompts if ids and len(ids) < positions]
    prompts += [ids for _, tools, ids in conversations if not tools]
    answers = []
    for ids in prompts:
        most = min(ANSWER_TOKENS, positions - len(ids))
        answers.append(Answer(ids, most, *greedy_answer(model, ids, most, ends)))
    rows, described = _documents(start, tokenizer)
    documents = [_document(model, *row) for row in _cut(rows, positions)]
    if not (answers and documents):
        raise ModelError(
            f"{start}: its context of {positions} tokens or its chat template takes none of the "
            "conversations that would prove an export"
        )
    cap = getattr(model.config, "final_logit_softcapping", None)
    is_chat = bool(tokenizer.chat_template)
    return Reference(is_chat, conversations, answers, documents, described, cap, ends)


# --- conversations ---

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]

SYSTEM = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "Who are you?"},
]

QUESTIONS = (
    "Spell the word: assume",
    "What is 12345 + 67? And 3.14 * 2?",
    "Why is the sky blue?",
    "  Two spaces,\ttabs\n\n\nand lines; don't stop, I'll wait...  ",
    "def add(a, b):\n    return a + b  # what does this do?",
    "Größe, naïve, Привет, 日本語, 👍🏽?",
)


def _user(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _conversations(tokenizer: Any) -> list[tuple[list[dict[str, Any]], list[Any] | None]]:
    """Ten conversations up to a question: one with a system message, one with tools if it can."""
    exchanges = [row["messages"] for row in task_rows("small_talk", 20, split="test", seed=0)]
    longer = [messages[:3] for messages in exchanges if len(messages) > 2][:2]
    found = [*((_user(question), None) for question in QUESTIONS), (SYSTEM, None)]
    found += [(messages, None) for messages in longer]
    takes_tools = "tools" in str(tokenizer.chat_template)
    return [*found, (_user("What is 2 + 3?"), TOOLS if takes_tools else None)]


def _rendered(
    messages: list[dict[str, Any]], tools: list[Any] | None, tokenizer: Any
) -> list[int] | None:
    """Token ids of a conversation up to the answer; None if the chat template refuses it."""
    if not tokenizer.chat_template:
        return tokenizer(messages[-1]["content"])["input_ids"]
    try:
        text = bounded(
            tokenizer.name_or_path,
            lambda: tokenizer.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=True,
                tokenize=False,
                **today(tokenizer.get_chat_template(tools=tools)),
            ),
        )
    except ModelError:
        raise
    except Exception:  # a template can raise anything
        return None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _sample_prompts(start: str) -> list[str]:
    """The prompts that a run answers at every validation; hfsft's own for another model."""
    recipe = Path(start).parent / "recipe.yaml"
    if not (Path(start) / "stage.json").is_file() or not recipe.is_file():
        return TOP["sample_prompts"].default
    return load_recipe(str(recipe)).sample_prompts


# --- held-out documents ---


def _documents(start: str, tokenizer: Any) -> tuple[list[dict[str, list[int]]], str]:
    """Rows whose loss is compared, and what they are."""
    try:
        rows = load_task(HELD_OUT, start, DOCUMENTS).documents
        return rows, f"{len(rows)} held-out {_unit(start)} of the run"
    except HfsftError:  # no stage of a run, or its data is not here
        made = task_rows("small_talk", DOCUMENTS, split="test", seed=1)
        rows = [{"input_ids": _whole(row["messages"], tokenizer)} for row in made]
        return rows, f"{len(rows)} built-in conversations"


def _unit(start: str) -> str:
    return "rows" if read_record(Path(start))["stage"] == "base" else "conversations"


def _whole(messages: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    prompt = _rendered(messages[:-1], None, tokenizer) or []
    return [*prompt, *tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]]


def _cut(rows: list[dict[str, list[int]]], positions: int) -> list[tuple[list[int], int]]:
    """Token ids, not too many, and the first position whose token the model is trained on."""
    cut = []
    for row in rows:
        labels = row.get("labels", row["input_ids"])
        trained = [at for at, label in enumerate(labels) if label != IGNORED and at > 0]
        if trained and trained[0] < positions - 1:
            length = min(trained[0] + DOCUMENT_TOKENS, positions - 1)
            cut.append((list(row["input_ids"][:length]), trained[0]))
    return cut


@torch.no_grad()
def _document(model: Any, ids: list[int], start: int) -> Document:
    capped = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
    with uncapped(model):
        plain = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        log_probability = log_probabilities(model, ids, start).sum().item()
    divergence = (capped.exp() * (capped - plain)).sum().item()
    targets = torch.tensor(ids[start:])[:, None]
    return Document(ids, start, log_probability, capped.gather(1, targets).sum().item(), divergence)

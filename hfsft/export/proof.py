"""The proof of an exported model: it is opened, and asked what the original was asked."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from hfsft.export.readers import NotProved, Reader
from hfsft.export.reference import ANSWER_TOKENS, Answer, Reference

# How far an export of a type may be from the original: in nats, the mean loss per token; and the
# logits by which two tokens may be apart and still change places.
BOUNDS = {
    "f32": (0.001, 0.01),
    "f16": (0.005, 0.05),
    "bf16": (0.02, 0.5),
    "q8_0": (0.03, 0.5),
    "q5_1": (0.15, 2.0),
    "q5_0": (0.15, 2.0),
    "q4_1": (0.4, 4.0),
    "q4_0": (0.4, 4.0),
}


@dataclass(frozen=True)
class Proof:
    """What was compared, and what came of it."""

    reader: str
    kind: str  # the type of the weights
    conversations: int  # rendered by the chat template and tokenized
    conversations_equal: int
    answers: int
    answers_equal: int
    answers_ended: int  # by an end token, in the original
    documents: str
    tokens: int  # of the documents, whose loss is compared
    loss: float  # of the original in nats, without a cap of the logits
    loss_exported: float
    loss_bound: float  # on the difference of the two
    tie: float  # logits that are less apart may change places
    cap: float | None  # of the original's logits, which the export has not
    cap_loss: float  # of the original with its cap
    cap_divergence: float  # KL of the original's distribution from the export's, per token

    def as_data(self) -> dict[str, Any]:
        """The proof as JSON data."""
        return asdict(self)

    def cap_line(self) -> str:
        """What the export loses with the cap of the logits, if the original has one."""
        return (
            f"the original caps its logits at {self.cap:g}, the export does not: greedy answers "
            f"are the same, sampling is sharper (KL {self.cap_divergence:.4f} nats a token at "
            f"temperature 1; loss {self.cap_loss:.4f} with the cap, {self.loss:.4f} without)"
        )

    def lines(self) -> list[str]:
        """The proof in words."""
        other = self.answers - self.answers_equal
        ties = f" ({other} differ where two logits are within {self.tie:g})" if other else ""
        return [
            f"read by {self.reader}",
            f"{self.conversations_equal} of {self.conversations} conversations: the same tokens",
            f"{self.answers_equal} of {self.answers} greedy answers: the same{ties}; "
            f"{self.answers_ended} end within {ANSWER_TOKENS} tokens, as the original's do",
            f"loss {self.loss:.4f} → {self.loss_exported:.4f} on {self.tokens} tokens of "
            f"{self.documents}",
        ]


def prove(
    reader: Reader, reference: Reference, model: Any, kind: str, same_tokens: bool = True
) -> Proof:
    """Compare an exported model with the original.

    Args:
        reader: has opened the export.
        reference: the original's behaviour.
        model: the original, asked how far apart two tokens are where an answer differs.
        kind: the type of the weights: a key of `BOUNDS`.
        same_tokens: whether a conversation that is tokenized otherwise refutes the export.

    Raises:
        NotProved: naming what differs.
    """
    loss_bound, tie = BOUNDS[kind]
    rendered = _same_tokens(reader, reference, same_tokens)
    for token in reference.ends:
        if not reader.ends_at(reference.answers[0].prompt, token):
            raise NotProved(f"{reader.name} does not stop at token {token}, which ends an answer")
    different = _different_answers(reader, reference, model, tie)
    documents = reference.documents
    tokens = sum(len(document.ids) - document.start for document in documents)
    loss = -sum(document.log_probability for document in documents) / tokens
    exported = sum(reader.log_probability(document.ids, document.start) for document in documents)
    if not abs(-exported / tokens - loss) <= loss_bound:  # NaN too
        raise NotProved(
            f"{reader.name} has a loss of {-exported / tokens:.4f} where the original has "
            f"{loss:.4f}: more than {loss_bound:g} apart"
        )
    return Proof(
        reader=reader.name,
        kind=kind,
        conversations=len(rendered),
        conversations_equal=sum(rendered),
        answers=len(reference.answers),
        answers_equal=len(reference.answers) - different,
        answers_ended=sum(answer.ended for answer in reference.answers),
        documents=reference.described,
        tokens=tokens,
        loss=loss,
        loss_exported=-exported / tokens,
        loss_bound=loss_bound,
        tie=tie,
        cap=reference.cap,
        cap_loss=-sum(document.capped for document in documents) / tokens,
        cap_divergence=sum(document.divergence for document in documents) / tokens,
    )


def _same_tokens(reader: Reader, reference: Reference, required: bool) -> list[bool]:
    """Whether each conversation is rendered and tokenized as the original's tokenizer does."""
    same = []
    for messages, tools, ids in reference.conversations:
        text = messages[-1]["content"]
        found = reader.prompt(messages, tools) if reference.is_chat else reader.tokens(text)
        same.append(found == ids)
        if required and found != ids:
            raise NotProved(f"{reader.name} renders or tokenizes {text!r} otherwise")
    return same


def _different_answers(reader: Reader, reference: Reference, model: Any, tie: float) -> int:
    """How many answers differ, each where two tokens are as good as tied."""
    different = 0
    for answer in reference.answers:
        ids, ended = reader.answer(answer.prompt, answer.most)
        if (ids, ended) == (answer.ids, answer.ended):
            continue
        different += 1
        apart = _apart(model, answer, ids, reference.ends)
        if apart > tie:
            raise NotProved(
                f"{reader.name} answers a prompt otherwise where two tokens are not tied: the "
                f"original's logits are {apart:.3g} apart, more than {tie:g}"
            )
    return different


@torch.no_grad()
def _apart(model: Any, answer: Answer, ids: list[int], ends: list[int]) -> float:
    """How far apart the original's logits are of the tokens at which two answers first differ."""
    shared = 0
    while shared < min(len(answer.ids), len(ids)) and answer.ids[shared] == ids[shared]:
        shared += 1
    logits = model(input_ids=torch.tensor([answer.prompt + answer.ids[:shared]])).logits[0, -1]

    def logit(tokens: list[int]) -> torch.Tensor:  # of the next token; behind the last an end token
        return logits[tokens[shared]] if shared < len(tokens) else logits[ends].max()

    return (logit(answer.ids) - logit(ids)).item()

"""The thread that generates: answers join the batch as they come and leave it when they end."""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hfsft.errors import ModelError, first_line
from hfsft.evaluation.answering import Calculator, Evaluator, load_its_tokenizer
from hfsft.serve.batch import Batch
from hfsft.serve.text import AnswerText

# in float32 a batch moved a logit by up to 2e-6 of the largest, in models of 2 to 8 layers; where
# the two highest are closer than this part of it, a batch of one decides between them
NEAR_TIE = 1e-4
WINDOW = 10.0  # seconds over which tokens/s are counted
GATHER = 0.02  # seconds of pieces that are published together; a small model's step takes 3 ms


class Busy(Exception):
    """The queue is full, or the server is shutting down."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer's tokens are chosen, and when it ends."""

    max_tokens: int
    temperature: float = 0.0  # 0 always picks the top-1 token
    top_k: int = 0  # sample from this many of the most probable tokens; 0: from all
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # alternatives to report with each token; None: no probabilities


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """A generated token and its log-probability, with the most probable ones."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step adds to an answer."""

    text: str
    tokens: int  # generated so far
    choice: TokenChoice | None = None
    finish: str | None = None  # "stop", "length", "cancelled", "stopping" or "error"


@dataclass(eq=False)
class Answer:
    """An answer that waits, is generated, or has ended; `key` is its owner's, to tell it by."""

    prompt: list[int]
    sampling: Sampling
    text: AnswerText
    publish: Callable[[Any, Piece], None]  # called in the event loop
    key: Any = None
    tokens: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # of a calculator's result, still to come
    is_cancelled: bool = False
    is_ended: bool = False
    was_alone: bool = True  # never computed beside another, so its logits are exact
    warpers: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    random: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        """Prepare the sampling; transformers' processors and order."""
        sampling = self.sampling
        if sampling.temperature > 0:
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self.warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self.warpers.append(TopPLogitsWarper(float(sampling.top_p)))
            if sampling.seed is None:
                self.random.seed()
            else:
                self.random.manual_seed(sampling.seed)

    @property
    def width(self) -> int:
        """The most positions that it will take."""
        return len(self.prompt) + self.sampling.max_tokens


class Engine:
    """One model, and the answers that it generates in one batch."""

    def __init__(self, evaluator: Evaluator, max_batch: int = 16, max_queue: int = 1024):
        """Load the model.

        Args:
            evaluator: the model with its tokenizer, end tokens and calculator.
            max_batch: at most this many answers are generated together.
            max_queue: at most this many more may wait.

        Raises:
            ModelError: if the model cannot be loaded, or cannot generate.
        """
        self.evaluator, self.max_batch, self.max_queue = evaluator, max_batch, max_queue
        # a fast tokenizer must not encode in two threads; prompts are encoded with the evaluator's
        self.tokenizer = load_its_tokenizer(evaluator.folder)
        self.calculator = Calculator(self.tokenizer, 0) if evaluator.has_calculator else None
        self.ends = set(evaluator.eos_token_ids)
        self.batch = Batch(evaluator.model)
        self.most_tokens = self._try_model()
        self.changed = threading.Condition()
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self.is_closed = False
        self.is_draining = False  # finish what runs, refuse what waits or comes
        self.prompt_tokens = self.generated_tokens = 0  # since the start
        self._steps: deque[tuple[float, int]] = deque()  # when, and how many tokens
        self._pieces: dict[Answer, list[Piece]] = {}  # not yet published
        self._published = 0.0  # when the last ones were
        self.in_loop: Callable[[Callable[[], None]], Any] = lambda call: call()
        self.thread = threading.Thread(target=self._run, name="hfsft-engine", daemon=True)

    def _try_model(self) -> int:
        """Generate a little; how many positions of the cache fit into the memory.

        A model whose rows depend on each other gets a batch of one.

        Raises:
            ModelError: if it fails.
        """
        batch, prompts = self.batch, [[1, 2, 3, 4, 5], [3, 4]]
        try:
            alone = [batch.alone(prompt, [2, 5]) for prompt in prompts]
            batch.join(prompts)
            batch.step([2, 2])
            together = batch.step([5, 5])
            most_tokens = int(_free_bytes(batch.model.device) / 4 / batch.bytes_per_token())
        except Exception as error:  # architectures fail in their own ways without such a cache
            raise ModelError(
                f"{self.evaluator.folder}: {self.evaluator.config.model_type} models cannot be "
                f"served: {first_line(error)}"
            ) from None
        batch.keep([])
        scale = max(logits.abs().max().item() for logits in alone)
        if not scale < float("inf"):
            raise ModelError(f"{self.evaluator.folder}: its logits are not finite numbers")
        tolerance = 1e-3 if batch.model.dtype == torch.float32 else 0.1
        if (together - torch.stack(alone)).abs().max() > tolerance * scale:
            self.max_batch = 1
        return most_tokens

    # --- called from the event loop ---

    def start(self, in_loop: Callable[[Callable[[], None]], Any]) -> None:
        """Start to generate.

        Args:
            in_loop: has the event loop call a function, such as `loop.call_soon_threadsafe`.
        """
        self.in_loop = in_loop
        self.thread.start()

    def answer(
        self,
        prompt: list[int],
        samplings: list[Sampling],
        publish: Callable[[Any, Piece], None],
        key: Any = None,
    ) -> list[Answer]:
        """Queue answers to a prompt, one for each way of sampling.

        Args:
            prompt: token ids.
            samplings: with room for `max_tokens` in the model's context.
            publish: is called in the event loop with the answer's key and each piece of it; the
                last one has a `finish`.
            key: of the first; the others' follow it.

        Raises:
            Busy: if not all of them may wait; none is queued then.
        """
        answers = [
            Answer(
                prompt,
                sampling,
                AnswerText(self.tokenizer, self.calculator is not None, sampling.stop),
                publish,
                key + index,
            )
            for index, sampling in enumerate(samplings)
        ]
        with self.changed:
            if self.is_draining:
                raise Busy("the server is shutting down")
            free = self.max_queue + self.max_batch - len(self.running)
            if len(self.waiting) + len(answers) > free:
                raise Busy(f"{len(self.waiting)} requests are waiting already")
            self.waiting += answers
            self.changed.notify()
        return answers

    def cancel(self, answers: list[Answer]) -> None:
        """End answers that nobody waits for any more; one that has ended stays as it is."""
        with self.changed:
            for answer in answers:
                answer.is_cancelled = True
            self.changed.notify()

    def close(self) -> None:
        """End the thread; what it still generates is dropped."""
        with self.changed:
            self.is_closed = True
            self.changed.notify()
        self.thread.join()

    @property
    def is_failed(self) -> bool:
        """Whether the thread has ended by an error, so that nothing is answered any more."""
        return not (self.is_closed or self.thread.is_alive())

    def tokens_per_second(self) -> float:
        """Generated tokens a second, over the last ten."""
        now = time.monotonic()
        return sum(tokens for when, tokens in list(self._steps) if now - when < WINDOW) / WINDOW

    # --- the thread ---

    def _run(self) -> None:
        """Generate until closed; an error ends the running answers, and the next ones start."""
        while True:
            joining: list[Answer] = []
            try:
                with self.changed:
                    while not (self.waiting or self.running or self.is_closed):
                        self.changed.wait()
                    if self.is_closed:
                        return
                    self._remove_ended()
                    joining = self._next_answers()
                if joining:
                    self._join(joining)
                if self.running:
                    self._advance(self.batch.step([answer.tokens[-1] for answer in self.running]))
            except torch.OutOfMemoryError:
                message = "hfsft: out of GPU memory; a smaller --max_batch needs less"
                print(message, file=sys.stderr, flush=True)
                self._fail([*self.running, *joining])
            except Exception:  # a bug; the next answers are not affected
                traceback.print_exc(file=sys.stderr)
                self._fail([*self.running, *joining])
            self._hand_over()

    def _remove_ended(self) -> None:
        """Take out what was cancelled, and all that waits once the server shuts down."""
        for answer in [*self.waiting]:
            if answer.is_cancelled or self.is_draining:
                self.waiting.remove(answer)
                self._end(answer, "cancelled" if answer.is_cancelled else "stopping")
        cancelled = [answer for answer in self.running if answer.is_cancelled]
        for answer in cancelled:
            self._end(answer, "cancelled")
        if cancelled:
            self._leave(cancelled)

    def _next_answers(self) -> list[Answer]:
        """Take from the queue what fits beside the running answers."""
        joining: list[Answer] = []
        widest = max((answer.width for answer in self.running), default=0)
        while self.waiting and len(self.running) + len(joining) < self.max_batch:
            rows = len(self.running) + len(joining) + 1
            widest = max(widest, self.waiting[0].width)
            if rows > 1 and rows * widest > self.most_tokens:
                break
            joining.append(self.waiting.popleft())
        return joining

    def _join(self, joining: list[Answer]) -> None:
        """Compute prompts, choose their first tokens, and add them to the batch."""
        logits = self.batch.join([answer.prompt for answer in joining])
        self.prompt_tokens += sum(len(answer.prompt) for answer in joining)
        self.running += joining
        self._advance(logits)

    def _advance(self, logits: torch.Tensor) -> None:
        """Choose the next token of the last rows, and drop the rows whose answers end.

        Args:
            logits: of the last running answers; [rows, vocabulary].
        """
        answers = self.running[len(self.running) - len(logits) :]
        alone = len(self.running) == 1
        highest, indices = logits.topk(min(2, logits.shape[-1]), dim=-1)
        pairs = zip(highest.tolist(), indices.tolist(), strict=True)
        sampled = _probabilities(answers, logits)
        ended = []
        for row, (answer, (scores, tokens)) in enumerate(zip(answers, pairs, strict=True)):
            # a prompt is always computed alone
            answer.was_alone = not answer.tokens or (alone and answer.was_alone)
            token = self._choose(answer, logits[row], scores, tokens, sampled.get(row))
            if self._add(answer, token, logits[row]):
                ended.append(answer)
        self.generated_tokens += len(answers)
        now = time.monotonic()
        self._steps.append((now, len(answers)))
        while now - self._steps[0][0] > WINDOW:
            self._steps.popleft()
        if ended:
            self._leave(ended)

    def _choose(
        self,
        answer: Answer,
        logits: torch.Tensor,
        scores: list[float],
        tokens: list[int],
        probabilities: torch.Tensor | None,
    ) -> int:
        """The next token: forced by the calculator, the top-1 token, or sampled."""
        if answer.forced:
            return answer.forced.pop(0)
        if probabilities is None:
            if scores[0] - scores[-1] < NEAR_TIE * max(map(abs, scores)):
                if not answer.was_alone and self.batch.model.dtype == torch.float32:
                    logits = self.batch.alone(answer.prompt, answer.tokens)
                return int(logits.argmax())  # of two equal ones, topk may put the other first
            return tokens[0]
        return int(torch.multinomial(probabilities, 1, generator=answer.random))

    def _add(self, answer: Answer, token: int, logits: torch.Tensor) -> bool:
        """Append a token to an answer, and tell its owner; whether the answer ends."""
        answer.tokens.append(token)
        choice = None
        if answer.sampling.logprobs is not None:
            choice = _choice(token, logits, answer.sampling.logprobs)
        finish = None
        if token in self.ends:
            text, finish = answer.text.end(), "stop"
        else:
            text = answer.text.add(token)
            if answer.text.is_stopped:
                finish = "stop"
            elif len(answer.tokens) >= answer.sampling.max_tokens:
                text, finish = text + answer.text.end(), "length"
            elif self.calculator and token == self.calculator.end and not answer.forced:
                answer.forced = self.calculator.result(answer.tokens)
        answer.is_ended = finish is not None
        if text or choice or finish:
            self._keep(answer, Piece(text, len(answer.tokens), choice, finish))
        return answer.is_ended

    def _keep(self, answer: Answer, piece: Piece) -> None:
        self._pieces.setdefault(answer, []).append(piece)

    def _end(self, answer: Answer, finish: str) -> None:
        answer.is_ended = True
        self._keep(answer, Piece("", len(answer.tokens), finish=finish))

    def _leave(self, answers: list[Answer]) -> None:
        """Drop the rows of answers that have ended."""
        rows = [row for row, answer in enumerate(self.running) if answer not in answers]
        self.running = [self.running[row] for row in rows]
        self.batch.keep(rows)

    def _fail(self, answers: list[Answer]) -> None:
        """End those answers whose step failed, unless they had ended before it."""
        for answer in answers:
            if not answer.is_ended:
                self._end(answer, "error")
        self.running = []
        self.batch.keep([])

    def _hand_over(self) -> None:
        """Publish the pieces of `GATHER` seconds, or sooner when an answer ends."""
        now, pieces = time.monotonic(), self._pieces
        ends = any(parts[-1].finish for parts in pieces.values())
        if not pieces or (now - self._published < GATHER and not ends):
            return
        self._pieces, self._published = {}, now

        def publish() -> None:
            for answer, parts in pieces.items():
                if answer.sampling.logprobs is None:  # else each token has a piece of its own
                    parts = [replace(parts[-1], text="".join(part.text for part in parts))]
                for piece in parts:
                    answer.publish(answer.key, piece)

        self.in_loop(publish)


def _probabilities(answers: list[Answer], logits: torch.Tensor) -> dict[int, torch.Tensor]:
    """What the next token of each answer that samples is drawn from, by its row.

    Answers that sample alike are computed together: for each by itself, eight of them took as long
    as half a step of a small model.
    """
    alike: dict[tuple[float, int, float], list[int]] = {}
    for row, answer in enumerate(answers):
        if answer.warpers:
            sampling = answer.sampling
            way = (sampling.temperature, sampling.top_k, sampling.top_p)
            alike.setdefault(way, []).append(row)
    found: dict[int, torch.Tensor] = {}
    for rows in alike.values():
        chosen = logits if len(rows) == len(logits) else logits[rows]
        # these processors read no token before
        probabilities = answers[rows[0]].warpers(None, chosen.cpu()).softmax(-1)
        found.update(zip(rows, probabilities, strict=True))
    return found


def _choice(token: int, logits: torch.Tensor, alternatives: int) -> TokenChoice:
    """The log-probability of a token before any sampling setting, and of the most probable."""
    logprobs = logits.log_softmax(-1)
    values, indices = logprobs.topk(min(alternatives, len(logprobs)))
    return TokenChoice(
        token, logprobs[token].item(), list(zip(indices.tolist(), values.tolist(), strict=True))
    )


def _free_bytes(device: torch.device) -> int:
    """Memory of a device that is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available

"""Answers in a batch are those one by one; sampling, the calculator, the queue, cancelling."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rigged import rigged_to_say, save
from serving import wait_for

from hfsft.errors import ModelError
from hfsft.evaluation.answering import Evaluator
from hfsft.serve import engine as engine_module
from hfsft.serve.batch import Batch
from hfsft.serve.engine import Busy, Engine, Piece, Sampling

QUESTIONS = ["Hi!", "Who are you, and what can you do for me today?", "What is 3 + 4?", "Why?"]
QUESTIONS += [f"Spell the word number {number}." for number in range(8)]


class Asking:
    """An engine that runs, and the pieces of its answers."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.pieces: queue.Queue[tuple[int, Piece]] = queue.Queue()
        self.prompts = [engine.evaluator.prompt_ids(question) for question in QUESTIONS]

    def ask(self, index: int, sampling: Sampling, key: int | None = None) -> list:
        key = index if key is None else key
        publish = lambda key, piece: self.pieces.put((key, piece))  # noqa: E731
        return self.engine.answer(self.prompts[index], [sampling], publish, key)

    def until_all_end(self, count: int) -> dict[int, tuple[str, str]]:
        """The text and finish of each answer."""
        texts, ends = {}, {}
        while len(ends) < count:
            key, piece = self.pieces.get(timeout=30)
            assert key not in ends
            texts[key] = texts.get(key, "") + piece.text
            if piece.finish:
                ends[key] = piece.finish
        return {key: (texts[key], finish) for key, finish in sorted(ends.items())}


@contextmanager
def asking(folder: str, **bounds: int) -> Iterator[Asking]:
    engine = Engine(Evaluator(folder), **bounds)
    engine.start(lambda call: call())
    yield Asking(engine)
    engine.close()
    assert not engine.thread.is_alive()


def one_by_one(folder: str, max_tokens: int) -> list[str]:
    return Evaluator(folder, batch_size=1).answers(QUESTIONS, max_tokens)


@pytest.mark.parametrize("model_type", ["nanochat", "llama"])
def test_greedy_answers_are_those_of_generate_one_by_one(folders, model_type):
    folder = folders(model_type)
    expected = one_by_one(folder, 24)
    with asking(folder, max_batch=5) as asked:  # answers wait, join and leave
        for index in range(len(QUESTIONS)):
            asked.ask(index, Sampling(24))
        found = asked.until_all_end(len(QUESTIONS))
        assert [text for text, _ in found.values()] == expected
        assert asked.engine.generated_tokens > 12 * 20
        assert asked.engine.prompt_tokens == sum(map(len, asked.prompts))
        assert not asked.engine.running and not asked.engine.waiting
        assert asked.engine.batch.lengths == []


def test_near_ties_are_chosen_as_alone(make_model, tokenizer, tmp_path, monkeypatch):
    """Every token has a twin with the same logits but for the last bits."""
    model = make_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[256:] = head[:256] * (1 + 1e-7)
    folder = save(model, tokenizer, tmp_path / "twins")
    expected = one_by_one(folder, 16)

    def differing() -> int:
        with asking(folder) as asked:
            with asked.engine.changed:  # all of them wait before the first one starts
                for index in range(len(QUESTIONS)):
                    asked.ask(index, Sampling(16))
            found = asked.until_all_end(len(QUESTIONS))
        texts = [text for text, _ in found.values()]
        return sum(a != b for a, b in zip(texts, expected, strict=True))

    assert differing() == 0
    monkeypatch.setattr(engine_module, "NEAR_TIE", 0.0)
    assert differing() > 0  # so the test can fail


def test_a_seed_decides_an_answer_whatever_runs_beside_it(folders):
    sampled = Sampling(16, temperature=1.0, top_k=40, top_p=0.9, seed=7)
    with asking(folders("nanochat")) as asked:
        asked.ask(1, sampled)
        alone = asked.until_all_end(1)[1]
        for index in range(6):
            asked.ask(index, sampled if index == 1 else Sampling(16, temperature=1.3))
        assert asked.until_all_end(6)[1] == alone
        for seed in range(4):
            asked.ask(1, Sampling(16, temperature=1.0, seed=seed), key=seed)
        assert len(set(asked.until_all_end(4).values())) == 4
        asked.ask(1, Sampling(16, temperature=1.0, top_k=1))
        asked.ask(1, Sampling(16), key=2)
        top, greedy = asked.until_all_end(2).values()
        assert top == greedy


def test_the_calculator_works_as_in_eval(make_model, tokenizer, tmp_path):
    made = rigged_to_say("<|python_start|>6*7<|python_end|>", make_model, tokenizer, tmp_path)
    with asking(made) as asked:
        for index in range(4):
            asked.ask(index, Sampling(20))
        assert set(asked.until_all_end(4).values()) == {("<<6*7=42>>", "stop")}
        asked.ask(0, Sampling(5))
        assert asked.until_all_end(1) == {0: ("<<6*7>>", "length")}


def test_pieces_of_a_short_time_come_together(folders, monkeypatch):
    folder = folders("llama")

    def pieces(gather: float, **settings: int) -> list[Piece]:
        monkeypatch.setattr(engine_module, "GATHER", gather)
        with asking(folder) as asked:
            asked.ask(0, Sampling(24, **settings))
            (whole,) = asked.until_all_end(1).values()
            asked.ask(0, Sampling(24, **settings))
            found = [asked.pieces.get(timeout=30)[1]]
            while not found[-1].finish:
                found.append(asked.pieces.get(timeout=30)[1])
        assert ("".join(piece.text for piece in found), found[-1].finish) == whole
        return found

    assert pieces(float("inf"))[-1].tokens == 24
    assert len(pieces(float("inf"))) == 1 < len(pieces(0))
    assert [piece.tokens for piece in pieces(float("inf"), logprobs=0)] == [*range(1, 25)]


def test_probabilities_are_those_of_the_model(folders):
    with asking(folders("nanochat")) as asked:
        asked.ask(0, Sampling(3, logprobs=2))
        found = [asked.pieces.get(timeout=30)[1].choice for _ in range(3)]
        text = list(asked.prompts[0])
        for choice in found:
            with torch.no_grad():
                logits = asked.engine.evaluator.model(torch.tensor([text])).logits[0, -1]
            values, tokens = logits.log_softmax(-1).topk(2)
            assert [token for token, _ in choice.top] == tokens.tolist()
            assert [value for _, value in choice.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert choice.token == tokens[0] and choice.logprob == choice.top[0][1]
            text.append(choice.token)


def test_the_queue_has_a_bound(folders):
    engine = Engine(Evaluator(folders("nanochat")), max_batch=2, max_queue=3)  # not started
    asked = Asking(engine)
    for index in range(5):
        asked.ask(index, Sampling(4))
    with pytest.raises(Busy, match="5 requests are waiting already"):
        asked.ask(5, Sampling(4))
    engine.start(lambda call: call())
    assert len(asked.until_all_end(5)) == 5
    asked.ask(5, Sampling(4))
    assert len(asked.until_all_end(1)) == 1
    engine.close()


def test_a_cancelled_answer_frees_its_place(folders):
    with asking(folders("nanochat"), max_batch=1) as asked:
        first = asked.ask(0, Sampling(200))
        waiting = asked.ask(1, Sampling(200))
        asked.ask(2, Sampling(3))
        wait_for(lambda: len(first[0].tokens) > 2)
        asked.engine.cancel(waiting)
        asked.engine.cancel(first)
        ends = {key: finish for key, (_, finish) in asked.until_all_end(3).items()}
        assert ends == {0: "cancelled", 1: "cancelled", 2: "length"}
        assert len(first[0].tokens) < 200 and not waiting[0].tokens


def test_draining_finishes_what_runs(folders):
    with asking(folders("nanochat"), max_batch=1) as asked:
        first = asked.ask(0, Sampling(100))
        asked.ask(1, Sampling(100))
        wait_for(lambda: len(first[0].tokens) > 2)
        asked.engine.is_draining = True
        ends = {key: finish for key, (_, finish) in asked.until_all_end(2).items()}
        assert ends == {0: "length", 1: "stopping"}
        with pytest.raises(Busy, match="shutting down"):
            asked.ask(2, Sampling(3))


def test_a_failing_step_ends_its_answers_and_the_next_ones_are_right(folders, capsys, monkeypatch):
    expected = one_by_one(folders("llama"), 6)[3]
    with asking(folders("llama")) as asked:
        step = asked.engine.batch.step

        def fail(tokens):
            raise RuntimeError("a bug")

        monkeypatch.setattr(asked.engine.batch, "step", fail)
        asked.ask(0, Sampling(6))
        asked.ask(1, Sampling(1))  # ends before the step
        ends = {key: finish for key, (_, finish) in asked.until_all_end(2).items()}
        assert ends == {0: "error", 1: "length"}
        monkeypatch.setattr(asked.engine.batch, "step", step)
        asked.ask(3, Sampling(6))
        assert asked.until_all_end(1)[3][0] == expected
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_an_error_while_a_cancelled_answer_leaves_ends_no_thread(folders, capsys, monkeypatch):
    with asking(folders("llama")) as asked:
        keep = asked.engine.batch.keep

        def fail(rows):
            if rows:  # the rest of the batch is copied; an empty one needs no memory
                raise torch.OutOfMemoryError
            keep(rows)

        monkeypatch.setattr(asked.engine.batch, "keep", fail)
        first, second = asked.ask(0, Sampling(200)), asked.ask(1, Sampling(200))
        wait_for(lambda: second[0].tokens)
        asked.engine.cancel(first)
        ends = {key: finish for key, (_, finish) in asked.until_all_end(2).items()}
        assert ends == {0: "cancelled", 1: "error"}
        asked.ask(2, Sampling(3))
        assert asked.until_all_end(1)[2][1] == "length" and not asked.engine.is_failed
    assert "out of GPU memory" in capsys.readouterr().err


def test_answers_that_do_not_fit_into_memory_together_wait(folders):
    engine = Engine(Evaluator(folders("nanochat")))  # not started
    asked = Asking(engine)
    answers = [asked.ask(index, Sampling(12))[0] for index in (0, 2, 3)]
    engine.most_tokens = 2 * max(answer.width for answer in answers)
    assert engine._next_answers() == answers[:2]
    engine.most_tokens = 1  # a single one always runs
    assert engine._next_answers() == answers[2:]


def test_a_model_whose_rows_depend_on_each_other_answers_one_at_a_time(folders, monkeypatch):
    forward = Batch._forward

    def mixing(self, ids, cache, **settings):
        logits = forward(self, ids, cache, **settings)
        return logits if len(ids) == 1 else logits + logits.mean(0)

    monkeypatch.setattr(Batch, "_forward", mixing)
    expected = one_by_one(folders("llama"), 6)[:3]
    with asking(folders("llama")) as asked:
        assert asked.engine.max_batch == 1
        for index in range(3):
            asked.ask(index, Sampling(6))
        assert [text for text, _ in asked.until_all_end(3).values()] == expected


def test_a_model_that_computes_nan_is_refused(make_model, tokenizer, tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="its logits are not finite numbers"):
        Engine(Evaluator(save(model, tokenizer, tmp_path / "nan")))

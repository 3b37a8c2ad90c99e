"""What a model is worth: tasks asked in batches, kept row by row, with the noise in each figure.

`<out>/eval/<task>.jsonl` holds a line for each row that was asked. The same command goes on from
there: what was asked of the same weights in the same way is not asked again. `<out>/eval.json`
holds the figures.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import disable_progress_bars

from hfsft.errors import ModelError, first_line
from hfsft.evaluation.answering import Evaluator, answer_dtype
from hfsft.evaluation.harness import ask_lm_eval, lm_eval_version
from hfsft.evaluation.kept import (
    append_lines,
    fingerprint,
    open_results,
    results_folder,
    rows_file,
    whole_lines,
    write_results,
)
from hfsft.evaluation.tasks import (
    GENERATED,
    LM_EVAL,
    Question,
    Task,
    check_names,
    default_tasks,
    load_task,
)
from hfsft.hub.client import require_model
from hfsft.noise import ratio_error, wilson

GRADED = tuple(GENERATED)  # the built-in tasks with right and wrong answers


ASKED_AS = 1  # goes up when the same rows are asked or graded in another way


BATCH_SIZE = 16  # prompts at a time


DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


Progress = Callable[[str, int, int], None]  # task, rows done, rows in all


def evaluate(
    model: str,
    tasks: list[str] | None = None,
    rows: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    out: Path | None = None,
    allow_code: bool = False,
    progress: Progress | None = None,
    data: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Ask a model the rows of some tasks, and keep each answer and the figures.

    Args:
        model: a folder or a Hub id.
        tasks: names as `questions.NAMES` has them, `reasoning_gym:NAME`, `lm_eval:NAME`; None: what
            runs offline for a stage of a run, nanochat's chat tasks for others.
        rows: of each task at most; None: all.
        seed: of their choice.
        batch_size: prompts at a time; it does not change the answers.
        out: a folder for eval/ and eval.json; None: the model's own, or ./eval-OWNER--NAME.
        allow_code: whether programs that the model writes may be run.
        progress: is told of each batch.
        data: task → file or Hub id with rows of the same schema.

    Returns:
        What eval.json holds: the figures of these tasks, and of others that were asked of the same
        weights with the same seed before. An accuracy has its 95% interval (Wilson 1927), the
        accuracy of chance, and `centred`, (accuracy - chance) / (1 - chance), whose mean over tasks
        is nanochat's ChatCORE where the tasks are its own.

    Raises:
        HfsftError: for what the user can mend.
    """
    data = data or {}
    check_names([*(tasks or ()), *data], allow_code)
    tasks = tasks or default_tasks(model, allow_code)
    if progress is None:  # nobody looks on: no bars of downloads either
        disable_progress_bars()
        datasets.disable_progress_bars()
    folder = _model_folder(model)
    out = out or results_folder(model)
    results = open_results(model, out, fingerprint(folder, out), seed)
    evaluator = Evaluator(str(folder), batch_size)
    # all at first: what is wrong with the last one is said before hours go into the others
    loaded = {
        name: load_task(name, str(folder), rows, seed, data.get(name))
        for name in tasks
        if not name.startswith(LM_EVAL)
    }
    if len(loaded) < len(set(tasks)):
        lm_eval_version()
    for name in tasks:
        began = time.perf_counter()
        if name in loaded:
            figures = _ask_task(loaded[name], evaluator, results["fingerprint"], out, progress)
        else:
            figures = _ask_harness(name, evaluator, results, out, rows, progress is None)
        results["seconds"] += time.perf_counter() - began
        results["tasks"][name] = figures
        write_results(results, out)
    return results


def _model_folder(model: str) -> Path:
    """The folder that holds a model's files, downloaded from the Hub if need be."""
    require_model(model)
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(
            snapshot_download(
                model, allow_patterns=list(DOWNLOADED), ignore_patterns=["*/*", "consolidated*"]
            )
        )
    except (HTTPError, OSError, ValueError) as error:
        raise ModelError(f"{model}: cannot be downloaded: {first_line(error)}") from None


# --- asking ---


def _label(digest: str, *way: Any) -> dict[str, str]:
    """What tells the results of a row: of which weights, and how they were asked."""
    said = repr((ASKED_AS, answer_dtype(), *way))
    return {
        "model": digest[:16],
        "way": hashlib.blake2b(said.encode(), digest_size=8).hexdigest(),
    }


def _ask_task(
    task: Task, evaluator: Evaluator, digest: str, out: Path, progress: Progress | None
) -> dict[str, Any]:
    """Ask those rows of a task batch by batch that have no result yet; its figures."""
    if task.kind == "loss":
        items = [(_ids_digest(row), row) for row in task.documents]
        room, lengths = 0, [len(row["input_ids"]) for row in task.documents]
    else:
        items, room = _encoded(task, evaluator)
        lengths = [len(ids) for _, (_, ids, _) in items]
    label = _label(digest, task.kind, room, evaluator.is_chat, evaluator.has_calculator)
    path = rows_file(out, task.name)
    done = {line["row"]: line for line in whole_lines(path) if label.items() <= line.items()}
    # the longest first, those of similar length together; the same question once
    order = sorted(range(len(items)), key=lambda index: -lengths[index])
    left = list(dict(items[index] for index in order if items[index][0] not in done).items())
    before = len({row for row, _ in items}) - len(left)
    for start in range(0, len(left), evaluator.batch_size):
        if progress:
            progress(task.name, before + start, before + len(left))
        batch = left[start : start + evaluator.batch_size]
        found = _ask(task, evaluator, [item for _, item in batch], room)
        lines = [
            label | {"row": row} | result for (row, _), result in zip(batch, found, strict=True)
        ]
        append_lines(path, lines)
        done |= {line["row"]: line for line in lines}
    if progress:
        progress(task.name, before + len(left), before + len(left))
    answers = [done[row] for row, _ in items]
    if task.kind == "loss":
        return _loss_figures(answers)
    chances = [
        1 / len(question.choices) if question.choices else 0.0 for question in task.questions
    ]
    return _accuracy_figures(task.kind, [answer["right"] for answer in answers], chances)


def _ask_harness(
    name: str,
    evaluator: Evaluator,
    results: dict[str, Any],
    out: Path,
    rows: int | None,
    quiet: bool,
) -> dict[str, Any]:
    """Have lm-eval ask one of its tasks, unless it has done so before; its figures."""
    way = (lm_eval_version(), rows, results["seed"], evaluator.is_chat)
    label = _label(results["fingerprint"], *way)
    path = rows_file(out, name)
    found = [line for line in whole_lines(path) if label.items() <= line.items()]
    if not found or len(found) < found[0]["of"]:
        asked = name.removeprefix(LM_EVAL)
        found = ask_lm_eval(evaluator, asked, rows, results["seed"], quiet)
        found = [label | {"of": len(found)} | row for row in found]
        append_lines(path, found)
    chances = [1 / row["choices"] if row["choices"] else 0.0 for row in found]
    kind = "categorical" if all(chances) else "generative"
    return _accuracy_figures(kind, [row["right"] for row in found], chances)


def _ids_digest(row: dict[str, list[int]]) -> str:
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=12).hexdigest()


def _encoded(task: Task, evaluator: Evaluator) -> tuple[list[tuple[str, Any]], int]:
    """Each question's digest with itself, its prompt's token ids and its choices', and the room."""
    questions = task.questions
    if task.kind == "categorical":
        parted = [
            evaluator.parted(
                [
                    evaluator.prompt_text(question.prompt, answer=letter)
                    for letter in question.choices
                ]
            )
            for question in questions
        ]
        room = 1
    else:
        texts = [evaluator.prompt_text(question.prompt, question.plain) for question in questions]
        parted = [(ids, []) for ids in evaluator.encode(texts)]
        room = evaluator.room([ids for ids, _ in parted], task.max_new_tokens)
    items = [
        (question.digest, (question, ids, tokens))
        for question, (ids, tokens) in zip(questions, parted, strict=True)
    ]
    return items, room


def _ask(task: Task, evaluator: Evaluator, batch: list[Any], room: int) -> list[dict[str, Any]]:
    """The results of one batch, as they are kept."""
    if task.kind == "loss":
        return evaluator.losses(batch)
    questions: list[Question] = [question for question, _, _ in batch]
    prompts = [ids for _, ids, _ in batch]
    if task.kind == "categorical":
        chosen = evaluator.choose(prompts, [tokens for _, _, tokens in batch])
        answers = [q.choices[place] for q, place in zip(questions, chosen, strict=True)]
        right = [answer == q.answer for q, answer in zip(questions, answers, strict=True)]
    else:
        ends = () if evaluator.is_chat else task.plain_ends
        answers = evaluator.go_on(prompts, room, ends)
        right = [q.is_right(answer) for q, answer in zip(questions, answers, strict=True)]
    return [{"right": ok, "answer": answer} for ok, answer in zip(right, answers, strict=True)]


def _accuracy_figures(kind: str, right: list[bool], chances: list[float]) -> dict[str, Any]:
    """The figures of a task whose rows are right or wrong, each with its chance at random."""
    accuracy, chance = sum(right) / len(right), sum(chances) / len(chances)
    low, high = wilson(sum(right), len(right))
    return {
        "kind": kind,
        "rows": len(right),
        "right": sum(right),
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "chance": chance,
        "centred": (accuracy - chance) / (1 - chance),
    }


def _loss_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean loss a token in nats, and its standard error over documents, as a ratio's."""
    loss, tokens = (sum(row[key] for row in rows) for key in ("loss", "tokens"))
    mean, size = loss / tokens, sum(row["bytes"] for row in rows)
    text_loss = sum(row["text_loss"] for row in rows)
    return {
        "kind": "loss",
        "rows": len(rows),
        "tokens": tokens,
        "loss": mean,
        "error": ratio_error([row["loss"] - mean * row["tokens"] for row in rows], tokens),
        "bits_per_byte": text_loss / math.log(2) / size if size else None,
    }

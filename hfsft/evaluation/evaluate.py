"""Evaluate a model: run tasks in batches, keep every answer, and compute figures with their noise.

`<out>/eval/<task>.jsonl` has a line for each row. Running the same command again resumes: rows that
the same weights answered under the same conditions are not run again. `<out>/eval.json` holds the
figures.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import disable_progress_bars

from hfsft.errors import ModelError, first_line
from hfsft.evaluation.answering import Evaluator, answer_dtype
from hfsft.evaluation.execution import sandbox
from hfsft.evaluation.harness import ask_lm_eval, lm_eval_version
from hfsft.evaluation.kept import (
    append_lines,
    fingerprint,
    open_results,
    results_folder,
    rows_file,
    write_results,
)
from hfsft.evaluation.tasks import (
    CHAT_TASKS,
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
from hfsft.run.files import read_json_lines

GRADED = tuple(GENERATED)  # the built-in tasks whose answers are graded

VERSION = 2  # increase when the same rows are prompted or graded differently

BATCH_SIZE = 16  # prompts per batch

DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")

# task, rows done, rows in total; None: not known
Progress = Callable[[str, int, int | None], None]


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
    """Run tasks on a model, keeping every answer and the figures on disk.

    Args:
        model: a folder or a Hub id.
        tasks: `tasks.NAMES`, `reasoning_gym:NAME` or `lm_eval:NAME`; None: `default_tasks`.
        rows: at most this many of each task; None: all.
        seed: of the choice of rows.
        batch_size: prompts per batch; it does not change the answers.
        out: the folder of eval/ and eval.json; None: the model's own, or ./eval-OWNER--NAME.
        allow_code: whether to execute programs that the model writes.
        progress: called after every batch.
        data: task → file or Hub id with rows of the same schema.

    Returns:
        The content of eval.json: the figures of these tasks, and of earlier ones with the same
        weights and seed. `centred` is (accuracy - chance) / (1 - chance); `chatcore` is nanochat's
        figure, by its rules, once its five tasks have been run.

    Raises:
        HfsftError: for anything the user can fix.
    """
    data = data or {}
    check_names(tasks or [], allow_code)
    check_names(list(data), allow_code=True)
    tasks = tasks or default_tasks(model, allow_code)
    if progress is None:  # hide the progress bars of downloads as well
        disable_progress_bars()
        datasets.disable_progress_bars()
    folder = _model_folder(model)
    out = out or results_folder(model)
    results = open_results(model, out, fingerprint(folder, out), seed)
    evaluator = Evaluator(str(folder), batch_size)
    loaded = _load_tasks(tasks, folder, rows, seed, data)
    for name in tasks:
        began = time.perf_counter()
        if name in loaded:
            figures = _run_task(loaded[name], evaluator, results["fingerprint"], out, progress)
            if name == "humaneval":
                figures["sandbox"] = sandbox()
        else:
            if progress:
                progress(name, 0, None)
            figures = _run_lm_eval(name, evaluator, results, out, rows)
        results["seconds"] += time.perf_counter() - began
        results["tasks"][name] = figures
        results["chatcore"] = chatcore(results["tasks"])
        write_results(results, out)
    return results


def _model_folder(model: str) -> Path:
    """The folder of a model's files, downloaded from the Hub if necessary."""
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


def _load_tasks(
    names: list[str], folder: Path, rows: int | None, seed: int, data: dict[str, str]
) -> dict[str, Task]:
    """Load every task before running any, so that bad data is reported at once, not hours later.

    Except lm-eval's, which it loads itself; here it is only checked that lm-eval is installed.
    """
    loaded = {
        name: load_task(name, str(folder), rows, seed, data.get(name))
        for name in names
        if not name.startswith(LM_EVAL)
    }
    if len(loaded) < len(set(names)):
        lm_eval_version()
    return loaded


# --- one task ---


@dataclass(frozen=True)
class Item:
    """A row of a task, encoded for the model."""

    digest: str  # equal for rows with the same content
    ids: list[int]  # tokens of the prompt, or of the held-out document
    choices: Sequence[int] = ()  # the token of each choice
    question: Question | None = None  # None: a held-out document
    document: dict[str, list[int]] | None = None
    is_cut: bool = False  # the prompt did not fit into the model's context


def _run_task(
    task: Task, evaluator: Evaluator, digest: str, out: Path, progress: Progress | None
) -> dict[str, Any]:
    """Run the rows of a task that have no result yet, batch by batch, and return its figures."""
    items, budget = _encoded(task, evaluator)
    label = _label(digest, task.kind, budget, evaluator.is_chat, evaluator.has_calculator)
    path = rows_file(out, task.name)
    done = {line["row"]: line for line in _labelled(path, label)}
    # longest first, so that a batch has similar lengths; duplicate rows are run once
    by_length = sorted(items, key=lambda item: -len(item.ids))
    left = list({item.digest: item for item in by_length if item.digest not in done}.values())
    total = len({item.digest for item in items})
    for start in range(0, len(left), evaluator.batch_size):
        if progress:
            progress(task.name, total - len(left) + start, total)
        batch = left[start : start + evaluator.batch_size]
        found = _run_batch(task, evaluator, batch, budget)
        lines = [
            label | {"row": item.digest} | result for item, result in zip(batch, found, strict=True)
        ]
        append_lines(path, lines)
        done |= {line["row"]: line for line in lines}
    if progress:
        progress(task.name, total, total)
    results = [done[item.digest] for item in items]
    if task.kind == "loss":
        return loss_figures(results) | {"way": label["way"]}
    chances = [1 / len(item.choices) if item.choices else 0.0 for item in items]
    figures = accuracy_figures(task.kind, results, chances)
    cut = sum(item.is_cut for item in items)
    return figures | {"cut": cut, "pool": task.pool, "way": label["way"]}


def _encoded(task: Task, evaluator: Evaluator) -> tuple[list[Item], int]:
    """A task's rows encoded, and the new tokens to generate for each answer."""
    if task.kind == "loss":
        return [
            Item(_document_digest(row), row["input_ids"], document=row) for row in task.documents
        ], 0
    if task.kind == "categorical":
        prompts = [evaluator.split_choices(q.prompt, q.choices) for q in task.questions]
        budget = 1
    else:
        prompts = [
            (evaluator.prompt_ids(q.prompt, q.plain, tools=q.tools), []) for q in task.questions
        ]
        budget = evaluator.answer_budget([ids for ids, _ in prompts], task.max_new_tokens)
    items = []
    for question, (ids, choices) in zip(task.questions, prompts, strict=True):
        kept = evaluator.fitted(ids, budget)
        items.append(Item(question.digest, kept, choices, question, is_cut=len(kept) < len(ids)))
    return items, budget


def _run_batch(
    task: Task, evaluator: Evaluator, batch: list[Item], budget: int
) -> list[dict[str, Any]]:
    """The results of one batch, as they are kept."""
    if task.kind == "loss":
        return evaluator.losses([item.document for item in batch])
    questions, prompts = [item.question for item in batch], [item.ids for item in batch]
    if task.kind == "categorical":
        chosen = evaluator.choose(prompts, [item.choices for item in batch])
        answers = [q.choices[index] for q, index in zip(questions, chosen, strict=True)]
    else:
        stop = () if evaluator.is_chat else task.plain_stop
        answers = evaluator.complete(prompts, budget, stop)
    return [_graded(q, answer) for q, answer in zip(questions, answers, strict=True)]


def _graded(question: Question, answer: str) -> dict[str, Any]:
    """An answer with what it answers and its grades, as it is kept."""
    right = answer == question.answer if question.choices else question.is_right(answer)
    by_nanochat = question.nanochat_is_right
    return {
        "right": right,
        "nanochat_right": by_nanochat(answer) if by_nanochat else right,
        "answer": answer,
        "expected": question.answer,
        "question": question.prompt,
    }


def _run_lm_eval(
    name: str,
    evaluator: Evaluator,
    results: dict[str, Any],
    out: Path,
    rows: int | None,
) -> dict[str, Any]:
    """Have lm-eval run one of its tasks, unless it has done so before, and return its figures."""
    seed = results["seed"]
    label = _label(results["fingerprint"], lm_eval_version(), rows, seed, evaluator.is_chat)
    path = rows_file(out, name)
    found = last_run(_labelled(path, label))
    if not found:
        found = ask_lm_eval(evaluator, name.removeprefix(LM_EVAL), rows, seed)
        found = [label | {"of": len(found)} | row for row in found]
        append_lines(path, found)
    return harness_figures(found) | {"way": label["way"]}


def last_run(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kept rows of lm-eval's last run, after those of one that was killed; [] if it was too."""
    rows = lines[-lines[-1]["of"] :] if lines else []
    return rows if rows and len(rows) == rows[-1]["of"] else []


# --- which kept results may be reused ---


def _label(fingerprint: str, *conditions: Any) -> dict[str, str]:
    """Identifies the weights and the conditions that a kept result is valid for."""
    text = repr((VERSION, answer_dtype(), *conditions))
    return {
        "model": fingerprint[:16],
        "way": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
    }


def _labelled(path: Path, label: dict[str, str]) -> list[dict[str, Any]]:
    return [line for line in read_json_lines(path) if label.items() <= line.items()]


def _document_digest(row: dict[str, list[int]]) -> str:
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=12).hexdigest()


# --- figures ---


def accuracy_figures(
    kind: str, results: list[dict[str, Any]], chances: list[float]
) -> dict[str, Any]:
    """The figures of a task with right and wrong answers.

    Args:
        kind: categorical or generative.
        results: of each row `right`, and `nanochat_right` unless lm-eval graded it.
        chances: of each row, the probability of a right answer at random.

    Returns:
        `low` and `high` bound the accuracy's 95% interval (Wilson 1927).
    """
    rows, right = len(results), sum(result["right"] for result in results)
    accuracy, chance = right / rows, _mean(chances)
    low, high = wilson(right, rows)
    by_nanochat = [result.get("nanochat_right") for result in results]
    return {
        "kind": kind,
        "rows": rows,
        "right": right,
        "nanochat_right": None if None in by_nanochat else sum(by_nanochat),
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "chance": chance,
        "centred": (accuracy - chance) / (1 - chance),
    }


def harness_figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one of lm-eval's tasks, with the means of its own metrics.

    Args:
        found: what `ask_lm_eval` returns.
    """
    # a single continuation, whose log-likelihood is asked for, is right or wrong, and no choice
    chances = [1 / row["choices"] if row["choices"] > 1 else 0.0 for row in found]
    kind = "categorical" if all(chances) else "generative"
    figures = accuracy_figures(kind, found, chances)
    names = [name for name in found[0]["metrics"] if all(name in row["metrics"] for row in found)]
    means = {name: _mean([row["metrics"][name] for row in found]) for name in names}
    return figures | {"metrics": means}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def chatcore(tasks: dict[str, dict[str, Any]]) -> float | None:
    """nanochat's ChatCORE: its five tasks by its own rules; None unless all of them have been run.

    Args:
        tasks: name → figures, as in eval.json.
    """
    if not CHAT_TASKS.keys() <= tasks.keys():
        return None
    accuracies = {name: tasks[name]["nanochat_right"] / tasks[name]["rows"] for name in CHAT_TASKS}
    return _mean(
        [(accuracies[name] - chance) / (1 - chance) for name, chance in CHAT_TASKS.items()]
    )


def loss_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean cross-entropy per token over documents, in nats, with its standard error.

    Args:
        rows: for each document `loss` (summed), `tokens`, `text_loss` and `bytes`.

    Returns:
        `error` is None for a single document, `bits_per_byte` for documents without text.
    """
    losses, tokens = [row["loss"] for row in rows], [row["tokens"] for row in rows]
    error, size = ratio_error(losses, tokens), sum(row["bytes"] for row in rows)
    text_loss = sum(row["text_loss"] for row in rows)
    return {
        "kind": "loss",
        "rows": len(rows),
        "tokens": sum(tokens),
        "loss": sum(losses) / sum(tokens),
        "error": error if len(rows) > 1 else None,
        "bits_per_byte": text_loss / math.log(2) / size if size else None,
    }

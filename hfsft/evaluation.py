"""What a model is worth: tasks asked in batches, kept row by row, with the noise in each figure.

`<out>/eval/<task>.jsonl` holds a line for each row that was asked. The same command goes on from
there: what was asked of the same weights in the same way is not asked again. `<out>/eval.json`
holds the figures.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.table import Table

from hfsft import __version__
from hfsft.answering import Evaluator, answer_dtype
from hfsft.errors import HfsftError, ModelError, first_line
from hfsft.harness import ask_lm_eval, lm_eval_version
from hfsft.hub import require_model
from hfsft.questions import (
    GENERATED,
    LM_EVAL,
    ON_HUB,
    Question,
    Task,
    check_names,
    default_tasks,
    load_task,
)

GRADED = tuple(GENERATED)  # the built-in tasks with right and wrong answers
ASKED_AS = 1  # goes up when the same rows are asked or graded in another way
BATCH_SIZE = 16  # prompts at a time
Z = 1.959964  # of a 95% interval
DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
# what answers depend on, of all that a model's folder may hold
FINGERPRINTED = (
    "*.safetensors",
    *("config.json", "generation_config.json", "*token*", "vocab.*", "merges.txt", "*.jinja"),
)
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
    results = _open_results(model, out, fingerprint(folder, out), seed)
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
        _write_results(results, out)
    return results


# --- what is kept ---


def fingerprint(folder: Path, out: Path | None = None) -> str:
    """A digest of what a model's answers depend on: weights, configuration, tokenizer, template.

    Args:
        folder: of the model.
        out: keeps the digest of each weight file while its size and time of change stay the same.
    """
    cache = out / "eval" / "weights.json" if out else None
    try:
        known = json.loads(cache.read_text()) if cache else {}
    except (OSError, ValueError):
        known = {}
    digests = {}
    for path in sorted({path for name in FINGERPRINTED for path in folder.glob(name)}):
        state = path.stat()
        stamp = [state.st_size, state.st_mtime_ns, state.st_ino]
        before = known.get(path.name)
        if path.suffix == ".safetensors" and before and before[0] == stamp:
            digests[path.name] = before
        else:
            with path.open("rb") as file:
                digests[path.name] = [stamp, hashlib.file_digest(file, "sha256").hexdigest()]
    weights = {name: held for name, held in digests.items() if name.endswith(".safetensors")}
    if cache and weights != known:
        _write(cache, json.dumps(weights))
    named = sorted((name, digest) for name, (_, digest) in digests.items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


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


def results_folder(model: str) -> Path:
    """Where a model's results go by default: its own folder, of a Hub id ./eval-OWNER--NAME."""
    folder = Path(model)
    return folder if folder.is_dir() else Path("eval-" + model.replace("/", "--"))


def _open_results(model: str, out: Path, digest: str, seed: int) -> dict[str, Any]:
    """What eval.json holds, or the beginning of it where it is of other weights or another seed."""
    try:
        held = json.loads((out / "eval.json").read_text())
    except (OSError, ValueError):
        held = {}
    same = held.get("fingerprint") == digest and held.get("seed") == seed
    names = ("torch", "transformers")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "model": model,
        "fingerprint": digest,
        "seed": seed,
        "versions": {"hfsft": __version__} | {name: version(name) for name in names},
        "device": device,
        "seconds": held["seconds"] if same else 0.0,
        "tasks": held["tasks"] if same else {},
        "mean_centred": None,
    }


def _write_results(results: dict[str, Any], out: Path) -> None:
    centred = [task["centred"] for task in results["tasks"].values() if "centred" in task]
    results["mean_centred"] = sum(centred) / len(centred) if centred else None
    _write(out / "eval.json", json.dumps(results, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise HfsftError(
            f"cannot write {path}: {error.strerror}; --out names another folder"
        ) from None


def row_results(out: Path, task: str) -> dict[str, dict[str, Any]]:
    """The latest result of each row of a task, of the weights that eval.json is of.

    Args:
        out: the folder of eval.json and eval/.
        task: its name.

    Returns:
        A row's digest → `right` and `answer`, or `loss`, `tokens`, `text_loss` and `bytes`.
    """
    held = json.loads((out / "eval.json").read_text())
    mine = held["fingerprint"][:16]
    return {line["row"]: line for line in _lines(_rows_file(out, task)) if line["model"] == mine}


def _rows_file(out: Path, task: str) -> Path:
    return out / "eval" / (re.sub(r"[^\w.-]+", "-", task) + ".jsonl")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; one that a killed command left half written is passed over."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


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
    path = _rows_file(out, task.name)
    done = {line["row"]: line for line in _lines(path) if label.items() <= line.items()}
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
        _append(path, lines)
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
    path = _rows_file(out, name)
    found = [line for line in _lines(path) if label.items() <= line.items()]
    if not found or len(found) < found[0]["of"]:
        asked = name.removeprefix(LM_EVAL)
        found = ask_lm_eval(evaluator, asked, rows, results["seed"], quiet)
        found = [label | {"of": len(found)} | row for row in found]
        _append(path, found)
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


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines to a file, on the disk when it returns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            # behind what a killed command left half written
            torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            text = "".join(json.dumps(line) + "\n" for line in lines)
            file.write(b"\n" * bool(torn) + text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise HfsftError(
            f"cannot write {path}: {error.strerror}; --out names another folder"
        ) from None


# --- figures ---


def wilson(right: int, rows: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927, Probable Inference, JASA 22)."""
    share, spread = right / rows, Z * Z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    return middle - half if right else 0.0, middle + half if right < rows else 1.0


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
        "error": _ratio_error([row["loss"] - mean * row["tokens"] for row in rows], tokens),
        "bits_per_byte": text_loss / math.log(2) / size if size else None,
    }


def _ratio_error(deviations: list[float], tokens: int) -> float | None:
    count = len(deviations)
    if count < 2:
        return None
    return math.sqrt(sum(d * d for d in deviations) * count / (count - 1)) / tokens


def difference(
    a: dict[str, Any],
    b: dict[str, Any],
    rows: tuple[dict[str, Any], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """How much better `b` is than `a` at one task, and whether that is more than noise.

    Args:
        a: the figures of the task, as eval.json has them.
        b: those of another model.
        rows: the `row_results` of both; rows that both were asked are compared one by one
            (McNemar's exact test, 1947), which tells smaller differences apart.

    Returns:
        `difference` (of accuracy; of loss, less is better), `low` and `high` of its 95% interval,
        `p` (two-sided; None for losses), `paired`, `rows` that were compared, and `within_noise`.
    """
    both = sorted(rows[0].keys() & rows[1].keys()) if rows else []
    # most rows were asked of one of them alone: the pairs would say less
    paired = 2 * len(both) > max(a["rows"], b["rows"])
    if a["kind"] == "loss":
        return _loss_difference(a, b, [(rows[0][k], rows[1][k]) for k in both] if paired else None)
    if paired:
        lost = sum(rows[0][k]["right"] and not rows[1][k]["right"] for k in both)
        won = sum(rows[1][k]["right"] and not rows[0][k]["right"] for k in both)
        count = len(both)
        value = (won - lost) / count
        half = Z * math.sqrt(max(won + lost - (won - lost) ** 2 / count, 0)) / count
        p = mcnemar(won, lost)
        low, high, noise = value - half, value + half, p >= 0.05
    else:
        count = min(a["rows"], b["rows"])
        value = b["accuracy"] - a["accuracy"]
        # Newcombe 1998, Interval estimation for the difference between independent proportions
        low = value - math.hypot(b["accuracy"] - b["low"], a["high"] - a["accuracy"])
        high = value + math.hypot(b["high"] - b["accuracy"], a["accuracy"] - a["low"])
        p, noise = None, low <= 0 <= high
    return {
        "difference": value,
        "low": low,
        "high": high,
        "p": p,
        "paired": paired,
        "rows": count,
        "within_noise": noise,
    }


def mcnemar(won: int, lost: int) -> float:
    """How likely so uneven a split of the rows that changed is, if each way were as likely."""
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def _loss_difference(
    a: dict[str, Any], b: dict[str, Any], pairs: list[tuple[dict[str, Any], dict[str, Any]]] | None
) -> dict[str, Any]:
    if pairs:
        tokens = sum(x["tokens"] for x, _ in pairs)
        value = sum(y["loss"] - x["loss"] for x, y in pairs) / tokens
        error = _ratio_error(
            [y["loss"] - x["loss"] - value * x["tokens"] for x, y in pairs], tokens
        )
        count = len(pairs)
    else:
        value, count = b["loss"] - a["loss"], min(a["rows"], b["rows"])
        errors = [a["error"], b["error"]]
        error = None if None in errors else math.hypot(*errors)
    half = math.inf if error is None else Z * error
    return {
        "difference": value,
        "low": value - half,
        "high": value + half,
        "p": None,
        "paired": bool(pairs),
        "rows": count,
        "within_noise": abs(value) <= half,
    }


# --- the command ---


def evaluate_and_print(
    models: list[str],
    tasks: list[str],
    data: list[str],
    out: Path | None,
    quiet: bool,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate models one after the other, and print their figures; of two how they differ.

    Args:
        models: folders or Hub ids.
        tasks: as `evaluate` takes them; empty: by default.
        data: each a `task=file`, or a folder of files with tasks' names.
        out: for one model only.
        quiet: print nothing.
        settings: as `evaluate` takes them.

    Returns:
        What `evaluate` returns; of several models `models`, a list of that, and of two
        `differences` as well, what `compare` returns.

    Raises:
        HfsftError: as `evaluate`, or for an `out` of several models.
    """
    if out and len(models) > 1:
        raise HfsftError("--out: it holds the results of one model only")
    files = data_files(data)
    console = Console(stderr=True)
    found = []
    shows = not quiet and console.is_terminal
    with Bar(console=console, disable=not shows) as bar:
        rows = partial(_show_rows, bar) if shows else None
        for model in models:
            task_names = tasks or None
            found.append(
                evaluate(model, task_names, out=out, data=files, progress=rows, **settings)
            )
    if not quiet:
        for results in found:
            print_results(results)
    if len(models) == 1:
        return found[0]
    both: dict[str, Any] = {"models": found}
    if len(models) == 2:
        both["differences"] = compare((results_folder(models[0]), results_folder(models[1])))
        if not quiet:
            print_differences(both["differences"])
    return both


def data_files(given: list[str]) -> dict[str, str]:
    """Task → file, of `task=file` and of folders of files with tasks' names.

    Raises:
        HfsftError: if one is neither, or a folder has no such file.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if equals:
            found[name] = path
            continue
        if not Path(one).is_dir():
            raise HfsftError(f"--data {one}: neither a folder nor NAME=FILE")
        inside = {
            file.name.partition(".")[0]: str(file)
            for file in sorted(Path(one).iterdir())
            if file.name.partition(".")[0] in ON_HUB
        }
        if not inside:
            raise HfsftError(f"--data {one}: no file there is named as a task, as arc_easy.jsonl")
        found |= inside
    return found


def _show_rows(bar: Bar, task: str, done: int, rows: int) -> None:
    known = {shown.description: shown.id for shown in bar.tasks}
    number = known[task] if task in known else bar.add_task(task)
    bar.update(number, completed=done, total=rows)


def print_results(results: dict[str, Any]) -> None:
    """Print what `evaluate` returns for a person."""
    console = Console(highlight=False)
    table = Table(title=escape(results["model"]), title_justify="left", header_style="bold")
    table.add_column("task", overflow="fold")
    for column in ("rows", "right", "accuracy [95% interval]", "chance", "centred"):
        table.add_column(column, justify="right")
    for name, task in results["tasks"].items():
        if task["kind"] != "loss":
            table.add_row(
                name,
                f"{task['rows']:,}",
                f"{task['right']:,}",
                escape(f"{task['accuracy']:.3f} [{task['low']:.3f}, {task['high']:.3f}]"),
                f"{task['chance']:.3f}",
                f"{task['centred']:.3f}",
            )
    if table.rows:
        console.print(table)
    for name, task in results["tasks"].items():
        if task["kind"] == "loss":
            error = "" if task["error"] is None else f" ± {Z * task['error']:.4f}"
            size = task["bits_per_byte"]
            bits = "" if size is None else f", {size:.4f} bits a byte"
            loss = f"{task['loss']:.4f}{error} nats a token{bits}"
            console.print(f"{name}: loss {loss}, {task['rows']:,} documents")
    if results["mean_centred"] is not None:
        console.print(f"mean centred accuracy: {results['mean_centred']:.4f}")


def compare(folders: tuple[Path, Path]) -> dict[str, dict[str, Any]]:
    """The `difference` of each task that two models were asked, row by row where they can be.

    Args:
        folders: each with an eval.json and its eval/.
    """
    tasks = [json.loads((folder / "eval.json").read_text())["tasks"] for folder in folders]
    found = {
        name: difference(
            tasks[0][name],
            tasks[1][name],
            (row_results(folders[0], name), row_results(folders[1], name)),
        )
        for name in tasks[0]
        if name in tasks[1]
    }
    # losses on other documents, as two stages hold out, or on one alone, say nothing of each other
    return {
        name: one
        for name, one in found.items()
        if "loss" not in tasks[0][name] or (one["paired"] and one["rows"] > 1)
    }


def print_differences(found: dict[str, dict[str, Any]]) -> None:
    """Print what `compare` returns for a person."""
    console = Console(highlight=False)
    for name, one in found.items():
        said = "within noise" if one["within_noise"] else "more than noise"
        interval = f"[{one['low']:+.3f}, {one['high']:+.3f}]"
        how = f"{one['rows']:,} rows, {'row by row' if one['paired'] else 'apart'}"
        console.print(escape(f"{name}: {one['difference']:+.3f} {interval}, {said} ({how})"))

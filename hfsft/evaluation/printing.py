"""The command `hfsft eval`: evaluate models, print their figures and how two of them differ."""

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.markup import escape
from rich.progress import Progress as Bar
from rich.table import Table

from hfsft.errors import HfsftError, printable
from hfsft.evaluation.differences import compare
from hfsft.evaluation.evaluate import Progress, evaluate
from hfsft.evaluation.kept import results_folder, row_results
from hfsft.evaluation.tasks import data_files
from hfsft.noise import Z95
from hfsft.terminal import Terminal

HEARTBEAT = 60  # seconds between two lines of progress without a terminal

SHOWN_CHARACTERS = 600  # of a question or answer; of a longer one its beginning and end


def evaluate_and_print(
    models: list[str],
    tasks: list[str],
    data: list[str],
    out: Path | None,
    quiet: bool,
    show: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate models one after the other and print their figures, and how two of them differ.

    Args:
        models: folders or Hub ids.
        tasks: as `evaluate` takes them; empty: the default ones.
        data: each a `task=file`, or a folder of files named after tasks.
        out: for a single model only.
        quiet: print nothing.
        show: print this many wrong answers of each task.
        settings: passed on to `evaluate`.

    Returns:
        For one model what `evaluate` returns; for several a list of those as `models`, and for two
        also `differences`, what `compare` returns.

    Raises:
        HfsftError: as `evaluate` does, or for an `out` with several models.
    """
    if out and len(models) > 1:
        raise HfsftError("--out: it holds the results of one model only")
    files = data_files(data, tasks)
    found = []
    with nullcontext() if quiet else _progress() as progress:
        for model in models:
            results = evaluate(
                model, tasks or None, out=out, data=files, progress=progress, **settings
            )
            found.append(results)
    for model, results in () if quiet else zip(models, found, strict=True):
        print_results(results)
        print_wrong(results, out or results_folder(model), show)
    if len(models) == 1:
        return found[0]
    together: dict[str, Any] = {"models": found}
    if len(models) == 2:
        folders = (results_folder(models[0]), results_folder(models[1]))
        together["differences"] = compare(folders)
        if not quiet:
            print_differences(together["differences"])
    return together


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show progress on stderr: a bar in a terminal, else a line every `HEARTBEAT` seconds."""
    stream = sys.stderr  # lm-eval's is redirected while it runs
    console = Terminal(file=stream)
    if console.is_terminal:
        with Bar(console=console) as bar:
            yield partial(_update_bar, bar)
        return
    state: list[str] = []
    done = Event()

    def update(task: str, done: int, rows: int | None) -> None:
        state[:] = [task if rows is None else f"{task}: {done:,} of {rows:,} rows"]

    def tell() -> None:
        began = time.monotonic()
        while not done.wait(HEARTBEAT):
            minutes = (time.monotonic() - began) / 60
            print(f"{printable(*state or ['loading'])}, {minutes:.0f} min", file=stream)

    thread = Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield update
    finally:
        done.set()
        thread.join()


def _update_bar(bar: Bar, task: str, done: int, rows: int | None) -> None:
    known = {shown.description: shown.id for shown in bar.tasks}
    number = known[task] if task in known else bar.add_task(task)
    bar.update(number, completed=done, total=rows)


def print_results(results: dict[str, Any]) -> None:
    """Print the figures of one model.

    Args:
        results: what `evaluate` returns.
    """
    console = Terminal(highlight=False)
    tasks = {name: task for name, task in results["tasks"].items() if task["kind"] != "loss"}
    graded_twice = any(_is_graded_twice(task) for task in tasks.values())
    table = Table(title=_shown(results["model"]), title_justify="left", header_style="bold")
    table.add_column("task", overflow="fold")
    for column in (
        *("rows", "right", "accuracy [95% interval]", "chance", "centred"),
        *["by nanochat's rule"] * graded_twice,
    ):
        table.add_column(column, justify="right")
    for name, task in tasks.items():
        table.add_row(
            _shown(name),
            f"{task['rows']:,}",
            f"{task['right']:,}",
            escape(f"{task['accuracy']:.3f} [{task['low']:.3f}, {task['high']:.3f}]"),
            f"{task['chance']:.3f}",
            f"{task['centred']:.3f}",
            *[f"{task['nanochat_right']:,}" if _is_graded_twice(task) else ""] * graded_twice,
        )
    if table.rows:
        console.print(table)
    for name, task in results["tasks"].items():
        for line in _notes(task):
            console.print(_shown(f"{name}: {line}"))
        if "sandbox" in task:
            console.print(_shown(f"{name}: its programs ran in {task['sandbox']}"))
    if results["mean_centred"] is not None:
        console.print(f"mean centred accuracy: {results['mean_centred']:.4f}")
    if results["chatcore"] is not None:
        console.print(f"nanochat's ChatCORE, by its rules: {results['chatcore']:.4f}")


def _is_graded_twice(task: dict[str, Any]) -> bool:
    """Whether nanochat's rule is another than ours."""
    return task.get("nanochat_right") not in (None, task["right"])


def _notes(task: dict[str, Any]) -> Iterator[str]:
    """What else is to be said of a task."""
    if task["kind"] == "loss":
        yield f"loss {_loss(task)}, {task['rows']:,} documents"
    if task.get("pool"):
        yield f"drawn without repeats from {task['pool']:,} held-out words or pairs of numbers"
    if task.get("cut"):
        yield (
            f"{task['cut']:,} of {task['rows']:,} prompts are too long for the model's context; "
            "their middle was cut out"
        )
    for metric, mean in list(task.get("metrics", {}).items())[1:]:
        yield f"{metric} {mean:.4f}"


def print_wrong(results: dict[str, Any], out: Path, count: int) -> None:
    """Print the first wrong answers of each task.

    Args:
        results: what `evaluate` returns.
        out: the folder of eval/.
        count: of each task.
    """
    console = Terminal(highlight=False)
    for name, task in results["tasks"].items():
        kept = row_results(out, name).values() if task["kind"] != "loss" and count else ()
        for row in itertools.islice((row for row in kept if not row["right"]), count):
            console.print(f"\n[bold]{_shown(name)}[/], wrong:")
            for key in ("question", "expected", "answer"):
                text = printable(row[key]).strip() or "(nothing)"
                if len(text) > SHOWN_CHARACTERS:
                    text = f"{text[: SHOWN_CHARACTERS // 2]} … {text[-SHOWN_CHARACTERS // 2 :]}"
                console.print(f"  [bold]{key}:[/] {escape(text)}")


def _loss(task: dict[str, Any]) -> str:
    error, bits_per_byte = task["error"], task["bits_per_byte"]
    interval = "" if error is None else f" ± {Z95 * error:.4f}"
    bits = "" if bits_per_byte is None else f", {bits_per_byte:.4f} bits per byte"
    return f"{task['loss']:.4f}{interval} nats per token{bits}"


def print_differences(found: dict[str, dict[str, Any]]) -> None:
    """Print how two models differ.

    Args:
        found: what `compare` returns.
    """
    console = Terminal(highlight=False)
    for name, task in found.items():
        verdict = "within noise" if task["within_noise"] else "more than noise"
        interval = f"[{task['low']:+.3f}, {task['high']:+.3f}]"
        how = f"{task['rows']:,} rows, {'row by row' if task['paired'] else 'not paired'}"
        console.print(_shown(f"{name}: {task['difference']:+.3f} {interval}, {verdict} ({how})"))


def _shown(text: str) -> str:
    return escape(printable(text))

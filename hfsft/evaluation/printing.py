"""The command `hfsft eval`: evaluate models, print their figures and how two of them differ."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress as Bar
from rich.table import Table

from hfsft.errors import HfsftError, printable
from hfsft.evaluation.differences import compare
from hfsft.evaluation.evaluate import evaluate
from hfsft.evaluation.kept import results_folder
from hfsft.evaluation.tasks import data_files
from hfsft.noise import Z95
from hfsft.terminal import Terminal


def evaluate_and_print(
    models: list[str],
    tasks: list[str],
    data: list[str],
    out: Path | None,
    quiet: bool,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate models one after the other and print their figures, and how two of them differ.

    Args:
        models: folders or Hub ids.
        tasks: as `evaluate` takes them; empty: the default ones.
        data: each a `task=file`, or a folder of files named after tasks.
        out: for a single model only.
        quiet: print nothing.
        settings: passed on to `evaluate`.

    Returns:
        For one model what `evaluate` returns; for several a list of those as `models`, and for two
        also `differences`, what `compare` returns.

    Raises:
        HfsftError: as `evaluate` does, or for an `out` with several models.
    """
    if out and len(models) > 1:
        raise HfsftError("--out: it holds the results of one model only")
    files = data_files(data)
    console = Terminal(stderr=True)
    shows_bar = not quiet and console.is_terminal
    found = []
    with Bar(console=console, disable=not shows_bar) as bar:
        progress = partial(_update_bar, bar) if shows_bar else None
        for model in models:
            results = evaluate(
                model, tasks or None, out=out, data=files, progress=progress, **settings
            )
            found.append(results)
    if not quiet:
        for results in found:
            print_results(results)
    if len(models) == 1:
        return found[0]
    together: dict[str, Any] = {"models": found}
    if len(models) == 2:
        folders = (results_folder(models[0]), results_folder(models[1]))
        together["differences"] = compare(folders)
        if not quiet:
            print_differences(together["differences"])
    return together


def _update_bar(bar: Bar, task: str, done: int, rows: int) -> None:
    known = {shown.description: shown.id for shown in bar.tasks}
    number = known[task] if task in known else bar.add_task(task)
    bar.update(number, completed=done, total=rows)


def print_results(results: dict[str, Any]) -> None:
    """Print the figures of one model.

    Args:
        results: what `evaluate` returns.
    """
    console = Terminal(highlight=False)
    table = Table(title=_shown(results["model"]), title_justify="left", header_style="bold")
    table.add_column("task", overflow="fold")
    for column in ("rows", "right", "accuracy [95% interval]", "chance", "centred"):
        table.add_column(column, justify="right")
    for name, task in results["tasks"].items():
        if task["kind"] != "loss":
            table.add_row(
                _shown(name),
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
            console.print(_shown(f"{name}: loss {_loss(task)}, {task['rows']:,} documents"))
        if "sandbox" in task:
            console.print(_shown(f"{name}: its programs ran in {task['sandbox']}"))
    if results["mean_centred"] is not None:
        console.print(f"mean centred accuracy: {results['mean_centred']:.4f}")


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

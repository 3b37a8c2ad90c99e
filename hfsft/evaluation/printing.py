"""Evaluate models and print their figures."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.table import Table

from hfsft.errors import HfsftError
from hfsft.evaluation.differences import compare
from hfsft.evaluation.evaluate import evaluate
from hfsft.evaluation.kept import results_folder
from hfsft.evaluation.tasks import data_files
from hfsft.noise import Z

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


def print_differences(found: dict[str, dict[str, Any]]) -> None:
    """Print what `compare` returns for a person."""
    console = Console(highlight=False)
    for name, one in found.items():
        said = "within noise" if one["within_noise"] else "more than noise"
        interval = f"[{one['low']:+.3f}, {one['high']:+.3f}]"
        how = f"{one['rows']:,} rows, {'row by row' if one['paired'] else 'apart'}"
        console.print(escape(f"{name}: {one['difference']:+.3f} {interval}, {said} ({how})"))

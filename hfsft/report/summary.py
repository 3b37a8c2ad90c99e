"""The summary after `hfsft run`: losses, grades of built-in tasks, answers, next commands."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from hfsft.errors import printable
from hfsft.recipe.schema import Recipe
from hfsft.run.record import read_record
from hfsft.terminal import Terminal


def run_summary(recipe: Recipe) -> dict[str, Any]:
    """Collect the stages' records, grade the last stage's built-in tasks, answer sample prompts.

    Every stage is evaluated on the same rows; its figures go to its `eval.json`.

    Args:
        recipe: of a finished run.

    Returns:
        JSON data: `stages` (figures of the records), `accuracy` of each stage on each task,
        `answers` to the recipe's `sample_prompts`, and `model`, the last stage's folder.
    """
    from hfsft.evaluation.answering import Evaluator
    from hfsft.evaluation.evaluate import GRADED, evaluate

    stages = {}
    for name, stage in recipe.stages.items():
        record = read_record(stage.folder)
        keys = ("steps", "tokens", "seconds", "peak_memory_bytes", "peak_memory_of")
        stages[name] = {key: record[key] for key in (*keys, "eval_loss_before", "eval_loss")}
    last = recipe.stages[list(stages)[-1]]
    tasks = list(dict.fromkeys(source.path for source in last.data if source.path in GRADED))
    accuracy = {}
    for name, stage in recipe.stages.items() if tasks else ():
        graded = evaluate(str(stage.folder), tasks, batch_size=50)["tasks"]
        accuracy[name] = {task: graded[task] for task in tasks}
    answers = Evaluator(str(last.folder)).answers(recipe.sample_prompts)
    return {
        "run": str(recipe.folder),
        "model": str(last.folder),
        "stages": stages,
        "accuracy": accuracy,
        "answers": dict(zip(recipe.sample_prompts, answers, strict=True)),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Print a run's summary.

    Args:
        summary: what `run_summary` returns, and the path of the `report`.
    """
    console = Terminal(highlight=False)
    table = Table(
        title=escape(printable(summary["run"])), title_justify="left", header_style="bold"
    )
    table.add_column("stage")
    columns = ("steps", "tokens", "loss before", "loss after", "seconds", "peak memory")
    for column in columns:
        table.add_column(column, justify="right")
    for name, record in summary["stages"].items():
        losses = [record["eval_loss_before"], record["eval_loss"]]
        table.add_row(
            name,
            f"{record['steps']:,}",
            f"{record['tokens']:,}",
            *("-" if loss is None else f"{loss:.3f}" for loss in losses),
            f"{record['seconds']:,.0f}",
            _gibibytes(record["peak_memory_bytes"]),
        )
    console.print()
    console.print(table)
    console.print("Loss is on held-out data; peak memory is of the " + _memory_of(summary) + ".")
    if summary["accuracy"]:
        _print_accuracy(console, summary["accuracy"])
    console.print()
    for prompt, answer in summary["answers"].items():
        for speaker, text in (("you", prompt), ("model", answer)):
            console.print(f"[bold]{speaker}:[/] ", end="")
            console.out(printable(text.strip()), highlight=False)
    console.print(f"\nChat with it: [bold]hfsft chat {escape(summary['model'])}[/]")
    console.print(f"All figures: [bold]{escape(summary['report'])}[/]")


def _gibibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"


def _memory_of(summary: dict[str, Any]) -> str:
    kinds = {record["peak_memory_of"] for record in summary["stages"].values()}
    return "GPU (reserved)" if kinds == {"GPU reserved"} else "whole process"


def _print_accuracy(console: Terminal, accuracy: dict[str, Any]) -> None:
    table = Table(header_style="bold")
    table.add_column("held-out task")
    for stage in accuracy:
        table.add_column(f"right after {stage}", justify="right")
    for task in next(iter(accuracy.values())):
        scores = [scored[task] for scored in accuracy.values()]
        table.add_row(task, *(f"{score['right']} of {score['rows']}" for score in scores))
    console.print(table)

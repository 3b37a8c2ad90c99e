"""What a run came to: one table, sample answers, and the line to type next."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hfsft.recipe import Recipe
from hfsft.record import read_record


def run_summary(recipe: Recipe) -> dict[str, Any]:
    """Gather the stages' records, answer the sample prompts, and grade the generated tasks.

    Args:
        recipe: of a finished run.

    Returns:
        Plain data: `stages` (the records' figures), `accuracy` on held-out tasks of the last
        stage and the one before it, `answers` to the recipe's `sample_prompts`, and the last
        `model` folder.
    """
    from hfsft.evaluation import GRADED, Evaluator

    stages = {}
    for name, stage in recipe.stages.items():
        record = read_record(stage.folder)
        keys = ("steps", "tokens", "seconds", "peak_memory_bytes", "peak_memory_of")
        stages[name] = {key: record[key] for key in (*keys, "eval_loss_before", "eval_loss")}
    last = recipe.stages[list(stages)[-1]]
    evaluator = Evaluator(str(last.folder))
    tasks = [source.path for source in last.data if source.path in GRADED]
    accuracy: dict[str, Any] = {}
    if tasks:
        accuracy[last.name] = {task: evaluator.accuracy(task) for task in tasks}
        start = Path(last.model_name_or_path or "")
        if (start / "stage.json").is_file():
            before = Evaluator(str(start))
            accuracy[start.name] = {task: before.accuracy(task) for task in tasks}
    answers = evaluator.answers(recipe.sample_prompts)
    return {
        "run": str(recipe.folder),
        "model": str(last.folder),
        "stages": stages,
        "accuracy": accuracy,
        "answers": dict(zip(recipe.sample_prompts, answers, strict=True)),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Print a run's summary for a person."""
    console = Console(highlight=False)
    table = Table(title=summary["run"], title_justify="left", header_style="bold")
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
            f"{record['peak_memory_bytes'] / 2**30:.2f} GiB",
        )
    console.print()
    console.print(table)
    console.print("Loss is on held-out data; peak memory is of the " + _memory_of(summary) + ".")
    if summary["accuracy"]:
        _print_accuracy(console, summary["accuracy"])
    console.print()
    for prompt, answer in summary["answers"].items():
        console.print(f"[bold]you:[/] {prompt}")
        console.print("[bold]model:[/] ", end="")
        console.out(answer.strip())
    console.print(f"\nTalk to it: [bold]hfsft chat {summary['model']}[/]")


def _memory_of(summary: dict[str, Any]) -> str:
    kinds = {record["peak_memory_of"] for record in summary["stages"].values()}
    return "GPU (reserved)" if kinds == {"GPU reserved"} else "whole process"


def _print_accuracy(console: Console, accuracy: dict[str, Any]) -> None:
    table = Table(header_style="bold")
    table.add_column("held-out task")
    stages = list(reversed(accuracy))  # the earlier stage first
    for stage in stages:
        table.add_column(f"right after {stage}", justify="right")
    for task in accuracy[stages[0]]:
        scores = [accuracy[stage][task] for stage in stages]
        table.add_row(task, *(f"{score['right']} of {score['rows']}" for score in scores))
    console.print(table)

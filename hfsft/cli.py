"""The command `hfsft`; what is heavy is imported late, so that --help answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hfsft import __version__
from hfsft.process import run_main

app = typer.Typer(
    name="hfsft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a small chat model through base, mid and SFT, driven by one YAML recipe.",
    epilog="Every key of a recipe can be set on the command line: --sft.max_steps 300.",
)
# the recipe's keys are no options of typer's: load_recipe checks them, with the nearest known key
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or one that comes with hfsft: demo.")
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config_file",
        metavar="FILE",
        help="Accelerate's config; by default your own, else one process.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hfsft {__version__}")
        raise typer.Exit


@app.callback()
def hfsft(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train a small chat model through base, mid and SFT, driven by one YAML recipe."""


@app.command(context_settings=OVERRIDES)
def run(
    context: typer.Context,
    recipe: RecipeArgument,
    config_file: ConfigOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every stage of a recipe in order; finished ones are skipped, a stopped one goes on."""
    from hfsft.recipe.loading import load_recipe

    quiet = quiet or as_json
    arguments = [*context.args, *(["--quiet"] if quiet else [])]
    checked = load_recipe(recipe, *arguments)
    if not checked.stages:
        from hfsft.errors import RecipeError

        raise RecipeError(f"{recipe} has no stage; it needs a base, mid or sft section")
    from hfsft.launch import launch_stage
    from hfsft.run.record import finished_line, is_finished

    for name, stage in checked.stages.items():
        if not checked.restart and is_finished(checked, stage):
            if not quiet:
                print(finished_line(stage))
        else:
            launch_stage(name, recipe, arguments, config_file)
    from hfsft.report.summary import print_summary, run_summary

    summary = run_summary(checked)
    from hfsft.report.report import write_report  # it reads what the summary has graded

    summary["report"] = str(write_report(checked.folder)[1])
    if as_json:
        print(json.dumps(summary, indent=1))
    elif not quiet:
        print_summary(summary)


def _stage(
    name: str, context: typer.Context, recipe: str, config_file: str | None, quiet: bool
) -> None:
    from hfsft.recipe.loading import load_recipe

    arguments = [*context.args, *(["--quiet"] if quiet else [])]
    load_recipe(recipe, *arguments, stage=name)
    from hfsft.launch import launch_stage

    launch_stage(name, recipe, arguments, config_file)


@app.command(context_settings=OVERRIDES)
def base(
    context: typer.Context,
    recipe: RecipeArgument,
    config_file: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train the base stage: language, from raw text."""
    _stage("base", context, recipe, config_file, quiet)


@app.command(context_settings=OVERRIDES)
def mid(
    context: typer.Context,
    recipe: RecipeArgument,
    config_file: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train the mid stage: the conversation format and tasks."""
    _stage("mid", context, recipe, config_file, quiet)


@app.command(context_settings=OVERRIDES)
def sft(
    context: typer.Context,
    recipe: RecipeArgument,
    config_file: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train the sft stage: the assistant's style, from conversations."""
    _stage("sft", context, recipe, config_file, quiet)


@app.command(context_settings=OVERRIDES)
def data(
    context: typer.Context,
    recipe: RecipeArgument,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Examples of each stage to print.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Show what the model will see: rows kept and refused, lengths, and real examples."""
    from hfsft.recipe.loading import load_recipe

    checked = load_recipe(recipe, *context.args)
    from hfsft.data.preview import preview, print_preview

    seen = preview(checked, show)
    if as_json:
        print(json.dumps(seen, ensure_ascii=False, indent=1))
    else:
        print_preview(seen)


@app.command(context_settings=OVERRIDES)
def plan(
    context: typer.Context,
    recipe: RecipeArgument,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Plan for a CUDA card of this size: 8GB."),
    ] = None,
    timed: Annotated[
        bool, typer.Option("--time", help="Time a few micro-batches of each stage on this device.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what each stage will need: memory, time, disk, and whether it fits."""
    from hfsft.recipe.loading import load_recipe
    from hfsft.recipe.schema import size_in_bytes

    checked = load_recipe(recipe, *context.args)
    size = None if memory is None else size_in_bytes(memory, "--memory")
    from hfsft.plan.choosing import plan_run
    from hfsft.plan.printing import print_plan
    from hfsft.plan.timing import seconds_per_step

    planned = plan_run(checked, size, seconds_per_step if timed else None)
    if as_json:
        print(json.dumps(planned, indent=1))
    else:
        print_plan(planned)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder: runs/demo.")],
    other: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Another one to compare it to.", show_default=False),
    ] = None,
    as_html: Annotated[
        bool, typer.Option("--html", help="Leave one HTML file too, with the pictures inside.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a run's report.md with pictures, wherever the run stands; or compare two runs."""
    from rich.console import Console
    from rich.markdown import Markdown

    if other is not None:
        from hfsft.report.comparison import differences_text, write_comparison

        numbers, path = write_comparison((Path(run), Path(other)), as_html)
        text = differences_text(numbers)
    else:
        from hfsft.report.report import summary_text, write_report

        numbers, path = write_report(Path(run), as_html)
        text = summary_text(numbers)
    if as_json:
        print(json.dumps(numbers, indent=1))
        return
    console = Console()
    console.print(Markdown(text))
    console.print(f"\nWritten: [bold]{escape(str(path))}[/]", highlight=False, soft_wrap=True)


@app.command()
def push(
    folder: Annotated[
        str, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, a stage, or a model's folder.")
    ],
    repo: Annotated[
        str | None,
        typer.Argument(
            metavar="[REPO]", help="me/fast; by default as the recipe says.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="By default main.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private", help="Make a new repository private.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Push a finished model to the Hub, or go on with a push: what is there is not sent again."""
    from hfsft.hub.push import push_run

    pushes = push_run(folder, repo, revision, private)
    if as_json:
        print(json.dumps([{"folder": str(push.folder), "url": push.url} for push in pushes]))
    else:
        for push in pushes:
            print(push)


@app.command("eval")
def evaluate_models(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Folders or Hub ids; of two the difference too."),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="arc_easy, arc_challenge, mmlu, gsm8k, humaneval, simple_spelling, spelling_bee, "
            "arithmetic, held_out, reasoning_gym:NAME, lm_eval:NAME. By default what runs offline "
            "for a stage of a run, nanochat's chat tasks for others.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Rows of each task at most.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of their choice.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Prompts at a time.")] = 16,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FOLDER|NAME=FILE",
            help="Rows of the same schema instead of the Hub's: arc_easy=mine.jsonl, or a folder "
            "of such files, each with its task's name.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where eval.json and eval/ go; by default to the model's."),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow_code", help="Run the programs that humaneval asks for.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask models the rows of benchmarks; what was asked before is not asked again."""
    from hfsft.evaluation.printing import evaluate_and_print

    names = [name for given in tasks or () for name in given.split(",") if name]
    found = evaluate_and_print(
        models,
        names,
        data or [],
        out,
        as_json,
        rows=rows,
        seed=seed,
        batch_size=batch_size,
        allow_code=allow_code,
    )
    if as_json:
        print(json.dumps(found, indent=1))


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, or a Hub id.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this one prompt and leave.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", min=1, help="Tokens an answer at most.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top_k", min=1, help="Sample from this many likeliest tokens.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 42,
    as_json: Annotated[
        bool, typer.Option("--json", help="With -p: print the whole conversation as JSON.")
    ] = False,
) -> None:
    """Talk to a model in the terminal."""
    from hfsft.chat import Chat, talk

    session = Chat(model, system, max_new_tokens, temperature, top_k, seed)
    if prompt is None:
        talk(session)
    elif as_json:
        session.answer(prompt)
        print(json.dumps(session.messages, ensure_ascii=False))
    else:
        for piece in session.stream(prompt):
            print(piece, end="", flush=True)
        print()


def main() -> None:
    """Run the command line."""
    run_main(lambda *argv: app(list(argv), prog_name="hfsft"), *sys.argv[1:])

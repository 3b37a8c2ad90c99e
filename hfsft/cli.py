"""The command `hfsft`; heavy modules are imported late, so that --help is instant."""

import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hfsft import __version__
from hfsft.documents.command import make_data
from hfsft.errors import RecipeError, printable
from hfsft.process import run_main
from hfsft.serve.command import serve
from hfsft.terminal import Terminal, say, say_json

app = typer.Typer(
    name="hfsft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a small chat model through base, mid and SFT, driven by one YAML recipe.",
    epilog="Every key of a recipe can be set on the command line: --sft.max_steps 300.",
)
# typer does not know the recipe's keys: load_recipe checks them and suggests the nearest one
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A YAML file, or a built-in recipe: demo."),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config_file",
        metavar="FILE",
        help="An Accelerate config; by default your own, or else one process.",
    ),
]
NumProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--num_processes", metavar="N", min=1, help="Processes on all machines, one a GPU."
    ),
]
NumMachinesOption = Annotated[
    int | None, typer.Option("--num_machines", metavar="N", min=1, help="Machines of the run.")
]
MachineRankOption = Annotated[
    int | None,
    typer.Option("--machine_rank", metavar="N", min=0, help="Which of several machines this is."),
]
MainProcessIpOption = Annotated[
    str | None,
    typer.Option("--main_process_ip", metavar="IP", help="Of machine 0, where there are several."),
]
MainProcessPortOption = Annotated[
    int | None, typer.Option("--main_process_port", metavar="PORT", help="Free on machine 0.")
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
    num_processes: NumProcessesOption = None,
    num_machines: NumMachinesOption = None,
    machine_rank: MachineRankOption = None,
    main_process_ip: MainProcessIpOption = None,
    main_process_port: MainProcessPortOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every stage of a recipe in order; skip finished ones, resume an interrupted one."""
    from hfsft.recipe.loading import load_recipe

    quiet = quiet or as_json
    arguments = [*context.args, *(["--quiet"] if quiet else [])]
    checked = load_recipe(recipe, *arguments)
    if not checked.stages:
        raise RecipeError(f"{recipe} has no stage; add a base, mid or sft section")
    from hfsft.launch import Processes, launch_stage
    from hfsft.run.record import finished_line, is_finished, mend_record

    where = (num_machines, machine_rank, main_process_ip, main_process_port)
    processes = Processes(config_file, num_processes, *where)
    alone = processes.machines() == 1
    for name, stage in checked.stages.items():
        if alone and not checked.restart and (line := mend_record(stage.folder)) and not quiet:
            say(line)
        # of several machines one alone may see what is finished: its ranks tell the others
        if alone and not checked.restart and is_finished(checked, stage):
            if not quiet:
                say(finished_line(stage))
        else:
            launch_stage(name, recipe, arguments, processes)
    if not processes.is_main_machine():
        return  # machine 0 grades, and writes the report
    from hfsft.report.summary import print_summary, run_summary

    summary = run_summary(checked)
    from hfsft.report.report import write_report  # after the summary, whose grades it reads

    summary["report"] = str(write_report(checked.folder)[1])
    if as_json:
        say_json(summary, indent=1)
    elif not quiet:
        print_summary(summary)


def _add_stage(name: str, teaches: str) -> None:
    """Add the command of one stage."""

    @app.command(name, help=f"Train the {name} stage: {teaches}.", context_settings=OVERRIDES)
    def train(
        context: typer.Context,
        recipe: RecipeArgument,
        config_file: ConfigOption = None,
        num_processes: NumProcessesOption = None,
        num_machines: NumMachinesOption = None,
        machine_rank: MachineRankOption = None,
        main_process_ip: MainProcessIpOption = None,
        main_process_port: MainProcessPortOption = None,
        quiet: QuietOption = False,
    ) -> None:
        from hfsft.recipe.loading import load_recipe

        arguments = [*context.args, *(["--quiet"] if quiet else [])]
        load_recipe(recipe, *arguments, stage=name)
        from hfsft.launch import Processes, launch_stage

        where = (num_machines, machine_rank, main_process_ip, main_process_port)
        launch_stage(name, recipe, arguments, Processes(config_file, num_processes, *where))


_add_stage("base", "language, from raw text")
_add_stage("mid", "the conversation format and tasks")
_add_stage("sft", "the assistant's style, from conversations")


@app.command(context_settings=OVERRIDES)
def data(
    context: typer.Context,
    recipe: RecipeArgument,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Number of examples to print per stage.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Show the data a model will see: rows kept and rejected, lengths, and real examples."""
    from hfsft.recipe.loading import load_recipe

    checked = load_recipe(recipe, *context.args)
    from hfsft.data.preview import preview, print_preview

    seen = preview(checked, show)
    if as_json:
        say_json(seen, indent=1)
    else:
        print_preview(seen)


app.command("make-data")(make_data)


@app.command(context_settings=OVERRIDES)
def plan(
    context: typer.Context,
    recipe: RecipeArgument,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Plan for a CUDA card of this size: 8GB."),
    ] = None,
    config_file: ConfigOption = None,
    num_processes: NumProcessesOption = None,
    timed: Annotated[
        bool, typer.Option("--time", help="Time a few micro-batches of each stage on this device.")
    ] = False,
    largest: Annotated[
        bool,
        typer.Option("--largest", help="Instead: the largest model that fits --memory, by method."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the memory, time and disk that each stage needs, and whether it fits."""
    from hfsft.recipe.loading import load_recipe
    from hfsft.recipe.schema import size_in_bytes

    checked = load_recipe(recipe, *context.args)
    size = None if memory is None else size_in_bytes(memory, "--memory")
    if largest:
        _print_largest(checked, size, as_json)
        return
    from hfsft.launch import Processes, planned_spread
    from hfsft.plan.choosing import plan_run
    from hfsft.plan.printing import print_plan
    from hfsft.plan.spread import planned_for
    from hfsft.plan.timing import seconds_per_step

    with planned_for(planned_spread(Processes(config_file, num_processes))):
        planned = plan_run(checked, size, seconds_per_step if timed else None)
    if as_json:
        say_json(planned, indent=1)
    else:
        print_plan(planned)


def _print_largest(recipe: Any, memory: int | None, as_json: bool) -> None:
    """Print what `hfsft plan --largest` found."""
    from hfsft.errors import RecipeError

    if memory is None:
        raise RecipeError("--largest needs a size: --memory 8GB")
    from hfsft.plan.largest import largest_models
    from hfsft.plan.printing import print_largest

    found = largest_models(recipe, memory)
    if as_json:
        say_json(found, indent=1)
    else:
        print_largest(found)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder: runs/demo.")],
    other: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Another run to compare it with.", show_default=False),
    ] = None,
    as_html: Annotated[
        bool,
        typer.Option("--html", help="Also write one HTML file with embedded pictures."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the report.md of a run, finished or not, with pictures; or compare two runs."""
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
        say_json(numbers, indent=1)
        return
    console = Terminal()
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
            metavar="[REPO]", help="me/fast; by default the recipe's.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="By default the recipe's or main."),
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private", help="Make a new repository private.")
    ] = None,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Also push the GGUF files of hfsft export.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Push a finished model to the Hub, or resume a push; uploaded files are not sent again."""
    from hfsft.hub.push import push_run

    pushes = push_run(folder, repo, revision, private, gguf)
    if as_json:
        say_json([{"folder": str(push.folder), "url": push.url} for push in pushes])
    else:
        for push in pushes:
            say(push)


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run's or a model's folder, or a Hub id."),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="gguf: for llama.cpp. ollama: the same and a Modelfile. qwen3: a folder for vLLM, "
            "SGLang, MLX and CTranslate2, of a nanochat model.",
        ),
    ],
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="TYPE,...",
            help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; by default q8_0 and f16. Of qwen3 "
            "f32 (the default) or bf16.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write to; by default gguf/ or qwen3/ in MODEL."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a model for llama.cpp, Ollama, vLLM and others, proved against the original."""
    from hfsft.export.export import export_model

    kinds = [kind for given in types or () for kind in given.split(",") if kind]
    proofs = export_model(model, to, kinds, out, (lambda line: None) if as_json else say)
    if as_json:
        say_json(proofs, indent=1)


@app.command("eval")
def evaluate_models(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Folders or Hub ids; two are compared as well."),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="arc_easy, arc_challenge, mmlu, gsm8k, humaneval, simple_spelling, spelling_bee, "
            "arithmetic, tool_calls, held_out, reasoning_gym:NAME, lm_eval:NAME. By default those "
            "that run offline for a stage of a run, else nanochat's chat tasks.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="At most this many rows per task.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the choice of rows.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Prompts per batch.")] = 16,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FOLDER|NAME=FILE",
            help="Rows of the same schema instead of the Hub's: arc_easy=mine.jsonl, or a folder "
            "of files named after tasks.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for eval.json and eval/; by default the model's."),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option("--allow_code", help="Let humaneval run programs the model writes."),
    ] = False,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Print this many wrong answers of each task.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Evaluate models on benchmarks; answers that are already on disk are reused."""
    from hfsft.evaluation.printing import evaluate_and_print

    names = [name for given in tasks or () for name in given.split(",") if name]
    found = evaluate_and_print(
        models,
        names,
        data or [],
        out,
        as_json,
        show,
        rows=rows,
        seed=seed,
        batch_size=batch_size,
        allow_code=allow_code,
    )
    if as_json:
        say_json(found, indent=1)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, or a Hub id.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this prompt and exit.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", min=1, help="At most this many tokens per answer.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 always picks the top-1 token.")
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option("--top_k", min=1, help="Sample from this many most probable tokens."),
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 42,
    tools: Annotated[
        str | None,
        typer.Option("--tools", metavar="FILE", help="JSON: the tools it may call; you answer."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With -p: print the conversation as JSON.")
    ] = False,
) -> None:
    """Chat with a model in the terminal."""
    from hfsft.chat import Chat, read_tools, talk

    given = None if tools is None else read_tools(tools)
    session = Chat(model, system, max_new_tokens, temperature, top_k, seed, given)
    if prompt is None:
        talk(session)
    elif as_json:
        session.answer(prompt)
        say_json(session.messages)
    else:
        for segment in session.stream(prompt):
            print(printable(segment), end="", flush=True)
        print()


app.command()(serve)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check whether what hfsft builds on works on this machine; its output belongs in a report."""
    from hfsft.doctor.examine import examine
    from hfsft.doctor.printing import print_finding, print_machine

    if not as_json:
        print_machine()
    found = examine() if as_json else examine(print_finding)
    if as_json:
        say_json(found, indent=1)
    if not found["passed"]:
        raise typer.Exit(2)


def main() -> None:
    """Run the command line."""
    run_main(_run_app, *sys.argv[1:])


def _run_app(*argv: str) -> None:
    gc.enable()  # off since `run_main`
    app(list(argv), prog_name="hfsft")

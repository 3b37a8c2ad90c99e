"""The command `hfsft make-data`; what takes time to import is imported when it runs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hfsft.terminal import say_json

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Text, Markdown, HTML and PDF files, or one.")
]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="The file of rows: rows.jsonl.")
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="An OpenAI-compatible server whose model writes the rows: http://localhost:8080/v1. "
        "Without it the documents are cut into text for base.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="The teacher; by default the first the server lists."),
]
KeyVariable = Annotated[
    str, typer.Option("--api_key_env", metavar="NAME", help="The variable that holds the API key.")
]
PromptsFile = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", help="A changed copy of prompts.yaml.")
]
RowsPerPassage = Annotated[
    int, typer.Option("--rows_per_passage", min=1, help="Rows to ask for per passage.")
]
PassageChars = Annotated[
    int, typer.Option("--passage_chars", min=200, help="Characters of a passage at most.")
]
MaxPassages = Annotated[
    int | None,
    typer.Option("--max_passages", min=1, help="A seeded sample of this many passages."),
]
Coverage = Annotated[
    float,
    typer.Option(
        "--coverage", min=0.0, max=1.0, help="Share of an answer's words that its passage has."
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of samples and answers.")]
Concurrency = Annotated[
    int, typer.Option("--concurrency", min=1, max=64, help="Requests at a time.")
]
Seconds = Annotated[
    float, typer.Option("--timeout", min=0.1, help="Seconds that one answer may take.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a file that was changed since, or is another.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")]


def make_data(
    folder: Folder,
    out: Out,
    endpoint: Endpoint = None,
    model: Model = None,
    api_key_env: KeyVariable = "OPENAI_API_KEY",
    prompts: PromptsFile = None,
    rows_per_passage: RowsPerPassage = 3,
    passage_chars: PassageChars = 3000,
    max_passages: MaxPassages = None,
    coverage: Coverage = 0.6,
    seed: Seed = 42,
    concurrency: Concurrency = 1,
    timeout: Seconds = 120.0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make rows of documents: conversations that a teacher writes, or text for base."""
    from hfsft.documents.making import Making, Output, make_conversations, make_text
    from hfsft.documents.printing import print_counts
    from hfsft.documents.prompts import DEFAULT, load_prompts
    from hfsft.documents.teacher import Teacher

    making = Making(
        passage_chars=passage_chars,
        rows_per_passage=rows_per_passage,
        max_passages=max_passages,
        coverage=coverage,
        seed=seed,
        concurrency=concurrency,
        quiet=quiet or as_json,
    )
    output = Output(out, overwrite)
    if endpoint is None:
        counts = make_text(folder, output, making)
    else:
        key = os.environ.get(api_key_env, "").strip() or None
        asked = load_prompts(prompts or DEFAULT)
        counts = make_conversations(
            folder, output, making, asked, lambda: Teacher(endpoint, model, key, timeout)
        )
    if as_json:
        say_json(counts, indent=1)
    elif not quiet:
        print_counts(counts, output)

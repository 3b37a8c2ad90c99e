"""The command `hfsft serve`; what takes time to import is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="One folder or Hub id; or two, to compare."),
    ],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; all but loopback need a key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 picks a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api_key", metavar="KEY", help="Key that clients must send.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api_key_file", help="A file with the key; or set HFSFT_API_KEY."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow_host", metavar="NAME", help="Another name of this server."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow_origin", metavar="URL", help="A web page that may use the endpoint."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max_batch", min=1, help="Answers generated together.")
    ] = 16,
    max_queue: Annotated[
        int, typer.Option("--max_queue", min=0, help="Answers that may wait beyond those.")
    ] = 1024,
) -> None:
    """Serve a model: a web page to talk to it, and an OpenAI-compatible endpoint."""
    from hfsft.serve.server import serve as serve_models

    serve_models(
        models,
        host,
        port,
        api_key,
        api_key_file,
        tuple(allow_host or ()),
        tuple(allow_origin or ()),
        max_batch,
        max_queue,
    )

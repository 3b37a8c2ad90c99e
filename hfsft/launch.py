"""Start a stage with `accelerate launch`, and pass its exit status and signals on.

Accelerate's own command turns every exit status of the script into 1 and adds a traceback.
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError

# what `accelerate launch` would choose with a warning where nothing is configured
ONE_PROCESS = (
    "--num_processes=1",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
)


def launch_stage(stage: str, recipe: str, arguments: list[str], config_file: str | None) -> None:
    """Run a stage in processes of its own, as Accelerate is configured.

    Args:
        stage: base, mid or sft.
        recipe: as the user gave it.
        arguments: the rest of the stage's command line.
        config_file: an Accelerate config; None: the user's own, else one process.

    Raises:
        RecipeError: if there is no such config.
        SystemExit: with the stage's own exit status, if it is not 0.
    """
    import psutil
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if config_file is not None:
        options = [f"--config_file={_find_config(config_file)}"]
    else:
        options = [] if Path(default_config_file).is_file() else list(ONE_PROCESS)
    command = launch_command_parser().parse_args(
        [*options, "--module", f"hfsft.{stage}", recipe, *arguments]
    )

    def forward(number: int, frame: Any) -> None:
        # the stage saves a checkpoint and ends; a terminal's Ctrl-C has reached it already
        if number == signal.SIGTERM:
            for child in psutil.Process().children():
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        launch_command(command)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(max(code if code > 0 else 128 - code for code in codes))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _find_config(given: str) -> Path:
    """An Accelerate config: a file, or the name of one that comes with hfsft (`multi_gpu`)."""
    package = Path(__file__).parent
    folders = (package / "accelerate_configs", package.parent / "accelerate_configs")
    name = Path(given).stem
    for path in (Path(given), *(folder / f"{name}.yaml" for folder in folders)):
        if path.is_file():
            return path
    raise RecipeError(f"--config_file: no such file {given}")

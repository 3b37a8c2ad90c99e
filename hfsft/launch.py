"""Start a stage with `accelerate launch`, and pass its exit status and signals on.

Accelerate's own command turns every exit status of the script into 1 and adds a traceback.
"""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError
from hfsft.process import unignored

# what `accelerate launch` would choose with a warning where nothing is configured
ONE_PROCESS = (
    "--num_processes=1",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
)
SLOWEST_STEP = 900  # seconds for step and checkpoint of several processes that are signalled


def launch_stage(stage: str, recipe: str, arguments: list[str], config_file: str | None) -> None:
    """Run a stage in processes of its own, as Accelerate is configured.

    Args:
        stage: base, mid or sft.
        recipe: as the user gave it.
        arguments: the rest of the stage's command line.
        config_file: an Accelerate config; None: the user's own, else one process.

    Raises:
        RecipeError: if there is no such config.
        SystemExit: with the stage's own exit status, if it is not 0; 2 where one of
            several processes was killed or stopped, and another names it.
    """
    import psutil
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if config_file is not None:
        options = [f"--config_file={_find_config(config_file)}"]
    else:
        options = [] if Path(default_config_file).is_file() else list(ONE_PROCESS)
    command = launch_command_parser().parse_args(
        [*options, "--module", f"hfsft.{stage}", recipe, *arguments]
    )
    # of several processes torch passes the signals on: for a step that takes longer than its 30 s,
    # and not those that are ignored, as SIGHUP is under nohup
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(SLOWEST_STEP))
    heard = unignored()
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in heard))
    logging.disable(logging.ERROR)  # the processes say themselves what happened
    received = []

    def forward(number: int, frame: Any) -> None:
        # a terminal's signal has reached the child already: two that come together count as one
        received.append(number)
        for child in psutil.Process().children():
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in heard}
    try:
        launch_command(command)
    except subprocess.CalledProcessError as error:
        sys.exit(_status(error.returncode))
    except ChildFailedError as error:
        # what a rank says itself, before what one was killed with; the first, as it ends the others
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        codes = [failure.exitcode for failure in failures]
        sys.exit(_status(next((code for code in codes if code > 0), codes[0])))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:  # the stage was at its end already; what would come next is not begun
        os.kill(os.getpid(), received[0])


def _status(code: int) -> int:
    """A process' exit status, as a shell has it where a signal killed it."""
    return code if code >= 0 else 128 - code


def _find_config(given: str) -> Path:
    """An Accelerate config: a file, or the name of one that comes with hfsft (`multi_gpu`)."""
    package = Path(__file__).parent
    folders = (package / "shipped" / "accelerate_configs", package.parent / "accelerate_configs")
    name = Path(given).stem
    for path in (Path(given), *(folder / f"{name}.yaml" for folder in folders)):
        if path.is_file():
            return path
    raise RecipeError(f"--config_file: no such file {given}")

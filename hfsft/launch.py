"""Start a stage with `accelerate launch`, forwarding its signals and its exit status.

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

# the defaults of `accelerate launch` where nothing is configured, given explicitly to avoid its
# warning
ONE_PROCESS = (
    "--num_processes=1",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
)
SHUTDOWN_SECONDS = 900  # for several ranks to finish their step and checkpoint after a signal


def launch_stage(stage: str, recipe: str, arguments: list[str], config_file: str | None) -> None:
    """Run a stage in processes of its own, as Accelerate is configured.

    Args:
        stage: base, mid or sft.
        recipe: as the user gave it.
        arguments: the rest of the stage's command line.
        config_file: an Accelerate config; None: the user's default config, or else one process.

    Raises:
        RecipeError: if there is no such config.
        SystemExit: with the stage's own exit status, if it is not 0; 2 if one of several ranks was
            killed or stopped, which another rank reports.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    command = _command(stage, recipe, arguments, config_file)
    handled = unignored()
    # torchelastic forwards signals to the ranks: give a step longer than its 30 s, and leave out
    # signals that are ignored, as SIGHUP is under nohup
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in handled))
    logging.disable(logging.ERROR)  # the stage's processes print their own errors
    received: list[int] = []
    before = {number: signal.signal(number, _forwarder(received)) for number in handled}
    try:
        launch_command(command)
    except subprocess.CalledProcessError as error:
        sys.exit(_status(error.returncode))
    except ChildFailedError as error:
        # prefer an exit status a rank chose over a kill signal; of those, the earliest failure
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        codes = [failure.exitcode for failure in failures]
        sys.exit(_status(next((code for code in codes if code > 0), codes[0])))
    except SignalException as error:
        sys.exit(128 + error.sigval)
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:  # the stage finished before the signal took effect; do not start the next one
        os.kill(os.getpid(), received[0])


def _command(stage: str, recipe: str, arguments: list[str], config_file: str | None) -> Any:
    """The parsed command line of `accelerate launch` for a stage."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    if config_file is not None:
        options = [f"--config_file={_find_config(config_file)}"]
    else:
        options = [] if Path(default_config_file).is_file() else list(ONE_PROCESS)
    return launch_command_parser().parse_args(
        [*options, "--module", f"hfsft.{stage}", recipe, *arguments]
    )


def _forwarder(received: list[int]) -> Any:
    """A signal handler that notes the signal and passes it to every child process."""
    import psutil

    def forward(number: int, frame: Any) -> None:
        # a terminal has already sent the signal to the child too: it counts two within a second as
        # one
        received.append(number)
        for child in psutil.Process().children():
            child.send_signal(number)

    return forward


def _status(code: int) -> int:
    """A process' exit status in the shell's convention: 128 plus the signal that killed it."""
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

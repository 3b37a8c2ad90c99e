"""Start a stage with `accelerate launch`, forwarding its signals and its exit status.

Accelerate's own command turns every exit status of the script into 1 and adds a traceback.
"""

import logging
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfsft.errors import RecipeError, first_line
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


@dataclass(frozen=True)
class Processes:
    """What a command line says about processes; None: as Accelerate's config has it."""

    config_file: str | None = None  # an Accelerate config; None: the user's own, or one process
    num_processes: int | None = None  # on all machines
    num_machines: int | None = None
    machine_rank: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None

    def config(self) -> Any:
        """The Accelerate config, or None without one.

        Raises:
            RecipeError: if there is no such file, or it is no config.
        """
        import yaml
        from accelerate.commands.config.config_args import (
            default_config_file,
            load_config_from_file,
        )

        if self.config_file is None and not Path(default_config_file).is_file():
            return None
        path = default_config_file if self.config_file is None else _find_config(self.config_file)
        try:
            return load_config_from_file(str(path))
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            why = "no settings" if isinstance(error, AttributeError) else first_line(error)
            raise RecipeError(
                f"{path}: not a config of Accelerate: {why}\n  `accelerate config` writes one"
            ) from None

    def machines(self) -> int:
        """How many machines the command runs on."""
        config = self.config()
        return self.num_machines or getattr(config, "num_machines", None) or 1

    def is_main_machine(self) -> bool:
        """Whether this is the machine that keeps checkpoints and results."""
        if self.machine_rank is not None:
            return self.machine_rank == 0
        return self.machines() == 1 or self.config().machine_rank == 0

    def options(self) -> list[str]:
        """The options of `accelerate launch`.

        Raises:
            RecipeError: if the config cannot start so many processes.
        """
        config, given = self.config(), asdict(self)
        del given["config_file"]
        options = [f"--{key}={value}" for key, value in given.items() if value is not None]
        wanted = self.num_processes or getattr(config, "num_processes", None) or 1
        if self.machines() > 1:
            self._check_machines(wanted, config)
        port = self.main_process_port or getattr(config, "main_process_port", None)
        if wanted > 1 and port is None and self.machines() == 1:
            options.append("--main_process_port=0")  # any that is free: two runs on one machine
        if config is None:
            several = (self.num_processes or 1) > 1 or self.machines() > 1
            preset = [one for one in ONE_PROCESS if given.get(one[2:].partition("=")[0]) is None]
            return ["--multi_gpu"] * several + preset + options
        if self.config_file is not None:
            options.append(f"--config_file={_find_config(self.config_file)}")
        if config.distributed_type.value in ("NO", "MULTI_CPU") and wanted > 1:
            # Accelerate's launcher for the CPU would start one; torchrun starts them all, and each
            # finds the CPU by the variable
            options.append("--multi_gpu")
            if getattr(config, "use_cpu", False):
                os.environ["ACCELERATE_USE_CPU"] = "true"
        return options

    def _check_machines(self, processes: int, config: Any) -> None:
        """Refuse what Accelerate would fail at, or start with fewer processes than asked for."""
        machines, rank, ip = self.machines(), self.machine_rank, self.main_process_ip
        rank = getattr(config, "machine_rank", None) if rank is None else rank
        ip = getattr(config, "main_process_ip", None) if ip is None else ip
        if rank is None or not 0 <= int(rank) < machines:
            raise RecipeError(
                f"--machine_rank: give each of {machines} machines its own, 0 to {machines - 1}"
            )
        if not ip:
            raise RecipeError("--main_process_ip: give every machine the address of machine 0")
        if processes % machines:
            raise RecipeError(
                f"--num_processes {processes} are those of all machines together; {machines} "
                f"machines need a multiple of {machines}"
            )


def planned_spread(processes: Processes) -> Any:
    """The `Spread` over which `hfsft plan` plans."""
    from hfsft.plan.spread import Spread

    config = processes.config()
    kind, count = "DDP", 1
    if config is not None:
        kind = {"FSDP": "FSDP2", "DEEPSPEED": "ZeRO-2"}.get(config.distributed_type.value, "DDP")
        count = getattr(config, "num_processes", None) or 1
    return Spread(processes.num_processes or count, kind)


def launch_stage(stage: str, recipe: str, arguments: list[str], processes: Processes) -> None:
    """Run a stage in processes of its own, as Accelerate is configured.

    Args:
        stage: base, mid or sft.
        recipe: as the user gave it.
        arguments: the rest of the stage's command line.
        processes: how many, and where.

    Raises:
        RecipeError: if there is no such config, or it cannot be launched.
        SystemExit: with the stage's own exit status, if it is not 0; 2 if one of several ranks was
            killed or stopped, which another rank reports.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    command = _command(stage, recipe, arguments, processes)
    handled = unignored()
    # torchelastic forwards signals to the ranks: give a step longer than its 30 s, and leave out
    # signals that are ignored, as SIGHUP is under nohup
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in handled))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a store whose launcher is gone
    logging.disable(logging.ERROR)  # the stage's processes print their own errors
    received: list[int] = []
    before = {number: signal.signal(number, _forwarder(received)) for number in handled}
    try:
        launch_command(command)
    except subprocess.CalledProcessError as error:
        sys.exit(_status(error.returncode))
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        sys.exit(_status_of_ranks([failure.exitcode for failure in failures], bool(received)))
    except (ConnectionError, DistError, ImportError, ValueError) as error:
        raise RecipeError(
            f"{stage}: the processes cannot be started: {first_line(error)}"
        ) from None
    except SignalException as error:
        sys.exit(128 + error.sigval)
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:  # the stage finished before the signal took effect; do not start the next one
        os.kill(os.getpid(), received[0])


def _command(stage: str, recipe: str, arguments: list[str], processes: Processes) -> Any:
    """The parsed command line of `accelerate launch` for a stage."""
    from accelerate.commands.launch import launch_command_parser

    options = processes.options()
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


def _status_of_ranks(codes: list[int], signalled: bool) -> int:
    """The exit status of several ranks: the earliest that one of them chose.

    Args:
        codes: of the ranks that failed, the earliest first; below 0 of those that were killed.
        signalled: whether the launcher was told to stop. If it was not, a SIGTERM is torchrun's,
            which ends the other ranks after a failure, and says nothing about its cause; unless
            every rank stopped by it, because one was told to.
    """
    stopped = 128 + signal.SIGTERM
    chosen = [code for code in codes if code > 0]
    if not signalled and set(codes) != {stopped}:
        chosen = [code for code in chosen if code != stopped] or [2]
    return chosen[0] if chosen else _status(codes[0])


def _find_config(given: str) -> Path:
    """An Accelerate config: a file, or the name of one that comes with hfsft (`multi_gpu`)."""
    package = Path(__file__).parent
    folders = (package / "shipped" / "accelerate_configs", package.parent / "accelerate_configs")
    name = Path(given).stem
    for path in (Path(given), *(folder / f"{name}.yaml" for folder in folders)):
        if path.is_file():
            return path
    raise RecipeError(f"--config_file: no such file {given}")

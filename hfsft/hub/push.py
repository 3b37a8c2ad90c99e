"""What a run pushes to the Hub: checkpoints during training, and the finished model.

`hub_strategy` takes transformers' values. A finished model always goes to `hub_revision` (default
main) in one commit, so that a reader never sees half a model. Checkpoints depend on the strategy:

| hub_strategy | at each save |
|---|---|
| end | nothing |
| every_save | the checkpoint's model, to the top of the branch `checkpoints`: a model to try |
| checkpoint | the full checkpoint, to the folder `last-checkpoint` of that branch |
| all_checkpoints | the full checkpoint, to its own folder `checkpoint-N` of that branch |

With a `hub_revision` other than main the branch is `<hub_revision>-checkpoints`. If a new
checkpoint arrives while an older one still waits, only `all_checkpoints` pushes both.
"""

import atexit
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from hfsft.errors import HfsftError, first_line
from hfsft.hub.bounds import PATIENCE, bound_requests, without_tokens
from hfsft.hub.client import MAIN, open_repository, push_folder, repository_id
from hfsft.recipe.key import STAGES
from hfsft.recipe.schema import Stage
from hfsft.run.manifest import MANIFEST, PLACE, checkpoints, verify_model
from hfsft.run.record import LOGS, read_record

CHECKPOINTS = "checkpoints"  # the branch


LONGEST_WAIT = 3600.0  # seconds at the end of a run for the pushes still pending


STAGING = "pushing"  # the folder of checkpoints waiting to be pushed


# peft's card of a checkpoint contains a local path, which the Hub rejects
CARD = "README.md"


# the files of a checkpoint that are not part of its model
STATE = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "trainer_state.json",
    PLACE,
    MANIFEST,
    *LOGS,
)


# the folders of `hfsft export` in a model's, which its own push leaves out
GGUF = "gguf"
EXPORTS = (GGUF, "qwen3", "*.partial")


@dataclass
class Push:
    """A folder to push to the Hub, and the outcome."""

    folder: Path
    repo_id: str
    revision: str  # the branch
    path_in_repo: str = ""
    leave_out: tuple[str, ...] = ()
    mirror: bool = False  # whether to delete files that exist only on the Hub
    url: str | None = None  # of the commit
    problem: str | None = None

    def __str__(self) -> str:
        if self.problem is not None:
            return f"not pushed: {self.problem}"
        return f"pushed {self.folder.name}: {self.url}"

    def send(self, patience: float = PATIENCE) -> None:
        """Push the folder.

        Args:
            patience: seconds of pauses between attempts.

        Raises:
            HfsftError: if it fails.
        """
        self.url = push_folder(
            self.folder,
            self.repo_id,
            self.revision,
            self.path_in_repo,
            self.leave_out,
            self.mirror,
            patience,
        )


@dataclass(frozen=True)
class Target:
    """Where a stage's model and checkpoints go."""

    repo_id: str
    revision: str = MAIN
    strategy: str = "end"

    @property
    def checkpoint_branch(self) -> str:
        """The branch of the checkpoints."""
        return CHECKPOINTS if self.revision == MAIN else f"{self.revision}-{CHECKPOINTS}"

    @property
    def branches(self) -> list[str]:
        """Every branch that is pushed to."""
        return [self.revision] + [self.checkpoint_branch] * (self.strategy != "end")

    def model(self, folder: Path) -> Push:
        """The push of a finished model."""
        # edited on the Hub, the files would not be those of the manifest any more
        leave_out = (MANIFEST, "validation.jsonl", *EXPORTS)
        return Push(folder, self.repo_id, self.revision, leave_out=leave_out)

    def gguf(self, folder: Path) -> Push:
        """The push of a model's GGUF files to the top level, with the card that names them."""
        return Push(folder / GGUF, self.repo_id, self.revision, leave_out=("*.partial",))

    def checkpoint(self, folder: Path) -> Push | None:
        """The push of a checkpoint; None if the strategy pushes none."""
        if self.strategy == "end":
            return None
        push = Push(folder, self.repo_id, self.checkpoint_branch, leave_out=(CARD,))
        if self.strategy == "every_save":
            push.leave_out = (CARD, *STATE)
        elif self.strategy == "checkpoint":
            push.path_in_repo, push.mirror = "last-checkpoint", True
        else:
            push.path_in_repo = folder.name
        return push


def _target(stage: Stage) -> Target:
    repo_id = repository_id(stage.hub_model_id or stage.folder.absolute().parent.name)
    return Target(repo_id, stage.hub_revision or MAIN, stage.hub_strategy)


def check_push(stage: Stage) -> None:
    """Check before training that the stage can be pushed at its end.

    The repository and its branches are created where missing.

    Args:
        stage: one with `push_to_hub`.

    Raises:
        HfsftError: if there is no token, it has no write access, or a name is invalid.
    """
    try:
        bound_requests()
        target = _target(stage)
        open_repository(target.repo_id, stage.hub_private_repo, target.branches)
    except HfsftError as error:
        raise HfsftError(
            f"{stage.name}.push_to_hub: {error}\n"
            f"  To train without pushing: --{stage.name}.push_to_hub false"
        ) from None


class Pusher:
    """Pushes a stage's checkpoints and model from a background thread; training never waits.

    Errors are not raised: `finish` returns the outcome of every push.
    """

    def __init__(self, stage: Stage, patience: float = PATIENCE):
        """Start the thread.

        Args:
            stage: one that passed `check_push`.
            patience: seconds of pauses between the attempts at one push.
        """
        self.target = _target(stage)
        self.patience = patience
        self.staging = stage.checkpoints / STAGING
        atexit.register(shutil.rmtree, self.staging, ignore_errors=True)  # if the run is stopped
        self.pushes: list[Push] = []  # in order, without superseded ones
        self._waiting: list[Push] = []
        self._closing = False
        self._changed = threading.Condition()
        disable_progress_bars()
        # a daemon thread: a run that is stopped exits without waiting for the Hub
        self._thread = threading.Thread(target=self._work, name="hfsft-push", daemon=True)
        self._thread.start()

    def checkpoint(self, folder: Path) -> None:
        """Queue a checkpoint according to `hub_strategy`; returns immediately.

        Until it is pushed, its files are kept on disk as hard links, which take no extra space.

        Args:
            folder: a complete checkpoint; may be deleted as soon as this returns.
        """
        push = self.target.checkpoint(folder)
        if push is None:
            return
        staged = self.staging / folder.name
        if staged in [known.folder for known in self.pushes]:
            return  # saved twice with the same content
        try:
            shutil.rmtree(staged, ignore_errors=True)  # left behind by a killed run
            shutil.copytree(folder, staged, copy_function=_link)
        except OSError as error:  # or shutil.Error, which is one
            push.problem = f"{folder}: {first_line(error)}"
            self.pushes.append(push)
            return
        push.folder = staged
        with self._changed:
            if self.target.strategy != "all_checkpoints":
                for older in self._waiting:
                    self.pushes.remove(older)
                    shutil.rmtree(older.folder, ignore_errors=True)
                self._waiting.clear()
            self._add(push)

    def model(self, folder: Path) -> None:
        """Queue the finished model; returns immediately.

        Args:
            folder: the stage's, complete.
        """
        with self._changed:
            self._add(self.target.model(folder))

    def _add(self, push: Push) -> None:
        self.pushes.append(push)
        self._waiting.append(push)
        self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                push = self._waiting.pop(0)
            try:
                push.send(self.patience)
            except HfsftError as error:
                push.problem = str(error)
            except Exception as error:  # even a bug: a thread's exception would be lost
                push.problem = without_tokens(f"{type(error).__name__}: {first_line(error)}")
            if push.folder.parent == self.staging:
                shutil.rmtree(push.folder, ignore_errors=True)

    def finish(self, seconds: float = LONGEST_WAIT) -> list[Push]:
        """Wait until every push has succeeded or failed.

        Args:
            seconds: to wait at most.

        Returns:
            Every push, with its `url` or its `problem`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        for push in self.pushes:
            if push.url is None and push.problem is None:
                push.problem = f"{push.folder.name} to {push.repo_id}: not done in {seconds:g} s"
        shutil.rmtree(self.staging, ignore_errors=True)
        return self.pushes


def _link(source: str, target: str) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def report_pushes(pushes: list[Push], folder: Path, say: Callable[[str], None]) -> None:
    """Print the outcome of every push.

    Args:
        pushes: as `Pusher.finish` returns them.
        folder: the stage's.
        say: prints a line.

    Raises:
        HfsftError: if any failed.
    """
    failed = [push for push in pushes if push.problem is not None]
    for push in pushes:
        if push.problem is None:
            say(str(push))
    if failed:
        problems = "\n  ".join(map(str, failed))
        raise HfsftError(
            f"{len(failed)} of {len(pushes)} pushes failed; everything is safe in {folder}\n"
            f"  {problems}\n  To push again: hfsft push {folder}"
        )


def push_run(
    given: str,
    repo: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    gguf: bool = False,
) -> list[Push]:
    """Push a run's last finished stage, a stage, or any model's folder, or resume a push.

    Args:
        given: the folder.
        repo: the repository; None: the recipe's, or else the run's or folder's name.
        revision: the branch; None: the recipe's, or else main.
        private: visibility of a new repository; True refuses an existing public one.
        gguf: also push the GGUF files that `hfsft export` wrote.

    Returns:
        The pushes: the model, its GGUF files, and without `repo` the checkpoints that the recipe
        asks for.

    Raises:
        HfsftError: if there is no finished model, or the push fails.
    """
    folder = finished_model(Path(given))
    verify_model(folder)
    if gguf and not any((folder / GGUF).glob("*.gguf")):
        raise HfsftError(
            f"{folder} holds no GGUF file\n  Write one first: hfsft export {folder} --to gguf"
        )
    record = read_record(folder)
    settings = record["settings"][record["stage"]] if record else {}
    own = folder.absolute().parent.name if record else folder.absolute().name
    bound_requests()
    if not sys.stderr.isatty():
        disable_progress_bars()
    strategy = "end"
    if repo is None and settings.get("push_to_hub"):
        strategy = settings.get("hub_strategy", Stage.hub_strategy)
    target = Target(
        repository_id(repo or settings.get("hub_model_id") or own),
        revision or settings.get("hub_revision") or MAIN,
        strategy,
    )
    private = settings.get("hub_private_repo") if private is None else private
    open_repository(target.repo_id, private, target.branches)
    found = checkpoints(folder / "checkpoints")[::-1]
    found = found if strategy == "all_checkpoints" else found[-1:]
    files = [target.gguf(folder)] if gguf else []
    checkpoint_pushes = filter(None, map(target.checkpoint, found))
    pushes = [target.model(folder), *files, *checkpoint_pushes]
    for push in pushes:
        push.send()
    return pushes


def finished_model(given: Path) -> Path:
    """The model of a folder: a run's last finished stage, or else the given folder itself.

    Raises:
        HfsftError: if it holds none, or its training is not finished.
    """
    for stage in reversed(STAGES):
        record = read_record(given / stage)
        if record is not None and record["status"] == "finished":
            return given / stage
    record = read_record(given)
    if record is not None and record["status"] != "finished":
        raise HfsftError(
            f"{given}: training is not finished\n"
            f"  A checkpoint is a model too: {given}/checkpoints/checkpoint-N"
        )
    if not any((given / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise HfsftError(f"{given}: holds no finished stage and no model")
    return given

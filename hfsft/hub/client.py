"""The Hub: what is there, who may write, and how files get there.

No request of a push stands still for ever, and what may pass is tried again after growing pauses.
"""

import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
    set_client_factory,
)
from huggingface_hub import logging as client_log
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id

from hfsft.errors import DataError, HfsftError, ModelError, first_line

MAIN = "main"  # the branch that readers get


TIMEOUT = 30.0  # seconds in which a request must move on; the client's own bound is none


PATIENCE = (
    300.0  # seconds of pauses between the attempts at one push; the Hub's windows last as long
)


CHECK_PATIENCE = 5.0  # the same, while a user waits for the training to begin


LONGEST_PAUSE = 60.0  # seconds


# what of a folder is for this machine alone: rows that were refused, pickles, hidden files
STAYS = (
    *("checkpoints", "rejected.jsonl", "bad_steps.jsonl", "validation.jsonl", "eval", "wandb"),
    *("training_args.bin", "*.partial", ".*"),
)


RECORDS = ("stage.json", "data.json", "eval.json")  # they name data and models by their paths


USAGE = re.compile(r'(pipeline\("text-generation", model=)"[^"\n]*"')  # in a model card


# what transformers raises for a repository's files that hold something else than they should
NOT_LOADED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError),
    UnpicklingError,
)


# --- what is there ---


def require_on_hub(repo_id: str, repo_type: str, revision: str | None = None) -> None:
    """Return if the Hub, or the cache of an earlier download, has the repository.

    The clients themselves try six times over 24 s and end in a traceback.

    Args:
        repo_id: such as HuggingFaceTB/SmolLM2-135M.
        repo_type: "model" or "dataset".
        revision: a commit, branch or tag.

    Raises:
        ModelError, DataError: if it cannot be reached, is not there, or is closed to this user.
    """
    kind: type[HfsftError] = ModelError if repo_type == "model" else DataError
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=10)
    except (HFValidationError, ValueError):
        raise kind(f"{repo_id} is neither a folder or file here nor a name on the Hub") from None
    except GatedRepoError:
        raise kind(
            f"the {repo_type} {repo_id} is gated: ask for access on its page, then `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise kind(f"the {repo_type} {repo_id} has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise kind(
            f"no {repo_type} {repo_id} here or on the Hub (a private one needs `hf auth login`)"
        ) from None
    except (HTTPError, OSError) as error:
        folder = f"{repo_type}s--{repo_id.replace('/', '--')}"
        if (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir():
            return
        reason = without_tokens(first_line(error))
        raise kind(
            f"cannot reach the Hub for the {repo_type} {repo_id}: {reason}\n"
            "  To try hfsft without the Hub: hfsft run demo"
        ) from None


def require_model(start: str, revision: str | None = None) -> None:
    """Return if `start` is a model's folder, or a model on the Hub.

    Raises:
        ModelError: if it is neither, or cannot be reached.
    """
    path = Path(start)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{start} holds no model (no config.json)")
    elif path.name in ("base", "mid", "sft") and len(path.parts) > 2:
        raise ModelError(
            f"{start} does not exist\n"
            f"  Train it first with `hfsft {path.name} RECIPE`, or start from another model: "
            "--model_name_or_path FOLDER_OR_HUB_ID"
        )
    elif start.startswith((".", "/", "~")):
        raise ModelError(f"{start}: no such folder")
    else:
        require_on_hub(start, "model", revision)


def why_not_loaded(error: BaseException) -> str:
    """What a loader of transformers says, in one line, and what mends it where we know."""
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        return "it needs Python code of its repository; --trust_remote_code runs it"
    return first_line(error)


def dataset_licence(repo_id: str) -> str | None:
    """The licence that a dataset's page states, or None where it cannot be told within 10 s."""
    try:
        card = HfApi().dataset_info(repo_id, timeout=10).card_data
    except (HTTPError, OSError, ValueError):
        return None
    stated = card.get("license") if card else None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else stated


# --- requests that end ---


def bound_requests(seconds: float = TIMEOUT) -> None:
    """Give every request of the Hub's client a time limit, and silence what it says of retries.

    Args:
        seconds: in which a request must connect, send or receive something.

    Raises:
        HfsftError: if the client is told to stay offline.
    """
    if constants.is_offline_mode():
        raise HfsftError("HF_HUB_OFFLINE is set: nothing can be pushed")
    session = get_session()
    client, hooks = type(session), session.event_hooks
    set_client_factory(lambda: client(event_hooks=hooks, follow_redirects=True, timeout=seconds))
    client_log.set_verbosity_error()  # its warnings show signed addresses


def insist(request: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """The answer to a request, which is made again while what went wrong may pass.

    Args:
        request: makes it; done twice it must do no harm.
        patience: seconds of pauses altogether, those that the Hub asks for included.

    Raises:
        Exception: the last attempt's error.
    """
    pause, waited = 1.0, 0.0
    while True:
        try:
            return request()
        except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
            # the client wraps what went wrong with an upload
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            cause = cause or error
            rest = max(pause, _asked_pause(cause))
            if not _may_pass(cause) or waited + rest > patience:
                raise cause from None
        time.sleep(rest)
        waited, pause = waited + rest, min(2 * pause, LONGEST_PAUSE)


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        # 412: somebody else's commit came between
        return status in (408, 412, 429) or (status >= 500 and status != 501)
    # no answer at all; what is no HTTPError is hf_xet's
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, RuntimeError))


def _asked_pause(error: BaseException) -> float:
    """Seconds after which the Hub wants to be asked again; 0: it said nothing."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("Retry-After", "").strip()
    return float(asked) if asked.isdigit() else 0.0


def without_tokens(text: str) -> str:
    """The text with every token of the Hub taken out, this user's and what looks like one."""
    known = {os.environ.get("HF_TOKEN", "").strip(), get_token()}
    for token in filter(None, known):
        text = text.replace(token, "(token)")
    return re.sub(r"hf_[A-Za-z0-9]{20,}", "(token)", text)


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Say what the Hub's client raises in one or two lines, without a token.

    Args:
        what: is being done, such as "push runs/fast/sft to me/fast".
    """
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or error.response.reason_phrase).splitlines()
        words = without_tokens(f"cannot {what}: {status} {said[0] if said else ''}".strip())
        if status == 401:
            words += "\n  This token is none: run `hf auth login`, or mend HF_TOKEN"
        elif status == 403:
            words += "\n  It takes a token that may write: https://huggingface.co/settings/tokens"
        raise HfsftError(words) from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HfsftError(without_tokens(f"cannot {what}: {first_line(error)}")) from None


# --- files that get there ---


def repository_id(name: str) -> str:
    """A model repository's whole name: `fast` is me/fast where the token is me's.

    Raises:
        HfsftError: if there is no token, the Hub does not know it, or the name is impossible.
    """
    token = get_token()
    if token is None:
        raise HfsftError("a push needs a token: run `hf auth login`, or set HF_TOKEN")
    if not (token.isascii() and token.isprintable()):  # the client would show it in its error
        raise HfsftError("the token holds a character that none has: run `hf auth login` again")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise HfsftError(
            f"{name!r} cannot be a repository's name: at most 96 letters, digits, '-', '_' and "
            "'.'; hub_model_id gives another"
        ) from None
    return name if "/" in name else f"{_user(token)}/{name}"


@cache
def _user(token: str) -> str:
    with _asking("ask the Hub whose token this is"):
        return insist(HfApi(token=token).whoami, CHECK_PATIENCE)["name"]


def open_repository(repo_id: str, private: bool | None, branches: list[str]) -> None:
    """Make sure that this user may write to a model repository; make it where there is none.

    Args:
        repo_id: as `repository_id` gives it.
        private: of a new repository, None: as its owner's are; True refuses one that is public.
        branches: are made where they are missing.

    Raises:
        HfsftError: if that cannot be had.
    """
    api = HfApi(token=True)
    with _asking(f"write to {repo_id} on the Hub"):
        try:
            insist(partial(api.auth_check, repo_id, write=True), CHECK_PATIENCE)
        except RepositoryNotFoundError:
            make = partial(api.create_repo, repo_id, private=private, exist_ok=True)
            insist(make, CHECK_PATIENCE)
        if private and not insist(partial(api.model_info, repo_id), CHECK_PATIENCE).private:
            raise HfsftError(f"{repo_id} is public on the Hub, and a private one is wanted")
        refs = insist(partial(api.list_repo_refs, repo_id), CHECK_PATIENCE)
        for branch in branches:
            if branch in [tag.name for tag in refs.tags]:
                raise HfsftError(f"{branch} is a tag of {repo_id}, and a push needs a branch")
            if branch not in [head.name for head in refs.branches]:
                make = partial(api.create_branch, repo_id, branch=branch, exist_ok=True)
                insist(make, CHECK_PATIENCE)


def push_folder(
    folder: Path,
    repo_id: str,
    revision: str = MAIN,
    path_in_repo: str = "",
    leave_out: tuple[str, ...] = (),
    mirror: bool = False,
    patience: float = PATIENCE,
) -> str:
    """Send a folder's files in one commit; those that are there already are not sent again.

    Args:
        folder: of a model or a checkpoint; what `STAYS` names is not sent.
        repo_id: a model repository.
        revision: a branch of it.
        path_in_repo: the folder there, "" for the top.
        leave_out: patterns of further names that stay here.
        mirror: whether files that are in that folder there, and not here, are deleted.
        patience: as `insist` takes it.

    Returns:
        The commit's address.

    Raises:
        HfsftError: if it cannot be done.
    """
    api = HfApi(token=True)
    prefix = f"{path_in_repo}/" if path_in_repo else ""

    def send() -> str:
        # made anew each time: they remember what the Hub had, and a lost answer may be a commit
        additions = _additions(folder, prefix, repo_id, leave_out)
        gone = _others(api, repo_id, revision, path_in_repo, additions) if mirror else []
        for addition in additions:
            # several at once are sent by threads that would keep the process from ending
            api.preupload_lfs_files(repo_id, [addition], revision=revision)
        message = f"{folder.name}, trained with hfsft"
        done = api.create_commit(
            repo_id, [*additions, *gone], commit_message=message, revision=revision
        )
        return str(done.commit_url)

    with _asking(f"push {folder} to {repo_id}"):
        return insist(send, patience)


def _additions(
    folder: Path, prefix: str, repo_id: str, leave_out: tuple[str, ...]
) -> list[CommitOperationAdd]:
    additions = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        stays = any(fnmatchcase(part, what) for part in name.parts for what in (*STAYS, *leave_out))
        if stays or not path.is_file():
            continue
        content: Path | bytes = path
        if prefix + name.as_posix() == "README.md":  # the card's example names the repository
            text = path.read_text(encoding="utf-8")
            content = USAGE.sub(rf'\1"{repo_id}"', text).encode()
        if prefix + name.as_posix() in RECORDS:
            held = without_paths(json.loads(path.read_text(encoding="utf-8")))
            content = (json.dumps(held, indent=1) + "\n").encode()
        additions.append(CommitOperationAdd(prefix + name.as_posix(), content))
    if not additions:
        raise HfsftError(f"{folder} holds nothing to push")
    return additions


def without_paths(held: Any) -> Any:
    """Plain data with each path of this machine cut to its last part."""
    if isinstance(held, dict):
        return {
            key: shlex.join(map(without_paths, shlex.split(value)))
            if key == "command"
            else without_paths(value)
            for key, value in held.items()
        }
    if isinstance(held, list):
        return [without_paths(value) for value in held]
    is_path = isinstance(held, str) and held.startswith(("/", "~")) and "\n" not in held
    return Path(held).name or held if is_path else held


def _others(
    api: HfApi,
    repo_id: str,
    revision: str,
    path_in_repo: str,
    additions: list[CommitOperationAdd],
) -> list[CommitOperationDelete]:
    """The deletions of what a folder of the repository holds beside these files."""
    kept = {addition.path_in_repo for addition in additions}
    try:
        there = list(
            api.list_repo_tree(repo_id, path_in_repo or None, recursive=True, revision=revision)
        )
    except EntryNotFoundError:  # no such folder yet
        return []
    return [
        CommitOperationDelete(entry.path)
        for entry in there
        if isinstance(entry, RepoFile) and entry.path not in kept
    ]

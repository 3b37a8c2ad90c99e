"""The Hub: which models and datasets exist, who may write, and how files are uploaded."""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from hfsft.errors import DataError, HfsftError, ModelError, first_line, quoted
from hfsft.hub.bounds import (
    CHECK_PATIENCE,
    PATIENCE,
    UNEXPECTED,
    EndlessAnswer,
    bound_answers,
    in_words,
    insist,
    without_tokens,
)
from hfsft.run.files import read_small
from hfsft.run.manifest import MANIFEST, verify_model

MAIN = "main"  # the branch that readers get


# never uploaded: rejected rows, pickles, hidden files, and what only this machine needs
STAYS = (
    *("checkpoints", "rejected.jsonl", "bad_steps.jsonl", "eval", "wandb"),
    *("training_args.bin", "*.partial", ".*"),
)


RECORDS = ("stage.json", "data.json", "eval.json")  # contain local paths of data and models


USAGE = re.compile(r'(pipeline\("text-generation", model=)"[^"\n]*"')  # in a model card


# what transformers raises for malformed files of a repository
NOT_LOADED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RecursionError),
    *(ArithmeticError, AssertionError, UnpicklingError, StrictDataclassError),
)


# of a config.json: sizes that are whole numbers above 0, and bounds on what is built so many times
SIZES = (
    *("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "head_dim"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("n_embd", "n_layer", "n_head", "n_positions"),
)
MOST_LAYERS = 1000
MOST = 10_000  # heads, experts, labels


# --- what exists ---


def require_on_hub(repo_id: str, repo_type: str, revision: str | None = None) -> None:
    """Check that a repository exists on the Hub, or in the cache of an earlier download.

    The libraries themselves would retry for 24 s and end in a traceback.

    Args:
        repo_id: such as HuggingFaceTB/SmolLM2-135M.
        repo_type: "model" or "dataset".
        revision: a commit, branch or tag.

    Raises:
        ModelError, DataError: if it is unreachable, does not exist, or this user has no access.
    """
    kind: type[HfsftError] = ModelError if repo_type == "model" else DataError
    bound_answers()
    try:
        validate_repo_id(repo_id)
        HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=10)
    except UNEXPECTED as error:
        raise kind(
            f"cannot find the {repo_type} {repo_id}: the Hub's answer is not as expected "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    except (HFValidationError, ValueError):
        raise kind(f"{repo_id} is neither a local path nor a valid name on the Hub") from None
    except EndlessAnswer as error:
        raise kind(f"cannot find the {repo_type} {repo_id}: {error}") from None
    except GatedRepoError:
        raise kind(
            f"the {repo_type} {repo_id} is gated: request access on its page, then `hf auth login`"
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
    """Check that `start` is a model's folder, or a model on the Hub.

    Raises:
        ModelError: if it is neither, or the Hub is unreachable.
    """
    path = Path(start)
    if path.is_dir():
        if not (path / "config.json").is_file():
            stages = [path / name for name in ("sft", "mid", "base")]
            trained = next((stage for stage in stages if (stage / "config.json").is_file()), None)
            hint = f"; did you mean {trained}?" if trained else ""
            raise ModelError(f"{start} holds no model (no config.json){hint}")
        verify_model(path)
        _require_sizes(start, path / "config.json")
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
        with suppress(HTTPError, OSError, ValueError):  # reported where the model is loaded
            _require_sizes(start, Path(hf_hub_download(start, "config.json", revision=revision)))


def _require_sizes(start: str, path: Path) -> None:
    """Check the sizes in a config.json, before something is built of them for minutes.

    Raises:
        ModelError: naming the first key with an impossible value.
    """
    try:
        config = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"{start}: its config.json is not a JSON object")
    inner = [held for held in config.values() if isinstance(held, dict)]  # such as text_config
    for key, value in (item for part in (config, *inner) for item in part.items()):
        is_count = type(value) is int and value > 0
        if key in SIZES and not (is_count or value is None or isinstance(value, list)):
            raise ModelError(
                f"{start}: config.json: {key} is {quoted(str(value))}, no whole number above 0"
            )
        most = MOST_LAYERS if "layer" in key else MOST
        if is_count and value > most and key.startswith(("num_", "n_layer", "n_head")):
            raise ModelError(f"{start}: config.json: {key} is {value:,}, above {most:,}")


def why_not_loaded(error: BaseException) -> str:
    """An error of a transformers loader in one line, with the fix where it is known."""
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        return "it needs Python code of its repository; pass --trust_remote_code to run it"
    if isinstance(error, StrictDataclassError):  # its first line names the key alone
        return f"config.json: {' '.join(str(error).split())}"
    return first_line(error)


def dataset_licence(repo_id: str) -> str | None:
    """The licence stated on a dataset's page; None if unknown, or without an answer in 10 s."""
    try:
        card = HfApi().dataset_info(repo_id, timeout=10).card_data
    except (HTTPError, OSError, ValueError, EndlessAnswer, *UNEXPECTED):
        return None
    stated = card.get("license") if card else None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else stated


@contextmanager
def _reporting(action: str) -> Iterator[None]:
    """Turn an error of the Hub's client into one or two lines that contain no token.

    Args:
        action: for the message, such as "push runs/fast/sft to me/fast".
    """
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        message = without_tokens(f"cannot {action}: {in_words(error)}")
        if status == 401:
            message += "\n  The Hub rejected this token: run `hf auth login` or fix HF_TOKEN"
        elif status == 403:
            message += "\n  It needs a token with write access: "
            message += "https://huggingface.co/settings/tokens"
        raise HfsftError(message) from None
    except UNEXPECTED as error:
        raise HfsftError(
            without_tokens(
                f"cannot {action}: the Hub's answer is not as expected "
                f"({type(error).__name__}: {first_line(error)})"
            )
        ) from None
    except EndlessAnswer as error:
        raise HfsftError(f"cannot {action}: {error}") from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HfsftError(without_tokens(f"cannot {action}: {first_line(error)}")) from None


# --- uploads ---


def repository_id(name: str) -> str:
    """A model repository's full name: `fast` is me/fast if the token belongs to me.

    Raises:
        HfsftError: if there is no token, the Hub rejects it, or the name is invalid.
    """
    token = get_token()
    if token is None:
        raise HfsftError("a push needs a token: run `hf auth login`, or set HF_TOKEN")
    if not (token.isascii() and token.isprintable()):  # the client's error would print it
        raise HfsftError("the token contains an invalid character: run `hf auth login` again")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise HfsftError(
            f"{name!r} is not a valid repository name: use at most 96 letters, digits, '-', '_' "
            "and '.'; set hub_model_id"
        ) from None
    return name if "/" in name else f"{_user(token)}/{name}"


@cache
def _user(token: str) -> str:
    with _reporting("ask the Hub whose token this is"):
        name = insist(HfApi(token=token).whoami, CHECK_PATIENCE)["name"]
        validate_repo_id(f"{name}/x")  # else it is no name
        return name


def open_repository(repo_id: str, private: bool | None, branches: list[str]) -> None:
    """Check that this user may write to a model repository, creating it if necessary.

    Args:
        repo_id: as `repository_id` returns it.
        private: visibility of a new repository; None: the owner's default; True refuses an
            existing public one.
        branches: created where missing.

    Raises:
        HfsftError: if the repository or a branch cannot be created or written.
    """
    api = HfApi(token=True)
    with _reporting(f"write to {repo_id} on the Hub"):
        try:
            insist(partial(api.auth_check, repo_id, write=True), CHECK_PATIENCE)
        except RepositoryNotFoundError:
            make = partial(api.create_repo, repo_id, private=private, exist_ok=True)
            insist(make, CHECK_PATIENCE)
        if private and not insist(partial(api.model_info, repo_id), CHECK_PATIENCE).private:
            raise HfsftError(f"{repo_id} is public on the Hub, but a private one was requested")
        refs = insist(partial(api.list_repo_refs, repo_id), CHECK_PATIENCE)
        for branch in branches:
            if branch in [tag.name for tag in refs.tags]:
                raise HfsftError(f"{branch} is a tag of {repo_id}, but a push needs a branch")
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
    """Upload a folder's files in one commit; files that the Hub already has are not sent again.

    Args:
        folder: a model's or checkpoint's; names matching `STAYS` are not uploaded.
        repo_id: a model repository.
        revision: one of its branches.
        path_in_repo: the target folder, "" for the top level.
        leave_out: patterns of further names not to upload.
        mirror: whether to delete files of the target folder that do not exist locally.
        patience: as for `insist`.

    Returns:
        The commit's URL.

    Raises:
        HfsftError: if the upload fails.
    """
    api = HfApi(token=True)
    prefix = f"{path_in_repo}/" if path_in_repo else ""

    def send() -> str:
        # rebuilt for every attempt: operations cache what the Hub has, and an attempt whose
        # response was lost may have committed
        additions = _additions(folder, prefix, repo_id, leave_out)
        deletions = _others(api, repo_id, revision, path_in_repo, additions) if mirror else []
        for addition in additions:
            # several at once would use threads that keep the process from exiting
            api.preupload_lfs_files(repo_id, [addition], revision=revision)
        message = f"{folder.name}, trained with hfsft"
        done = api.create_commit(
            repo_id, [*additions, *deletions], commit_message=message, revision=revision
        )
        return str(done.commit_url)

    with _reporting(f"push {folder} to {repo_id}"):
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
        if prefix + name.as_posix() == "README.md":  # the card's example then loads the repository
            text = path.read_text(encoding="utf-8")
            content = USAGE.sub(rf'\1"{repo_id}"', text).encode()
        if prefix + name.as_posix() in RECORDS or name.name == MANIFEST:
            record = without_paths(json.loads(path.read_text(encoding="utf-8")))
            content = (json.dumps(record, indent=1) + "\n").encode()
        additions.append(CommitOperationAdd(prefix + name.as_posix(), content))
    if not additions:
        raise HfsftError(f"{folder} holds nothing to push")
    return additions


def without_paths(held: Any) -> Any:
    """JSON data with every absolute path shortened to its last component."""
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
    """Deletions of the other files in a folder of the repository."""
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

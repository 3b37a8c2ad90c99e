"""Where a model or dataset is: a folder here, or the Hub, asked before a stage spends any time."""

from pathlib import Path

from hfsft.errors import DataError, HfsftError, ModelError, first_line


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
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # of whichever client huggingface_hub uses: httpx2 since 2.4
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

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
        reason = first_line(error)
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

"""Agreement of all ranks before they train, and what machines without a shared folder receive.

Where the machines do not share the run's folder, machine 0 alone keeps checkpoints and results. The
others prepare the same data and tokenizer themselves, and receive from it what they cannot make:
the checkpoint that a run resumes from, and the model of an earlier stage that this one starts from.
To refuse would mean that no run of several stages, and no interrupted one, could ever continue
there.
"""

import hashlib
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hfsft.errors import RecipeError
from hfsft.process_group import (
    copy_from_main,
    from_main,
    gathered,
    is_first_of_machine,
    is_shared,
    machines,
    meet,
    place,
)
from hfsft.recipe.key import STAGES
from hfsft.recipe.schema import Recipe, Stage
from hfsft.run.manifest import MANIFEST, read_manifest

LIBRARIES = ("hfsft", "torch", "transformers", "trl", "accelerate", "peft", "datasets")
RECEIVED = "received"  # a folder of checkpoints, and a file that marks a copied model


# --- agreement ---


def agree(stage: Stage, facts: dict[str, Any], fix: str) -> None:
    """Compare facts over all ranks; every rank calls it.

    Args:
        stage: about to train.
        facts: name → this rank's value.
        fix: what to do about a difference.

    Raises:
        RecipeError: on every rank, if a rank differs from rank 0; it names both machines.
    """
    everyone = gathered((place(), facts))
    first_place, first = everyone[0]
    for other_place, other in everyone[1:]:
        for name in sorted(first.keys() | other.keys()):
            here, there = first.get(name), other.get(name)
            if here != there:
                raise RecipeError(
                    f"{stage.name}: {name} differs: {_shown(here)} for {first_place}, "
                    f"{_shown(there)} for {other_place}\n  {fix}"
                )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def agree_on_run(recipe: Recipe, stage: Stage) -> None:
    """Compare what every rank was started with: stage, versions and recipe.

    Raises:
        RecipeError: as `agree`.
    """
    versions = {f"the version of {name}": version(name) for name in LIBRARIES}
    versions["the version of Python"] = sys.version.split()[0]
    agree(stage, {"the stage": stage.name}, "Give the same command on every machine")
    agree(stage, versions, "Install the same on every machine")
    # a later stage may name a model that this machine alone has
    keys = {key: value for key, value in recipe.resolved.items() if key not in STAGES}
    keys[stage.name] = recipe.resolved[stage.name]
    agree(stage, dict(_flat(keys)), "Give the same recipe and flags on every machine")


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@torch.no_grad()
def weights_digest(model: Any) -> str:
    """A digest of a model's weights; sums of their bits, as hashing takes a second per gigabyte."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta" and weight.numel():
            plain = weight.detach().contiguous().view(-1)
            bits = plain.view(torch.uint8) if plain.element_size() % 4 else plain.view(torch.int32)
            digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
    return digest.hexdigest()


# --- machines without a shared folder ---


def receive_start(recipe: Recipe, stage: Stage) -> None:
    """Give every machine the model of the run's earlier stage that this one starts from.

    Raises:
        RecipeError: if a machine has another model there that hfsft did not copy.
    """
    start = Path(stage.model_name_or_path or "")
    if machines() == 1 or start.parent != recipe.folder or is_shared(recipe.folder):
        return
    wanted = from_main(lambda: _file_digests(start))
    own, copied = _file_digests(start), (start / RECEIVED).is_file()
    differs = bool(own) and own != wanted
    foreign = [where for where in gathered(place() if differs and not copied else None) if where]
    if foreign:
        raise RecipeError(
            f"{stage.name}: {start} is another model for {foreign[0]} than for rank 0\n"
            "  Rename it there, and the one of machine 0 is copied"
        )
    if not any(gathered(own != wanted)):
        return
    partial = start.with_name(f"{start.name}.{RECEIVED}")
    copy_from_main(start, sorted(wanted), partial)
    if is_first_of_machine() and partial.is_dir():
        (partial / RECEIVED).touch()
        if copied:
            shutil.rmtree(start)
        if start.exists():  # the same already
            shutil.rmtree(partial)
        else:
            partial.rename(start)
    meet("receives the model")


def _file_digests(folder: Path) -> dict[str, str]:
    """The digest of each file that a model's folder holds itself."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and path.name != RECEIVED:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def receive_checkpoint(stage: Stage, checkpoint: Path) -> Path:
    """The checkpoint as this machine sees it, after a copy where it does not see rank 0's.

    Args:
        stage: whose.
        checkpoint: verified on rank 0.

    Raises:
        RecipeError: if machines that share the folder see different checkpoints.
    """
    if machines() == 1:
        return checkpoint
    if is_shared(stage.checkpoints):
        seen = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        agree(stage, {str(checkpoint): seen}, "The folder is not the same on every machine")
        return checkpoint
    names = from_main(lambda: [*read_manifest(checkpoint)["files"], MANIFEST])
    folder = stage.checkpoints / RECEIVED
    if is_first_of_machine():
        shutil.rmtree(folder, ignore_errors=True)
    meet("clears its copy")
    copy_from_main(checkpoint, names, folder / checkpoint.name)
    copies = (folder / checkpoint.name / MANIFEST).is_file()
    return folder / checkpoint.name if copies else checkpoint

"""What hfsft uses of its libraries that is not public API: listed once, and still there."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from transformers import Trainer
from trl import SFTTrainer

from hfsft.train.trainer import PRIVATE_API

PACKAGE = Path(__file__).parents[2] / "hfsft"
TRAIN = PACKAGE / "train"
LISTED = [(owner, name) for owner, names in PRIVATE_API.items() for name in names]


@pytest.mark.parametrize(("owner", "name"), LISTED, ids=[f"{o}.{n}" for o, n in LISTED])
def test_upstream_still_has(owner, name):
    """It is an attribute, or one that the class or its configuration sets on itself."""
    module, _, cls = owner.rpartition(".")
    try:
        holder = getattr(importlib.import_module(module), cls)
    except AttributeError:
        holder = importlib.import_module(owner)
    if not hasattr(holder, name):
        # httpx2 gives its classes another module's name, in which getsource does not find them
        of = holder.__init__ if owner.startswith(("httpx2.", "httpcore2.")) else holder
        assert re.search(rf"self\.{name}\b.* = ", inspect.getsource(of))


def upstream_names() -> set[str]:
    """Every private name that Trainer and SFTTrainer define as a method or set on themselves."""
    found = set()
    for cls in (*SFTTrainer.__mro__, *Trainer.__mro__):
        if cls is object:
            continue
        found |= {name for name in vars(cls) if name.startswith("_") and name[1] != "_"}
        for node in ast.walk(ast.parse(inspect.getsource(cls).lstrip())):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and node.attr.startswith("_")
            ):
                found.add(node.attr)
    return found


def test_the_list_names_all_that_the_trainers_use():
    """A private name of Trainer or SFTTrainer that train/ calls, sets or overrides is listed."""
    upstream, used = upstream_names(), set()
    for path in TRAIN.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in upstream:
                used.add(node.attr)
            elif isinstance(node, ast.FunctionDef) and node.name in upstream:
                used.add(node.name)
    listed = {name for _, name in LISTED}
    assert "_save_checkpoint" in used  # the search finds what is there
    assert used - listed == set()


def test_the_list_names_all_that_the_package_uses():
    """A private name of anything but self that hfsft does not define, or a private module's."""
    ours, used = {"_exit"}, set()  # os._exit is documented
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                ours.add(node.name)
            elif isinstance(node, ast.ImportFrom) and "._" in (node.module or ""):
                used |= {name.name for name in node.names}
            elif isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
                if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                    used.add(node.attr)
                elif isinstance(node.ctx, ast.Store):
                    ours.add(node.attr)
    listed = {name for _, name in LISTED}
    assert {"_pool", "TorchDynamoException"} <= used  # the search finds what is there
    assert used - ours - listed == set()


def test_upstream_leaves_our_own_names_alone():
    """No method or attribute that hfsft adds has a name that a trainer class uses too."""
    from hfsft.train.trainer import SFTStageTrainer
    from hfsft.train.validating import ValidatingStep

    theirs = {name for cls in SFTTrainer.__mro__ if cls is not object for name in vars(cls)}
    public = {"training_step", "compute_loss", "log", "evaluate", "evaluation_loop"}
    public |= {"get_train_dataloader", "get_eval_dataloader", "create_model_card"}
    ours = {
        name
        for cls in (SFTStageTrainer, *ValidatingStep.__mro__)
        if cls.__module__.startswith("hfsft")
        for name in vars(cls)
        if not name.startswith("__")
    }
    overridden = ours & (theirs | upstream_names())
    assert overridden - public == overridden & {name for _, name in LISTED}

"""EleutherAI's lm-eval, run with a model that is already loaded."""

import contextlib
import io
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from hfsft.errors import HfsftError, first_line
from hfsft.evaluation.answering import Evaluator

INSTALL = "needs its package: pip install 'hfsft[eval]'"


def lm_eval_version() -> str:
    """The version of the installed lm-eval.

    Raises:
        HfsftError: if it is not installed.
    """
    try:
        return version("lm_eval")
    except ImportError:
        raise HfsftError(f"lm_eval {INSTALL}") from None


def ask_lm_eval(
    evaluator: Evaluator, name: str, rows: int | None, seed: int
) -> list[dict[str, Any]]:
    """Have lm-eval run one of its tasks or groups, as configured there.

    Args:
        evaluator: the model; a chat model is prompted through its chat template.
        name: a task, a group, or the YAML file of a task.
        rows: use the first this many rows of each task; None: all.
        seed: for the few-shot examples of tasks that have some.

    Returns:
        For each row `row`, `right`, `answer`, `expected`, `question`, `metrics`, and `choices`, the
        number of choices (0 for a generated answer). `metrics` are the task's, such as `acc` and
        `acc_norm`, as far as they are numbers; `right` is the first one, under the first filter.

    Raises:
        HfsftError: if lm-eval lacks the task or its data, or the first metric is not 0 or 1.
    """
    lm_eval_version()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = Path(name).suffix in (".yaml", ".yml")
    try:
        task = yaml.safe_load(Path(name).read_text())["task"] if own else name
        with (
            contextlib.redirect_stderr(io.StringIO()),  # its bars
            # it asks git, whose "fatal: not a git repository" would reach the terminal
            patch("lm_eval.evaluator.get_git_commit_hash", str),
        ):
            found = simple_evaluate(
                model=HFLM(
                    pretrained=evaluator.model,
                    tokenizer=evaluator.tokenizer,
                    batch_size=evaluator.batch_size,
                ),
                tasks=[task],
                limit=rows,
                apply_chat_template=evaluator.is_chat,
                task_manager=TaskManager(include_path=str(Path(name).parent) if own else None),
                log_samples=True,
                bootstrap_iters=0,  # hfsft computes its own interval
                random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:  # a task's code and data can raise anything
        raise HfsftError(f"lm_eval:{name}: {first_line(error)}") from None
    return [
        _row(f"lm_eval:{name}", task, sample)
        for task, samples in found["samples"].items()
        for sample in samples
        if sample["filter"] == samples[0]["filter"]
    ]


def _row(name: str, task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """One of lm-eval's samples as a result."""
    metric = sample["metrics"][0]
    metrics = {key: sample[key] for key in sample["metrics"]}
    value = metrics[metric]
    if not isinstance(value, int | float) or value not in (0, 1):
        raise HfsftError(f"{name}: its first metric, {metric}, is neither 0 nor 1")
    # a multiple-choice sample has one response with a log-likelihood per choice
    is_choice = isinstance(sample["filtered_resps"][0], tuple | list)
    return {
        "row": f"{task}:{sample['doc_hash'][:24]}",
        "right": bool(value),
        "metrics": {key: kept for key, kept in metrics.items() if isinstance(kept, int | float)},
        "answer": "" if is_choice else str(sample["filtered_resps"][0]),
        "expected": str(sample["target"]),
        "question": str(sample["arguments"][0][0]),
        "choices": len(sample["filtered_resps"]) if is_choice else 0,
    }

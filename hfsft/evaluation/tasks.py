"""The tasks of `hfsft eval`: where rows come from, their prompts, and which answers are right.

ARC, MMLU, GSM8K and HumanEval follow karpathy/nanochat's chat_eval.py, so that the figures are
comparable: a choice is the letter with the highest logit at the position of the answer; other
answers are generated with top-1 decoding and the calculator, and graded by nanochat's rule as well
as by ours. Any task of EleutherAI's lm-eval is run by lm-eval itself, as `lm_eval:NAME`.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfsft.data.mixture import mix_conversations
from hfsft.data.sources import load_rows, parse_row
from hfsft.data.tasks import grade, pool_size, task_rows
from hfsft.data.text import mix_text
from hfsft.errors import DataError, HfsftError, nearest
from hfsft.evaluation.calling import calling_rows, calls_are_right
from hfsft.evaluation.execution import passes, sandbox
from hfsft.evaluation.grading import final_number, nanochat_number, nanochat_program, program
from hfsft.recipe.loading import load_recipe
from hfsft.recipe.schema import Recipe, Source, Stage
from hfsft.run.record import read_record
from hfsft.tokens.row_formats import BadRow, from_gsm8k, read_row
from hfsft.tokens.tokenizer import load_tokenizer

# task → its rows on the Hub
ON_HUB = {
    "arc_easy": Source("allenai/ai2_arc", name="ARC-Easy", split="test"),
    "arc_challenge": Source("allenai/ai2_arc", name="ARC-Challenge", split="test"),
    "mmlu": Source("cais/mmlu", name="all", split="test"),
    "gsm8k": Source("openai/gsm8k", name="main", split="test"),
    "humaneval": Source("openai/openai_humaneval", split="test"),
}


# tasks whose answer is one of several letters
CATEGORICAL = ("arc_easy", "arc_challenge", "mmlu")

# hfsft's built-in tasks → new tokens of an answer
GENERATED = {"simple_spelling": 96, "spelling_bee": 256, "arithmetic": 96}

# nanochat's chat tasks → chance in its ChatCORE (scripts/chat_eval.py at 92d63d4, July 2026)
CHAT_TASKS = {"arc_easy": 0.25, "arc_challenge": 0.25, "mmlu": 0.25, "gsm8k": 0.0, "humaneval": 0.0}

HELD_OUT, CALLING = "held_out", "tool_calls"

GYM, LM_EVAL = "reasoning_gym:", "lm_eval:"

NAMES = (*ON_HUB, *GENERATED, CALLING, HELD_OUT)

ANSWER_TOKENS = 512  # of an answer with reasoning or code, as in nanochat

GENERATED_ROWS = 100  # of a generated task by default

GYM_DRAWS = 10  # at most, for each row

GYM_SEED = 10_000_000  # far from the seeds of training rows

# where a model that is not a chat model starts something new after a function (Chen et al. 2021,
# Evaluating Large Language Models Trained on Code)
CODE_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

QUESTION_STOP = ("\nQuestion:",)


@dataclass(frozen=True)
class Question:
    """One row of a task."""

    prompt: str  # the user's message
    answer: str  # the reference answer; a letter if there are choices
    choices: tuple[str, ...] = ()  # the letters to choose from
    is_right: Callable[[str], bool] | None = None  # grades a generated answer
    nanochat_is_right: Callable[[str], bool] | None = None  # by nanochat's rule, where it differs
    plain: str | None = None  # prompt of a model that is not a chat model, if not Question: ...
    tools: tuple[dict[str, Any], ...] = ()  # that the model may call, in OpenAI's form

    @property
    def digest(self) -> str:
        """Equal for rows with the same content."""
        given = [self.tools] if self.tools else []
        text = json.dumps([self.prompt, self.answer, self.choices, *given])
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Task:
    """A task and its rows."""

    name: str
    kind: str  # categorical, generative or loss
    questions: list[Question]
    documents: list[dict[str, list[int]]] = dataclasses.field(default_factory=list)  # kind loss
    max_new_tokens: int = 0
    pool: int | None = None  # different words or pairs that the rows were drawn from
    plain_stop: tuple[str, ...] = QUESTION_STOP  # ends answers of a model that is not a chat model


def check_names(names: list[str], allow_code: bool) -> None:
    """Check that every name is a task that may be run.

    Raises:
        HfsftError: naming the first one that is not.
    """
    for name in names:
        if name.startswith((GYM, LM_EVAL)):
            continue
        if name not in NAMES:
            others = f"{GYM}NAME and {LM_EVAL}NAME"
            hint = nearest(name, NAMES) or f"; known tasks: {', '.join(NAMES)}, {others}"
            raise HfsftError(f"no task {name}{hint}")
        if name == "humaneval" and not allow_code:
            raise HfsftError(
                f"humaneval runs programs that the model writes, here in {sandbox()}; "
                "pass --allow_code to allow it"
            )


def default_tasks(model: str, allow_code: bool) -> list[str]:
    """The default tasks: those that need no network for a run's stage, else nanochat's chat tasks.

    Args:
        model: a folder or a Hub id.
        allow_code: whether humaneval is among them.
    """
    stage_of_run = _stage_of(model)
    if stage_of_run is not None:
        return [HELD_OUT, *GENERATED] if stage_of_run[1].validates else list(GENERATED)
    return [name for name in CHAT_TASKS if name != "humaneval" or allow_code]


def load_task(
    name: str, model: str, rows: int | None = None, seed: int = 0, data: str | None = None
) -> Task:
    """Load a task's rows; `lm_eval:` tasks are loaded by lm-eval.

    Args:
        name: one that `check_names` accepts.
        model: its folder, for the run's held-out rows.
        rows: a seeded sample of this many; None: all, or 100 of a generated task.
        seed: of the sample, or of the generator.
        data: a file or Hub id with rows of the same schema, instead of the task's own.

    Raises:
        DataError: if the rows cannot be loaded, or one does not have the task's schema.
    """
    if data is not None and name not in ON_HUB:
        raise DataError(f"{name} takes no data; tasks that do: {', '.join(ON_HUB)}")
    if name == HELD_OUT:
        return _held_out(model, rows, seed)
    if name in GENERATED:
        try:
            made = task_rows(name, rows or GENERATED_ROWS, split="test", seed=seed)
        except ValueError as error:
            raise DataError(f"{name}: {error}; pass a smaller --rows") from None
        questions = [_generated(name, row) for row in made]
        pool = pool_size(name, "test")
        return Task(name, "generative", questions, max_new_tokens=GENERATED[name], pool=pool)
    if name == CALLING:
        made = [_calling(row) for row in calling_rows(rows or GENERATED_ROWS, seed)]
        return Task(name, "generative", made, max_new_tokens=ANSWER_TOKENS)
    if name.startswith(GYM):
        questions = _gym(name.removeprefix(GYM), rows or GENERATED_ROWS, seed)
        return Task(name, "generative", questions, max_new_tokens=ANSWER_TOKENS)
    source = Source(data) if data is not None else ON_HUB[name]
    questions = _read_questions(name, dataclasses.replace(source, rows=rows), seed)
    kind = "categorical" if name in CATEGORICAL else "generative"
    stop = CODE_STOP if name == "humaneval" else QUESTION_STOP
    return Task(name, kind, questions, max_new_tokens=ANSWER_TOKENS, plain_stop=stop)


def _read_questions(name: str, source: Source, seed: int) -> list[Question]:
    """The rows of a source as the questions of one of the tasks in `ON_HUB`."""
    read = _human_eval if name == "humaneval" else _gsm8k if name == "gsm8k" else _choices
    questions = []
    for number, row in enumerate(load_rows(source, seed)):
        try:
            questions.append(read(parse_row(row, source)))
        except (BadRow, KeyError, TypeError) as error:
            reason = error if isinstance(error, BadRow) else f"not a row of {name}"
            raise DataError(f"{source}: row {row.get('hfsft_row', number)}: {reason}") from None
    return questions


# --- choices ---


def _choices(row: dict[str, Any]) -> Question:
    """A row of ARC or MMLU, worded as in training (`row_formats.read_row`)."""
    question, answer = read_row(row, "multiple_choice").messages
    choices = row["choices"]
    if isinstance(choices, dict):
        letters = [str(label) for label in choices["label"]]
    else:
        letters = [chr(ord("A") + index) for index in range(len(choices))]
    return Question(question["content"], answer["content"], tuple(letters))


# --- numbers ---


def _gsm8k(row: dict[str, Any]) -> Question:
    from_gsm8k(row)  # raises BadRow
    number = final_number(row["answer"])
    if number is None:
        raise BadRow("an answer without a number")
    # nanochat reads the reference from what follows the last calculator call
    reference = nanochat_number(re.split("<<[^>]+>>", row["answer"])[-1])
    return Question(
        row["question"],
        str(number),
        is_right=lambda text: final_number(text) == number,
        nanochat_is_right=lambda text: nanochat_number(text) == reference,
    )


def _generated(name: str, row: dict[str, Any]) -> Question:
    """A row of one of hfsft's built-in tasks."""
    question, answer = row["messages"]
    return Question(
        question["content"], answer["content"], is_right=lambda text: grade(name, row, text)
    )


def _calling(row: dict[str, Any]) -> Question:
    """A row of the generated tool-calling task."""
    tools, calls = row["tools"], row["calls"]
    return Question(
        row["prompt"],
        json.dumps(calls),
        is_right=lambda text: calls_are_right(text, calls, tools),
        tools=tuple(tools),
    )


# --- code ---


def _human_eval(row: dict[str, Any]) -> Question:
    prompt, test, entry = row["prompt"], row["test"], row["entry_point"]
    if not all(isinstance(text, str) for text in (prompt, test, entry)):
        raise BadRow("content that is not text")

    def is_right(text: str) -> bool:
        return passes(program(prompt, entry, text), entry, prompt, test)

    def nanochat_is_right(text: str) -> bool:
        return passes(nanochat_program(prompt, text), entry, prompt, test)

    return Question(
        prompt, test, is_right=is_right, nanochat_is_right=nanochat_is_right, plain=prompt
    )


# --- reasoning_gym ---


def _gym(name: str, rows: int, seed: int) -> list[Question]:
    """Rows of one of reasoning-gym's seeded generators, graded by its own scorer."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError(f"{GYM}{name} needs its package: pip install 'hfsft[tasks]'") from None
    if name not in DATASETS:
        hint = nearest(name, DATASETS) or ", such as chain_sum"
        raise DataError(f"{name} is not one of reasoning_gym's {len(DATASETS)} generators{hint}")
    # some generators have few questions: draw more and leave out repeated ones
    made = reasoning_gym.create_dataset(name, size=GYM_DRAWS * rows, seed=GYM_SEED + seed)
    distinct: dict[str, dict[str, Any]] = {}
    for item in itertools.takewhile(lambda _: len(distinct) < rows, made):
        distinct.setdefault(item["question"], item)
    if len(distinct) < rows:
        raise DataError(
            f"{GYM}{name}: only {len(distinct)} different questions in {GYM_DRAWS * rows:,} draws, "
            f"fewer than {rows} rows; pass a smaller --rows"
        )

    def question(item: dict[str, Any]) -> Question:
        # partial credit for nearly right answers does not count
        def is_right(text: str) -> bool:
            return made.score_answer(answer=text.strip(), entry=item) >= 1

        return Question(item["question"], str(item["answer"]), is_right=is_right)

    return [question(item) for item in distinct.values()]


# --- held out ---


def _stage_of(model: str) -> tuple[Recipe, Stage] | None:
    """The recipe and stage that a model's folder belongs to; None if it is not a run's stage."""
    folder = Path(model).resolve()
    recipe = folder.parent / "recipe.yaml"
    record = read_record(folder)
    if record is None or not recipe.is_file():
        return None
    loaded = load_recipe(str(recipe))
    return loaded, loaded.stage(record["stage"])


def _held_out(model: str, rows: int | None, seed: int) -> Task:
    """The held-out set of a run's stage, according to the run's recipe."""
    found = _stage_of(model)
    if found is None:
        raise DataError(f"{HELD_OUT}: {model} is not the stage of a run (no ../recipe.yaml)")
    recipe, stage = found
    if not stage.validates:
        raise DataError(f"{HELD_OUT}: {stage.name} has no held-out set")
    tokenizer = load_tokenizer(model)
    if stage.name == "base":
        held_out = mix_text(recipe, tokenizer).held_out
    else:
        # the finished model has the context length of the model it started from, which may be gone
        held_out = mix_conversations(
            dataclasses.replace(stage, model_name_or_path=model, quiet=True), tokenizer
        ).held_out
    if rows is not None and rows < len(held_out):
        held_out = held_out.shuffle(seed=seed).select(range(rows))
    documents = [
        {key: row[key] for key in ("input_ids", "labels") if key in row} for row in held_out
    ]
    return Task(HELD_OUT, "loss", [], documents)


def data_files(given: list[str], tasks: list[str]) -> dict[str, str]:
    """Parse the values of `--data`.

    Args:
        given: each `task=file`, or a folder of files named after tasks.
        tasks: that are run; files of others in a folder are left alone. Empty: the default ones.

    Returns:
        Task → file.

    Raises:
        HfsftError: if a value is neither, a folder has no such file, or a named task is not run.
    """
    found: dict[str, str] = {}
    for value in given:
        name, equals, path = value.partition("=")
        if equals:
            if name in NAMES and tasks and name not in tasks:
                raise HfsftError(f"--data {value}: {name} is not among the tasks of --tasks")
            found[name] = path
            continue
        if not Path(value).is_dir():
            raise HfsftError(f"--data {value}: neither a folder nor NAME=FILE")
        files = {
            file.name.partition(".")[0]: str(file)
            for file in sorted(Path(value).iterdir())
            if file.name.partition(".")[0] in (set(ON_HUB) & set(tasks) if tasks else ON_HUB)
        }
        if not files:
            named = next((name for name in tasks if name in ON_HUB), "arc_easy")
            raise HfsftError(f"--data {value}: no file is named after a task, like {named}.jsonl")
        found |= files
    return found

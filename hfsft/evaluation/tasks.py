"""The tasks of `hfsft eval`: where their rows come from, what is asked, which answers are right.

ARC, MMLU, GSM8K, HumanEval and the spelling tasks are asked as karpathy/nanochat's chat_eval.py
asks them, so that its figures and these can be laid side by side: a choice is made among the
letters at the place of the answer, an answer is generated greedily, with the calculator. Whatever
else lm-eval (EleutherAI) has is asked by lm-eval itself: `lm_eval:NAME`.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from hfsft.data.mixture import mix_conversations
from hfsft.data.sources import load_rows, parse_row
from hfsft.data.tasks import grade, task_rows
from hfsft.data.text import mix_text
from hfsft.errors import DataError, HfsftError, nearest
from hfsft.evaluation.execution import ends_well
from hfsft.recipe.loading import load_recipe
from hfsft.recipe.schema import Recipe, Source, Stage
from hfsft.tokens.formats import BadRow, from_gsm8k, to_messages
from hfsft.tokens.tokenizer import load_tokenizer

# task → its rows on the Hub
ON_HUB = {
    "arc_easy": Source("allenai/ai2_arc", name="ARC-Easy", split="test"),
    "arc_challenge": Source("allenai/ai2_arc", name="ARC-Challenge", split="test"),
    "mmlu": Source("cais/mmlu", name="all", split="test"),
    "gsm8k": Source("openai/gsm8k", name="main", split="test"),
    "humaneval": Source("openai/openai_humaneval", split="test"),
}


CATEGORICAL = ("arc_easy", "arc_challenge", "mmlu")


GENERATED = {"simple_spelling": 96, "spelling_bee": 256, "arithmetic": 96}  # tokens of an answer


# nanochat's chat tasks
CHAT_TASKS = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee")


HELD_OUT = "held_out"


GYM, LM_EVAL = "reasoning_gym:", "lm_eval:"


NAMES = (*ON_HUB, *GENERATED, HELD_OUT)


ANSWER_TOKENS = 512  # of an answer that reasons or is code, as in nanochat


GENERATED_ROWS = 100  # of a generated task, unless asked otherwise


GYM_SEED = 10_000_000  # away from the seeds of training rows


# where a model that is no chat begins something new (Chen et al. 2021, Evaluating Large Language
# Models Trained on Code)
CODE_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


QUESTION_ENDS = ("\nQuestion:",)


@dataclass(frozen=True)
class Question:
    """One row of a task."""

    prompt: str  # what the user asks
    answer: str  # the row's own; a letter where there are choices
    choices: tuple[str, ...] = ()  # the letters to choose from
    is_right: Callable[[str], bool] | None = None  # whether a generated answer is
    plain: str | None = None  # what a model that is no chat goes on with, if not Question: ...

    @property
    def digest(self) -> str:
        """The same for rows that ask the same."""
        said = json.dumps([self.prompt, self.answer, self.choices])
        return hashlib.blake2b(said.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Task:
    """A task and the rows that are to be asked."""

    name: str
    kind: str  # categorical, generative or loss
    questions: list[Question]
    documents: list[dict[str, list[int]]] = dataclasses.field(default_factory=list)  # of loss
    max_new_tokens: int = 0
    plain_ends: tuple[str, ...] = QUESTION_ENDS  # where the answer of a model that is no chat ends


def check_names(names: list[str], allow_code: bool) -> None:
    """Return if every name is a task that may be run.

    Raises:
        HfsftError: naming the first that is not.
    """
    for name in names:
        if name.startswith((GYM, LM_EVAL)):
            continue
        if name not in NAMES:
            others = f"{GYM}NAME and {LM_EVAL}NAME"
            hint = nearest(name, NAMES) or f"; there are {', '.join(NAMES)}, {others}"
            raise HfsftError(f"no task {name}{hint}")
        if name == "humaneval" and not allow_code:
            raise HfsftError(
                "humaneval runs programs that the model writes, with limits but in no jail; "
                "--allow_code runs them"
            )


def default_tasks(model: str, allow_code: bool) -> list[str]:
    """What a model is asked unless told: a run's stage what runs offline, others the chat tasks."""
    stage_of_run = _stage_of(model)
    if stage_of_run is not None:
        return [HELD_OUT, *GENERATED] if stage_of_run[1].validates else list(GENERATED)
    return [name for name in CHAT_TASKS if name != "humaneval" or allow_code]


def load_task(
    name: str, model: str, rows: int | None = None, seed: int = 0, data: str | None = None
) -> Task:
    """Load a task's rows; `lm_eval:` ones are lm-eval's to load.

    Args:
        name: as `check_names` passes it.
        model: whose held-out rows are wanted.
        rows: a seeded sample of so many; None: all, of a generated task 100.
        seed: of the sample, or of what is generated.
        data: rows of the same schema, in a file or on the Hub, instead of those on the Hub.

    Raises:
        DataError: if they cannot be had, or one is not what the task asks for.
    """
    if data is not None and name not in ON_HUB:
        raise DataError(f"{name} takes no data of its own; those that do are {', '.join(ON_HUB)}")
    if name == HELD_OUT:
        return _held_out(model, rows, seed)
    if name in GENERATED:
        made = task_rows(name, rows or GENERATED_ROWS, split="test", seed=seed)
        return Task(
            name,
            "generative",
            [_generated(name, row) for row in made],
            max_new_tokens=GENERATED[name],
        )
    if name.startswith(GYM):
        questions = _gym(name.removeprefix(GYM), rows or GENERATED_ROWS, seed)
        return Task(name, "generative", questions, max_new_tokens=ANSWER_TOKENS)
    source = Source(data) if data is not None else ON_HUB[name]
    source = dataclasses.replace(source, rows=rows)
    read = _human_eval if name == "humaneval" else _gsm8k if name == "gsm8k" else _choices
    questions = []
    for number, row in enumerate(load_rows(source, seed)):
        try:
            questions.append(read(parse_row(row, source)))
        except (BadRow, KeyError, TypeError) as error:
            reason = error if isinstance(error, BadRow) else f"no row of {name}"
            raise DataError(f"{source}: row {row.get('hfsft_row', number)}: {reason}") from None
    kind = "categorical" if name in CATEGORICAL else "generative"
    ends = CODE_ENDS if name == "humaneval" else QUESTION_ENDS
    return Task(name, kind, questions, max_new_tokens=ANSWER_TOKENS, plain_ends=ends)


# --- choices ---


def _choices(row: dict[str, Any]) -> Question:
    """ARC's and MMLU's rows, as conversations.py words them for training."""
    question, answer = to_messages(row, "multiple_choice")
    choices = row["choices"]
    if isinstance(choices, dict):
        letters = [str(label) for label in choices["label"]]
    else:
        letters = [chr(ord("A") + index) for index in range(len(choices))]
    return Question(question["content"], answer["content"], tuple(letters))


# --- numbers ---


def final_number(text: str) -> Decimal | None:
    r"""The number that an answer comes to: `#### 1,234.0`, else `\boxed{1234}`, else its last one.

    nanochat and GSM8K's authors take the number behind the mark alone; that of a model that was
    never taught to write it is looked for as lm-eval's `flexible-extract` does.
    """
    marked = text.rpartition("####")
    boxed = re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    part = marked[2] if marked[1] else boxed[-1] if boxed else text
    numbers = re.findall(r"(?<![\d.])-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", part)
    if not numbers:
        return None
    number = numbers[0] if marked[1] or boxed else numbers[-1]
    try:
        return Decimal(re.sub("[$,]", "", number))
    except InvalidOperation:
        return None


def _gsm8k(row: dict[str, Any]) -> Question:
    from_gsm8k(row)  # raises BadRow
    number = final_number(row["answer"])
    if number is None:
        raise BadRow("an answer without a number")
    return Question(
        row["question"], str(number), is_right=lambda text: final_number(text) == number
    )


def _generated(name: str, row: dict[str, Any]) -> Question:
    question, answer = row["messages"]
    return Question(
        question["content"], answer["content"], is_right=lambda text: grade(name, row, text)
    )


# --- code ---


def _human_eval(row: dict[str, Any]) -> Question:
    prompt, test, entry = row["prompt"], row["test"], row["entry_point"]
    if not all(isinstance(text, str) for text in (prompt, test, entry)):
        raise BadRow("content that is not text")

    def is_right(text: str) -> bool:
        return ends_well(f"{program(prompt, entry, text)}\n{test}\ncheck({entry})\n")

    return Question(prompt, test, is_right=is_right, plain=prompt)


def program(prompt: str, entry_point: str, answer: str) -> str:
    """The program that an answer to HumanEval's prompt makes.

    As in nanochat it is the first code block, or all of the answer, behind the prompt's imports;
    where that does not define the function it is taken to go on where the prompt ends.
    """
    block = re.search(r"```(?:[Pp]ython|py)?[^\S\n]*\n(.*?)(?:\n```|\Z)", answer, re.S)
    code = block[1] if block else answer
    if re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", code, re.M):
        imports = re.findall(r"^(?:import|from)\s.*", prompt, re.M)
        return "\n".join([*imports, code])
    return prompt + code


# --- reasoning_gym ---


def _gym(name: str, rows: int, seed: int) -> list[Question]:
    """Rows of one of reasoning-gym's seeded generators; its own scorer judges the answers."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError(f"{GYM}{name} needs its package: pip install 'hfsft[tasks]'") from None
    if name not in DATASETS:
        hint = nearest(name, DATASETS) or ", such as chain_sum"
        raise DataError(f"{name} is none of reasoning_gym's {len(DATASETS)} generators{hint}")
    made = reasoning_gym.create_dataset(name, size=rows, seed=GYM_SEED + seed)

    def question(item: dict[str, Any]) -> Question:
        # it gives parts of a point for answers that are nearly right
        def is_right(text: str) -> bool:
            return made.score_answer(answer=text.strip(), entry=item) >= 1

        return Question(item["question"], str(item["answer"]), is_right=is_right)

    return [question(item) for item in made]


# --- held out ---


def _stage_of(model: str) -> tuple[Recipe, Stage] | None:
    """The run's recipe and the stage that a folder is, if it is one of a run."""
    folder = Path(model).resolve()
    recipe = folder.parent / "recipe.yaml"
    if not (folder / "stage.json").is_file() or not recipe.is_file():
        return None
    name = json.loads((folder / "stage.json").read_text())["stage"]
    return (found := load_recipe(str(recipe))), found.stages[name]


def _held_out(model: str, rows: int | None, seed: int) -> Task:
    """What the run held out from the training of this stage, as its recipe says."""
    found = _stage_of(model)
    if found is None:
        raise DataError(f"{HELD_OUT}: {model} is no stage of a run (no ../recipe.yaml)")
    recipe, stage = found
    if not stage.validates:
        raise DataError(f"{HELD_OUT}: {stage.name} holds nothing out")
    tokenizer = load_tokenizer(model)
    if stage.name == "base":
        held_out = mix_text(recipe, tokenizer).held_out
    else:
        # the finished model has the positions of the one that it started from
        held_out = mix_conversations(
            dataclasses.replace(stage, model_name_or_path=model, quiet=True), tokenizer
        ).held_out
    if rows is not None and rows < len(held_out):
        held_out = held_out.shuffle(seed=seed).select(range(rows))
    documents = [
        {key: row[key] for key in ("input_ids", "labels") if key in row} for row in held_out
    ]
    return Task(HELD_OUT, "loss", [], documents)


def data_files(given: list[str]) -> dict[str, str]:
    """Task → file, of `task=file` and of folders of files with tasks' names.

    Raises:
        HfsftError: if one is neither, or a folder has no such file.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if equals:
            found[name] = path
            continue
        if not Path(one).is_dir():
            raise HfsftError(f"--data {one}: neither a folder nor NAME=FILE")
        inside = {
            file.name.partition(".")[0]: str(file)
            for file in sorted(Path(one).iterdir())
            if file.name.partition(".")[0] in ON_HUB
        }
        if not inside:
            raise HfsftError(f"--data {one}: no file there is named as a task, as arc_easy.jsonl")
        found |= inside
    return found

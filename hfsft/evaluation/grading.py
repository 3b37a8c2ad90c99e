"""Grading of generated answers: the number of a calculation, the program of a coding task.

Each by hfsft's rule and, for comparable figures, by nanochat's stricter one (tasks/gsm8k.py and
tasks/humaneval.py of karpathy/nanochat at commit 92d63d4, July 2026).
"""

import re
from decimal import Decimal, InvalidOperation

# --- numbers ---


def final_number(text: str) -> Decimal | None:
    r"""The final number of an answer: after the last `####`, else in `\boxed{}`, else the last one.

    For a model that was never trained to write the mark, the last number is taken, as lm-eval's
    `flexible-extract` does.
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


def nanochat_number(text: str) -> str | None:
    """The number that nanochat reads: after the first `#### `, its characters without commas."""
    marked = re.search(r"#### (-?[0-9.,]+)", text)
    return marked[1].replace(",", "") if marked else None


# --- programs ---


def program(prompt: str, entry_point: str, answer: str) -> str:
    """The program to run for an answer to one of HumanEval's prompts.

    Of the code blocks the first that defines the function, else the first one, else the entire
    answer, after the prompt's imports. If that does not define the function, it is taken as the
    continuation of the prompt.
    """
    # the last fence may be missing where the answer was cut off
    fenced = re.findall(r"```([^\n`]*)\n(.*?)(?:^[ \t]*```|\Z)", answer, re.S | re.M)
    blocks = [code for mark, code in fenced if re.fullmatch(r"\s*((python3?|py)\b.*)?", mark, re.I)]
    definition = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.M)
    defining = [block for block in blocks if definition.search(block)]
    code = [*defining, *blocks, answer][0]
    if definition.search(code):
        imports = re.findall(r"^(?:import|from)\s.*", prompt, re.M)
        return "\n".join([*imports, code])
    return prompt + code


def nanochat_program(prompt: str, answer: str) -> str:
    """The program that nanochat runs: the first closed block, or else all, after the imports."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    block = re.search(r"```(?:python)?\s*\n(.*?)\n```", answer, re.S)
    return "\n".join([*imports, "", (block[1] if block else answer).strip(), ""])

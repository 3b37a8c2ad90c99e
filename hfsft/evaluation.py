"""What a model answers: to prompts, and how often rightly on held-out generated tasks."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfsft.tasks import grade, task_rows

GRADED = ("simple_spelling", "spelling_bee", "arithmetic")


class Evaluator:
    """A model that answers batches of prompts, always taking the likeliest token."""

    def __init__(self, folder: str, batch_size: int = 50):
        """Load the model of a folder or Hub id; `batch_size` prompts are answered at a time."""
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if torch.cuda.is_available():
            self.model.to("cuda")
        self.batch_size = batch_size

    def answers(self, prompts: list[str], max_new_tokens: int = 96) -> list[str]:
        """The answer to each prompt, as text without special tokens."""
        return [
            answer
            for start in range(0, len(prompts), self.batch_size)
            for answer in self._batch(prompts[start : start + self.batch_size], max_new_tokens)
        ]

    def _batch(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        inputs = self.tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.model.device)
        made = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        new = made[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def accuracy(self, task: str, rows: int = 100, seed: int = 0) -> dict[str, Any]:
        """How many of a task's held-out rows are answered rightly.

        Args:
            task: one of `GRADED`; the rows are of its test split, whose words and numbers are in no
                training row.
            rows: how many.
            seed: which.

        Returns:
            `right` and `rows`.
        """
        asked = task_rows(task, rows=rows, split="test", seed=seed)
        answers = self.answers([row["messages"][0]["content"] for row in asked])
        right = sum(grade(task, row, answer) for row, answer in zip(asked, answers, strict=True))
        return {"right": right, "rows": rows}

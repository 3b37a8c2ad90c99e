"""A model that is served: its name, its prompts, its defaults, and the engine that answers."""

from pathlib import Path
from typing import Any

from hfsft.errors import ModelError, first_line
from hfsft.evaluation.answering import NANOCHAT_BOS, Evaluator
from hfsft.hub.client import NOT_LOADED
from hfsft.serve.engine import Engine
from hfsft.tokens.encoding import encode_texts
from hfsft.tokens.foreign_templates import PROBE, bounded, encode_prompt

UNSTATED_CONTEXT = 4096  # tokens, of a model whose configuration states no length


class ServedModel:
    """A model under the name that clients see."""

    def __init__(self, model: str, max_batch: int = 16, max_queue: int = 1024):
        """Load the model.

        Args:
            model: a folder or a Hub id.
            max_batch: see `Engine`.
            max_queue: see `Engine`.

        Raises:
            ModelError: if it cannot be loaded, or its chat template exceeds a bound.
        """
        self.evaluator = Evaluator(model)
        self.name = model_name(model)
        self.tokenizer = self.evaluator.tokenizer
        self.is_chat = self.evaluator.is_chat
        self.takes_tools = self.is_chat and "tools" in str(self.tokenizer.chat_template)
        if self.is_chat:
            self._try_template()
        self.context = self.evaluator.positions or UNSTATED_CONTEXT
        self.engine = Engine(self.evaluator, max_batch, max_queue)
        self.vocabulary = self.evaluator.model.get_input_embeddings().num_embeddings
        self.defaults = self._defaults()

    def _try_template(self) -> None:
        """Render a conversation within the bounds, which do not apply to those of requests."""
        try:
            bounded(
                self.evaluator.folder,
                lambda: self.tokenizer.apply_chat_template(
                    PROBE[:3], add_generation_prompt=True, tokenize=False
                ),
            )
        except ModelError:
            raise
        except Exception:  # a template may refuse this conversation; a request is told why
            return

    def _defaults(self) -> dict[str, Any]:
        """How the model's generation_config.json has it sampled; without `do_sample`, greedily."""
        config = self.evaluator.model.generation_config
        return {
            "max_tokens": config.max_new_tokens,
            "temperature": (1.0 if config.temperature is None else config.temperature)
            if config.do_sample
            else 0.0,
            "top_k": config.top_k or 0,
            "top_p": 1.0 if config.top_p is None else config.top_p,
        }

    def encode_chat(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        """The prompt for the assistant's turn; special tokens in messages are plain text.

        Raises:
            ModelError: if the chat template refuses the messages.
        """
        return encode_prompt(messages, self.tokenizer, tools)

    def encode_text(self, text: str) -> list[int]:
        """The prompt of a completion: special tokens in it are plain text."""
        (ids,) = encode_texts([text], self.tokenizer)
        starts = self.tokenizer("")["input_ids"]  # what the tokenizer puts in front of a text
        if not starts and self.tokenizer.bos_token == NANOCHAT_BOS:
            starts = [self.tokenizer.bos_token_id]
        return [*starts, *ids]

    def description(self) -> dict[str, Any]:
        """What /v1/models says of it: OpenAI's fields, and what the page needs."""
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "hfsft",
            "context_length": self.context,
            "is_chat": self.is_chat,
            "defaults": self.defaults,
        }


def model_name(model: str) -> str:
    """The name of a model: `fast/sft` for a stage of a run, a folder's name, or a Hub id."""
    path = Path(model)
    if not path.is_dir():
        return model
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if (path / "stage.json").is_file() else path.name


def load_served(models: list[str], max_batch: int, max_queue: int) -> list[ServedModel]:
    """Load the models to serve.

    Args:
        models: folders or Hub ids.
        max_batch: see `Engine`.
        max_queue: see `Engine`.

    Raises:
        ModelError: if one cannot be loaded, or two are the same.
    """
    if len({Path(model).resolve() for model in models}) < len(models):
        raise ModelError(f"{models[0]} is given twice; give two models to compare them")
    served = []
    for model in models:
        try:
            served.append(ServedModel(model, max_batch, max_queue))
        except ModelError:
            raise
        except (*NOT_LOADED, RuntimeError) as error:
            raise ModelError(f"{model}: cannot be loaded: {first_line(error)}") from None
    if len({one.name for one in served}) < len(served):  # such as a/sft and b/a/sft
        for one, model in zip(served, models, strict=True):
            one.name = model
    return served

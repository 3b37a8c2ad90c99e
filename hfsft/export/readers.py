"""Programs that open an exported model, for the proof: llama.cpp, or else transformers."""

import json
import secrets
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import gguf
import torch
import transformers
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from hfsft.errors import ModelError, first_line, printable
from hfsft.evaluation.answering import generate_greedily
from hfsft.export.splitting import splitter

try:
    import xllamacpp
except ImportError:  # the extra `hfsft[export]` is not installed
    xllamacpp = None

FORCED = 1e9  # added to a token's logit


class NotProved(ModelError):
    """An export that does not do what the original does."""


class Reader(Protocol):
    """What the proof asks of a program that has opened an exported model."""

    name: str  # of the program, with its version

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        """Token ids of a conversation up to the assistant's next turn."""
        ...

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text that is no conversation."""
        ...

    def answer(self, prompt: list[int], most: int) -> tuple[list[int], bool]:
        """The top-1 tokens after a prompt without the end token, and whether they ended by one."""
        ...

    def log_probability(self, ids: list[int], start: int) -> float:
        """The sum of the log-probabilities of `ids[start:]`, in nats."""
        ...

    def ends_at(self, prompt: list[int], token: int) -> bool:
        """Whether an answer ends where the model writes this token."""
        ...


def today(template: str | None) -> dict[str, str]:
    """The date for a chat template that writes it, such as Llama 3.1's, as llama.cpp gives it."""
    if "date_string" not in (template or ""):
        return {}
    return {"date_string": datetime.now().strftime("%d %b %Y")}


class LlamaCpp:
    """llama.cpp itself, through xllamacpp: its server, asked by this process alone."""

    def __init__(self, path: Path, positions: int, threads: int):
        """Open a GGUF file.

        Args:
            path: the file.
            positions: tokens of the longest prompt with its answer.
            threads: of the CPU.
        """
        self.name = f"llama.cpp (xllamacpp {xllamacpp.__version__})"
        self.key = secrets.token_hex(16)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel = positions, 1
        settings.verbosity, settings.warmup, settings.ui = -1, False, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.n_gpu_layers = 0
        settings.api_keys = [self.key]
        # its default rounds keys and values to 16 bits: the file is to be proved, not that
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        try:
            self.server = xllamacpp.Server(settings)
        except RuntimeError as error:
            raise NotProved(f"{self.name} cannot open it: {first_line(error)}") from None

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            raise NotProved(f"{self.name} refuses {path}: {printable(answer)[:300]}") from None

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        """As `Reader.prompt`: rendered and tokenized as its chat endpoint does."""
        body = {"messages": messages} | ({"tools": tools} if tools else {})
        return self.tokens(self._ask("/apply-template", body)["prompt"])

    def tokens(self, text: str) -> list[int]:
        """As `Reader.tokens`."""
        body = {"content": text, "add_special": True, "parse_special": True}
        return self._ask("/tokenize", body)["tokens"]

    def _complete(self, prompt: list[int], most: int, **settings: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "n_predict": most, "temperature": 0.0, "top_k": 1}
        body |= {"repeat_penalty": 1.0, "n_probs": 1, "return_tokens": True, **settings}
        return self._ask("/completion", body)

    def answer(self, prompt: list[int], most: int) -> tuple[list[int], bool]:
        """As `Reader.answer`."""
        found = self._complete(prompt, most)
        ended = found["stop_type"] == "eos"
        return (found["tokens"][:-1] if ended else found["tokens"]), ended

    def log_probability(self, ids: list[int], start: int) -> float:
        """As `Reader.log_probability`: each token is forced, its own probability returned."""
        total = 0.0
        for position in range(start, len(ids)):
            forced = [[ids[position], FORCED]]
            found = self._complete(ids[:position], 1, logit_bias=forced)
            total += found["completion_probabilities"][0]["logprob"]
        return total

    def ends_at(self, prompt: list[int], token: int) -> bool:
        """As `Reader.ends_at`."""
        return self._complete(prompt, 2, logit_bias=[[token, FORCED]])["stop_type"] == "eos"


class Transformers:
    """transformers, on a folder in the Hub's format."""

    def __init__(self, folder: Path):
        """Open a folder.

        Args:
            folder: with a model and its tokenizer.
        """
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.name = f"{type(self.model).__name__} of transformers {transformers.__version__}"
        ends = self.model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        """As `Reader.prompt`."""
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=True,
            return_dict=False,
            **today(self.tokenizer.get_chat_template(tools=tools)),
        )

    def tokens(self, text: str) -> list[int]:
        """As `Reader.tokens`."""
        return self.tokenizer(text)["input_ids"]

    def answer(self, prompt: list[int], most: int) -> tuple[list[int], bool]:
        """As `Reader.answer`."""
        return greedy_answer(self.model, prompt, most, self.ends)

    def log_probability(self, ids: list[int], start: int) -> float:
        """As `Reader.log_probability`."""
        return log_probabilities(self.model, ids, start).sum().item()

    def ends_at(self, prompt: list[int], token: int) -> bool:
        """As `Reader.ends_at`."""
        return token in self.ends


class GGUFReadBack(Transformers):
    """transformers, on what a GGUF file holds: its weights, its tokens and merges, its template.

    transformers ignores the pre-tokenizer that a GGUF names, so the tokenizer is put together here.
    """

    def __init__(self, path: Path):
        """Read a GGUF file back into float32.

        Args:
            path: the file.
        """
        self.name = f"transformers {transformers.__version__}, reading the GGUF back"
        self.fields = gguf.GGUFReader(path).fields
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        # which transformers does not read: its Qwen3 would have heads of 128
        config.head_dim = self.fields[f"{config.model_type}.attention.key_length"].contents()
        self.model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype="float32"
        ).eval()
        ends = (self._field(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        self.ends = [token for token in ends if token is not None]
        self.all_tokens = self._field("ggml.tokens")
        self.tokenizer = self._tokenizer()

    def _field(self, name: str) -> Any:
        field = self.fields.get(f"tokenizer.{name}")
        return None if field is None else field.contents()

    def _tokenizer(self) -> Tokenizer:
        name = self._field("ggml.pre")
        merges = [tuple(merge.split(" ")) for merge in self._field("ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(self.all_tokens)}
        found = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))
        found.pre_tokenizer = splitter(name)
        kinds = dict(zip(self.all_tokens, self._field("ggml.token_type"), strict=True))
        for special, kind in ((True, gguf.TokenType.CONTROL), (False, gguf.TokenType.USER_DEFINED)):
            added = [token for token in self.all_tokens if kinds[token] == kind]
            found.add_tokens(
                [AddedToken(token, special=special, normalized=False) for token in added]
            )
        return found

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[int]:
        """As `Reader.prompt`."""
        template = self._field("chat_template")
        try:
            rendered, _ = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                **today(template),
                add_generation_prompt=True,
                bos_token=self.all_tokens[self._field("ggml.bos_token_id")],
                eos_token=self.all_tokens[self._field("ggml.eos_token_id")],
            )
        except TemplateError as error:
            raise NotProved(f"its chat template refuses: {first_line(error)}") from None
        return self.tokens(rendered[0])

    def tokens(self, text: str) -> list[int]:
        """As `Reader.tokens`."""
        ids, beginning = self.tokenizer.encode(text).ids, self._field("ggml.bos_token_id")
        adds = self._field("ggml.add_bos_token") and ids[:1] != [beginning]
        return [beginning, *ids] if adds else ids


def greedy_answer(
    model: Any, prompt: list[int], most: int, ends: list[int]
) -> tuple[list[int], bool]:
    """The top-1 tokens after a prompt, without the end token, and whether they ended by one.

    Args:
        model: a causal language model in evaluation mode.
        prompt: token ids.
        most: new tokens at most.
        ends: the end tokens.
    """
    ids = torch.tensor([prompt], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = generate_greedily(model, inputs, ends[0], ends, max_new_tokens=most)
    found = output[0, len(prompt) :].tolist()
    ended = bool(found) and found[-1] in ends
    return (found[:-1] if ended else found), ended


@torch.no_grad()
def log_probabilities(model: Any, ids: list[int], start: int) -> torch.Tensor:
    """The log-probability of each of `ids[start:]` in nats, `start` above 0."""
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, start - 1 : -1]
    targets = torch.tensor(ids[start:], device=model.device)
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")

"""An Ollama Modelfile: the GGUF, the chat template in Go's language, and when to stop.

Ollama runs no Jinja. Its template is put together from what the model's own template writes around
the contents of a conversation.
"""

import json
from typing import Any

from hfsft.errors import ModelError, first_line
from hfsft.export.gguf_file import adds_bos, sampling_settings
from hfsft.tokens.foreign_templates import bounded

MADE = "# written by hfsft export"

# stand for the contents of messages while the template is taken apart
SYSTEM, FIRST, ANSWER, SECOND = ("\u27e6s\u27e7", "\u27e6f\u27e7", "\u27e6a\u27e7", "\u27e6q\u27e7")


def modelfile(file: str, tokenizer: Any, generation: Any, positions: int, ends: list[int]) -> str:
    """The Modelfile of a GGUF in the same folder.

    Args:
        file: the GGUF's name.
        tokenizer: of the model.
        generation: its `GenerationConfig`: how it wants to be sampled.
        positions: the length of its context.
        ends: the end tokens, each of which becomes a `stop`.

    Raises:
        ModelError: if the chat template cannot be written for Ollama.
    """
    parameters = [("stop", json.dumps(token)) for token in tokenizer.convert_ids_to_tokens(ends)]
    parameters.append(("num_ctx", positions))
    if generation.max_new_tokens:
        parameters.append(("num_predict", generation.max_new_tokens))
    parameters += sampling_settings(generation).items()
    template = go_template(tokenizer) if tokenizer.chat_template else "{{ .Prompt }}"
    lines = [MADE, f"FROM ./{file}", f'TEMPLATE """{template}"""']
    return "\n".join([*lines, *(f"PARAMETER {name} {value}" for name, value in parameters)]) + "\n"


def go_template(tokenizer: Any) -> str:
    """The chat template of a tokenizer for system, user and assistant messages, in Go's language.

    Raises:
        ModelError: if it depends on more than the messages' order.
    """
    parts = template_parts(tokenizer)
    if adds_bos(tokenizer):  # as Ollama does then
        parts = {name: text.removeprefix(tokenizer.bos_token) for name, text in parts.items()}
    go = {name: json.dumps(text, ensure_ascii=False) for name, text in parts.items()}
    system = (
        f'{{{{- if eq .Role "system" }}}}{{{{ {go["before_system"]} }}}}{{{{ .Content }}}}'
        f"{{{{ $before = {go['after_system']} }}}}\n{{{{- else if"
        if "before_system" in go
        else "{{- if"
    )
    return (
        f"{{{{- $before := {go['before_first']} }}}}\n"
        "{{- range .Messages }}\n"
        f'{system} eq .Role "user" }}}}{{{{ $before }}}}{{{{ .Content }}}}'
        f"{{{{ {go['before_answer']} }}}}{{{{ $before = {go['after_answer']} }}}}\n"
        '{{- else if eq .Role "assistant" }}{{ .Content }}\n'
        "{{- end }}\n"
        "{{- end }}"
    )


def template_parts(tokenizer: Any) -> dict[str, str]:
    """What a chat template writes before, between and after the contents of messages.

    Returns:
        `before_first`: up to the first message, a user's; `before_answer`; `after_answer`: up to
        the user's next message; and, unless the template refuses system messages,
        `before_system` and `after_system`.

    Raises:
        ModelError: if it writes other things before an answer that is given than before one that is
            asked for, or changes the contents.
    """
    user = {"role": "user", "content": FIRST}
    turns = [user, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": SECOND}]
    first, answer, after, asked = _around(turns, tokenizer)
    if answer != asked:
        raise _refused(tokenizer, f"{asked!r} precedes an answer, {answer!r} an earlier one")
    parts = {"before_first": first, "before_answer": answer, "after_answer": after}
    try:
        found = _around([{"role": "system", "content": SYSTEM}, user], tokenizer)
    except ModelError:
        return parts
    return parts | {"before_system": found[0], "after_system": found[1]}


def _around(messages: list[dict[str, str]], tokenizer: Any) -> list[str]:
    """The text around the contents of messages, in order."""
    try:
        text = bounded(
            tokenizer.name_or_path,
            lambda: tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            ),
        )
    except ModelError:
        raise
    except Exception as error:  # a template can raise anything
        raise _refused(tokenizer, first_line(error)) from None
    found = []
    for message in messages:
        before, content, text = text.partition(message["content"])
        if not content:
            raise _refused(tokenizer, f"it does not write a {message['role']}'s message as it is")
        found.append(before)
    return [*found, text]


def _refused(tokenizer: Any, why: str) -> ModelError:
    return ModelError(
        f"{tokenizer.name_or_path}: its chat template cannot be written for Ollama: {why}\n"
        "  --to gguf needs no such template: llama.cpp reads the model's own"
    )

"""The Modelfile, and its template against the model's own on many conversations."""

import re
from pathlib import Path

import pytest
import trl
from plain_tokenizers import plain_bpe
from transformers import GenerationConfig

from hfsft.data.tasks import task_rows
from hfsft.errors import ModelError
from hfsft.export.gguf_file import sampling_settings
from hfsft.export.ollama import go_template, modelfile, template_parts
from hfsft.tokens.tokenizer import template

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SYSTEM = {"role": "system", "content": 'Be "brief".\nNo {{ braces }}.'}


def test_the_modelfile_of_a_nanochat_model(tokenizer):
    sampling = GenerationConfig(do_sample=True, temperature=0.6, top_k=50, max_new_tokens=128)
    assert modelfile("demo-Q8_0.gguf", tokenizer, sampling, 256, [4, 0]) == (
        "# written by hfsft export\n"
        "FROM ./demo-Q8_0.gguf\n"
        'TEMPLATE """{{- $before := "<|bos|><|user_start|>" }}\n'
        "{{- range .Messages }}\n"
        '{{- if eq .Role "system" }}{{ "<|bos|><|user_start|>" }}{{ .Content }}'
        '{{ $before = "\\n\\n" }}\n'
        '{{- else if eq .Role "user" }}{{ $before }}{{ .Content }}'
        '{{ "<|user_end|><|assistant_start|>" }}{{ $before = "<|assistant_end|><|user_start|>" }}\n'
        '{{- else if eq .Role "assistant" }}{{ .Content }}\n'
        "{{- end }}\n"
        '{{- end }}"""\n'
        'PARAMETER stop "<|assistant_end|>"\n'
        'PARAMETER stop "<|bos|>"\n'
        "PARAMETER num_ctx 256\n"
        "PARAMETER num_predict 128\n"
        "PARAMETER temperature 0.6\n"
        "PARAMETER top_k 50\n"
        "PARAMETER top_p 1.0\n"
        "PARAMETER min_p 0.0\n"
        "PARAMETER repeat_penalty 1.0\n"
    )


def test_a_greedy_model_and_one_without_a_template(tokenizer):
    plain = plain_bpe("<|end|>", eos_token="<|end|>")
    text = modelfile("m.gguf", plain, GenerationConfig(do_sample=False, top_k=50), 64, [0])
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    assert text.endswith(
        'PARAMETER stop "<|end|>"\nPARAMETER num_ctx 64\nPARAMETER temperature 0\n'
        "PARAMETER repeat_penalty 1.0\n"
    )


def test_what_a_model_leaves_unset_is_as_transformers_has_it():
    defaults = GenerationConfig._get_default_generation_params() | {"min_p": 0.0}
    names = {"repeat_penalty": "repetition_penalty"}
    settings = sampling_settings(GenerationConfig(do_sample=True))
    assert settings == {name: defaults[names.get(name, name)] for name in settings}
    assert len(settings) == 5
    set_ones = GenerationConfig(do_sample=True, top_k=0, top_p=0.9, repetition_penalty=1.2)
    assert sampling_settings(set_ones)["top_k"] == 0
    assert sampling_settings(set_ones)["repeat_penalty"] == 1.2


def run(parts: dict[str, str], messages: list[dict[str, str]]) -> str:
    """What Ollama makes of a conversation: the loop of `go_template`, in Python."""
    before, text = parts["before_first"], ""
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            text, before = text + parts["before_system"] + content, parts["after_system"]
        elif message["role"] == "user":
            text += before + content + parts["before_answer"]
            before = parts["after_answer"]
        else:
            text += content
    return text


@pytest.mark.parametrize("name", ["nanochat", "chatml", "qwen2_5", "llama3_2", "phi3", "gemma3"])
def test_the_parts_make_what_the_template_makes(name):
    tokenizer = plain_bpe("<|end|>", eos_token="<|end|>", bos_token="<|end|>")
    own = name in ("nanochat", "chatml")
    tokenizer.chat_template = template(name) if own else (TEMPLATES / f"{name}.jinja").read_text()
    parts = template_parts(tokenizer)
    for task in ("small_talk", "identity"):
        for row in task_rows(task, 10, split="test", seed=3):
            for messages in (row["messages"][:-1], [SYSTEM, *row["messages"][:-1]]):
                assert run(parts, messages) == tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
    assert set(re.findall(r"\.\w+", go_template(tokenizer))) >= {".Messages", ".Role", ".Content"}


def test_a_template_that_refuses_system_messages_has_no_part_for_them():
    tokenizer = plain_bpe("<|end|>", eos_token="<|end|>")
    tokenizer.chat_template = (TEMPLATES / "gemma.jinja").read_text()
    assert "system" not in go_template(tokenizer)


def test_a_template_that_thinks_before_new_answers_alone_is_refused():
    tokenizer = plain_bpe("<|end|>", eos_token="<|end|>")
    tokenizer.chat_template = (TEMPLATES / "deepseekv3.jinja").read_text()
    with pytest.raises(ModelError) as refused:
        go_template(tokenizer)
    first, second = str(refused.value).splitlines()
    assert "its chat template cannot be written for Ollama" in first and "<think>" in first
    assert second.strip().startswith("--to gguf needs no such template")

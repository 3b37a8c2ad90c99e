"""A tokenizer trained on the spot, and the kinds of tokenizers that a run may start from."""

import json
import shutil
from pathlib import Path

import pytest
import trl
from chat_messages import assistant, call, calling, system, tool, user
from plain_tokenizers import MARKED, plain_bpe
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer

from hfsft.data.tasks import facts
from hfsft.errors import ModelError, RecipeError
from hfsft.recipe.loading import load_recipe
from hfsft.tokens.encoding import encode_conversation
from hfsft.tokens.tokenizer import (
    SPECIAL_TOKENS,
    base_tokenizer,
    load_tokenizer,
    require_bounded,
    template,
    train_tokenizer,
)

UNMARKED = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
ODD = [
    "", " ", "\n", "\r\n \t", "   three", "12345", "1,234.5", "don't WON'T", "a  b .  , n't",
    "🇩🇪👩‍👩‍👧🙂", "שלום", "\u202eabc", "مرحبا", "中文", "नमस्ते", "e\u0301", "a\u00a0b\u3000c",
    "\u0000\u0001\u007f", "\ufeffbom", "\ufffd\uffff", "\ud7ff\ue000", "\U0010ffff", "\u200b\u200d",
    "<|bos|>", "<|assistant_end|><|pad|>", "<|", "١٢٣٤", "²³½", "ǅ ß İ",
]  # fmt: skip


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.fixture
def save(tmp_path):
    """Saves a tokenizer, with a chat template if one is given; returns the folder."""

    def save(tokenizer, chat_template=None) -> str:
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(tmp_path / "saved")
        return str(tmp_path / "saved")

    return save


# --- trained ---


def test_trained_tokenizer_has_its_size_and_special_tokens(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 512
    assert max(tokenizer.get_vocab().values()) == 511
    assert len(SPECIAL_TOKENS) == 10
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(10))
    assert sorted(tokenizer.all_special_ids) == list(range(10))
    assert tokenizer.bos_token == "<|bos|>"
    assert tokenizer.eos_token == "<|assistant_end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.chat_template == template("nanochat")
    assert tokenizer.hfsft_template == "nanochat"


@pytest.mark.parametrize(
    ("pre_tokenizer", "parts"),
    [
        ("qwen2", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", ["123", "45"]),
        ("nanochat", ["12", "34", "5"]),
    ],
)
def test_numbers_are_split_as_the_pre_tokenizer_says(pre_tokenizer, parts):
    # a text of one number over and over: without the split it would be one token
    tokenizer = train_tokenizer(["12345 67890 "] * 5000 + facts(), 400, pre_tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert max(len(token) for token in vocabulary if token.isdigit()) == len(parts[0])
    assert [tokenizer.decode(i) for i in encode(tokenizer, "12345")] == parts


@pytest.mark.parametrize("text", ODD)
def test_any_text_comes_back(tokenizer, text):
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(10))
    assert (
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        == tokenizer([text], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
        == ids
    )


def test_special_tokens_are_recognized_only_when_asked(tokenizer):
    assert tokenizer.encode("<|assistant_end|>", add_special_tokens=False) == [4]
    assert 4 not in encode(tokenizer, "<|assistant_end|>")


def test_too_little_text_is_an_error():
    with pytest.raises(RecipeError) as error:
        train_tokenizer(["one two two"], 400)
    assert str(error.value) == (
        "tokenizer: the base text yields only 271 tokens, not vocab_size: 400; "
        "lower vocab_size or add text"
    )


def test_trained_tokenizer_is_the_same_after_saving(tokenizer, save):
    loaded = load_tokenizer(save(tokenizer))
    assert loaded.hfsft_template == "nanochat"
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in [*ODD, *facts()[:50]]:
        assert encode(loaded, text) == encode(tokenizer, text)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 4, 9)
    assert sorted(loaded.all_special_ids) == list(range(10))
    # transformers alone loads the same
    stock = AutoTokenizer.from_pretrained(loaded.name_or_path)
    messages = [{"role": "user", "content": "Hi"}]
    assert stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>"
    )


def test_base_trains_on_max_chars_characters_and_resumes_with_the_same(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nmodel: {{depth: 2, vocab_size: 300}}\n"
        "tokenizer: {train: true, max_chars: 3000}\nbase: {data: [{path: facts}], max_steps: 1}\n"
    )
    recipe = load_recipe(str(path))
    read = []

    def texts():
        for text in facts():
            read.append(text)
            yield text

    tokenizer = base_tokenizer(recipe, texts(), resuming=False)
    # one more is read before the limit is checked
    assert sum(map(len, read[:-2])) < 3000 <= sum(map(len, read))
    assert len(tokenizer) == 300
    assert Path(tokenizer.name_or_path) == tmp_path / "r" / "tokenizer"
    again = base_tokenizer(recipe, iter(()), resuming=True)
    assert again.get_vocab() == tokenizer.get_vocab()


# --- loaded ---


def test_chatml_tokens_without_a_template_get_chatml(save):
    plain = plain_bpe("<|endoftext|>", "<|im_start|>", "<|im_end|>", eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(save(plain))
    assert tokenizer.hfsft_template == "chatml"
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    # not a special token before, but one now
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in encode(tokenizer, "<|im_end|>")


def test_chatml_tokens_of_the_plain_vocabulary_become_special(save):
    plain = plain_bpe("<|im_start|>", "<|im_end|>")
    folder = save(plain)
    path = Path(folder) / "tokenizer.json"
    held = json.loads(path.read_text())
    held["added_tokens"] = []  # then both are ordinary words of the vocabulary
    path.write_text(json.dumps(held))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.hfsft_template == "chatml"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.encode("a<|im_end|>", add_special_tokens=False)[-1] == end
    assert end not in encode(tokenizer, "a<|im_end|>")
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id == 300


def test_plain_bpe_gets_nanochat_tokens(save):
    tokenizer = load_tokenizer(save(plain_bpe("<|endoftext|>", eos_token="<|endoftext|>")))
    assert tokenizer.hfsft_template == "nanochat"
    assert len(tokenizer) == 310
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(300, 310))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|bos|>",
        "<|assistant_end|>",
        "<|pad|>",
    )


EARLIER = Path(__file__).parent / "templates"  # hfsft's templates before they could write tools
NO_TOOLS = [
    system("Be kind."),
    user("Hi"),
    assistant([{"type": "text", "text": "a"}, {"type": "python", "text": "1+1"},
               {"type": "python_output", "text": "2"}, {"type": "text", "text": "b"}]),
    user("And?\n"),
    assistant(" Fine."),
]  # fmt: skip


@pytest.mark.parametrize("name", ["nanochat", "chatml"])
def test_a_tokenizer_with_an_earlier_template_of_hfsft_s_gets_the_present_one(name, save):
    earlier = (EARLIER / f"{name}-1.jinja").read_text()
    plain = plain_bpe(*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>")
    made = load_tokenizer(save(plain, earlier))
    assert made.hfsft_template == name and made.chat_template == template(name) != earlier
    for settings in ({}, {"add_generation_prompt": True}):
        assert made.apply_chat_template(
            NO_TOOLS, chat_template=earlier, tokenize=False, **settings
        ) == made.apply_chat_template(NO_TOOLS, tokenize=False, **settings)


@pytest.mark.parametrize("name", ["nanochat", "chatml"])
def test_own_templates_carry_how_an_answer_is_taken_apart(name, save):
    folder = save(plain_bpe(*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>"))
    load_tokenizer(folder, name).save_pretrained(folder)
    stock = AutoTokenizer.from_pretrained(folder)  # as a server loads it
    asked = [system("Be kind."), user("Add.")]
    calls = [call("add", {"a": 1, "b": [2, None]}), call("f", {})]
    for answer in (
        calling(*calls, content="Let me see.") | {"reasoning_content": "Hm."},
        calling(calls[1]),
        assistant("Just text."),
    ):
        prompt = stock.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = stock.apply_chat_template([*asked, answer], tokenize=False)
        parsed = stock.parse_response(whole.removeprefix(prompt), prefix=prompt)
        assert parsed == {name: held for name, held in answer.items() if held}
    if name == "nanochat":  # a calculator call is none of a tool
        text = "It is <|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>2."
        parsed = stock.parse_response(f"{text}<|assistant_end|>", prefix=prompt)
        assert parsed == {"role": "assistant", "content": text}


@pytest.mark.parametrize("name", ["nanochat", "chatml"])
def test_own_templates_take_content_in_parts(name, save):
    folder = save(plain_bpe(*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>"))
    made = load_tokenizer(folder, name)

    def parts(key: str, *texts: str) -> list[dict]:
        return [{"type": "text", key: text} for text in texts]

    plain = [system("Be kind."), user("Hi you"), calling(call("f", {})), tool("3"), assistant("x")]
    split = [
        {"role": "developer", "content": parts("text", "Be ", "kind.")},
        user(parts("value", "Hi ", "you")),
        calling(call("f", {}), content=None),
        tool(parts("text", "3")),
        assistant(parts("text", "x")),
    ]
    assert made.apply_chat_template(split, tokenize=False) == made.apply_chat_template(
        plain, tokenize=False
    )
    with pytest.raises(Exception, match=f"the {name} template has no content of type image"):
        made.apply_chat_template([user([{"type": "image"}])], tokenize=False)


def test_another_template_can_be_chosen(save, tokenizer, tmp_path):
    plain = plain_bpe("<|im_start|>", "<|im_end|>", "<|other|>", "<|end|>", eos_token="<|im_end|>")
    plain.add_special_tokens({"extra_special_tokens": ["<|other|>"]})
    folder = save(plain)
    assert load_tokenizer(folder).hfsft_template == "chatml"
    chosen = load_tokenizer(folder, "nanochat")
    assert chosen.hfsft_template == "nanochat"
    assert set(chosen.all_special_tokens) == {*SPECIAL_TOKENS, "<|other|>"}
    file = tmp_path / "mine.jinja"
    file.write_text(MARKED)
    own = load_tokenizer(folder, str(file))
    assert (own.hfsft_template, own.hfsft_training_template) == (None, MARKED)
    with pytest.raises(RecipeError, match=r"chatlm is not nanochat, chatml or a file"):
        load_tokenizer(folder, "chatlm")


def test_foreign_template_with_marks_is_its_own_training_template(save):
    tokenizer = load_tokenizer(save(plain_bpe("<|end|>", eos_token="<|end|>"), MARKED))
    assert tokenizer.hfsft_template is None
    assert tokenizer.hfsft_training_template == tokenizer.chat_template == MARKED
    assert tokenizer.pad_token == "<|pad|>" != tokenizer.eos_token


def test_foreign_template_known_to_trl_is_trained_with_its_marked_copy(save):
    folder = Path(trl.__file__).parent / "chat_templates"
    qwen = (folder / "qwen2_5.jinja").read_text()
    plain = plain_bpe(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer = load_tokenizer(save(plain, qwen))
    assert tokenizer.hfsft_template is None
    assert tokenizer.chat_template == qwen
    assert (
        tokenizer.hfsft_training_template == (folder / "qwen2_5_training.jinja").read_text() != qwen
    )
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("name", ["phi3", "phi3_5"])
def test_phi_s_template_whose_last_mark_is_the_end_of_the_text(save, name):
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokens = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    plain = plain_bpe(*tokens, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer = load_tokenizer(save(plain, template))
    assert tokenizer.eos_token == "<|end|>"
    _, labels = encode_conversation([user("Hi"), assistant("Hello")], tokenizer)
    assert tokenizer.decode([label for label in labels if label != -100]).startswith("Hello<|end|>")


def test_deepseek_s_template_whose_marks_have_the_header(save):
    template = (Path(trl.__file__).parent / "chat_templates" / "deepseekv3.jinja").read_text()
    user_token, assistant_token, end = (
        f"<\N{FULLWIDTH VERTICAL LINE}{name}\N{FULLWIDTH VERTICAL LINE}>"
        for name in ("User", "Assistant", "end\u2581of\u2581sentence")
    )
    plain = plain_bpe(user_token, assistant_token, end, "<bos>", eos_token=end, bos_token="<bos>")
    tokenizer = load_tokenizer(save(plain, template))
    assert "{%- generation %}" in tokenizer.hfsft_training_template
    ids, labels = encode_conversation([user("Hi"), assistant("<b>")], tokenizer)
    assert tokenizer.decode(ids) == f"<bos>{user_token}Hi{assistant_token}<b>{end}"
    assert tokenizer.decode([label for label in labels if label != -100]) == f"<b>{end}"


def test_an_unknown_template_without_marks_can_be_trained_with(save):
    tokenizer = load_tokenizer(save(plain_bpe("<|end|>", eos_token="<|end|>"), UNMARKED))
    assert (tokenizer.hfsft_template, tokenizer.hfsft_training_template) == (None, None)
    assert tokenizer.eos_token == "<|end|>"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "end in no special token"),
        ("{{ messages[-1].content }}<|end|>", "a user's message, which the chat template leaves"),
        (
            "{% for m in messages %}{{ m.content }} {{ loop.revindex }}<|end|>{% endfor %}",
            "rewrites earlier turns",
        ),
        ("{{ raise_exception('never') }}", "the chat template refuses it: never"),
    ],
)
def test_a_template_that_cannot_be_trained_with(save, template, problem):
    folder = save(plain_bpe("<|end|>", eos_token="<|end|>"), template)
    with pytest.raises(ModelError) as error:
        load_tokenizer(folder)
    first, second = str(error.value).splitlines()
    assert first.startswith(f"{folder}: cannot train with its chat template: ") and problem in first
    assert second.strip().startswith("Choose another: tokenizer: {chat_template: FILE}")
    assert load_tokenizer(folder, "chatml").hfsft_template == "chatml"


def test_several_named_templates_are_an_error(save):
    folder = save(plain_bpe("<|end|>"), {"default": MARKED, "tool_use": MARKED})
    with pytest.raises(ModelError) as error:
        load_tokenizer(folder)
    assert str(error.value) == (
        f"{folder}: has several chat templates; choose one with tokenizer: {{chat_template: FILE}}"
    )
    assert load_tokenizer(folder, "nanochat").hfsft_template == "nanochat"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "cannot load its tokenizer"),
        ("tokenizer.json", "{}", "cannot load its tokenizer"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}, "added_tokens": []}', "cannot load"),
        ("tokenizer.json", None, "holds no model"),
        ("tokenizer_config.json", "{", "cannot load its tokenizer"),
    ],
)
def test_broken_tokenizer_is_an_error_that_names_it(save, file, content, message):
    folder = save(plain_bpe())
    if content is None:
        (Path(folder) / file).unlink()
    else:
        (Path(folder) / file).write_text(content)
    with pytest.raises(ModelError, match=message) as error:
        load_tokenizer(folder)
    assert str(error.value).startswith(folder)
    assert len(str(error.value).splitlines()) == 1


def test_missing_tokenizer_is_an_error(save, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    folder = save(plain_bpe())
    shutil.rmtree(folder)
    Path(folder).mkdir()
    (Path(folder) / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot load its tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "steps",
    [
        [normalizers.Replace("a", "b" * 5000)],
        [normalizers.Replace("a", "aaa")] * 9,
        [normalizers.NFC(), normalizers.Sequence([normalizers.Replace(Regex("x*"), "y" * 50)])],
        [normalizers.Prepend("p" * 10_000)],
    ],
    ids=["one", "nine", "nested", "prepend"],
)
def test_a_normalizer_that_makes_text_many_times_longer_is_refused(tmp_path, steps):
    made = plain_bpe("<|im_end|>", eos_token="<|im_end|>")
    made.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    made.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"normalizer can make a text [\d,]+ times as long"):
        load_tokenizer(str(tmp_path))


def test_normalizers_of_real_tokenizers_are_not_refused():
    made = plain_bpe("<|im_end|>", eos_token="<|im_end|>")
    for steps in (
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), "▁")],
    ):
        made.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        require_bounded(made, "m")

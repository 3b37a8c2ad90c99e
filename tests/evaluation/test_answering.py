"""Answering: batches give the same answers as single prompts; chat and plain; the calculator."""

import copy

import pytest
import torch
from rigged import rigged_to_say, save
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hfsft.errors import DataError, ModelError
from hfsft.evaluation.answering import Calculator, Evaluator, load_for_answers, load_its_tokenizer
from hfsft.tokens.encoding import encode_conversation
from hfsft.tokens.tokenizer import load_tokenizer

PROMPTS = ["Hi!", "Who are you, and what can you do for me today?", "What is 3 + 4?", "Why?"]


@pytest.fixture
def folder(tmp_path, make_model, tokenizer):
    """Makes the folder of a random model of a given type, with or without a chat template."""

    def make(model_type: str = "nanochat", chat: bool = True, **settings) -> str:
        own = copy.deepcopy(tokenizer)
        if not chat:
            own.chat_template = None
        return save(make_model(model_type, **settings), own, tmp_path / f"{model_type}{chat}")

    return make


def choices_of(evaluator: Evaluator) -> list[tuple[list[int], list[int]]]:
    return [evaluator.split_choices(prompt, "ABCD") for prompt in PROMPTS]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("model_type", ["nanochat", "llama"])
def test_a_batch_gives_the_same_answers_as_single_prompts(folder, model_type, chat):
    made = folder(model_type, chat)
    together, alone = Evaluator(made, batch_size=4), Evaluator(made, batch_size=1)
    assert together.is_chat == chat
    answers = together.answers(PROMPTS, max_new_tokens=12)
    assert answers == alone.answers(PROMPTS, max_new_tokens=12)
    assert len(set(answers)) > 1
    split = choices_of(together)
    chosen = together.choose(*zip(*split, strict=True))
    assert chosen == [alone.choose([ids], [tokens])[0] for ids, tokens in split]
    rows = [{"input_ids": ids} for ids in map(together.prompt_ids, PROMPTS)]
    for batched, (single,) in zip(
        together.losses(rows), [alone.losses([row]) for row in rows], strict=True
    ):
        assert batched["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert batched["tokens"] == single["tokens"]


def test_losses_are_those_of_the_model(folder):
    evaluator = Evaluator(folder())
    ids = evaluator.prompt_ids("Hi there!")
    labels = [-100] * 4 + ids[4:]
    (found,) = evaluator.losses([{"input_ids": ids, "labels": labels}])
    model = load_for_answers(evaluator.folder)
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    losses = [-log_probs[index - 1, ids[index]].item() for index in range(4, len(ids))]
    assert found["loss"] == pytest.approx(sum(losses), rel=1e-5)
    assert found["tokens"] == len(losses)
    # the last two are <|user_end|> and <|assistant_start|>
    assert found["text_loss"] == pytest.approx(sum(losses[:-2]), rel=1e-5)
    assert found["bytes"] == len(evaluator.tokenizer.decode(ids[4:-2]))


def test_a_model_with_learned_positions_and_no_pad_token(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=48)
    own = copy.deepcopy(tokenizer)
    own.chat_template = own.pad_token = None
    made = save(GPT2LMHeadModel(config), own, tmp_path / "gpt2")
    evaluator = Evaluator(made, batch_size=2)
    assert evaluator.tokenizer.pad_token == "<|assistant_end|>"
    prompts = ["Hi!", "word " * 60]  # the second is longer than the model's positions
    answers = evaluator.answers(prompts, max_new_tokens=512)
    assert len(answers) == 2
    assert evaluator.answer_budget([[0] * 10], 512) == 38
    assert evaluator.answer_budget([[0] * 60], 512) == 24
    assert evaluator.answer_budget([[0] * 10], 12) == 12


def test_the_answer_token_is_the_one_of_training(folder):
    chats, plain = Evaluator(folder()), Evaluator(folder(chat=False))
    for evaluator, written in ((chats, "B"), (plain, " B")):
        ids, tokens = evaluator.split_choices("Which?", "ABC")
        assert evaluator.tokenizer.decode([*ids, tokens[1]]).endswith(written)
        answered = evaluator.prompt_ids("Which?", answer="B")
        assert answered[: len(ids) + 1] == [*ids, tokens[1]]
    assert chats.prompt_ids("Which?") == chats.split_choices("Which?", "ABC")[0]


@pytest.mark.parametrize("chat", [True, False])
def test_a_special_token_in_a_question_is_plain_text_as_in_training(folder, chat):
    evaluator = Evaluator(folder(chat=chat))
    marks = ["<|user_start|>", "<|assistant_end|>", "<|bos|>"]
    ids = evaluator.prompt_ids(f"What is {''.join(marks)} for?")
    special = evaluator.tokenizer.convert_tokens_to_ids(marks)
    expected = [1, 0, 1] if chat else [0, 0, 1]  # those of the template, and BOS
    assert [ids.count(token) for token in special] == expected
    assert "<|user_start|><|assistant_end|><|bos|> for?" in evaluator.tokenizer.decode(ids)
    if chat:
        prepared = load_tokenizer(evaluator.folder)
        messages = [{"role": "user", "content": f"What is {''.join(marks)} for?"}]
        messages.append({"role": "assistant", "content": "x"})
        trained, _ = encode_conversation(messages, prepared)
        assert ids == trained[: len(ids)]
        assert evaluator.prompt_ids(messages[0]["content"], answer="x")[: len(trained)] == trained


def test_a_prompt_that_is_too_long_loses_its_middle(folder):
    evaluator = Evaluator(folder(max_position_embeddings=64))
    ids = evaluator.prompt_ids("first " + "word " * 100 + "last?")
    kept = evaluator.fitted(ids, 32)
    assert kept == ids[:16] + ids[-16:]
    text = evaluator.tokenizer.decode(kept)
    assert text.startswith("<|bos|><|user_start|>first")
    assert text.endswith("last?<|user_end|><|assistant_start|>")
    assert evaluator.fitted(ids[:32], 32) == ids[:32]
    assert len(evaluator.fitted(ids, 31)) == 33


def test_choices_with_the_same_token_are_refused(folder):
    evaluator = Evaluator(folder())
    with pytest.raises(DataError, match="does not tell the choices apart"):
        evaluator.split_choices("Q", ["A", "A"])


def test_a_base_stage_gets_plain_prompts(tmp_path, folder):
    made = folder()
    assert Evaluator(made).is_chat
    (tmp_path / "nanochatTrue" / "stage.json").write_text(
        '{"stage": "base", "status": "finished", "settings": {}}'
    )
    evaluator = Evaluator(made)
    assert not evaluator.is_chat
    ids = evaluator.prompt_ids("Why?")
    assert evaluator.tokenizer.decode(ids) == "<|bos|>Question: Why?\nAnswer:"


def test_the_calculator_works_during_generation(make_model, tokenizer, tmp_path):
    # after the result of the call, generation continues from <|output_end|>
    made = rigged_to_say("<|python_start|>6*7<|python_end|>", make_model, tokenizer, tmp_path)
    evaluator = Evaluator(made, batch_size=2)
    assert evaluator.has_calculator
    # the model never generates <|output_start|> and <|output_end|>: only the calculator does
    assert evaluator.answers(PROMPTS[:3]) == ["<<6*7=42>>"] * 3
    assert Evaluator(made).answers(PROMPTS[:1], max_new_tokens=5) == ["<<6*7>>"]


def test_the_calculator_handles_each_row_separately(tokenizer):
    names = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
    call, end, output, output_end = tokenizer.convert_tokens_to_ids(list(names))
    five, seven, plus, word = (tokenizer(t)["input_ids"][0] for t in ("5", "7", "+", "a"))
    rows = [
        [call, five, plus, seven, end],  # can be evaluated
        [word, call, word, word, end],  # cannot
        [word, word, word, word, end],  # no call
        [call, five, end, five, end],  # a stray end token
        [word, word, call, five, plus],  # not ended yet
    ]
    calculator = Calculator(tokenizer, start=2)
    prompt = [[call, end]] * len(rows)  # calls in the prompt are ignored
    scores = torch.zeros(len(rows), 512)
    assert torch.equal(calculator(torch.tensor(prompt), scores.clone()), scores)
    ids = torch.tensor([[call, end, *row] for row in rows])
    forced = []
    for _ in range(6):
        scores = calculator(ids, torch.zeros(len(rows), 512))
        free = (scores == 0).all(dim=1)
        assert free[1:].all()
        chosen = torch.where(free, torch.full_like(free, 0, dtype=torch.int64), scores.argmax(1))
        forced.append(None if free[0] else int(chosen[0]))
        ids = torch.cat([ids, torch.where(free, word, chosen)[:, None]], dim=1)
    twelve = tokenizer("12")["input_ids"]
    expected = [output, *twelve, output_end]
    assert forced[: len(expected)] == expected
    assert set(forced[len(expected) :]) == {None}


def test_a_model_without_the_tokens_has_no_calculator(tmp_path, make_model, tokenizer):
    made = save(make_model(), tokenizer, tmp_path / "m")
    text = (tmp_path / "m" / "tokenizer.json").read_text().replace("<|output_start|>", "<|o|>")
    (tmp_path / "m" / "tokenizer.json").write_text(text)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        path = tmp_path / "m" / name
        path.write_text(path.read_text().replace("<|output_start|>", "<|o|>"))
    assert not Evaluator(made).has_calculator


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        Evaluator("./nothing")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="tokenizer"):
        load_its_tokenizer(str(tmp_path))


def test_the_tokenizer_is_unchanged(folder):
    made = folder()
    assert load_its_tokenizer(made).get_vocab() == AutoTokenizer.from_pretrained(made).get_vocab()

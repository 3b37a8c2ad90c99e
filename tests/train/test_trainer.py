"""The step: its gradient against padded references, stock SFTTrainer's curve, and lost memory."""

import copy
import json
import random

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface
from trl import SFTConfig, SFTTrainer

from hfsft.errors import MemoryShortage, RecipeError
from hfsft.tokens.encoding import IGNORED
from hfsft.train.arguments import arguments
from hfsft.train.held_out import attention_of
from hfsft.train.step import StepSampler
from hfsft.train.trainer import SFTStageTrainer

LENGTH = 64


def conversations(count: int, seed: int = 0) -> datasets.Dataset:
    """Chats of 4 to 64 tokens, some parts of each trained on."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(10, 512) for _ in range(rng.randint(4, LENGTH))]
        labels = [IGNORED, *(token if rng.random() < 0.6 else IGNORED for token in ids[1:])]
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids, "labels": labels})
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def make_trainer(make_stage, tokenizer):
    """Makes an `SFTStageTrainer` of 8 conversations a step on the CPU."""

    def make(model, train=None, examples=8, steps=2, held_out=None, in_4bit=False, **settings):
        settings = {
            "eval_strategy": "no" if held_out is None else "steps",
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "optim": "adamw_torch",
            **settings,
        }
        stage = make_stage(
            examples_per_step=examples,
            max_steps=steps,
            held_out=0 if held_out is None else len(held_out),
            eval_budget=1.0,
            load_in_4bit=in_4bit,
            trainer=settings,
        )
        train = conversations(40) if train is None else train
        train = train.select(StepSampler(len(train), steps * examples, 42))
        return SFTStageTrainer(
            stage,
            examples,
            LENGTH,
            model=model,
            args=arguments(stage, train, examples),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )

    return make


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_by_one(model, rows) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of conversations one by one, without anything of hfsft."""
    tokens = sum(sum(label != IGNORED for label in row["labels"][1:]) for row in rows)
    model.zero_grad()
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction="sum"
        )
        (loss / tokens).backward()
        total += loss.item() / tokens
    return total, gradients(model)


def step(trainer, rows) -> float:
    """One `training_step` of the trainer, without the optimizer."""
    trainer.model.zero_grad()
    batch = trainer.data_collator(rows)
    items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    return trainer.training_step(trainer.model, batch, items).item()


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("rows", [0, 1, 2, 100])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", ["nanochat", "llama"])
def test_gradient_is_that_of_the_conversations_one_by_one(
    make_model, make_trainer, model_type, checkpointing, rows
):
    model = make_model(model_type)
    train = list(conversations(32))
    expected_loss, expected = one_by_one(model, train)
    trainer = make_trainer(
        model, per_device_train_batch_size=max(rows, 1), gradient_checkpointing=checkpointing
    )
    trainer.rows = rows
    assert trainer.fused and model.config._attn_implementation == "hfsft_documents"
    if checkpointing:
        model.gradient_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
    assert step(trainer, train) == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("model_type", ["nanochat", "llama"])
def test_gradient_of_an_adapter(make_model, make_trainer, model_type):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(make_model(model_type), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    train = list(conversations(16))
    loss, expected = one_by_one(model, train)
    trainer = make_trainer(model)
    assert trainer.fused
    assert step(trainer, train) == pytest.approx(loss, rel=1e-6)
    assert len(expected) == 2 * 2 * (7 if model_type == "llama" else 6)
    assert_same_gradients(gradients(trainer.model), expected)


def test_an_adapter_of_4bit_weights_trains_in_float32(make_model, make_trainer):
    """trl casts it to bfloat16 where the model says that it is in 4 bits."""
    model = make_model("llama")
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trainer = make_trainer(model, in_4bit=True)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_model_whose_head_is_not_plain_still_has_its_own_gradient(make_model, make_trainer):
    model = make_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    train = list(conversations(16))
    loss, expected = one_by_one(model, train)
    trainer = make_trainer(model)
    assert not trainer.fused
    assert step(trainer, train) == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(gradients(model), expected)


def test_a_model_that_cannot_keep_documents_apart_gets_one_a_row(make_model, make_trainer):
    model = reading_rows_as_one_text(make_model("llama"))
    train = list(conversations(16))
    loss, expected = one_by_one(model, train)
    trainer = make_trainer(model)
    assert trainer.data_collator.alone
    assert step(trainer, train) == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(gradients(model), expected)


def test_an_attention_that_refuses_the_model_is_not_used(make_model, make_trainer, monkeypatch):
    def refusing(*args, **kwargs):
        raise RuntimeError("This flash attention build requires head_size % 8 == 0")

    monkeypatch.setitem(AttentionInterface._global_mapping, "refusing", refusing)
    monkeypatch.setattr("hfsft.train.step.packed_attention", lambda *args: "refusing")
    model = make_model("llama")
    trainer = make_trainer(model)
    assert trainer.fused and model.config._attn_implementation == "sdpa"
    train = list(conversations(16))
    loss, expected = one_by_one(model, train)
    assert step(trainer, train) == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(gradients(model), expected)


def reading_rows_as_one_text(model):
    """Has a model ignore where a row's documents begin."""
    inner = model.model.forward
    model.model.forward = lambda *args, position_ids=None, cu_seq_lens_q=None, **kwargs: inner(
        *args,
        cu_seq_lens_q=torch.arange(
            0, kwargs["input_ids"].numel() + 1, kwargs["input_ids"].shape[1]
        ),
        **kwargs,
    )
    return model


def test_dft_is_held_against_the_loss_from_materialised_logits(make_model, make_trainer):
    model = make_model("llama")
    train = list(conversations(8))
    trainer = make_trainer(model, loss_type="dft")
    assert trainer.fused and model.config._attn_implementation == "hfsft_documents"
    expected, tokens = 0.0, 0
    for row in train:
        ids = torch.tensor([row["input_ids"]])
        with attention_of(model, "sdpa"):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        expected += (losses * (-losses).exp())[labels != IGNORED].sum().item()
        tokens += int((labels != IGNORED).sum())
    assert step(trainer, train) == pytest.approx(expected / tokens, rel=1e-5)
    # a fused loss that differs is refused: the model's own would silently train without dft
    with pytest.raises(RecipeError, match="loss_type: dft does not reproduce"):
        make_trainer(reading_rows_as_one_text(make_model("llama")), loss_type="dft")


@pytest.mark.parametrize("model_type", ["nanochat", "llama"])
def test_twenty_steps_are_those_of_stock_sfttrainer(
    make_model, make_trainer, tokenizer, tmp_path, model_type
):
    train = conversations(100)
    order = list(StepSampler(100, 160, 42))
    stock = SFTTrainer(
        model=make_model(model_type),
        args=SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=20,
            learning_rate=1e-3,
            logging_steps=1,
            optim="adamw_torch",
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=train.select(order),
        processing_class=tokenizer,
    )
    stock.train()
    ours = make_trainer(make_model(model_type), train, steps=20, gradient_checkpointing=False)
    ours.train()
    curves = [
        [line["loss"] for line in trainer.state.log_history if "loss" in line]
        for trainer in (stock, ours)
    ]
    assert len(curves[0]) == 20 and curves[0][0] - curves[0][-1] > 0.05
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    accuracies = [
        [line["mean_token_accuracy"] for line in trainer.state.log_history if "loss" in line]
        for trainer in (stock, ours)
    ]
    # stock averages over micro-batches what ours counts over tokens
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.05)


def test_a_micro_batch_never_exceeds_its_rows(make_model, make_trainer):
    seen = []
    model = make_model("llama")
    trainer = make_trainer(model, per_device_train_batch_size=3)
    inner = model.model.forward
    model.model.forward = lambda *a, **k: (seen.append(k["input_ids"].shape), inner(*a, **k))[1]
    step(trainer, list(conversations(32)))
    assert sum(rows for rows, _ in seen) < 32
    assert max(rows for rows, _ in seen) == 3 and max(width for _, width in seen) <= LENGTH


# --- memory ---


class RunsOut:
    """Makes a model's forward raise torch's own error above so many tokens, from a call on."""

    def __init__(self, model, tokens, after=0):
        self.inner, self.tokens, self.after = model.model.forward, tokens, after
        self.calls = self.failed = 0
        model.model.forward = self

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls > self.after and kwargs["input_ids"].numel() > self.tokens:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(("tokens", "rows"), [(2 * LENGTH, 2), (LENGTH, 1), (40, 0)])
def test_out_of_memory_leaves_the_result_as_it_is(make_model, make_trainer, tokens, rows):
    train = conversations(64).filter(lambda row: len(row["input_ids"]) <= 40)
    trainers = []
    for start in (rows, 4):
        # dropout: what is drawn for the step that is given up is drawn again
        model = make_model("llama", attention_dropout=0.1)
        trainer = make_trainer(model, train, 32, steps=4, gradient_checkpointing=False)
        trainer.rows = start
        if start == 4:
            lost = RunsOut(model, tokens, after=1)  # in the second micro-batch
        trainer.train()
        trainers.append(trainer)
    assert [trainer.rows for trainer in trainers] == [rows, rows]
    assert lost.failed == {2: 1, 1: 2, 0: 3}[rows]
    logs = [[line for line in trainer.state.log_history if "loss" in line] for trainer in trainers]
    assert [len(log) for log in logs] == [4, 4]
    for key in ("loss", "grad_norm", "mean_token_accuracy"):
        started_small, shrank = ([line[key] for line in log] for log in logs)
        assert shrank == pytest.approx(started_small, rel=1e-5)
    assert len({trainer.state.num_input_tokens_seen for trainer in trainers}) == 1


def test_dropout_is_the_same_however_a_step_is_cut_up(make_model, make_trainer):
    logs = []
    for rows, dropout in ((1, 0.5), (4, 0.5), (4, 0.0)):
        lora = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear")
        torch.manual_seed(1)
        model = get_peft_model(make_model("llama"), lora)
        trainer = make_trainer(
            model, conversations(96), 32, steps=3, per_device_train_batch_size=rows
        )
        trainer.train()
        logs.append([line["grad_norm"] for line in trainer.state.log_history if "loss" in line])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert logs[0] != pytest.approx(logs[2], rel=1e-2)


def test_a_conversation_that_does_not_fit_says_so(make_model, make_trainer):
    model = make_model("llama")
    trainer = make_trainer(model)
    RunsOut(model, 40)
    with pytest.raises(MemoryShortage, match=r"52 tokens in one document on cpu\n.*hfsft plan"):
        trainer.train()


def test_other_errors_pass_through(make_model, make_trainer):
    model = make_model("llama")
    trainer = make_trainer(model)

    def broken(*args, **kwargs):
        raise RuntimeError("shape mismatch")

    model.model.forward = broken
    with pytest.raises(RuntimeError, match="shape mismatch"):
        trainer.train()


# --- validation ---


def one_after_another(trainer, held_out) -> list[float]:
    """The summed loss of each conversation by itself, in the same order."""
    with attention_of(trainer.model, "sdpa"):
        return [one_by_one(trainer.model, [row])[0] * trained_tokens(row) for row in held_out]


def trained_tokens(row) -> int:
    return sum(label != IGNORED for label in row["labels"][1:])


@pytest.fixture
def held_out():
    rows = conversations(60, seed=1)
    return rows.add_column("source", ["some", "others"] * 30)


@pytest.mark.parametrize(("batch", "fused"), [(1, True), (50, True), (3, False)])
def test_validation_has_the_loss_of_each_conversation(
    make_model, make_trainer, held_out, batch, fused
):
    model = make_model("nanochat")
    trainer = make_trainer(model, held_out=held_out, per_device_eval_batch_size=batch)
    assert trainer.fused
    if not fused:
        trainer.fused, trainer.data_collator.alone = False, True
        model.set_attn_implementation("sdpa")
    found = trainer.evaluate()
    line = json.loads((trainer.stage.folder / "validation.jsonl").read_text())
    expected = one_after_another(trainer, held_out)
    assert line["losses"] == pytest.approx(expected, rel=1e-5)
    assert line["tokens"] == [trained_tokens(row) for row in held_out]
    assert found["eval_loss"] == pytest.approx(sum(expected) / sum(line["tokens"]), rel=1e-6)
    some = sum(expected[::2]) / sum(line["tokens"][::2])
    assert found["eval_some_loss"] == pytest.approx(some, rel=1e-6)
    assert 0 <= found["eval_mean_token_accuracy"] < 0.1


def test_text_is_what_is_no_special_token_with_a_name_or_without(
    make_model, make_trainer, tokenizer
):
    (odd,) = tokenizer.encode("e", add_special_tokens=False)
    row = {"input_ids": [0, odd, odd], "labels": [IGNORED, odd, odd], "source": "a"}
    trainer = make_trainer(make_model(), held_out=datasets.Dataset.from_list([row]))
    trainer.processing_class = copy.deepcopy(tokenizer)
    trainer.processing_class.add_tokens(["e"], special_tokens=True)
    held_out = trainer.eval_dataset
    assert held_out.text_bytes(trainer.processing_class) == 0
    totals = trainer._document_losses(trainer.get_eval_dataloader(), 1)
    assert totals[0].item() > 0 and totals[3].item() == 0


def test_out_of_memory_in_validation_it_takes_smaller_parts(make_model, make_trainer, held_out):
    model = make_model()
    trainer = make_trainer(model, held_out=held_out, per_device_eval_batch_size=50)
    expected = trainer.evaluate()
    inner = model.model.forward
    lost = RunsOut(model, tokens=2 * LENGTH)
    found = trainer.evaluate()
    assert lost.failed > 3
    for name in ("eval_loss", "eval_loss_error", "eval_some_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    model.model.forward = inner
    RunsOut(model, tokens=8)
    with pytest.raises(MemoryShortage, match=r"sft: out of memory with \d+ tokens in"):
        trainer.evaluate()

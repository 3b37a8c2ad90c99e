"""The planner: its peaks beside the allocator's own record, its proposals, and its `auto`."""

import gc
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from hfsft import base, sft
from hfsft.data.tasks import facts
from hfsft.errors import MemoryShortage, ModelError
from hfsft.plan import choosing, step_memory
from hfsft.plan import plan as memory
from hfsft.plan.choosing import choose, nearest_settings, plan_run, require_fit, with_settings
from hfsft.plan.plan import CUDA_CONTEXT, estimated_seconds, limit_of, plan_stage
from hfsft.plan.printing import print_plan
from hfsft.recipe.loading import load_recipe

# large enough that activations, states and the head matter beside each other
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}
SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
CHECKPOINTING = ("--gradient_checkpointing", "true")
# benchmarks/planner.py has more of them, and larger ones
SETTINGS = [
    pytest.param("nanochat", (), marks=pytest.mark.slow),
    pytest.param("nanochat", (*CHECKPOINTING, "--lora.r", "8"), marks=pytest.mark.slow),
    ("llama", (*CHECKPOINTING, "--optim", "adamw_bnb_8bit")),
    ("llama", ("--examples_per_step", "4")),
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Every test runs in a folder of its own, with a recipe for it."""
    monkeypatch.chdir(tmp_path)
    shared = {"held_out": 0, "max_steps": 2, "per_device_train_batch_size": 4}
    shared |= {"max_length": 256, "save_strategy": "no"}
    recipe = {
        "name": "r",
        "tokenizer": {"path": "nanochat"},
        "model": {"model_type": "nanochat", **SHAPE},
        "base": {"data": ["facts"], "tokens_per_step": 2048, **shared},
        "sft": {
            "model_name_or_path": "base",
            "data": [{"path": "chats.jsonl"}],
            "assistant_only_loss": False,
            "examples_per_step": 8,
            "optim": "adamw_torch_fused",
            "gradient_checkpointing": False,
            **shared,
        },
    }
    Path("r.yaml").write_text(json.dumps(recipe))
    return tmp_path


def model_folder(**settings) -> str:
    """A folder that holds a model's configuration and no weights."""
    config = AutoConfig.for_model(**settings)
    config.save_pretrained(settings["model_type"])
    return settings["model_type"]


def smollm2():
    """A recipe of SmolLM2-135M, 2 x 1,024 tokens of 32 conversations."""
    folder = model_folder(**SMOLLM2_135M)
    command = ("--model_name_or_path", folder, "--max_length", "1024", "--examples_per_step", "32")
    return load_recipe("r.yaml", *command, "--device_batch_size", "2", stage="sft")


def allocated(run) -> int:
    """The most bytes that lived at once, by the allocator's own record."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    live = highest = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_plan_is_what_a_stage_allocates(kind, settings, make_model, tokenizer):
    make_model(kind, **SHAPE).save_pretrained(kind)
    tokenizer.save_pretrained(kind)
    text = " ".join(facts())
    with open("chats.jsonl", "w") as file:  # longer than a row, so that every row is full
        for start in range(0, 1000, 50):
            answer = {"role": "assistant", "content": text[start : start + 3000]}
            file.write(json.dumps({"messages": [{"role": "user", "content": "?"}, answer]}) + "\n")
    argv = ("r.yaml", "--model_name_or_path", kind, *settings, "--quiet")
    recipe = load_recipe(*argv, stage="sft")
    plan = plan_stage(recipe, recipe.sft)
    assert plan.peak - plan.overhead == pytest.approx(allocated(lambda: sft.main(*argv)), rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_plan_is_what_base_allocates(tokenizer):
    tokenizer.save_pretrained("nanochat")
    recipe = load_recipe("r.yaml", stage="base")
    plan = plan_stage(recipe, recipe.base)
    real = allocated(lambda: base.main("r.yaml", "--quiet"))
    assert plan.peak - plan.overhead == pytest.approx(real, rel=0.05)


def test_what_each_setting_saves():
    recipe = smollm2()

    def plan(**changes):
        return plan_stage(recipe, with_settings(recipe.sft, **changes), device_type="cuda")

    plain = plan()
    assert plain.parameters == plain.trained_parameters == 134_515_008
    assert plain.weights == pytest.approx(4 * 134_515_008, rel=1e-3)
    assert plain.optimizer == pytest.approx(8 * 134_515_008, rel=1e-3)
    assert plan(gradient_checkpointing=True).activations < 0.3 * plain.activations
    # embeddings stay in 32 bits: 28.3 M parameters of 134.5 M
    in_8_bits = 134_515_008 - 49152 * 576
    eight = plan(optim="adamw_bnb_8bit")
    assert eight.optimizer == pytest.approx(8 * 49152 * 576 + 2 * in_8_bits, rel=0.05)
    paged = plan(optim="paged_adamw_8bit")
    assert paged.optimizer < 0.05 * eight.optimizer
    assert any("paged" in note for note in paged.notes)
    lora = plan(lora={"r": 8})
    assert lora.trained_parameters < 0.05 * plain.parameters
    assert max(lora.gradients, lora.optimizer) < 0.1 * plain.gradients
    four = plan(lora={"r": 8}, load_in_4bit=True)
    # 106 M weights of linear layers at 4.127 bits, the rest at 32
    expected = 4 * four.trained_parameters + 4 * 49152 * 576 + 4.127 / 8 * in_8_bits
    assert four.weights == pytest.approx(expected, rel=0.01)
    assert four.peak < lora.peak < plain.peak
    assert plan(max_length=512).peak < plain.peak
    assert plan(attn_implementation="eager").peak > 1.5 * plain.peak  # 30 layers of 2 x 9 x 1,024²


def test_validation_can_be_the_peak():
    folder = model_folder(model_type="llama", **SHAPE)
    recipe = load_recipe("r.yaml", "--model_name_or_path", folder, stage="sft")
    stage = with_settings(recipe.sft, held_out=10, per_device_eval_batch_size=256)
    plan, without = (plan_stage(recipe, item) for item in (stage, with_settings(stage, held_out=0)))
    assert plan.phase == "validation" and "validation" not in without.phases
    assert plan.peak - plan.overhead > 1.5 * (without.peak - without.overhead)


@pytest.mark.parametrize("kind", ["nanochat", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_many_layers_are_a_straight_line(kind, checkpointing, monkeypatch):
    folder = model_folder(model_type=kind, **SHAPE | {"num_hidden_layers": 16})
    recipe = load_recipe("r.yaml", "--model_name_or_path", folder, stage="sft")
    stage = with_settings(recipe.sft, gradient_checkpointing=checkpointing)
    line = plan_stage(recipe, stage)
    monkeypatch.setattr(step_memory, "DEPTHS", (8, 16))
    whole = plan_stage(recipe, stage)
    assert line.peak - line.overhead == pytest.approx(whole.peak - whole.overhead, rel=0.01)
    assert line.phases == pytest.approx(whole.phases, rel=0.02)


def test_many_rows_are_a_straight_line(monkeypatch):
    # a vocabulary of which 16 tokens fill a chunk of the head
    folder = model_folder(model_type="llama", **SHAPE | {"vocab_size": 2**20})
    argv = ("--model_name_or_path", folder, "--max_length", "64", "--device_batch_size", "40")
    recipe = load_recipe("r.yaml", *argv, "--examples_per_step", "80", stage="sft")
    line = plan_stage(recipe, recipe.sft)
    monkeypatch.setattr(step_memory, "TRACED_CHUNKS", 1000)
    assert line.phases == pytest.approx(plan_stage(recipe, recipe.sft).phases, rel=0.01)


def test_nearest_settings_fit():
    recipe = smollm2()
    peak = plan_stage(recipe, recipe.sft, device_type="cuda").peak
    found = nearest_settings(recipe, recipe.sft, int(0.85 * peak), "cuda")
    keys = [next(iter(changes)) for changes, _ in found]
    assert {"per_device_train_batch_size", "gradient_checkpointing", "max_length"} <= set(keys)
    for changes, plan in found:
        assert len(changes) == 1 or set(changes) == {"dtype", "optim"}
        stage = with_settings(recipe.sft, **changes)
        assert plan == plan_stage(recipe, stage, int(0.85 * peak), "cuda")
        assert plan.fits and plan.headroom >= 0
    length = next(changes["max_length"] for changes, _ in found if "max_length" in changes)
    longer = with_settings(recipe.sft, max_length=length + 64)
    assert not plan_stage(recipe, longer, int(0.85 * peak), "cuda").fits


def test_nearest_settings_together_or_none():
    recipe = smollm2()
    (changes, plan), *more = nearest_settings(recipe, recipe.sft, int(1.69e9), "cuda")
    assert len(changes) > 1 and not more and plan.fits
    assert nearest_settings(recipe, recipe.sft, 10**9, "cuda") == []


def test_a_step_that_does_not_fit_is_refused():
    recipe = smollm2()
    plan = plan_stage(recipe, recipe.sft, device_type="cuda")
    assert require_fit(recipe, recipe.sft, plan.peak, "cuda").headroom == 0
    with pytest.raises(MemoryShortage) as refused:
        require_fit(recipe, recipe.sft, plan.peak - 10**8, "cuda")
    said = str(refused.value)
    assert refused.value.exit_status == 2
    assert said.startswith(f"sft: needs {plan.peak / 1e9:.2f} GB at its peak")
    assert "0.10 GB more than there is" in said and "--gradient_checkpointing true" in said
    assert said.count("\n") == 3
    told = load_recipe("r.yaml", "--model_name_or_path", "llama", "--ignore_plan", stage="sft")
    assert not require_fit(told, told.sft, memory.CPU_OVERHEAD, "cpu").fits


def test_offloaded_activations_are_not_on_the_card():
    recipe = smollm2()
    stage = with_settings(recipe.sft, gradient_checkpointing=True)
    kept = plan_stage(recipe, stage, device_type="cuda")
    offload = with_settings(stage, activation_checkpointing_kwargs={"offload": True})
    moved = plan_stage(recipe, offload, device_type="cuda")
    # the input of each of 30 layers: 2 x 1,024 tokens, 576 wide, in 32 bits
    assert kept.phases["head"] - moved.phases["head"] == 30 * 2 * 1024 * 576 * 4
    assert moved.weights == kept.weights


AUTO = {
    "per_device_train_batch_size": "auto",
    "gradient_checkpointing": "auto",
    "optim": "auto",
}


def test_auto_takes_the_largest_micro_batch_and_the_cheapest_settings():
    recipe = smollm2()
    stage = with_settings(recipe.sft, **AUTO)
    seen = []
    for limit in (80 * 10**9, 8 * 10**9, int(3.3e9)):
        chosen, why = choose(recipe, stage, limit, "cuda")
        plan = plan_stage(recipe, chosen, limit, "cuda")
        assert plan.peak <= choosing.MARGIN * limit
        assert chosen.examples_per_step == 32
        assert "\n" not in why and f"{limit / 1e9:.2f} GB" in why
        seen.append((plan.rows, plan.checkpointing, plan.optim))
        if plan.rows < 32:
            more = with_settings(chosen, per_device_train_batch_size=plan.rows + 1)
            assert plan_stage(recipe, more, device_type="cuda").peak > choosing.MARGIN * limit
    assert seen[0] == (32, False, "adamw_torch_fused")
    assert seen[1][0] >= 4
    assert seen[-1][1:] == (True, "adamw_bnb_8bit")
    # too little for anything: the smallest there is, which its plan then refuses
    chosen, _ = choose(recipe, stage, 10**9, "cuda")
    assert plan_stage(recipe, chosen, 10**9, "cuda").rows == 1


def test_auto_leaves_what_is_given():
    recipe = smollm2()
    assert choose(recipe, recipe.sft, 10**9, "cuda") == (recipe.sft, "")
    stage = with_settings(recipe.sft, optim="auto")
    chosen, why = choose(recipe, stage, int(5.25e9), "cuda")
    assert chosen.trainer == recipe.sft.trainer | {"optim": "adamw_bnb_8bit"}
    assert "--optim adamw_torch_fused would take" in why


def test_auto_of_a_recipe():
    model_folder(model_type="llama", **SHAPE)
    argv = [f"--{key}={value}" for key, value in AUTO.items()]
    recipe = load_recipe("r.yaml", "--model_name_or_path", "llama", *argv, stage="sft")
    chosen, why = choose(recipe, recipe.sft)
    assert chosen.trainer["per_device_train_batch_size"] == 8
    assert chosen.trainer["activation_checkpointing"] is False
    assert "the whole step at once" in why


def test_a_model_that_is_not_trained_yet():
    recipe = load_recipe("r.yaml")
    base_plan, sft_plan = (plan_stage(recipe, stage) for stage in recipe.stages.values())
    assert base_plan.parameters == sft_plan.parameters
    assert base_plan.weights == sft_plan.weights
    elsewhere = load_recipe("r.yaml", "--sft.model_name_or_path", "./nowhere")
    with pytest.raises(ModelError, match="no such folder"):
        plan_stage(elsewhere, elsewhere.sft)


def test_planning_leaves_chance_and_disk_alone(here):
    recipe = load_recipe("r.yaml", "--sft.lora.r", "4")
    before = torch.get_rng_state()
    plan_run(recipe)
    assert torch.equal(before, torch.get_rng_state())
    assert [path.name for path in here.iterdir()] == ["r.yaml"]


def test_memory_of_other_processes_is_not_planned_with(make_stage, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 5 * 10**8)
    free = {"alone": 79 * 10**8, "desktop": 6 * 10**9}
    limits = {}
    for name, size in free.items():
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda size=size: (size, 8 * 10**9))
        limits[name] = limit_of(make_stage(), "cuda")
    assert limits == {"alone": 8 * 10**9, "desktop": 6 * 10**9 + 5 * 10**8 + CUDA_CONTEXT}
    assert limit_of(make_stage(memory_limit="3GB"), "cuda") == 3 * 10**9


def test_disk():
    argv = ("--sft.save_strategy", "steps", "--sft.save_total_limit", "2")
    recipe = load_recipe("r.yaml", *argv)
    plan = plan_stage(recipe, recipe.sft)
    # three checkpoints of weights and two states, and the model
    assert plan.disk == pytest.approx((3 * 12 + 4) * plan.parameters, rel=0.01)
    assert plan_stage(recipe, recipe.base).disk == 4 * plan.parameters
    # paged states take what the same ones take that are not paged
    for paged, plain in (
        ("paged_adamw_8bit", "adamw_bnb_8bit"),
        ("paged_adamw_32bit", "adamw_torch_fused"),
        ("paged_lion_8bit", "lion_8bit"),
    ):
        sizes = [
            plan_stage(recipe, with_settings(recipe.sft, optim=optim), device_type="cuda").disk
            for optim in (paged, plain)
        ]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01), paged


def test_operations_of_a_step():
    recipe = smollm2()
    plan = plan_stage(recipe, recipe.sft)
    # six a parameter and token, and causal attention of 30 layers of 576 over 1,024 tokens
    per_token = 6 * 134_515_008 + 6 * 30 * 576 * 1024
    assert plan.flops_per_step == pytest.approx(32 * 1024 * per_token, rel=0.001)
    adapter = with_settings(recipe.sft, lora={"r": 1})
    assert plan_stage(recipe, adapter).flops_per_step < 0.75 * plan.flops_per_step


def test_launches_of_a_small_model(monkeypatch):
    """Six layers, 8 conversations in two micro-batches: 5 ms a layer, whatever the arithmetic."""
    folder = model_folder(model_type="llama", **SHAPE)
    recipe = load_recipe("r.yaml", "--model_name_or_path", folder, stage="sft")
    stage = with_settings(recipe.sft, per_device_train_batch_size=4, gradient_checkpointing=False)

    def seconds(fill=1.0, **changes):
        changed = with_settings(stage, **changes)
        return estimated_seconds(plan_stage(recipe, changed, None, "cuda"), changed, fill)

    once = 6 * 5e-3
    assert seconds() == pytest.approx(2 * once)
    assert seconds(fill=0.5) == pytest.approx(once)
    assert seconds(fill=0.6) == pytest.approx(2 * once)
    assert seconds(gradient_checkpointing=True) == pytest.approx(3 * once)
    assert seconds(lora={"r": 4}) == pytest.approx(3 * once)
    assert seconds(lora={"r": 4}, load_in_4bit=True) == pytest.approx(1.45 * 3 * once)


def test_table(capsys):
    recipe = load_recipe("r.yaml")
    print_plan(plan_run(recipe, 600 * 10**6))
    shown = capsys.readouterr().out
    for words in ("base", "sft", "weights", "optimizer states", "nothing near it does", "on disk"):
        assert words in shown


def test_a_compiled_stage_is_timed_without_the_compiler_too(capsys):
    recipe = load_recipe("r.yaml", "--sft.torch_compile", "true")
    planned = plan_run(recipe, None, lambda r, s: 2.0 if s.trainer.get("torch_compile") else 1.25)
    base_data, sft_data = planned["stages"]["base"], planned["stages"]["sft"]
    assert base_data["seconds_per_step_uncompiled"] is None
    assert sft_data["seconds_per_step"] == 2.0
    assert sft_data["seconds_per_step_uncompiled"] == 1.25
    print_plan(planned)
    slower = "sft: torch_compile is not worth it: leave it out; 2 s a step with it, 1.25 s without."
    assert slower in " ".join(capsys.readouterr().out.split())
    sft_data["seconds_per_step"] = 1.0
    print_plan(planned)
    shown = " ".join(capsys.readouterr().out.split())
    assert "sft: torch_compile is worth it; 1 s a step with it, 1.25 s without." in shown


def test_a_stage_that_does_not_fit_is_not_timed(capsys):
    recipe = load_recipe("r.yaml", "--sft.memory_limit", "300MB")
    planned = plan_run(recipe, 10**12, lambda recipe, stage: 7.0)
    base_data, sft_data = planned["stages"]["base"], planned["stages"]["sft"]
    assert (base_data["seconds_per_step"], base_data["timed"]) == (7.0, True)
    assert not sft_data["fits"] and not sft_data["timed"]
    assert (
        sft_data["seconds_per_step"]
        == plan_run(recipe, 10**12)["stages"]["sft"]["seconds_per_step"]
    )
    print_plan(planned)
    shown = " ".join(capsys.readouterr().out.split())
    assert "measured from a few micro-batches" in shown
    assert "Times of sft are estimated" in shown

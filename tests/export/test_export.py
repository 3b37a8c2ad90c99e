"""Exports of tiny models: each file is read by llama.cpp, or nothing is left of it."""

import json
import resource
from pathlib import Path

import gguf
import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfsft.errors import DiskShortage, HfsftError, ModelError
from hfsft.export import architecture, export, gguf_file
from hfsft.export.export import export_model
from hfsft.export.readers import GGUFReadBack, LlamaCpp, NotProved, xllamacpp
from hfsft.tokens.tokenizer import train_tokenizer

KINDS = ("nanochat", "llama", "qwen2", "qwen3")


def silent(line: str) -> None:
    """In place of `print`."""


def export_silently(folder: Path, to: str = "gguf", *types: str, **settings) -> list[dict]:
    return export_model(str(folder), to, list(types), say=silent, **settings)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read_by_llama_cpp(save_model, kind):
    assert xllamacpp is not None, "the dev extra brings xllamacpp"
    folder = save_model(kind)
    proofs = export_silently(folder, "gguf", "f32", "f16", "q8_0")
    assert [proof["file"] for proof in proofs] == [
        "model-F32.gguf",
        "model-F16.gguf",
        "model-Q8_0.gguf",
    ]
    for proof in proofs:
        assert proof["reader"].startswith("llama.cpp")
        assert proof["conversations_equal"] == proof["conversations"] == 10
        assert proof["passages_split_otherwise"] == 0 and proof["pre_tokenizer"] == "qwen2"
        assert proof["end_tokens"] == ["<|assistant_end|>", "<|bos|>"]
        assert proof["cap"] == (15.0 if kind == "nanochat" else None)
    exact = proofs[0]
    # of the conversations without tools; one may differ where two logits are within 0.01: random
    # weights make such ties
    assert exact["answers"] - 1 <= exact["answers_equal"] and exact["answers"] == 12
    assert abs(exact["loss_exported"] - exact["loss"]) < 1e-3
    made = files(folder / "gguf")
    assert made == {"README.md", *(p["file"] for p in proofs)} | {
        p["file"].replace(".gguf", ".proof.json") for p in proofs
    }
    assert json.loads((folder / "gguf" / "model-F32.proof.json").read_text()) == exact


def test_the_file_says_how_to_sample_and_where_to_end(save_model):
    folder = save_model("llama")
    export_silently(folder, "gguf", "q8_0")
    fields = gguf.GGUFReader(folder / "gguf" / "model-Q8_0.gguf").fields
    held = {name: field.contents() for name, field in fields.items()}
    assert held["general.architecture"] == "llama"
    assert held["general.sampling.temp"] == pytest.approx(0.6)
    assert held["general.sampling.top_k"] == 50
    assert held["general.sampling.top_p"] == held["general.sampling.penalty_repeat"] == 1
    assert held["general.sampling.min_p"] == 0
    assert held["tokenizer.ggml.pre"] == "qwen2"
    assert (held["tokenizer.ggml.eos_token_id"], held["tokenizer.ggml.eot_token_id"]) == (4, 0)
    assert held["tokenizer.ggml.add_bos_token"] is False
    assert "generation" not in held["tokenizer.chat_template"].replace("add_generation_prompt", "")


def test_the_card_lists_the_files_of_earlier_exports_too(save_model):
    folder = save_model("llama")
    for kind in ("f32", "q8_0", "f16"):
        export_silently(folder, "gguf", kind)
    (folder / "gguf" / "model-Q8_0.gguf").unlink()
    export_silently(folder, "gguf", "f16")
    rows = (folder / "gguf" / "README.md").read_text().split("|---|---|---|---|\n")[1]
    assert [line.split("`")[1] for line in rows.splitlines() if line.startswith("|")] == [
        "model-F16.gguf",
        "model-F32.gguf",
    ]
    (folder / "gguf" / "model-F32.proof.json").write_text("{")
    export_silently(folder, "gguf", "f16")
    assert "`model-F32.gguf`" not in (folder / "gguf" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["nanochat", "llama"])
def test_without_llama_cpp_the_file_is_read_back(save_model, monkeypatch, kind):
    monkeypatch.setattr(export, "xllamacpp", None)
    proof, *others = export_silently(save_model(kind), "gguf", "f32", "q4_1")
    assert proof["reader"].endswith("reading the GGUF back") and len(others) == 1
    assert proof["answers_equal"] == proof["answers"]
    assert abs(proof["loss_exported"] - proof["loss"]) < 1e-4


def test_both_readers_agree_on_one_file(save_model):
    folder = save_model("qwen2")
    export_silently(folder, "gguf", "f32")
    path = folder / "gguf" / "model-F32.gguf"
    one, other = LlamaCpp(path, 256, 1), GGUFReadBack(path)
    messages = [{"role": "user", "content": "Is 1234 more than 12?"}]
    prompt = one.prompt(messages, None)
    assert prompt == other.prompt(messages, None)
    assert one.answer(prompt, 8) == other.answer(prompt, 8)
    assert one.log_probability(prompt, 2) == pytest.approx(other.log_probability(prompt, 2), 1e-3)
    for token, ends in ((4, True), (0, True), (100, False)):
        assert one.ends_at(prompt, token) is other.ends_at(prompt, token) is ends


# --- a proof that fails ---


BROKEN = {
    "heads not swapped": ("nanochat", architecture, "swapped_halves", lambda rows, width: rows),
    "gate too soft": ("nanochat", architecture, "SHARPNESS", 1.0),
    "rows not interleaved": ("llama", gguf_file, "interleaved", lambda rows, heads: rows),
    "other end tokens": ("qwen3", gguf_file, "end_tokens", lambda *_: [5]),
    "template lost": ("qwen3", gguf_file, "plain_template", lambda text: text.replace("user", "x")),
}


@pytest.mark.parametrize(
    ("fault", "reader"),
    [
        *((fault, "llama.cpp") for fault in BROKEN),
        ("heads not swapped", "transformers"),
        ("other end tokens", "transformers"),
        ("template lost", "transformers"),
    ],
)
def test_a_broken_export_is_refused_and_leaves_no_file(save_model, monkeypatch, fault, reader):
    kind, module, name, value = BROKEN[fault]
    folder = save_model(kind)
    monkeypatch.setattr(module, name, value)
    if reader == "transformers":
        monkeypatch.setattr(export, "xllamacpp", None)
    with pytest.raises(NotProved) as refused:
        export_silently(folder, "gguf", "f32")
    first, second = str(refused.value).splitlines()
    assert first.startswith(f"{folder}/gguf/model-F32.gguf: not exported: ")
    assert second.startswith("  The file is deleted") and refused.value.exit_status == 2
    assert files(folder / "gguf") == set()


def test_another_pre_tokenizer_is_seen(save_model, monkeypatch):
    folder = save_model("llama")
    train_tokenizer([f"{n} {n * 37}" for n in range(3000)], 512, "llama-bpe").save_pretrained(
        folder
    )
    (proof,) = export_silently(folder, "gguf", "f32")
    assert proof["pre_tokenizer"] == "llama-bpe"
    monkeypatch.setattr(export, "choose_splitting", lambda *_: ("qwen2", 0))
    with pytest.raises(NotProved, match="renders or tokenizes 'What is 12345"):
        export_silently(folder, "gguf", "f32")
    # but for a tokenizer that is known to split otherwise, which is said
    monkeypatch.setattr(export, "choose_splitting", lambda *_: ("qwen2", 7))
    (proof,) = export_silently(folder, "gguf", "f32")
    assert proof["passages_split_otherwise"] == 7
    assert 0 < proof["conversations_equal"] < proof["conversations"]


def test_a_fault_in_the_weights_alone_is_seen(save_model, monkeypatch):
    """One matrix of one layer, slightly wrong."""
    folder, tensors = save_model("llama"), gguf_file._tensors

    def faulty(model, names):
        for name, tensor in tensors(model, names):
            yield name, tensor * 1.05 if name == "blk.1.ffn_up.weight" else tensor

    monkeypatch.setattr(gguf_file, "_tensors", faulty)
    with pytest.raises(NotProved):
        export_silently(folder, "gguf", "f32")
    assert files(folder / "gguf") == set()


def test_what_was_exported_before_stays_when_a_proof_fails(save_model, monkeypatch):
    folder = save_model("llama")
    export_silently(folder, "gguf", "f32")
    before = {name: (folder / "gguf" / name).read_bytes() for name in files(folder / "gguf")}
    monkeypatch.setattr(gguf_file, "interleaved", lambda rows, heads: rows)
    with pytest.raises(NotProved):
        export_silently(folder, "gguf", "f32")
    assert {name: (folder / "gguf" / name).read_bytes() for name in before} == before
    monkeypatch.undo()
    export_silently(folder, "gguf", "f32")  # and is replaced by one that is proved
    assert files(folder / "gguf") == set(before)


# --- a plain folder ---


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_a_nanochat_model_becomes_a_qwen3_folder(save_model, kind):
    folder = save_model("nanochat")
    (proof,) = export_silently(folder, "qwen3", kind)
    assert proof["reader"].startswith("Qwen3ForCausalLM of transformers")
    made = folder / "qwen3"
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["rope_theta"] == 10000.0
    assert config["dtype"] == {"f32": "float32", "bf16": "bfloat16"}[kind]
    ids = torch.tensor([[0, 20, 30, 40]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(made, dtype="float32")(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    export_silently(folder, "qwen3", kind)  # replaces its own
    assert files(folder) >= {"qwen3"} and not {n for n in files(folder) if "qwen3." in n}


def test_ctranslate2_converts_the_qwen3_folder(save_model, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder = save_model("nanochat")
    export_silently(folder, "qwen3")
    converter = ctranslate2.converters.TransformersConverter(str(folder / "qwen3"))
    converter.convert(str(tmp_path / "ct2"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_dict=False
    )
    generator = ctranslate2.Generator(str(tmp_path / "ct2"))
    (found,) = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(prompt)],
        max_length=8,
        sampling_topk=1,
        include_prompt_in_result=False,
        end_token=[4, 0],
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    assert found.sequences_ids[0] == [token for token in expected if token not in (4, 0)]


# --- what is refused ---


def test_a_users_mistakes(save_model, tmp_path, make_model, tokenizer):
    llama = save_model("llama")
    for to, types, problem in (
        ("gptq", (), "--to gptq: expected gguf, ollama, qwen3"),
        ("gguf", ("q4_k",), "--type q4_k: --to gguf writes f32, f16, bf16, q8_0"),
        ("qwen3", ("q8_0",), "--type q8_0: --to qwen3 writes f32, bf16"),
        ("qwen3", (), "is a llama model, which other readers open as it is"),
    ):
        with pytest.raises(HfsftError) as refused:
            export_silently(llama, to, *types)
        assert problem in str(refused.value)
    sliding = save_model("qwen2", use_sliding_window=True)
    with pytest.raises(ModelError, match="use_sliding_window: true, which hfsft cannot export"):
        export_silently(sliding)
    assert not (llama / "gguf").exists() and not (sliding / "gguf").exists()


def test_a_context_too_short_for_a_conversation_is_refused(save_model):
    with pytest.raises(ModelError, match="its context of 8 tokens or its chat template takes none"):
        export_silently(save_model("llama", max_position_embeddings=8))


def test_unknown_architectures_and_broken_folders(save_model, tmp_path):
    folder = save_model("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="is a gpt2 model; hfsft exports nanochat, llama, qwen2"):
        export_silently(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        export_silently(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="its weights cannot be read"):
        export_silently(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HfsftError, match="holds no finished stage and no model"):
        export_silently(tmp_path / "empty")
    with pytest.raises(ModelError, match="no such folder"):
        export_silently(tmp_path / "nowhere")
    assert not (folder / "gguf").exists()


@pytest.mark.parametrize(("to", "kind"), [("gguf", "f32"), ("qwen3", "f32")])
def test_a_full_disk_is_said_and_leaves_no_file(save_model, to, kind):
    folder = save_model("nanochat")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # as a disk that runs full
    try:
        with pytest.raises(DiskShortage) as refused:
            export_silently(folder, to, kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(str(refused.value).splitlines()) == 2
    assert "cannot be written" in str(refused.value)
    assert files(folder / to) == set() and not {n for n in files(folder) if "partial" in n}


def test_a_file_of_the_users_is_not_replaced(save_model):
    folder = save_model("llama")
    (folder / "gguf").mkdir()
    for name in ("model-F32.gguf", "Modelfile", "README.md"):
        (folder / "gguf" / name).write_text("mine")
        with pytest.raises(HfsftError, match=f"{name} exists and was not written by hfsft export"):
            export_silently(folder, "ollama", "f32")
        assert (folder / "gguf" / name).read_text() == "mine"
        (folder / "gguf" / name).unlink()


def test_weights_too_large_for_f16_are_refused(save_model, monkeypatch):
    folder = save_model("nanochat")
    monkeypatch.setattr(architecture, "SHARPNESS", 2.0**20)
    with pytest.raises(ModelError, match="too large for f16; use bf16"):
        export_silently(folder, "gguf", "f16")
    assert files(folder / "gguf") == set()


@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
def test_published_templates_are_rendered_alike_with_tools_and_system(save_model, name):
    """As llama.cpp renders them: both take tools, and Llama 3.1's writes the date."""
    folder = save_model("llama", max_position_embeddings=1024)
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    (folder / "chat_template.jinja").write_text(path.read_text())
    (proof,) = export_silently(folder, "gguf", "f32")
    assert proof["conversations_equal"] == proof["conversations"] == 10


@pytest.mark.parametrize(("to", "kind"), [("gguf", "llama"), ("qwen3", "nanochat")])
def test_of_several_templates_a_gguf_has_the_default_one(save_model, to, kind):
    folder = save_model(kind, max_position_embeddings=1024)
    own = (folder / "chat_template.jinja").read_text()
    (folder / "additional_chat_templates").mkdir()
    named = folder / "additional_chat_templates" / "tool_use.jinja"
    named.write_text("{{ tools | tojson }}" + own)
    (proof,) = export_silently(folder, to, "f32")
    assert proof["conversations_equal"] == proof["conversations"] == 10
    if to == "gguf":
        (path,) = (folder / "gguf").glob("*.gguf")
        written = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
        assert written == gguf_file.plain_template(own)

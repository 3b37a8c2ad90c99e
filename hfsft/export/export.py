"""Export a model: write it for other readers, prove each file, and only then give it its name."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from hfsft import __version__
from hfsft.errors import HfsftError, ModelError, first_line
from hfsft.evaluation.answering import load_for_answers, load_its_tokenizer
from hfsft.export.architecture import as_qwen3
from hfsft.export.card import HEADING, write_card
from hfsft.export.gguf_file import ARCHITECTURES, TYPES, check_model, end_tokens, write_gguf
from hfsft.export.ollama import MADE, modelfile
from hfsft.export.proof import Proof, prove
from hfsft.export.readers import GGUFReadBack, LlamaCpp, NotProved, Reader, Transformers, xllamacpp
from hfsft.export.reference import Reference, make_reference
from hfsft.export.splitting import PASSAGES, choose_splitting
from hfsft.hub.client import NOT_LOADED, require_model, why_not_loaded
from hfsft.hub.push import finished_model
from hfsft.model.loading import write_rope_theta
from hfsft.run.disk import require_writable, shown, writing_to
from hfsft.run.files import write_text_atomically

GGUF, OLLAMA, QWEN3 = "gguf", "ollama", "qwen3"

TARGETS = (GGUF, OLLAMA, QWEN3)

DEFAULT_TYPES = {GGUF: ("q8_0", "f16"), OLLAMA: ("q8_0", "f16"), QWEN3: ("f32",)}

PLAIN_TYPES = {"f32": "float32", "bf16": "bfloat16"}  # of a folder in the Hub's format

Say = Callable[[str], None]


@dataclass(frozen=True)
class Original:
    """The model to export, opened, and what every export of it must reproduce."""

    start: str  # its folder or Hub id
    name: str  # of the exported files
    model: Any  # in float32 on the CPU
    tokenizer: Any
    ends: list[int]  # the end tokens
    reference: Reference

    def plain(self) -> Any:
        """The model in an architecture that other readers have; a Qwen3 in a NanoChat's place."""
        if self.model.config.model_type != "nanochat":
            return self.model
        plain = as_qwen3(self.model)
        plain.generation_config = self.model.generation_config
        return plain


def export_model(
    given: str, to: str, types: list[str] | None = None, out: Path | None = None, say: Say = print
) -> list[dict[str, Any]]:
    """Export a model and prove each file that is written.

    Args:
        given: a run's folder (its last finished stage), a model's folder, or a Hub id.
        to: one of `TARGETS`.
        types: of the weights; None: `DEFAULT_TYPES`.
        out: the folder to write to; None: gguf/ or qwen3/ in the model's, or, for a model on the
            Hub, NAME-gguf/ or NAME-qwen3/ here.
        say: prints a line.

    Returns:
        The proof of each file, as it is written beside it.

    Raises:
        HfsftError: for anything the user can fix.
        NotProved: if an export does not do what the original does; its file is deleted.
    """
    types = check_types(to, types)
    start = str(finished_model(Path(given))) if Path(given).is_dir() else given
    _check_architecture(start, to)
    folder = out or _default_folder(start, to)
    require_writable(folder)
    name = _name(start)
    targets = [folder / f"{name}-{kind.upper()}.gguf" for kind in types]
    _check_replaceable(folder, [] if to == QWEN3 else targets)
    tokenizer = load_its_tokenizer(start)
    if to != QWEN3:
        _take_one_template(tokenizer, start)
    splitting = None if to == QWEN3 else choose_splitting(tokenizer, start)
    model = load_for_answers(start, exact=True)
    ends = end_tokens(model, tokenizer)
    datasets.disable_progress_bars()
    say(f"asking the original, {start}")
    reference = make_reference(model, tokenizer, start, ends)
    original = Original(start, name, model, tokenizer, ends, reference)
    with writing_to(folder):
        if to == QWEN3:
            return [_export_folder(original, folder, types[0], say)]
        folder.mkdir(parents=True, exist_ok=True)
        plain = original.plain()
        exported = [
            _export_gguf(original, plain, path, kind, splitting, say)
            for path, kind in zip(targets, types, strict=True)
        ]
        write_card(folder, name, Path(start) / "README.md", exported)
        if to == OLLAMA:
            _write_modelfile(original, folder, exported[0]["file"], say)
    return exported


# --- what is asked for ---


def check_types(to: str, types: list[str] | None) -> list[str]:
    """The types of weights to write.

    Raises:
        HfsftError: if `to` or a type is none that hfsft writes.
    """
    if to not in TARGETS:
        raise HfsftError(f"--to {to}: expected {', '.join(TARGETS)}")
    known = PLAIN_TYPES if to == QWEN3 else TYPES
    types = list(dict.fromkeys(kind.lower() for kind in types or DEFAULT_TYPES[to]))
    for kind in types:
        if kind not in known:
            raise HfsftError(f"--type {kind}: --to {to} writes {', '.join(known)}")
    if to == QWEN3 and len(types) > 1:
        raise HfsftError("--type: --to qwen3 writes one folder, of one type")
    return types


def _check_architecture(start: str, to: str) -> None:
    """Refuse a model that cannot be exported before its weights are read."""
    require_model(start)
    try:
        config = AutoConfig.from_pretrained(start, trust_remote_code=False)
    except NOT_LOADED as error:
        raise ModelError(f"{start}: cannot be loaded: {why_not_loaded(error)}") from None
    known = ("nanochat", *ARCHITECTURES)
    if config.model_type not in known:
        raise ModelError(
            f"{start}: is a {config.model_type} model; hfsft exports {', '.join(known)}\n"
            "  llama.cpp's convert_hf_to_gguf.py reads other architectures"
        )
    if config.model_type != "nanochat":
        if to == QWEN3:
            raise ModelError(
                f"{start}: is a {config.model_type} model, which other readers open as it is; "
                "--to qwen3 is for nanochat models"
            )
        check_model(config, start)


def _take_one_template(tokenizer: Any, start: str) -> None:
    """Of several chat templates by name, keep the default one: a GGUF's readers take one."""
    if isinstance(tokenizer.chat_template, dict):
        try:
            tokenizer.chat_template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(f"{start}: {first_line(error)}") from None


def _default_folder(start: str, to: str) -> Path:
    folder = QWEN3 if to == QWEN3 else GGUF
    return Path(start) / folder if Path(start).is_dir() else Path(f"{_name(start)}-{folder}")


def _name(start: str) -> str:
    """`runs/demo/sft` → demo-sft, if that is a run's stage; else the last part of the path."""
    path = Path(start)
    if (path / "stage.json").is_file():
        return f"{path.resolve().parent.name}-{path.resolve().name}"
    return path.resolve().name if path.is_dir() else path.name


# --- files that are there only once they are proved ---


def _proof_path(path: Path) -> Path:
    """`NAME-Q8_0.gguf` → `NAME-Q8_0.proof.json`; a folder's is inside."""
    return path.with_suffix(".proof.json") if path.suffix == ".gguf" else path / "proof.json"


def _check_replaceable(folder: Path, files: list[Path]) -> None:
    """Refuse to replace what `hfsft export` did not write; without `files` it is the folder."""
    proved = files or [folder]
    foreign = [path for path in proved if path.exists() and not _proof_path(path).is_file()]
    for name, mark in (("README.md", HEADING), ("Modelfile", MADE)) if files else ():
        path = folder / name
        if path.is_file() and mark not in path.read_text(encoding="utf-8", errors="replace"):
            foreign.append(path)
    if foreign:
        raise HfsftError(
            f"{foreign[0]} exists and was not written by hfsft export\n"
            "  Give another folder with --out"
        )


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A name to write to; whatever is there is deleted if the block fails."""
    partial = path.with_name(f"{path.name}.partial")
    _delete(partial)  # of an export that was killed
    try:
        yield partial
    except BaseException:
        _delete(partial)
        raise


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _positions(original: Original) -> int:
    """Tokens of the longest row that the proof gives to a reader, with its answer."""
    reference = original.reference
    answers = [len(answer.prompt) + answer.most for answer in reference.answers]
    return max(*answers, *(len(document.ids) for document in reference.documents)) + 8


def _export_gguf(
    original: Original, plain: Any, path: Path, kind: str, splitting: tuple[str, int], say: Say
) -> dict[str, Any]:
    """Write and prove one GGUF file; returns its proof."""
    pre_tokenizer, differing = splitting
    say(f"writing {path}")
    with _partial(path) as partial:
        write_gguf(partial, plain, original.tokenizer, pre_tokenizer, kind, original.name)
        proof = _proved(original, lambda: _open_gguf(partial, original), path, kind, not differing)
        facts = {
            "file": path.name,
            "type": kind,
            "bytes": partial.stat().st_size,
            "sha256": _sha256(partial),
            "pre_tokenizer": pre_tokenizer,
            "passages": PASSAGES,
            "passages_split_otherwise": differing,
        }
        found = _write_proof(original, path, facts, proof, say)
        partial.replace(path)
    return found


def _export_folder(original: Original, folder: Path, kind: str, say: Say) -> dict[str, Any]:
    """Write and prove a folder in the Hub's format; returns its proof."""
    say(f"writing {folder}")
    with _partial(folder) as partial:
        plain = original.plain().to(getattr(torch, PLAIN_TYPES[kind]))
        plain.save_pretrained(partial)
        write_rope_theta(partial / "config.json")
        AutoTokenizer.from_pretrained(original.start).save_pretrained(partial)
        proof = _proved(original, lambda: Transformers(partial), folder, kind)
        size = sum(file.stat().st_size for file in partial.rglob("*"))
        facts = {"file": folder.name, "type": kind, "bytes": size}
        found = _write_proof(original, partial, facts, proof, say)
        if folder.exists():
            old = folder.with_name(f"{folder.name}.old")
            _delete(old)
            folder.rename(old)
            partial.rename(folder)
            _delete(old)
        else:
            partial.rename(folder)
    return found


def _open_gguf(path: Path, original: Original) -> Reader:
    if xllamacpp is None:
        return GGUFReadBack(path)
    return LlamaCpp(path, _positions(original), torch.get_num_threads())


def _proved(
    original: Original,
    open_reader: Callable[[], Reader],
    path: Path,
    kind: str,
    same_tokens: bool = True,
) -> Proof:
    try:
        return prove(open_reader(), original.reference, original.model, kind, same_tokens)
    except NotProved as error:
        raise NotProved(
            f"{path}: not exported: {first_line(error)}\n"
            "  The file is deleted. Another --type may be closer to the original; if none is, this "
            "is a fault of hfsft's"
        ) from None


def _write_proof(
    original: Original, path: Path, facts: dict[str, Any], proof: Proof, say: Say
) -> dict[str, Any]:
    """Write a proof beside a file, or into a folder, and say it."""
    found = {
        **facts,
        "original": original.name,
        "end_tokens": original.tokenizer.convert_ids_to_tokens(original.ends),
        **proof.as_data(),
        "versions": {"hfsft": __version__, "transformers": transformers.__version__},
    }
    write_text_atomically(_proof_path(path), json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    lines = [f"proved: {facts['file']}, {shown(facts['bytes'])}", *proof.lines()]
    if proof.cap is not None:
        lines.append(proof.cap_line())
    if facts.get("passages_split_otherwise"):
        lines.append(
            f"llama.cpp splits {facts['passages_split_otherwise']} of {PASSAGES:,} passages "
            f"otherwise, even as {facts['pre_tokenizer']}: it has no pre-tokenizer with nanochat's "
            "regex (for the next model: tokenizer: {pre_tokenizer: qwen2})"
        )
    say("\n  ".join([*lines, f"stops at {' '.join(found['end_tokens'])}"]))
    return found


def _write_modelfile(original: Original, folder: Path, file: str, say: Say) -> None:
    positions = original.model.config.max_position_embeddings
    generation = original.model.generation_config
    text = modelfile(file, original.tokenizer, generation, positions, original.ends)
    write_text_atomically(folder / "Modelfile", text)
    say(
        f"with Ollama: ollama create {original.name} -f {folder / 'Modelfile'}, "
        f"then ollama run {original.name}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

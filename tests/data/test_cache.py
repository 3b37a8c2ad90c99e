"""Cache keys: cached rows change with the code, the tokenizer and the settings they depend on."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hfsft.data.cache import PACKAGE, code_digest, imported_code
from hfsft.data.encoded import EncodedConversations
from hfsft.tokens.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package."""
    folder = tmp_path_factory.mktemp("copy") / "hfsft"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "builtin"))
    return folder


def digest_after_touching(path: Path, package: Path) -> str:
    """The digest with a comment at the end of one file, which is then restored."""
    before = path.read_text()
    path.write_text(before + "\n# touched\n")
    code_digest.cache_clear()
    try:
        return code_digest(package=package)
    finally:
        path.write_text(before)
        code_digest.cache_clear()


def test_a_copy_of_the_code_has_the_same_digest(package):
    assert code_digest(package=package) == code_digest()


@pytest.mark.parametrize(
    "file",
    [
        "tokens/row_formats.py",
        "tokens/foreign_templates.py",
        "tokens/encoding.py",
        "data/sources.py",
        "data/packing.py",
        "data/encoded.py",
    ],
)
def test_code_that_makes_rows_is_in_the_digest(package, file):
    assert digest_after_touching(package / file, package) != code_digest()


@pytest.mark.parametrize("file", ["report/report.py", "cli.py"])
def test_other_code_is_not_in_the_digest(package, file):
    assert digest_after_touching(package / file, package) == code_digest()


def test_every_module_that_is_loaded_is_in_the_digest():
    code = (
        "import sys, hfsft.data.mixture, hfsft.data.text\n"
        "print(*(name for name in sys.modules if name.split('.')[0] == 'hfsft'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    )
    loaded = set(done.stdout.split())
    assert {"hfsft", "hfsft.data.rows", "hfsft.tokens.row_formats", "hfsft.errors"} <= loaded
    assert loaded <= set(imported_code("hfsft.data.text"))


def test_imports_of_every_form_are_followed(tmp_path):
    files = {
        "__init__.py": "",
        "a.py": "from hfsft.room import (\n    b,  # why\n    c as d,\n)\nfrom hfsft import e\n",
        "room/__init__.py": "",
        "room/b.py": "def late():\n    import hfsft.f\n",
        "room/c.py": "import os\nfrom hfsft.room.g import one, two\n",
        "room/g.py": "",
        "e.py": "",
        "f.py": "from hfsft.a import late\n",
        "room/other.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found = imported_code("hfsft.a", tmp_path)
    room = {f"hfsft.room.{name}" for name in "bcg"}
    assert set(found) == {"hfsft", "hfsft.a", "hfsft.room", *room, "hfsft.e", "hfsft.f"}


def test_a_row_s_key_has_the_tokenizer_the_template_and_the_settings(
    make_stage, tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path / "a")
    template = tmp_path / "mine.jinja"
    rendered = "{% for m in messages %}{% generation %}{{ m.content }}<|assistant_end|>"
    template.write_text(rendered + "{% endgeneration %}{% endfor %}")

    def key(tokenizer, **settings) -> str:
        return EncodedConversations(make_stage("identity", **settings), tokenizer, []).key

    def loaded(chat_template=None):
        return load_tokenizer(str(tmp_path / "a"), chat_template)

    more_tokens = loaded()
    more_tokens.add_tokens(["another"])
    first = loaded(str(template))
    template.write_text(rendered + "\n{% endgeneration %}{% endfor %}")
    keys = [
        key(loaded()),
        key(more_tokens),
        key(loaded("chatml")),
        key(first),
        key(loaded(str(template))),
        key(loaded(), max_length=48),
        key(loaded(), on_too_long="drop"),
        key(loaded(), assistant_only_loss=False),
    ]
    assert len(set(keys)) == len(keys)
    assert key(loaded()) == keys[0]

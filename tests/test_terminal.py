"""Foreign text on a terminal: no control character of it gets there."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import hfsft
from hfsft.terminal import Terminal, say, say_json

HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\x9b31md\rE\x08f\u202eg\x00"
ALLOWED = re.compile(r"\x1b\[[\d;]*m")  # the styles that rich writes


def harmless(text: str) -> bool:
    return not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", ALLOWED.sub("", text)
    )


def test_rich_prints_no_foreign_control_character():
    out = io.StringIO()
    console = Terminal(
        file=out, force_terminal=True, width=200, color_system="standard", highlight=False
    )
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    for what in (HOSTILE, Text(HOSTILE, style="bold"), table):
        console.print(what, markup=False)
    console.out(HOSTILE)
    console.print(f"[bold]{HOSTILE}[/]")
    assert "\x1b[1m" in out.getvalue()  # rich's own styles stay
    assert harmless(out.getvalue()) and out.getvalue().count("title") == 6
    assert "2Jc" in out.getvalue() and "\x1b[2J" not in out.getvalue()


def test_lines_and_json(capsys):
    say(HOSTILE)
    line = capsys.readouterr().out
    assert harmless(line) and line.endswith("\n") and "title" in line
    data = {HOSTILE: [HOSTILE, "é\n\t"]}
    say_json(data, indent=1)
    printed = capsys.readouterr().out
    assert harmless(printed) and json.loads(printed) == data and "é" in printed


def test_every_console_is_a_terminal():
    package = Path(hfsft.__file__).parent
    naming = [
        path.name
        for path in package.rglob("*.py")
        if re.search(r"\bimport Console\b|\bConsole\(", path.read_text(encoding="utf-8"))
    ]
    assert naming == ["terminal.py"]


@pytest.mark.parametrize("command", ["data", "push"])
def test_a_command_prints_names_of_data_harmlessly(command, tmp_path, monkeypatch, capsys):
    from hfsft.cli import main

    recipe = tmp_path / "r.yaml"
    name = json.dumps(f"{tmp_path}/{HOSTILE[:-1]}.jsonl")
    recipe.write_text(
        f"sft: {{model_name_or_path: {tmp_path}, data: [{{path: {name}}}]}}", encoding="utf-8"
    )
    given = [str(recipe)] if command == "data" else [f"{tmp_path}/{HOSTILE[:-1]}"]
    monkeypatch.setattr(sys, "argv", ["hfsft", command, *given])
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert harmless(printed.out + printed.err)

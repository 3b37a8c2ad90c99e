"""The report of a tiny run, of incomplete ones, and with hostile text."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from hfsft import base, mid, sft
from hfsft.data.mixture import load_conversations
from hfsft.errors import HfsftError, printable
from hfsft.evaluation.evaluate import evaluate
from hfsft.report.comparison import compare_runs, write_comparison
from hfsft.report.markdown import code, fenced, html_page, plain, table
from hfsft.report.pictures import draw
from hfsft.report.report import duration, report_text, summary_text, write_report
from hfsft.run.results import read_run, speeds_of

HOSTILE = "<script>alert(1)</script> `code` ``` | a \\| b * [x](y) _z_\n# no title\x1b[31m\u202e"
RECIPE = {
    "name": "tiny",
    "sample_prompts": ["Who are you?", HOSTILE],
    "model": {"depth": 1, "vocab_size": 300, "max_position_embeddings": 96},
    "tokenizer": {"train": True},
    "base": {
        "data": [{"path": "facts", "rows": 100}],
        "held_out": 20,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
    },
    "mid": {
        "data": [{"path": "small_talk", "rows": 40}, {"path": "arithmetic", "rows": 20}],
        "held_out": 6,
        "max_length": 96,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
    },
    "sft": {
        "data": [{"path": "arithmetic", "rows": 30}],
        "held_out": 4,
        "examples_per_step": 4,
        "max_length": 96,
        "max_steps": 4,
        "eval_steps": 2,
        "logging_steps": 1,
    },
}


def write_json(path: Path, change: dict) -> None:
    """Change some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of three stages, trained on the CPU, its last two evaluated."""
    folder = tmp_path_factory.mktemp("report")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(folder)}))
    for stage in (base, mid, sft):
        stage.main(str(recipe), "--quiet")
    for name in ("mid", "sft"):
        evaluate(str(folder / "tiny" / name), ["arithmetic"], rows=5)
    return folder / "tiny"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run that a test may change."""
    leave = shutil.ignore_patterns("checkpoints", "*.safetensors", "report*")
    return shutil.copytree(trained, tmp_path / "tiny", ignore=leave)


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", text, flags=re.M)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


class Seen(HTMLParser):
    """The tags of a page, their addresses, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


# --- a complete run ---


def test_three_lines_summarize_the_results(run):
    read = read_run(run)
    lines = summary_text(read).splitlines()
    reached = {name: stage["reached"] for name, stage in read["stages"].items()}
    assert len(lines) == 3
    assert f"{read['stages']['sft']['record']['parameters']:,} parameters" in lines[0]
    assert "from random weights" in lines[0]
    assert f"sft (4 of 4 steps, {reached['sft']['tokens']:,} tokens)" in lines[0]
    before, after = (reached["sft"][key] for key in ("eval_loss_before", "eval_loss"))
    assert f"sft {before:.3f} → {after:.3f}" in lines[1]
    accuracy = read["stages"]["sft"]["evaluation"]["tasks"]["arithmetic"]["accuracy"]
    assert f"Accuracy after sft: arithmetic {accuracy:.0%}" in lines[1]
    assert f"`hfsft chat {run}/sft`" in lines[2]


def test_report_has_every_section_and_its_pictures(run):
    _, path = write_report(run)
    assert path == run / "report.md"
    text = path.read_text()
    assert list(sections(text)) == [
        "",
        "Stages",
        "Missing from this report",
        "Loss",
        "Evaluation",
        "Sample answers",
        "Cost",
        "Data",
        "Environment",
        "To reproduce it",
    ]
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert shown == [f"report/{name}.png" for name in ("loss", "evaluation", "speed", "data")]
    for name in shown:
        with Image.open(run / name) as picture:
            assert picture.width == 1600  # sharp at 800
            assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_report_has_the_figures_of_the_files(run):
    text = sections(report_text(read_run(run), {}))
    record = json.loads((run / "sft/stage.json").read_text())
    scores = json.loads((run / "sft/eval.json").read_text())["tasks"]["arithmetic"]
    assert "| steps | 2 of 2 | 2 of 2 | 4 of 4 |" in text["Stages"]
    assert f"{record['eval_loss_before']:.3f} | {record['eval_loss']:.3f} ±" in text["Loss"]
    assert re.search(r"^\| mid, small_talk \| \d", text["Loss"], re.M)  # by source
    interval = f"{scores['accuracy']:.0%} ({scores['low']:.0%} to {scores['high']:.0%})"
    assert re.search(
        rf"^\| arithmetic \| 5 \| 0% \| - \| .* \| {re.escape(interval)} \|",
        text["Evaluation"],
        re.M,
    )
    assert f"{record['peak_memory_bytes'] / 2**30:.2f} GiB" in text["Cost"]
    assert "| small_talk | 40 | 40 | 0 |" in text["Data"]
    assert f"| torch | {record['versions']['torch']} |" in text["Environment"]
    recipe = re.search("(`{3,})yaml\n(.*)\n\\1", text["To reproduce it"], re.S)[2]
    assert yaml.safe_load(recipe) == yaml.safe_load(printable((run / "recipe.yaml").read_text()))
    assert "base: not evaluated" in text["Missing from this report"]
    assert "sft, step 0:" in text["Sample answers"] and "sft, step 4:" in text["Sample answers"]


def test_advice_plan_and_energy_are_shown(run):
    plan = {"peak": 3 * 2**30}
    write_json(
        run / "sft/stage.json", {"plan": plan, "energy_joules": 7200, "stopped_at": "plateau"}
    )
    advice = {"says": "stop at 4", "rate": 0.8, "projected": {"8": [5.0, 5.5]}}
    with (run / "sft/metrics.jsonl").open("a") as file:
        line = {"step": 4, "eval_loss": 5.6, "advice": advice, "tokens": 9, "seconds": 99}
        file.write(json.dumps(line) + "\n")
    text = write_report(run)[1].read_text()
    assert "Advice on sft: stop at 4." in text
    assert "| planned memory | - | - | 3.00 GiB |" in text
    assert "| energy | - | - | 2.0 Wh |" in text
    assert "| status | finished | finished | finished at a plateau |" in text
    assert "base, mid: no plan" in sections(text)["Missing from this report"]


def test_throughput_leaves_validation_out():
    stage = {
        "validation": [
            {"eval_loss": 1, "seconds": 5.0, "eval_seconds": 3.0, "sample_seconds": 1.0}
        ],
        "training": [
            {"loss": 1, "tokens": 100, "seconds": 6.0},
            {"loss": 1, "tokens": 300, "seconds": 8.0},
        ],
    }
    assert speeds_of(stage) == [(6.0, 50.0), (8.0, 100.0)]


# --- an incomplete run ---


def test_a_run_with_only_sft(run):
    shutil.rmtree(run / "base")
    shutil.rmtree(run / "mid")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({"name": "tiny", "sft": recipe["sft"]}))
    text = report_text(read_run(run), {})
    assert "|  | sft |" in sections(text)["Stages"]
    assert "starts from | " in text and f"Next:** chat with it: `hfsft chat {run}/sft`" in text


def test_skipped_stages_are_not_due(run):
    shutil.rmtree(run / "base")
    text = report_text(read_run(run), {})
    assert "- base: not started." in sections(text)["Missing from this report"]
    assert f"Next:** chat with it: `hfsft chat {run}/sft`" in text


def test_a_stage_that_has_not_started(run):
    shutil.rmtree(run / "sft")
    text = report_text(read_run(run), {})
    assert "- sft: not started." in sections(text)["Missing from this report"]
    assert "sft has not started; run `hfsft run" in text


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            "running",
            "sft is running, or was killed; if no process trains it, `accelerate x` resumes it",
        ),
        (
            "interrupted",
            "sft was interrupted at step 2; `accelerate x` resumes from its last checkpoint",
        ),
        ("failed", "sft failed at step 2; `accelerate x` resumes from its last checkpoint"),
    ],
)
def test_an_interrupted_stage(run, status, expected):
    """Its record was never closed, and the log's last line is truncated."""
    record = json.loads((run / "sft/stage.json").read_text())
    measured = ("steps", "tokens", "seconds", "train_loss", "eval_loss", "peak_memory_bytes")
    kept = {key: value for key, value in record.items() if key not in measured}
    kept |= {"status": status, "command": "accelerate x"}
    (run / "sft/stage.json").write_text(json.dumps(kept))
    lines = (run / "sft/metrics.jsonl").read_text().splitlines()
    lines = [line for line in lines if json.loads(line)["step"] <= 2]
    (run / "sft/metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    text = report_text(read_run(run), {})
    assert expected in text
    assert "| steps | 2 of 2 | 2 of 2 | 2 of 4 |" in text
    assert "sft: not finished" in text


def test_missing_results_are_listed(run):
    for stage in run.glob("*/stage.json"):
        for name in ("data.json", "eval.json", "samples.jsonl"):
            (stage.parent / name).unlink(missing_ok=True)
        (stage.parent / "metrics.jsonl").write_text(
            '{"step": 1, "loss": NaN, "tokens": 9, "seconds": 1}\n'
        )
        write_json(stage, {"eval_loss": None, "eval_loss_before": None})
    text = write_report(run)[1].read_text()
    missing = sections(text)["Missing from this report"]
    for gap in ("not validated", "no data.json", "not evaluated", "no sample answers"):
        assert f"- base, mid, sft: {gap}" in missing
    assert "no loss on held-out data was measured after training" in text
    assert sorted(path.name for path in (run / "report").iterdir()) == ["loss.png", "speed.png"]


def test_a_folder_that_is_not_a_run_is_an_error(run, tmp_path):
    with pytest.raises(HfsftError, match="is not a run: it holds no base, mid or sft"):
        write_report(tmp_path / "nothing")
    with pytest.raises(HfsftError, match=f"is not a run.*its run is {run}"):
        write_report(run / "sft")
    (run / "mid/stage.json").write_text("{")
    for copy in (run / "mid").rglob("manifest.json"):
        copy.unlink()
    with pytest.raises(HfsftError, match="cannot be read"):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("stage.json", '{"stage": "sft", "status": "finished", "settings": {}}'),
        ("metrics.jsonl", '{"step": 1, "loss": [], "tokens": "x"}\n'),
        ("samples.jsonl", '{"step": 1}\n'),
        ("data.json", '{"sources": [{"source": 3}]}'),
        ("data.json", "[" * 100_000),
        ("eval.json", '{"tasks": {"arithmetic": {"accuracy": "x"}}}'),
    ],
)
def test_a_file_of_another_shape_is_an_error_that_says_where_to_look(run, name, text):
    (run / "sft" / name).write_text(text)
    with pytest.raises(HfsftError) as error:
        write_report(run)
    assert str(run) in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_a_folder_that_is_not_writable_is_an_error(run):
    (run / "report").write_text("in the way")
    with pytest.raises(HfsftError, match="cannot be written"):
        write_report(run)


# --- foreign text ---


@pytest.mark.parametrize("text", [HOSTILE, "| --- |", "&lt;b&gt;", "a\\", "$x$ ~~y~~", "_a_ b_c"])
def test_text_is_shown_literally(text, tmp_path):
    shown = " ".join(printable(text).split())
    page = Seen(html_page("t", table(["a"], [[plain(text)]]) + f"\n\nx {code(text)} y", tmp_path))
    assert page.text.count(shown) == 2
    assert page.tags & {"script", "b", "a", "img", "s", "em"} == set()
    block = Seen(html_page("t", fenced(text), tmp_path))
    assert printable(text).rstrip() in block.text and "h1" not in block.tags


def test_what_nothing_reads_of_the_rows_is_named(run, tmp_path, tokenizer, make_stage):
    """As a stage's own audit counts it."""
    rows = [
        {"messages": [{"role": "user", "content": f"Q{n}"},
                      {"role": "assistant", "content": "A", "glossary": "x"}], "score": n}
        for n in range(5)
    ]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"a": 1}]))
    stage = make_stage(
        str(tmp_path / "r.jsonl"), on_bad_rows="skip", max_steps=2, examples_per_step=1
    )
    load_conversations(stage, tokenizer)
    shutil.copy(stage.folder / "data.json", run / "sft/data.json")
    text = sections(report_text(read_run(run), {}))["Data"]
    assert "r.jsonl: 1 refused: " in text
    assert re.search(r"r\.jsonl: not used: .*column score \(5\)", text)
    assert re.search(r"r\.jsonl: not used: .*field glossary \(5\)", text)


def test_hostile_text_stays_text_everywhere_in_the_report(run):
    """In an answer, a source's name, a setting, a reason and the device."""
    audit = json.loads((run / "sft/data.json").read_text())
    audit["sources"][0] |= {"source": HOSTILE, "refused": {HOSTILE: 1}}
    write_json(run / "sft/data.json", audit)
    write_json(run / "sft/stage.json", {"device": HOSTILE, "command": HOSTILE})
    with (run / "sft/samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "prompt": HOSTILE, "answer": HOSTILE}) + "\n")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"name": "```\n<script>"}))
    _, path = write_report(run, as_html=True)
    page = Seen(path.read_text())
    assert "script" not in page.tags and page.text.count("<script>alert(1)</script>") >= 5
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == 4
    text = (run / "report.md").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    for line in sections(text)["Data"].splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 13


def test_access_tokens_are_removed(run):
    token = "hf_" + "a" * 30
    write_json(run / "sft/stage.json", {"command": f"HF_TOKEN={token} hfsft sft x.yaml"})
    assert token not in report_text(read_run(run), {})


# --- two runs ---


def test_runs_that_differ_beyond_noise(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["sft"]["learning_rate"] = 0.5
    versions = json.loads((other / "sft/stage.json").read_text())["versions"]
    write_json(other / "sft/stage.json", {"versions": versions | {"torch": "1.0"}})
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = [json.loads(line) for line in (other / "sft/validation.jsonl").read_text().splitlines()]
    tokens = lines[-1]["tokens"]
    lines[-1]["losses"] = [
        loss + 0.5 * n for loss, n in zip(lines[-1]["losses"], tokens, strict=True)
    ]
    (other / "sft/validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared, path = write_comparison((run, other), as_html=True)
    assert compared["recipe"] == {"sft.learning_rate": [2e-5, 0.5]}
    assert compared["environment"] == {"sft.versions.torch": [torch.__version__, "1.0"]}
    results = {(result["stage"], result["what"]): result for result in compared["results"]}
    loss = results["sft", "validation loss, nats per token"]
    assert loss["difference"] == pytest.approx(0.5) and loss["beyond_noise"] is True
    assert loss["how"] == "the same 4 held-out documents"
    assert results["mid", "validation loss, nats per token"]["beyond_noise"] is False
    score = results["sft", "arithmetic, accuracy"]
    assert score["difference"] == 0 and score["how"] == "the same 5 rows"
    assert path == other / "report" / "against-tiny.html"
    text = path.with_suffix(".md").read_text()
    assert "| sft.learning\\_rate |" not in text and "| sft.learning_rate | " in text
    assert "against-tiny.png" in text and (other / "report/against-tiny.png").is_file()


def test_losses_on_different_data_are_not_compared(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    log = other / "sft/validation.jsonl"
    digest = json.loads(log.read_text().splitlines()[-1])["documents"]

    def compared() -> dict:
        results = compare_runs(read_run(run), read_run(other))["results"]
        return next(one for one in results if one["stage"] == "sft" and "loss" in one["what"])

    log.write_text(log.read_text().replace(digest, "0"))  # as many tokens, of other documents
    assert compared()["how"] == "different held-out data: not comparable"
    log.write_text(log.read_text().replace('"documents"', '"earlier"'))
    assert compared()["how"] == "the same 4 held-out documents"
    log.unlink()
    loss = compared()
    assert "beyond_noise" not in loss and loss["how"] == "different held-out data: not comparable"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("stage.json", '{"stage": "sft", "status": "finished", "settings": {}}'),
        ("validation.jsonl", '{"step": 1}\n'),
    ],
)
def test_a_comparison_with_a_file_of_another_shape_says_where_to_look(run, tmp_path, name, text):
    other = shutil.copytree(run, tmp_path / "other")
    (other / "sft" / name).write_text(text)
    with pytest.raises(HfsftError, match="not as hfsft writes it") as error:
        write_comparison((run, other))
    assert str(other) in str(error.value) and len(str(error.value).splitlines()) == 2


# --- the command, the browser ---


def test_command_prints_three_lines_or_json(run):
    hfsft = Path(sys.executable).with_name("hfsft")
    done = subprocess.run([hfsft, "report", run, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"]["sft"]["reached"]["steps"] == 4
    done = subprocess.run([hfsft, "report", run / "sft"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) <= 2 and "Traceback" not in done.stderr


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_page_opens_from_disk_in_a_browser(run, tmp_path):
    """Every picture is drawn, at a width that fits, and no script of the data ran."""
    with (run / "sft/samples.jsonl").open("a") as file:
        answer = "<script>document.title='broken'</script><img src=x>"
        file.write(json.dumps({"step": 4, "prompt": "Who are you?", "answer": answer}) + "\n")
    page = write_report(run, as_html=True)[1]
    picture = tmp_path / "page.png"
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run hide-scrollbars"
    flags += " disable-background-networking disable-component-update disable-sync"
    command = ["chromium", *(f"--{flag}" for flag in flags.split())]
    command += [f"--user-data-dir={tmp_path / 'browser'}", "--window-size=900,1500"]
    for output in (f"--screenshot={picture}", "--dump-dom"):
        done = subprocess.run(
            [*command, output, page.as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    assert (
        "<title>tiny</title>" in done.stdout and "broken" not in done.stdout.partition("<body")[0]
    )
    with Image.open(picture) as seen:
        colours = {colour for _, colour in seen.convert("RGB").getcolors(1 << 24)}
    assert (0x00, 0x72, 0xB2) in colours  # the first curve's


def test_durations_have_two_units():
    assert [duration(s) for s in (1.24, 59.4, 61, 3599, 8040)] == [
        "1.2 s",
        "59 s",
        "1 min 1 s",
        "59 min 59 s",
        "2 h 14 min",
    ]


def test_names_that_matplotlib_would_interpret_are_drawn(run):
    audit = json.loads((run / "sft/data.json").read_text())
    audit["sources"][0]["source"] = "_$\\frac{$_" + "x" * 50
    audit["sources"].append(audit["sources"][0] | {"length_percentiles": {}})
    write_json(run / "sft/data.json", audit)
    assert draw(read_run(run), run / "report")["data"].is_file()

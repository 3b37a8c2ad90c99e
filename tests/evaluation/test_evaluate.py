"""hfsft eval: known answers, kept results, resuming, and the noise in the figures."""

import copy
import importlib.util
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from chat_rows import read_jsonl, write_jsonl
from rigged import always_follow, chain, save

from hfsft.cli import main
from hfsft.data.mixture import mix_conversations
from hfsft.errors import HfsftError
from hfsft.evaluation.differences import compare, difference
from hfsft.evaluation.evaluate import GRADED, evaluate, harness_figures, last_run
from hfsft.evaluation.kept import fingerprint, row_results
from hfsft.evaluation.printing import evaluate_and_print
from hfsft.evaluation.tasks import data_files
from hfsft.noise import wilson
from hfsft.recipe.loading import load_recipe
from hfsft.tokens.tokenizer import load_tokenizer

MMLU = str(Path(__file__).parents[1] / "rows" / "mmlu.jsonl")


@pytest.fixture(scope="module")
def arc(tmp_path_factory) -> str:
    """600 rows in ARC's schema with three to five choices and a random right answer."""
    rng = random.Random(0)
    rows = []
    for number in range(600):
        letters = "ABCDE"[: rng.choice((3, 4, 4, 5))]
        rows.append(
            {
                "question": f"Which of these is number {number}?",
                "choices": {
                    "text": [str(rng.randrange(1000)) for _ in letters],
                    "label": list(letters),
                },
                "answerKey": rng.choice(letters),
            }
        )
    path = tmp_path_factory.mktemp("arc") / "arc_easy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory, make_model, tokenizer) -> str:
    model = make_model(max_position_embeddings=1024)
    return save(model, tokenizer, tmp_path_factory.mktemp("random"))


def rigged(make_model, tokenizer, folder: Path, text: str, chat: bool = True) -> str:
    """A model that answers every prompt with the same text."""
    model = make_model("llama", hidden_size=512, num_hidden_layers=1, max_position_embeddings=1024)
    own = copy.deepcopy(tokenizer)
    end = tokenizer.eos_token_id
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if chat:
        start = tokenizer.convert_tokens_to_ids("<|assistant_start|>")
    else:
        own.chat_template = None
        start = tokenizer(":", add_special_tokens=False)["input_ids"][-1]
    return save(always_follow(model, chain([start, *ids, end]), end), own, folder)


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_that_always_answers_a(tmp_path, make_model, tokenizer, arc, chat):
    model = rigged(make_model, tokenizer, tmp_path / "a", "A" if chat else " A", chat)
    lines = Path(arc).read_text().splitlines(keepends=True)[:120]
    data = {"arc_easy": str(tmp_path / "arc.jsonl"), "mmlu": MMLU}
    (tmp_path / "arc.jsonl").write_text("".join(lines))
    found = evaluate(model, ["arc_easy", "mmlu"], data=data)
    rows = [json.loads(line) for line in lines]
    easy, mmlu = found["tasks"]["arc_easy"], found["tasks"]["mmlu"]
    assert easy["right"] == sum(row["answerKey"] == "A" for row in rows)
    assert easy["chance"] == pytest.approx(
        sum(1 / len(row["choices"]["label"]) for row in rows) / 120
    )
    assert mmlu["rows"] == 25 and mmlu["chance"] == 0.25
    assert mmlu["right"] == 5  # of the 25 real rows, five have the answer A
    assert mmlu["centred"] == pytest.approx((0.2 - 0.25) / 0.75)
    assert found["mean_centred"] == pytest.approx((easy["centred"] + mmlu["centred"]) / 2)
    assert {line["answer"] for line in row_results(tmp_path / "a", "arc_easy").values()} == {"A"}


def test_a_random_model_scores_chance(random_model, arc):
    task = evaluate(random_model, ["arc_easy"], data={"arc_easy": arc})["tasks"]["arc_easy"]
    assert task["kind"] == "categorical" and task["rows"] == 600
    assert task["low"] < task["chance"] < task["high"]
    assert task["high"] - task["low"] < 0.08


def test_gsm8k_with_the_calculator(tmp_path, make_model, tokenizer):
    """The model never generates 42 itself: only the calculator writes it, after the call."""
    call = "<|python_start|>6*7<|python_end|>"
    model = rigged(make_model, tokenizer, tmp_path / "m", call)
    rows = [
        {"question": "Six weeks have how many days?", "answer": "6*7=<<6*7=42>>42\n#### 42"},
        {"question": "Seven weeks?", "answer": "7*7=<<7*7=49>>49\n#### 49"},
    ]
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(model, ["gsm8k"], data={"gsm8k": str(data)})["tasks"]["gsm8k"]
    assert (found["kind"], found["chance"], found["rows"]) == ("generative", 0.0, 2)
    assert found["right"] == 1
    answers = {line["answer"] for line in row_results(tmp_path / "m", "gsm8k").values()}
    assert answers == {"<<6*7=42>>"}
    assert found["nanochat_right"] == 0  # no mark
    for row in rows:
        kept = next(
            line
            for line in row_results(tmp_path / "m", "gsm8k").values()
            if line["question"] == row["question"]
        )
        assert kept["expected"] == row["answer"][-2:]
        assert (kept["right"], kept["nanochat_right"]) == (kept["expected"] == "42", False)


def test_code_that_a_model_wrote(tmp_path, make_model, tokenizer):
    model = rigged(make_model, tokenizer, tmp_path / "m", " 0")
    test = "def check(candidate):\n    assert candidate() is None\n"
    rows = [
        {"prompt": "def nothing():\n", "entry_point": "nothing", "test": test},
        {
            "prompt": "def something():\n",
            "entry_point": "something",
            "test": test.replace("is", "is not"),
        },
    ]
    data = tmp_path / "humaneval.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"tasks": ["humaneval"], "data": {"humaneval": str(data)}}
    with pytest.raises(HfsftError, match="--allow_code"):
        evaluate(model, **settings)
    assert not (tmp_path / "m" / "eval.json").exists()
    found = evaluate(model, **settings, allow_code=True)["tasks"]["humaneval"]
    assert (found["right"], found["rows"]) == (1, 2)


def test_nanochats_figure_is_of_its_five_tasks_by_its_rules(
    tmp_path, make_model, tokenizer, arc, capsys
):
    model = rigged(make_model, tokenizer, tmp_path / "m", "A")
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": "1?", "answer": "#### 1"}))
    code = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f): f()"}
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(code))
    (tmp_path / "arc_easy.jsonl").write_text(Path(arc).read_text())
    (tmp_path / "arc_challenge.jsonl").write_text(Path(arc).read_text())
    (tmp_path / "mmlu.jsonl").write_text(Path(MMLU).read_text())
    names = ["arc_easy", "arc_challenge", "mmlu", "gsm8k"]
    # the folder's humaneval.jsonl is of no concern to tasks that are not run
    assert evaluate_and_print([model], names, [str(tmp_path)], None, True)["chatcore"] is None
    found = evaluate_and_print(
        *([model], [*names, "humaneval"], [str(tmp_path)], None, False), show=1, allow_code=True
    )
    easy = found["tasks"]["arc_easy"]
    # chance is 0.25 even for questions of three or five choices, and 0 where answers are written
    centred = [(easy["accuracy"] - 0.25) / 0.75] * 2 + [(0.2 - 0.25) / 0.75, 0, 0]
    assert found["chatcore"] == pytest.approx(sum(centred) / 5)
    assert found["chatcore"] != pytest.approx(found["mean_centred"], abs=1e-6)
    printed = capsys.readouterr().out
    assert f"nanochat's ChatCORE, by its rules: {found['chatcore']:.4f}" in printed
    assert "gsm8k, wrong:\n  question: 1?\n  expected: 1\n  answer: A\n" in printed


def test_prompts_that_do_not_fit_are_counted(tmp_path, make_model, tokenizer, capsys):
    model = save(make_model(max_position_embeddings=96), tokenizer, tmp_path / "m")
    rows = [{"question": f"{n} " * length, "answer": "#### 1"} for n, length in enumerate((9, 99))]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate_and_print([model], ["gsm8k"], [f"gsm8k={path}"], None, False)
    assert found["tasks"]["gsm8k"]["cut"] == 1
    assert "1 of 2 prompts are too long for the model's context" in capsys.readouterr().out


def test_lines_of_progress_without_a_terminal(random_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hfsft.evaluation.printing.HEARTBEAT", 0.01)
    evaluate_and_print([random_model], ["arithmetic"], [], tmp_path, False, rows=40, batch_size=1)
    lines = capsys.readouterr().err.splitlines()
    told = re.compile(r"(loading|arithmetic: \d+ of 40 rows), \d+ min")
    assert all(map(told.fullmatch, lines))
    assert "arithmetic: " in lines[-1]


def test_the_file_holds_what_is_returned(tmp_path, random_model):
    out = tmp_path / "out"
    found = evaluate(random_model, ["arithmetic"], rows=4, seed=3, out=out)
    assert json.loads((out / "eval.json").read_text()) == found
    assert list(found) == [
        *("model", "fingerprint", "seed", "versions", "device", "seconds", "tasks"),
        *("mean_centred", "chatcore"),
    ]
    assert found["model"] == random_model and found["seed"] == 3
    assert found["device"] == "cpu" and set(found["versions"]) == {
        *("hfsft", "torch", "transformers")
    }
    assert list(found["tasks"]["arithmetic"]) == [
        *("kind", "rows", "right", "nanochat_right", "accuracy", "low", "high", "chance"),
        *("centred", "cut", "pool", "way"),
    ]
    assert found["tasks"]["arithmetic"]["pool"] == 499
    more = evaluate(random_model, ["simple_spelling"], rows=4, seed=3, out=out)
    assert list(more["tasks"]) == ["arithmetic", "simple_spelling"]
    assert list(evaluate(random_model, ["spelling_bee"], rows=2, out=out)["tasks"]) == [
        "spelling_bee"
    ]


class Stop(Exception):
    """Interrupts an evaluation."""


def test_kept_rows_are_not_run_again(tmp_path, random_model):
    uninterrupted = evaluate(
        random_model, ["arithmetic"], rows=12, batch_size=4, out=tmp_path / "other"
    )
    asked = []

    def stop_after_a_batch(task, done, rows):
        asked.append((task, done, rows))
        if done:
            raise Stop

    def note(task, done, rows):
        asked.append((task, done, rows))

    settings = {"tasks": ["arithmetic"], "rows": 12, "batch_size": 4, "out": tmp_path / "out"}
    with pytest.raises(Stop):
        evaluate(random_model, **settings, progress=stop_after_a_batch)
    assert not (tmp_path / "out" / "eval.json").exists()
    kept = tmp_path / "out" / "eval" / "arithmetic.jsonl"
    assert len(kept.read_text().splitlines()) == 4
    with kept.open("a") as file:
        file.write('{"model": "half a li')  # as a killed process leaves it
    asked.clear()
    found = evaluate(random_model, **settings, progress=note)
    assert asked == [("arithmetic", n, 12) for n in (4, 8, 12)]
    assert found["tasks"] == uninterrupted["tasks"]
    asked.clear()
    again = evaluate(random_model, **settings, progress=note)
    assert asked == [("arithmetic", 12, 12)]
    assert again["tasks"] == uninterrupted["tasks"]
    assert len(kept.read_text().splitlines()) == 13


def test_other_weights_are_evaluated_again(tmp_path, make_model, tokenizer):
    folder = tmp_path / "m"
    model = make_model()
    save(model, tokenizer, folder)
    first = evaluate(str(folder), ["arithmetic"], rows=4)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    save(model, tokenizer, folder)
    asked = []
    found = evaluate(str(folder), ["arithmetic"], rows=4, progress=lambda *seen: asked.append(seen))
    assert asked[0] == ("arithmetic", 0, 4)
    assert found["fingerprint"] != first["fingerprint"]
    assert len(row_results(folder, "arithmetic")) == 4


def test_the_fingerprint_depends_on_contents(tmp_path, make_model, tokenizer):
    save(make_model(), tokenizer, tmp_path / "one")
    save(make_model(), tokenizer, tmp_path / "two")
    one = fingerprint(tmp_path / "one")
    assert one == fingerprint(tmp_path / "two")
    (tmp_path / "two" / "stage.json").write_text("{}")
    assert one == fingerprint(tmp_path / "two", tmp_path / "two")
    assert one == fingerprint(tmp_path / "two", tmp_path / "two")  # from the cache
    template = tmp_path / "two" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert one != fingerprint(tmp_path / "two", tmp_path / "two")


def test_a_duplicate_row_is_run_once_and_counts_twice(tmp_path, random_model):
    row = {"question": "Up?", "choices": ["sky", "sea"], "answer": 0}
    data = tmp_path / "mmlu.jsonl"
    data.write_text((json.dumps(row) + "\n") * 3)
    found = evaluate(random_model, ["mmlu"], out=tmp_path, data={"mmlu": str(data)})
    assert found["tasks"]["mmlu"]["rows"] == 3
    assert found["tasks"]["mmlu"]["chance"] == 0.5
    assert len((tmp_path / "eval" / "mmlu.jsonl").read_text().splitlines()) == 1


def test_held_out_loss_of_a_stage(tmp_path, make_model, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "name": "tiny",
        "output_dir": "runs",
        "sft": {
            "model_name_or_path": "runs/tiny/sft",
            "data": [{"path": "arithmetic", "rows": 40}],
            "held_out": 6,
            "max_length": 64,
            "max_steps": 2,
        },
    }
    folder = tmp_path / "runs" / "tiny" / "sft"
    model = make_model()
    save(model, tokenizer, folder)
    (folder / "stage.json").write_text('{"stage": "sft", "status": "finished", "settings": {}}')
    (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = evaluate("runs/tiny/sft", ["held_out"], batch_size=4)["tasks"]["held_out"]
    assert list(found) == ["kind", "rows", "tokens", "loss", "error", "bits_per_byte", "way"]

    stage = load_recipe("runs/tiny/recipe.yaml").sft
    held_out = mix_conversations(stage, load_tokenizer(str(folder))).held_out
    total, tokens, text, size = 0.0, 0, 0.0, 0
    special = set(tokenizer.all_special_ids)
    with torch.no_grad():
        for row in held_out:
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            for index, label in enumerate(row["labels"]):
                if label != -100:
                    total -= log_probs[index - 1, label].item()
                    tokens += 1
                    if label not in special:
                        text -= log_probs[index - 1, label].item()
                        size += len(tokenizer.decode([label]).encode())
    assert (found["rows"], found["tokens"]) == (6, tokens)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(text / math.log(2) / size, rel=1e-5)
    assert 0 < found["error"] < found["loss"]
    assert not (folder / "data.json").exists()  # the run's audit is untouched

    default = evaluate("runs/tiny/sft", rows=2)
    assert list(default["tasks"]) == ["held_out", *GRADED]


# --- figures ---


def figures(right: int, rows: int) -> dict:
    low, high = wilson(right, rows)
    return {
        "kind": "generative",
        "rows": rows,
        "right": right,
        "accuracy": right / rows,
        "low": low,
        "high": high,
    }


def test_a_difference_within_noise():
    separate = difference(figures(50, 100), figures(55, 100))
    assert separate["difference"] == pytest.approx(0.05) and separate["within_noise"]
    assert not separate["paired"] and separate["p"] is None
    assert not difference(figures(50, 100), figures(80, 100))["within_noise"]
    # they differ in the same ten rows: paired, that exceeds the noise
    rows = [{str(n): {"right": n < right} for n in range(100)} for right in (50, 60)]
    assert difference(figures(50, 100), figures(60, 100))["within_noise"]
    paired = difference(figures(50, 100), figures(60, 100), tuple(rows))
    assert paired["paired"] and not paired["within_noise"]
    assert paired["p"] == pytest.approx(2 / 1024)
    assert paired["low"] < 0.1 < paired["high"]
    same = difference(figures(50, 100), figures(50, 100), (rows[0], rows[0]))
    assert same["within_noise"]
    assert same["high"] == -same["low"] == pytest.approx(0.037, abs=1e-4)  # not [0, 0]


def test_a_difference_of_losses():
    a = {"kind": "loss", "rows": 3, "loss": 2.0, "error": 0.3}
    b = {"kind": "loss", "rows": 3, "loss": 1.9, "error": 0.3}
    assert difference(a, b)["within_noise"]
    losses = [(20.0, 19.0), (10.0, 9.1), (30.0, 28.9)]
    rows = [
        {str(n): {"loss": pair[side], "tokens": 10} for n, pair in enumerate(losses)}
        for side in (0, 1)
    ]
    paired = difference(a, b, tuple(rows))
    assert paired["difference"] == pytest.approx(-0.1)
    assert paired["paired"] and not paired["within_noise"]


def test_two_models_and_their_differences(tmp_path, make_model, tokenizer, capsys):
    one = rigged(make_model, tokenizer, tmp_path / "one", "A")
    two = rigged(make_model, tokenizer, tmp_path / "two", "B")
    found = evaluate_and_print([one, two], ["mmlu"], [f"mmlu={MMLU}"], None, quiet=False)
    assert [results["tasks"]["mmlu"]["right"] for results in found["models"]] == [5, 10]
    assert found["differences"] == compare((Path(one), Path(two)))
    assert found["differences"]["mmlu"]["within_noise"]
    printed = capsys.readouterr()
    assert "mmlu: +0.200" in printed.out and "within noise (25 rows, row by row)" in printed.out
    assert "mean centred accuracy: 0.2000" in printed.out
    assert printed.err == ""
    with pytest.raises(HfsftError, match="one model only"):
        evaluate_and_print([one, two], ["mmlu"], [], tmp_path, quiet=True)


# --- errors the user can fix ---


def test_data_given_as_files_or_a_folder(tmp_path, arc):
    folder = str(Path(arc).parent)
    assert data_files([folder, "mmlu=x.csv"], []) == {"arc_easy": arc, "mmlu": "x.csv"}
    assert data_files([folder], ["arc_easy", "gsm8k"]) == {"arc_easy": arc}
    with pytest.raises(HfsftError, match=r"named after a task, like arc_easy\.jsonl"):
        data_files([str(tmp_path)], [])
    with pytest.raises(HfsftError, match=r"named after a task, like mmlu\.jsonl"):
        data_files([folder], ["arithmetic", "mmlu"])
    with pytest.raises(HfsftError, match="mmlu is not among the tasks of --tasks"):
        data_files(["mmlu=x.csv"], ["gsm8k"])
    with pytest.raises(HfsftError, match="neither a folder nor NAME=FILE"):
        data_files(["nothing.jsonl"], [])


def test_a_mistake_is_reported_before_anything_is_run(tmp_path, random_model):
    for settings, words in (
        ({"tasks": ["arithmetic", "arc"]}, "no task arc"),
        ({"tasks": ["arithmetic"], "data": {"arc": "x"}}, "no task arc"),
        ({"tasks": ["arithmetic", "mmlu"], "data": {"mmlu": "x.jsonl"}}, "no such file"),
        ({"tasks": ["arithmetic", "held_out"]}, "not the stage of a run"),
    ):
        with pytest.raises(HfsftError, match=words):
            evaluate(random_model, **settings, out=tmp_path)
    assert not (tmp_path / "eval.json").exists()
    with pytest.raises(HfsftError, match="no such folder"):
        evaluate("./nothing", ["arithmetic"])


def test_a_folder_that_is_not_writable(tmp_path, random_model):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(HfsftError, match="another folder with --out"):
        evaluate(random_model, ["arithmetic"], rows=1, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "arc_easi"], "no task arc_easi; did you mean 'arc_easy'?"),
        (["--tasks", "arithmetic,humaneval"], "pass --allow_code to allow it"),
        (["--tasks", "arc_easy", "--data", "arc_easy=none.jsonl"], "none.jsonl: no such file"),
        (["--tasks", "lm_eval:piqa"], "pip install 'hfsft[eval]'"),
    ],
)
def test_the_command_reports_a_mistake_in_one_line(
    random_model, tmp_path, monkeypatch, capsys, arguments, words
):
    if "lm_eval:piqa" in arguments and importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-eval is installed")
    out = ["--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["hfsft", "eval", random_model, *arguments, *out])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


def test_the_command(random_model, tmp_path, monkeypatch, capsys, arc):
    arguments = ["--tasks", "arc_easy,arithmetic", "--rows", "3", "--out", str(tmp_path)]
    command = ["hfsft", "eval", random_model, *arguments, "--data", f"arc_easy={arc}"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    printed = capsys.readouterr()
    assert "arc_easy" in printed.out and printed.err == ""
    assert "mean centred accuracy: " in printed.out.splitlines()[-1]
    monkeypatch.setattr("sys.argv", [*command, "--json"])
    with pytest.raises(SystemExit):
        main()
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "eval.json").read_text())


def test_a_log_likelihood_of_lm_eval_is_no_choice():
    row = {"metrics": {"acc": 1.0, "perplexity": 2.5}, "choices": 1}
    found = harness_figures([row | {"right": True}, row | {"right": False}])
    assert (found["kind"], found["accuracy"], found["chance"]) == ("generative", 0.5, 0.0)
    assert found["centred"] == 0.5 and found["metrics"] == {"acc": 1.0, "perplexity": 2.5}


def test_rows_of_a_killed_lm_eval_run_count_once():
    rows = [{"row": f"{number}", "of": 3} for number in range(3)]
    assert last_run([]) == last_run(rows[:2]) == []
    assert last_run(rows) == last_run(rows[:2] + rows) == rows


def test_only_rows_answered_in_the_same_way_are_shown_and_compared(tmp_path, random_model):
    out = tmp_path / "out"
    evaluate(random_model, ["arithmetic"], rows=4, out=out)
    path = out / "eval" / "arithmetic.jsonl"
    lines = read_jsonl(path)
    write_jsonl(path, [*lines, lines[0] | {"way": "another", "row": "x"}])
    assert row_results(out, "arithmetic").keys() == {line["row"] for line in lines}


def test_lm_eval_runs_a_task_of_the_user(random_model, tmp_path, monkeypatch, capfd):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"{n}?", "choices": ["yes", "no"], "answer": n % 2} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    name = f"lm_eval:{tmp_path / 'own.yaml'}"
    monkeypatch.chdir(tmp_path)  # no git repository
    found = evaluate(random_model, [name], rows=4, out=tmp_path)["tasks"][name]
    assert "fatal" not in capfd.readouterr().err
    assert (found["kind"], found["rows"], found["chance"]) == ("categorical", 4, 0.5)
    assert found["metrics"]["acc"] == found["accuracy"] and "acc_norm" in found["metrics"]
    kept = list(row_results(tmp_path, name).values())
    assert len(kept) == 4 and {row["expected"] for row in kept} == {"0", "1"}
    assert any("3?" in row["question"] for row in kept)
    assert evaluate(random_model, [name], rows=4, out=tmp_path)["tasks"][name] == found

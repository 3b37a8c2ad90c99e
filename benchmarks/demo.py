"""The demo over seeds and numbers of threads: training time, score and answers.

    python benchmarks/demo.py                       # five seeds, with one, two and four threads
    python benchmarks/demo.py --seeds 3 --threads 2

Each run is `hfsft run recipes/demo.yaml` in a new folder. The time is that of the three stages, as
`stage.json` has it; the score is of 100 held-out words. An answer is right if the built-in task
gives it to that question, or spells the word.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hfsft.data.tasks import phrases

REPOSITORY = Path(__file__).parents[1]


def is_right(question: str, answer: str) -> bool:
    """Whether the demo's model answered one of its sample prompts as it was taught."""
    if question.startswith("Spell the word: "):
        word = question.removeprefix("Spell the word: ")
        return answer == f"{word}:{','.join(word)}"
    topics = phrases("identity")["topics"].values()
    return any(question in topic["questions"] and answer in topic["answers"] for topic in topics)


def run_demo(seed: int, threads: int, folder: Path) -> str:
    """Train the demo once; returns a line of the table."""
    command = [sys.executable, "-m", "hfsft", "run", str(REPOSITORY / "recipes" / "demo.yaml")]
    command += ["--seed", str(seed), "--output_dir", str(folder), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout)
    seconds = [stage["seconds"] for stage in found["stages"].values()]
    score = found["accuracy"]["sft"]["simple_spelling"]
    answers = found["answers"].items()
    wrong = [
        f"{question} {answer!r}"
        for question, answer in answers
        if not is_right(question, answer.strip())
    ]
    return (
        f"{seed:>5}{threads:>9}{sum(seconds):>10.0f}{score['right']:>8} of {score['rows']}"
        f"{len(answers) - len(wrong):>6} of {len(answers)}  {'; '.join(wrong)}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 4])
    chosen = parser.parse_args()
    print(f"{'seed':>5}{'threads':>9}{'seconds':>10}{'words':>15}{'answers':>11}")
    for threads in chosen.threads:
        for seed in range(1, chosen.seeds + 1):
            with tempfile.TemporaryDirectory() as folder:
                print(run_demo(seed, threads, Path(folder)), flush=True)


if __name__ == "__main__":
    main()

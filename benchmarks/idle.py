"""How long ranks wait for each other in a step, by the lengths of its conversations.

    python benchmarks/idle.py LENGTHS.txt [--examples_per_step 32] [--steps 200]

LENGTHS.txt has a conversation's number of tokens on each line. Its conversations are put in a run's
seeded order, and each step's dealt to 2, 4, 8 and 16 ranks: in blocks, and as hfsft deals them. The
time of a rank is taken as its tokens; the idle share is what the others wait for the fullest.
"""

import argparse
import itertools
from pathlib import Path

from hfsft.data.order import idle_share, run_order


def main() -> None:
    """Print a line for each number of ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("lengths", type=Path)
    parser.add_argument("--examples_per_step", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    lengths = [int(line) for line in given.lengths.read_text().split()]
    order = run_order(lengths, seed=42)
    size = given.examples_per_step
    steps = [list(itertools.islice(order, size)) for _ in range(given.steps)]
    print(f"{len(lengths):,} conversations, {given.steps} steps of {size}: share of time idle")
    print("ranks   in blocks   as dealt   speed, of one rank's")
    for ranks in (2, 4, 8, 16):
        blocks, dealt = idle_share(steps, ranks, dealt=False), idle_share(steps, ranks)
        print(f"{ranks:5}   {blocks:9.1%}   {dealt:8.1%}   {ranks * (1 - dealt):.1f} x")


if __name__ == "__main__":
    main()

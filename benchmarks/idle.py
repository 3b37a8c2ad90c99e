"""How long ranks wait for each other in a step, by the lengths of its conversations.

    python benchmarks/idle.py LENGTHS.txt [--examples_per_step 32] [--steps 200]

LENGTHS.txt has a conversation's number of tokens on each line. Its conversations are put in a run's
seeded order, and each step's dealt to 2, 4, 8 and 16 ranks: in blocks, and as hfsft deals them. The
time of a rank is taken as its tokens; the idle share is what the others wait for the fullest. No
dealing of whole conversations in equal counts can idle less than the bound: a rank that has the
step's longest one takes as long as that. More examples per step lower it.
"""

import argparse
import itertools
from pathlib import Path

from hfsft.data.order import idle_share, run_order

HOW = ("blocks", "dealt", "bound")


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
    print("ranks   in blocks   as dealt   bound   speed, of one rank's")
    for ranks in (2, 4, 8, 16):
        blocks, dealt, bound = (idle_share(steps, ranks, how) for how in HOW)
        speed = ranks * (1 - dealt)
        print(f"{ranks:5}   {blocks:9.1%}   {dealt:8.1%}   {bound:5.1%}   {speed:.1f} x")


if __name__ == "__main__":
    main()

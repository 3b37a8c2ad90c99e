"""Tokens per second of `hfsft serve` for one client and for several at once.

    python benchmarks/serving.py runs/demo/sft
    python benchmarks/serving.py runs/demo/sft --clients 16 --rounds 5

It starts the server in a process of its own, and asks it with the official client of OpenAI, in
threads of this one. Every client sends one message after the other and waits for its greedy answer,
whole or streamed. One client and several take turns, `--rounds` times.
"""

import argparse
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI

from hfsft.data.tasks import task_rows

ASKED = [row["messages"][0] for row in task_rows("simple_spelling", 100, split="test", seed=1)]


def answer(client: OpenAI, number: int, tokens: int, streamed: bool) -> int:
    """Ask for one answer; how many tokens it has."""
    asked = {"model": "served", "messages": [ASKED[number % len(ASKED)]]}
    asked |= {"max_tokens": tokens, "temperature": 0}
    if not streamed:
        return client.chat.completions.create(**asked).usage.completion_tokens
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = client.chat.completions.create(**asked, **options)
    return last.usage.completion_tokens


def tokens_per_second(
    server: OpenAI, clients: int, requests: int, tokens: int, streamed: bool
) -> float:
    """Of a number of clients that each send a number of requests."""

    def client(first: int) -> int:
        return sum(answer(server, first + n, tokens, streamed) for n in range(requests))

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        total = sum(pool.map(client, range(0, clients * requests, requests)))
    return total / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=12, help="of each client in a round")
    parser.add_argument("--tokens", type=int, default=100, help="at most, of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    command = [sys.executable, "-m", "hfsft", "serve", given.model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[-1]
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            for streamed in (False, True):
                answer(client, 0, 10, streamed)  # the first one is slower
                compare(client, given, streamed)
        finally:
            server.terminate()


def compare(client: OpenAI, given: argparse.Namespace, streamed: bool) -> None:
    """Print the tokens per second of one client and of several."""
    rates: dict[int, list[float]] = {1: [], given.clients: []}
    for _ in range(given.rounds):
        for clients, found in rates.items():
            found.append(tokens_per_second(client, clients, given.requests, given.tokens, streamed))
    print("streamed" if streamed else "whole")
    for clients, found in rates.items():
        print(f"{clients:3} clients: {statistics.median(found):,.0f} tokens/s")
    ratio = statistics.median(
        many / one for one, many in zip(rates[1], rates[given.clients], strict=True)
    )
    print(f"{given.clients} clients get {ratio:.2f} times the tokens per second of one")


if __name__ == "__main__":
    main()

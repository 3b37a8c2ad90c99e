"""Tokens per second of `hfsft serve` for one client and for several at once.

    python benchmarks/serving.py runs/demo/sft
    python benchmarks/serving.py runs/demo/sft --clients 16 --rounds 5

It starts the server in a process of its own. Every client sends one completion after the other,
each of a prompt of its own, and waits for it. One client and several take turns, `--rounds` times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor


def answer(url: str, number: int, tokens: int) -> int:
    """Ask for one completion; how many tokens it has."""
    body = {"prompt": f"Number {number} is", "max_tokens": tokens, "temperature": 1, "seed": number}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)["usage"]["completion_tokens"]


def tokens_per_second(url: str, clients: int, requests: int, tokens: int) -> float:
    """Of a number of clients that each send a number of requests."""

    def client(first: int) -> int:
        return sum(answer(url, first + number, tokens) for number in range(requests))

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        total = sum(pool.map(client, range(0, clients * requests, requests)))
    return total / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--tokens", type=int, default=100, help="at most, of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    command = [sys.executable, "-m", "hfsft", "serve", given.model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[-1]
            answer(url, 0, 10)  # the first one is slower
            rates: dict[int, list[float]] = {1: [], given.clients: []}
            for _ in range(given.rounds):
                for clients, found in rates.items():
                    found.append(tokens_per_second(url, clients, given.requests, given.tokens))
        finally:
            server.terminate()
    for clients, found in rates.items():
        print(f"{clients:3} clients: {statistics.median(found):,.0f} tokens/s")
    ratio = statistics.median(
        many / one for one, many in zip(rates[1], rates[given.clients], strict=True)
    )
    print(f"{given.clients} clients get {ratio:.2f} times the tokens per second of one")


if __name__ == "__main__":
    main()

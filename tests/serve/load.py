"""Many clients for a minute: nothing lost, memory flat. A script, as it takes too long for a test.

Run it as ``python -m tests.serve.load``, or with a run or model folder to serve; it prints what it saw as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path

import httpx

from moesaic.serve import Settings, load_served, running
from tests.serve.conftest import make


def resident_mib() -> float:
    """Memory of this process, service and clients, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def client_work(http: httpx.AsyncClient, number: int, end: float, seen: Counter[str]) -> None:
    """Ask again and again; every request must come to its own complete answer."""
    first: dict[int, str] = {}
    turn = 0
    while time.monotonic() < end:
        kind, turn = turn % 4, turn + 1
        body = {
            "prompt": f"client {number} {kind}",
            "max_tokens": 8 + 8 * kind,
            "seed": number,
            "stream": kind % 2 == 0,
        }
        seen["sent"] += 1
        answer = await http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            seen[f"status {answer.status_code}"] += 1
            continue
        if body["stream"]:
            lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            if lines[-1] != "[DONE]":
                seen["cut short"] += 1
                continue
            text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
        else:
            text = answer.json()["choices"][0]["text"]
        seen["answered"] += 1
        seen["wrong text"] += first.setdefault(kind, text) != text


async def everybody(url: str, clients: int, seconds: float) -> tuple[Counter[str], list[float]]:
    """All clients at once; the memory every five seconds, the first taken when all have been served for a while."""
    seen: Counter[str] = Counter()
    memory_mib: list[float] = []
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=clients)) as http:
        work = [asyncio.create_task(client_work(http, number, end, seen)) for number in range(clients)]
        while time.monotonic() < end:
            await asyncio.sleep(min(5, seconds / 3))
            memory_mib.append(round(resident_mib(), 1))
        await asyncio.gather(*work)
    return seen, memory_mib


def main() -> None:
    """Serve, let the clients loose, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    served = load_served(given.model) if given.model else make()
    with running(served, Settings(port=0)) as url:
        seen, memory_mib = asyncio.run(everybody(url, given.clients, given.seconds))
        figures = httpx.get(f"{url}metrics").text
    lost = seen["sent"] - seen["answered"]
    outcomes = [line for line in figures.splitlines() if line.startswith("moesaic_answers")]
    print(json.dumps({**seen, "lost": lost, "memory_mib": memory_mib, "outcomes": outcomes}, indent=1))


if __name__ == "__main__":
    main()

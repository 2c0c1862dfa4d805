"""The yardstick: the same requests from a plain asyncio and aiohttp client that keeps nothing.

It stores no answer, counts no money, and loses everything when it is killed. Faults are met with the simplest retry
there is.
Run as a process of its own: `python -m benchmarks.plain URL REQUESTS.jsonl IN_FLIGHT`.
"""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp

TRIES = 8
PAUSE_S = 0.25


async def ask_all(url: str, bodies: Iterator[str], in_flight: int) -> int:
    """Posts every body, at most so many at the same time; returns how many were answered with a JSON object."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        counts = await asyncio.gather(*(_ask_some(session, url, bodies) for _ in range(in_flight)))
    return sum(counts)


async def _ask_some(session: aiohttp.ClientSession, url: str, bodies: Iterator[str]) -> int:
    answered = 0
    for body in bodies:
        answered += await _ask(session, url, body)
    return answered


async def _ask(session: aiohttp.ClientSession, url: str, body: str) -> bool:
    for _ in range(TRIES):
        try:
            async with session.post(url, data=body, headers={"content-type": "application/json"}) as response:
                if response.status == 200:
                    reply = json.loads(await response.read())
                    return isinstance(json.loads(reply["choices"][0]["message"]["content"]), dict)
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(PAUSE_S)
    return False


def main() -> None:
    """Asks and prints how many calls were answered."""
    url, path, in_flight = sys.argv[1:]
    with Path(path).open(encoding="utf-8") as lines:
        answered = asyncio.run(ask_all(url, (line.rstrip("\n") for line in lines), int(in_flight)))
    print(json.dumps({"completed": answered}))


if __name__ == "__main__":
    main()

"""The yardstick of scenario D: a plain aiohttp client that knows its limit and keeps to it with a clock of its own.

It sends a burst, then one request after the other at the exact pace, and tries again when it is refused. It is alone:
several of them would have to share a limit, which is what the limiter is for.
Run as a process of its own: `python -m benchmarks.pacing URL CALLS RPM BURST`.
"""

import asyncio
import json
import sys
import time

import aiohttp

RETRY_S = 1.0


async def pace(url: str, calls: int, rpm: int, burst: int) -> int:
    """Posts so many questions; returns how many were refused on the way."""
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = loop.time()

        async def ask(number: int) -> int:
            await asyncio.sleep(max(0, number + 1 - burst) * 60 / rpm - (loop.time() - began))
            refused = 0
            messages = [{"role": "user", "content": f"How good is this? item number {number}"}]
            body = {"model": "fake-model", "max_tokens": 60, "messages": messages}
            while True:
                async with session.post(url, json=body) as response:
                    await response.read()
                    if response.status == 200:
                        return refused
                refused += 1
                await asyncio.sleep(RETRY_S)

        return sum(await asyncio.gather(*(ask(number) for number in range(calls))))


def main() -> None:
    """Asks, and prints how many requests were refused and the processor time since the first one."""
    url, calls, rpm, burst = sys.argv[1:]
    before_s = time.process_time()
    refused = asyncio.run(pace(url, int(calls), int(rpm), int(burst)))
    print(json.dumps({"refused": refused, "cpu_s": time.process_time() - before_s}))


if __name__ == "__main__":
    main()

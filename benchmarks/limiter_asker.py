"""A process that only asks for permits, waits for their moments and settles them: arguments URL RPM PERMITS.

At the end it prints the processor time that it took, from its very start.
"""

import asyncio
import json
import os
import sys
import time

from redis.asyncio import Redis

from workers.limiter import Limiter, Permit, Pool, PoolLimits

BURST = 20
LATENCY_S = 0.3


async def ask(url: str, rpm: int, permits: int) -> None:
    client = Redis.from_url(url)
    limiter = Limiter(client, "bench")
    allowed = PoolLimits(rpm=rpm, rpm_burst=BURST, tpm=rpm * 10_000)

    async def one(number: int) -> None:
        while True:
            got = await limiter.permit(
                Pool("bench:account:model"),
                allowed,
                {"rpm": 1, "tpm": 900},
                permit_id=f"{os.getpid()}-{number}",
                lease_s=30.0,
                max_wait_s=120.0,
                run=str(os.getpid()),
            )
            if isinstance(got, Permit) and await limiter.wait_until_due(got):
                await asyncio.sleep(LATENCY_S)
                limiter.settle(got, {"tpm": 500})
                return
            if isinstance(got, Permit):
                limiter.release_unsent(got)

    await asyncio.gather(*(one(number) for number in range(permits)))
    await limiter.aclose()
    await client.aclose()


if __name__ == "__main__":
    asyncio.run(ask(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    print(json.dumps({"cpu_s": time.process_time()}))

"""One of several processes that send as fast as a shared limit lets them; prints when each request really left."""

import asyncio
import json
import sys
import time

from redis.asyncio import Redis

from workers.limiter import Limit, Limiter, Permit, Pool, PoolLimits

ASKERS = 400


async def main(url: str, units: int, window_s: float, seconds: float, name: str) -> None:
    started_s = time.process_time()
    client = Redis.from_url(url)
    limiter = Limiter(client, "test", horizon_s=1.0)
    loop = asyncio.get_running_loop()
    allowed = PoolLimits(extra=(Limit("rpm", units, window_s, max(1, units // 10)),))
    until = loop.time() + seconds
    sent: list[float] = []

    async def sender(number: int) -> None:
        while loop.time() < until:
            number += ASKERS
            got = await limiter.permit(
                Pool("shared"),
                allowed,
                {"rpm": 1},
                permit_id=f"{name}-{number}",
                lease_s=10,
                max_wait_s=max(0.0, until - loop.time()),
            )
            if not isinstance(got, Permit):
                return
            if await limiter.wait_until_due(got):
                sent.append(loop.time())
                limiter.settle(got)
            else:
                limiter.release_unsent(got)

    await asyncio.gather(*(sender(number) for number in range(ASKERS)))
    await limiter.aclose()
    await client.aclose()
    print(json.dumps({"sent": sent, "cpu_s": time.process_time() - started_s}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), sys.argv[5]))

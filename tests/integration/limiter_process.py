"""One of several processes that send as fast as a shared limit lets them; prints when each left and was due."""

import asyncio
import json
import random
import sys
import time

from redis.asyncio import Redis

from workers.limiter import Limit, Limiter, Permit, Pool, PoolLimits

ASKERS = 400
MOST_LATE_S = 0.008


async def main(url: str, units: int, window_s: float, seconds: float, name: str, kind: str = "requests") -> None:
    started_s = time.process_time()
    client = Redis.from_url(url)
    limiter = Limiter(client, "test", horizon_s=1.0)
    loop = asyncio.get_running_loop()
    allowed = PoolLimits(extra=(Limit("units", units, window_s, max(1, units // 10)),))
    until = loop.time() + seconds
    left: list[float] = []
    due: list[float] = []
    costs: list[int] = []
    # Sendings before which this machine held the process up, between two lines: nobody can do anything about that.
    held_up: list[bool] = []
    chance = random.Random(name)

    async def sender(number: int) -> None:
        while loop.time() < until:
            number += ASKERS
            cost = 1 if kind == "requests" else chance.randint(units // 1000, units // 20)
            got = await limiter.permit(
                Pool("shared"),
                allowed,
                {"units": cost},
                permit_id=f"{name}-{number}",
                lease_s=10,
                max_wait_s=max(0.0, until - loop.time()),
            )
            if not isinstance(got, Permit):
                return
            if await limiter.wait_until_due(got):
                late_s, at = chance.uniform(0, MOST_LATE_S), loop.time()
                held_up.append(at > got.late_after)
                left.append(at + late_s)
                due.append(got.send_us / 1e6 + late_s)
                costs.append(cost)
                limiter.settle(got)
            else:
                limiter.release_unsent(got)

    await asyncio.gather(*(sender(number) for number in range(ASKERS)))
    await limiter.aclose()
    await client.aclose()
    used_s = time.process_time() - started_s
    print(json.dumps({"left": left, "due": due, "costs": costs, "cpu_s": used_s, "held_up": sum(held_up)}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:]))

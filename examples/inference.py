"""Ask an HTTP endpoint about every row, with a bounded number of requests under way.

The endpoint here is a small one on loopback that is busy now and then. Each row is answered at
least once: a worker that dies repeats the batch it had in hand, no more.
"""

import argparse
import asyncio
from typing import Any

import ray
from aiohttp import ClientError, ClientSession, ClientTimeout, web

import asyncsplit


@ray.remote(num_cpus=0)
class Worker:
    """Sends the rows of its split."""

    def __init__(self, split: asyncsplit.AsyncDataIterator, url: str, concurrency: int) -> None:
        """Allow so many requests at a time."""
        self.split = split
        self.url = url
        self.slots = asyncio.Semaphore(concurrency)

    async def run(self) -> int:
        """Send all rows; return the sum of the answers."""
        total = 0
        async with (
            ClientSession(timeout=ClientTimeout(total=10), raise_for_status=True) as session,
            self.split.iter_batches(batch_size=128) as stream,
        ):
            async for batch in stream:
                # All answers before the next batch, whose request says that this one is finished.
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self.ask(session, i)) for i in batch["id"].tolist()]
                total += sum(task.result() for task in tasks)
        return total

    async def ask(self, session: ClientSession, row: int, attempts: int = 4) -> int:
        """Return the answer for a row; try again if the endpoint is busy or gone for a moment."""
        for attempt in range(attempts):
            try:
                async with self.slots, session.post(self.url, json={"id": row}) as response:
                    return int((await response.json())["answer"])
            except (ClientError, TimeoutError):
                if attempt == attempts - 1:
                    raise
                await asyncio.sleep(0.1 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


class Endpoint:
    """Stands for your model's server."""

    def __init__(self) -> None:
        """Count what is under way."""
        self.requests = self.now = self.most = 0

    async def answer(self, request: web.Request) -> web.Response:
        """Double a number; every fiftieth request finds it busy."""
        self.requests += 1
        if self.requests % 50 == 0:
            raise web.HTTPServiceUnavailable
        self.now += 1
        self.most = max(self.most, self.now)
        row = await request.json()
        await asyncio.sleep(0.001)
        self.now -= 1
        return web.json_response({"answer": 2 * row["id"]})


async def main() -> None:
    """Serve, and run two workers. Ctrl-C closes the server, and Ray ends with this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()

    endpoint = Endpoint()
    app = web.Application()
    app.router.add_post("/", endpoint.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port, *_ = runner.addresses[0]
        splits = asyncsplit.streaming_split(ray.data.range(args.rows), 2)
        workers: list[Any] = [
            Worker.remote(split, f"http://{host}:{port}/", args.concurrency) for split in splits
        ]
        totals = await asyncio.gather(*(worker.run.remote() for worker in workers))
        print("sum of the answers:", sum(totals))
        print("bounded:", endpoint.most <= 2 * args.concurrency)
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())

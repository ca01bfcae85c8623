"""The gate in front of the batch queue: full batches, nobody forgotten, nobody let in twice."""

from __future__ import annotations

import asyncio

from serve.gate import BatchGate


class Batcher:
    """What `serve.batch` does: collects for a moment, queues the batch, runs one at a time."""

    def __init__(self, gate: BatchGate, wait_s: float, work_s: float) -> None:
        self.gate, self.wait_s, self.work_s = gate, wait_s, work_s
        self.sizes: list[int] = []
        self._pending: list[asyncio.Future[None]] = []
        self._one_at_a_time = asyncio.Semaphore(1)
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(self) -> None:
        async with self.gate:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._pending.append(done)
            if len(self._pending) == 1:
                task = asyncio.create_task(self._collect())
                self._tasks.add(task)
            await done

    async def _collect(self) -> None:
        await asyncio.sleep(self.wait_s)
        batch, self._pending = self._pending, []
        async with self._one_at_a_time:
            batch = [done for done in batch if not done.cancelled()]
            self.sizes.append(len(batch))
            with self.gate.running():
                await asyncio.sleep(self.work_s)
            for done in batch:
                if not done.done():
                    done.set_result(None)


def test_batches_of_waiting_clients_merge_and_stay_full() -> None:
    """Clients start one after another, so that the first batches are fragments; after that all are full."""

    async def main() -> list[int]:
        batcher = Batcher(BatchGate(8), wait_s=0.005, work_s=0.05)

        async def client(number: int) -> None:
            await asyncio.sleep(number * 0.01)
            for _ in range(4):
                await batcher.call()

        await asyncio.gather(*(client(number) for number in range(16)))
        return batcher.sizes

    sizes = asyncio.run(main())
    assert sum(sizes) == 64 and max(sizes) == 8
    assert sizes[3:-3].count(8) >= len(sizes[3:-3]) - 1, sizes


def test_clients_that_give_up_leave_no_trace() -> None:
    async def main() -> tuple[list[int], BatchGate]:
        gate = BatchGate(4)
        batcher = Batcher(gate, wait_s=0.005, work_s=0.03)
        calls = [asyncio.create_task(batcher.call()) for _ in range(24)]
        for index, call in enumerate(calls):
            if index % 3 == 0:
                asyncio.get_running_loop().call_later(0.002 * index, call.cancel)
        await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        await batcher.call()
        return batcher.sizes, gate

    sizes, gate = asyncio.run(main())
    assert gate._inside == 0 and not gate._waiting and max(sizes) <= 4


def test_nobody_waits_for_those_who_gave_up_while_the_model_worked() -> None:
    """The batch's only client leaves, another comes before the model has noticed: it goes in when the model is idle."""

    async def main() -> None:
        gate = BatchGate(4)

        async def ask(done: asyncio.Event) -> None:
            async with gate:
                await done.wait()

        leaver = asyncio.create_task(ask(asyncio.Event()))
        await asyncio.sleep(0)
        done = asyncio.Event()
        done.set()
        with gate.running():
            leaver.cancel()
            await asyncio.sleep(0)
            comers = [asyncio.create_task(ask(done)) for _ in range(3)]
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*comers), 5)
        await asyncio.wait_for(ask(done), 5)

    asyncio.run(main())

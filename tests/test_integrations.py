"""What needs no adapter: loops of asyncio and bars of tqdm around a client's own results."""

import asyncio
import concurrent.futures
import io
import threading

import pytest
import tqdm
import tqdm.asyncio

from zmqsched.errors import NotSerializable


def bar():
    """What a bar draws on; the last line is its final state."""
    return io.StringIO()


def drawn(file):
    return file.getvalue().split("\r")[-1].strip()


def test_a_bar_around_a_map(client):
    file = bar()
    assert list(tqdm.tqdm(client.map(abs, range(-40, 0)), total=40, file=file)) == list(range(40, 0, -1))
    assert "100%" in drawn(file)
    assert "40/40" in drawn(file)


def test_a_bar_around_what_is_done_first(client):
    file = bar()
    futures = [client.submit(abs, -number) for number in range(30)]
    done = tqdm.tqdm(concurrent.futures.as_completed(futures), total=len(futures), file=file)
    assert sorted(future.result() for future in done) == list(range(30))
    assert "30/30" in drawn(file)


def test_a_bar_in_asyncio(client):
    file = bar()

    async def main():
        return await tqdm.asyncio.tqdm.gather(*(client.submit(abs, -number) for number in range(30)), file=file)

    assert asyncio.run(main()) == list(range(30))
    assert "30/30" in drawn(file)


def test_a_task_group_of_asyncio_cancels_what_waits(client, gate):
    async def wait_for(future):
        return await future

    async def main():
        busy = [client.submit(gate.task) for _ in range(2)]
        gate.wait_until_begun(2)
        waiting, failing = client.submit(abs, -1), client.submit(int, threading.Lock())
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the group raises at its end
            async with asyncio.TaskGroup() as group:
                for future in (waiting, failing):
                    group.create_task(wait_for(future))
        assert [type(error) for error in caught.value.exceptions] == [NotSerializable]
        assert waiting.cancelled()
        gate.open()
        await asyncio.gather(*busy)

    asyncio.run(main())


def test_a_time_limit_of_asyncio(client, gate):
    async def main():
        busy = [client.submit(gate.task) for _ in range(2)]
        gate.wait_until_begun(2)
        waiting = client.submit(abs, -1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await waiting
        assert waiting.cancelled()
        gate.open()
        assert await asyncio.gather(*busy) == [None, None]

    asyncio.run(main())

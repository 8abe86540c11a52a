from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable
from typing import Any

import pytest

from sparsespec.server.app import shares
from tests.server.server_stubs import CRASH, GREEDY, HANG, KILLED, NAP, RAISE
from tests.server.serving import Answer, Limits, Stub, call, create_app, in_a_loop, photo, running, with_app

posix = pytest.mark.skipif(os.name != "posix", reason="signals and process groups of POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc of Linux")
PNG = {"Content-Type": "image/png"}


def post(app: Any, red: int = 99, **options: Any) -> Awaitable[Answer]:
    return call(app, headers=PNG, body=photo(red=red), **options)


async def until(true: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_images_at_the_same_time_and_the_order_of_those_that_wait() -> None:
    async def use(app: Any) -> None:
        pool = app.state.pool
        assert pool.memory() == [0]
        await pool.settled.wait()
        assert (pool.ready, pool.full) == (1, False)
        assert pool.memory()[0] > 1e6 or sys.platform != "linux"
        done: list[int] = []

        async def one(number: int) -> int:
            answer = await post(app, NAP)
            done.append(number)
            return answer.status

        tasks = []
        for number in range(4):
            tasks.append(asyncio.create_task(one(number)))
            await asyncio.sleep(0.01)
        assert (pool.at_work, pool.waiting) == (1, 3)
        assert await asyncio.gather(*tasks) == [200] * 4
        assert done == [0, 1, 2, 3]
        assert (pool.at_work, pool.waiting) == (0, 0)

    with_app(use, workers=1)


@posix
def test_one_image_that_ends_its_process_and_those_beside_it() -> None:
    async def use(app: Any) -> None:
        pool = app.state.pool
        await until(lambda: pool.ready == 2)
        answers = await asyncio.gather(*(post(app, red) for red in (CRASH, NAP, NAP, 99, 99)))
        assert [answer.status for answer in answers] == [500, 200, 200, 200, 200]
        assert answers[0].kind == "crash"
        assert pool.restarts["crash"] == 1
        killed = await post(app, KILLED)
        assert (killed.status, killed.kind) == (503, "memory")
        await until(lambda: pool.ready == 2)
        assert (await post(app)).status == 200

    with_app(use, workers=2)


@posix
def test_an_image_that_takes_too_long() -> None:
    async def use(app: Any) -> None:
        slow = asyncio.create_task(post(app, HANG))
        await until(lambda: app.state.pool.at_work == 1)
        after = await post(app)
        answer = await slow
        assert (answer.status, answer.kind) == (503, "time")
        assert "0.4 s" in answer.document["detail"]
        assert after.status == 200
        assert app.state.pool.restarts["time"] == 1

    with_app(use, workers=1, limits=Limits(time_limit=0.4))


@linux
def test_an_image_that_takes_too_much_memory() -> None:
    async def use(app: Any) -> None:
        answer = await post(app, GREEDY)
        assert (answer.status, answer.kind) == (503, "memory")
        assert app.state.pool.restarts["memory"] == 1
        assert (await post(app)).status == 200

    with_app(use, workers=1, limits=Limits(memory_limit=200_000_000))


def test_a_full_queue_and_waiting_too_long() -> None:
    async def use(app: Any) -> None:
        pool = app.state.pool
        await pool.settled.wait()
        tasks = [asyncio.create_task(post(app, NAP)) for _ in range(5)]
        answers = await asyncio.gather(*tasks)
        assert sorted(answer.status for answer in answers) == [200, 429, 429, 429, 503]
        for answer in answers:
            if answer.status == 429:
                assert answer.kind == "busy"
                assert 1 <= int(answer.headers["retry-after"]) <= 60
            if answer.status == 503:
                assert answer.kind == "waited"
        assert (await post(app)).status == 200

    with_app(use, workers=1, limits=Limits(max_waiting=1, wait_limit=0.1))


def test_clients_that_go_away() -> None:
    async def use(app: Any) -> None:
        pool = app.state.pool
        await pool.settled.wait()
        gone = asyncio.Event()
        first = asyncio.create_task(post(app, NAP))
        await until(lambda: pool.at_work == 1)
        waiting = asyncio.create_task(post(app, NAP, gone=gone))
        await until(lambda: pool.waiting == 1)
        gone.set()
        assert (await waiting).status == 499
        assert (pool.waiting, pool.at_work) == (0, 1)
        assert (await first).status == 200
        # Of one that is at work, too; its process is not lost for it.
        gone = asyncio.Event()
        at_work = asyncio.create_task(post(app, NAP, gone=gone))
        await until(lambda: pool.at_work == 1)
        gone.set()
        assert (await at_work).status == 499
        assert (await post(app)).status == 200
        assert sum(pool.restarts.values()) == 0

    with_app(use, workers=1)


@posix
def test_a_process_that_dies_between_two_images() -> None:
    async def use(app: Any) -> None:
        pool = app.state.pool
        await pool.settled.wait()
        child = pool._children[0]
        os.kill(child.pid, 9)
        await until(lambda: not child.alive)
        assert (await post(app)).status == 200
        assert pool.restarts["crash"] == 1

    with_app(use, workers=1)


def test_errors_keep_the_process() -> None:
    async def use(app: Any) -> None:
        await app.state.pool.settled.wait()
        pid = app.state.pool._children[0].pid
        assert (await post(app, RAISE)).kind == "internal"
        assert (await post(app)).status == 200
        assert app.state.pool._children[0].pid == pid

    with_app(use, workers=1)


def test_models_that_cannot_be_opened() -> None:
    async def use(app: Any) -> None:
        pool = app.state.pool
        early = asyncio.create_task(post(app))
        await pool.settled.wait()
        assert pool.unusable == "ValueError: the file is gone"
        for answer in (await early, await post(app)):
            assert (answer.status, answer.kind) == (503, "not-open")
            assert "gone" not in answer.body.decode()
        assert (await call(app, "GET", "/readyz")).status == 503

    with_app(use, {"default": Stub(broken="the file is gone")}, workers=2)


def test_images_that_come_before_the_model_is_open() -> None:
    async def use(app: Any) -> None:
        assert (await call(app, "GET", "/readyz")).document["status"] == "starting"
        assert (await post(app)).status == 200

    with_app(use, {"default": Stub(slow_start=0.2)}, workers=1)


@posix
def test_stopping_finishes_what_was_taken_on() -> None:
    async def run() -> None:
        app = create_app({"default": Stub()}, workers=1, limits=Limits(grace=20.0))
        async with running(app):
            await app.state.pool.settled.wait()
            pid = app.state.pool._children[0].pid
            tasks = [asyncio.create_task(post(app, NAP)) for _ in range(3)]
            await until(lambda: app.state.pool.waiting == 2)
        assert [(await task).status for task in tasks] == [200] * 3
        assert (await post(app)).kind == "stopping"
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    in_a_loop(run())


@posix
def test_stopping_does_not_wait_for_ever() -> None:
    async def run() -> None:
        app = create_app({"default": Stub()}, workers=1, limits=Limits(grace=0.1))
        async with running(app):
            await app.state.pool.settled.wait()
            pid = app.state.pool._children[0].pid
            tasks = [asyncio.create_task(post(app, HANG)) for _ in range(2)]
            await until(lambda: app.state.pool.waiting == 1)
        for task in tasks:
            answer = await task
            assert (answer.status, answer.kind) == (503, "stopping")
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    in_a_loop(run())


def test_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsespec.server import app

    monkeypatch.setattr(app, "available_cpus", lambda: 12)
    assert [shares(n) for n in (None, 1, 5, 12, 40)] == [(4, 3), (1, 12), (5, 2), (12, 1), (40, 1)]
    with pytest.raises(ValueError, match="workers must be at least 1"):
        shares(0)

"""The application: what is behind each address."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sparsespec._threads import available_cpus
from sparsespec.server import metrics, openapi, page
from sparsespec.server.body import DisconnectedError, Store, check_head, image_of, read_body
from sparsespec.server.desk import Desk, record_of
from sparsespec.server.limits import Limits
from sparsespec.server.logs import LOGGER
from sparsespec.server.models import Model, ServedModel
from sparsespec.server.problems import Problem, ProblemError, internal
from sparsespec.server.wish import Wish, parse
from sparsespec.server.work import Done
from sparsespec.server.workers import Pool

__all__ = ["Workers", "create_app", "shares"]

_LOG = logging.getLogger(LOGGER)
_MOST_WORKERS = 4
_GONE = 499


class Workers(Protocol):
    """What segments the images: a :class:`sparsespec.server.workers.Pool`, or what behaves like one."""

    workers: int
    restarts: dict[str, int]
    unusable: str | None

    @property
    def waiting(self) -> int: ...  # noqa: D102
    @property
    def at_work(self) -> int: ...  # noqa: D102
    @property
    def ready(self) -> int: ...  # noqa: D102
    @property
    def full(self) -> bool: ...  # noqa: D102
    @property
    def stopping(self) -> bool: ...  # noqa: D102

    def memory(self) -> Sequence[int]: ...  # noqa: D102
    def check_room(self) -> None: ...  # noqa: D102
    def refuse(self) -> None: ...  # noqa: D102
    async def start(self) -> None: ...  # noqa: D102
    async def stop(self, grace: float = 0.0) -> None: ...  # noqa: D102
    async def work(self, wish: Wish, body: bytes) -> tuple[Done, float]: ...  # noqa: D102


def shares(workers: int | None = None) -> tuple[int, int]:
    """Choose how many worker processes there are, and how many threads each has.

    Parameters
    ----------
    workers : int, optional
        The default is the processors granted to this process, four at most.

    Raises
    ------
    ValueError
        Below 1.
    """
    cpus = available_cpus()
    if workers is None:
        workers = min(cpus, _MOST_WORKERS)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers!r}")
    return workers, max(1, cpus // workers)


def create_app(
    models: Mapping[str, ServedModel] | None = None,
    *,
    limits: Limits | None = None,
    workers: int | Workers | None = None,
    allowed_hosts: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    root_path: str = "",
) -> Starlette:
    """Make the application.

    Parameters
    ----------
    models : mapping of str to ServedModel
        What is served, by its name; the first is the default. By default ``{"default": Model()}``.
    limits : Limits
        What is too much.
    workers : int or Workers
        Worker processes; the default is one for each processor, four at most.
    allowed_hosts : sequence of str
        Values of the header ``Host``, without the port, that are answered; by default all.
    cors_origins : sequence of str
        Origins whose pages may use this server; by default none but its own.
    root_path : str
        The path under which a proxy shows this server.

    Returns
    -------
    Starlette
        An ASGI application. Its lifespan starts and ends the worker processes; ``app.state.pool`` are these.

    Raises
    ------
    ValueError
        No models, or a number out of range.
    """
    served: dict[str, ServedModel] = {"default": Model()} if models is None else dict(models)
    if not served:
        raise ValueError("models must hold at least one model")
    limits = limits or Limits()
    pool: Workers
    if workers is None or isinstance(workers, int):
        pool = Pool(served, *shares(workers), limits)
    else:
        pool = workers
    server = _Server(pool, list(served), limits, root_path)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.stop(limits.grace)

    middleware = [
        Middleware(
            Desk,
            requests=server.requests,
            received=server.received,
            sent=server.sent,
            paths=frozenset(server.routes()),
            allowed_hosts=tuple(allowed_hosts),
            cors_origins=tuple(cors_origins),
        )
    ]
    if cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Accept", "Content-Type", "X-Request-ID"],
                expose_headers=["Server-Timing", "X-Request-ID", "Retry-After"],
                max_age=600,
            )
        )
    app = Starlette(
        routes=[Route(path, handler, methods=methods) for path, (handler, methods) in server.routes().items()],
        middleware=middleware,
        exception_handlers={HTTPException: _plain},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.pool = pool
    app.state.limits = limits
    return app


async def _plain(request: Request, error: Exception) -> Response:
    """Answer to what the router refuses."""
    assert isinstance(error, HTTPException)
    problem = Problem.of_status(error.status_code, error.headers)
    record_of(request.scope).kind = problem.kind
    return problem.response(record_of(request.scope).request_id)


class _Server:
    """The answers."""

    def __init__(self, pool: Workers, models: list[str], limits: Limits, root_path: str) -> None:
        self._pool, self._models, self._limits = pool, models, limits
        self._store = Store(limits.max_held)
        self._document = openapi.document(models, limits, root_path)
        self.requests = metrics.Counter("sparsespec_requests_total", "Requests by method, path and status.")
        self.received = metrics.Counter("sparsespec_received_bytes_total", "Bytes of bodies received.")
        self.sent = metrics.Counter("sparsespec_sent_bytes_total", "Bytes of bodies sent.")
        self._images = metrics.Counter("sparsespec_images_total", "Images segmented.")
        self._pixels = metrics.Counter("sparsespec_pixels_total", "Pixels of these.")
        self._instances = metrics.Counter("sparsespec_instances_total", "Objects found in these.")
        self._seconds = metrics.Histogram(
            "sparsespec_stage_seconds", "Seconds per image and stage; total is from the first byte to the last."
        )
        self._registry = metrics.Registry(
            [
                self.requests,
                self.received,
                self.sent,
                self._images,
                self._pixels,
                self._instances,
                self._seconds,
                self._gauge("queue_length", "Images that wait.", lambda: pool.waiting),
                self._gauge("queue_limit", "Images that may wait.", lambda: limits.max_waiting),
                self._gauge("in_work", "Images at work.", lambda: pool.at_work),
                self._gauge("held_bytes", "Bytes of uploads held in memory.", lambda: self._store.held),
                self._gauge("workers", "Worker processes.", lambda: pool.workers),
                self._gauge("workers_ready", "Worker processes that have opened the model.", lambda: pool.ready),
                metrics.Gauge(
                    "sparsespec_worker_restarts_total",
                    "Worker processes that were replaced, by reason.",
                    lambda: {(("reason", reason),): count for reason, count in pool.restarts.items()},
                    kind="counter",
                ),
                metrics.Gauge(
                    "sparsespec_worker_memory_bytes",
                    "Memory of each worker process of its own, without shared pages.",
                    lambda: {(("worker", str(k)),): size for k, size in enumerate(pool.memory())},
                ),
                self._gauge("resident_memory_bytes", "Resident memory of the server's own process.", _resident),
            ]
        )

    @staticmethod
    def _gauge(name: str, text: str, look: Callable[[], float]) -> metrics.Gauge:
        return metrics.Gauge(f"sparsespec_{name}", text, lambda: {(): look()})

    def routes(self) -> dict[str, tuple[Callable[[Request], Awaitable[Response]], list[str]]]:
        """What is behind each address, and by which methods."""
        return {
            "/segment": (self.segment, ["POST"]),
            "/healthz": (self.alive, ["GET"]),
            "/readyz": (self.ready, ["GET"]),
            "/metrics": (self.metrics, ["GET"]),
            "/openapi.json": (self.openapi, ["GET"]),
            **{path: (answer, ["GET"]) for path, answer in page.answers().items()},
        }

    async def alive(self, request: Request) -> Response:
        """Tell that the process answers at all."""
        return JSONResponse({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """Tell whether an image would be taken on."""
        pool = self._pool
        if pool.stopping:
            status, code = "stopping", 503
        elif pool.unusable is not None:
            status, code = "model cannot be opened", 503
        elif not pool.ready:
            status, code = "starting", 503
        elif pool.full:
            status, code = "queue full", 503
        else:
            status, code = "ready", 200
        content = {"status": status, "workers_ready": pool.ready, "waiting": pool.waiting, "models": self._models}
        return JSONResponse(content, code, headers={"Retry-After": "2"} if code != 200 else None)

    async def metrics(self, request: Request) -> Response:
        """Give the numbers of this server."""
        return PlainTextResponse(self._registry.text(), headers={"Content-Type": metrics.MEDIA_TYPE})

    async def openapi(self, request: Request) -> Response:
        """Give the description of this server."""
        return JSONResponse(self._document)

    async def segment(self, request: Request) -> Response:
        """Segment an image."""
        record = record_of(request.scope)
        try:
            return await self._segment(request)
        except ProblemError as error:
            record.kind = error.problem.kind
            return error.problem.response(record.request_id)
        except DisconnectedError:
            record.status, record.kind = _GONE, "disconnected"
            # Nobody gets it.
            return Response(status_code=_GONE)

    async def _segment(self, request: Request) -> Response:
        record = record_of(request.scope)
        headers = request.headers
        wish = parse(request.query_params.multi_items(), _joined(headers, "accept"), self._models, self._limits)
        kind, parameters = check_head(headers, self._limits)
        # Before the body is read: whoever waits for "100 Continue" need not send it.
        self._pool.check_room()
        clock = asyncio.get_running_loop().time
        began = clock()
        with self._store.place() as place:
            body = await read_body(request.receive, kind, self._limits, place)
            image = image_of(body, kind, parameters, self._limits)
            del body
            record.stages["upload"] = clock() - began
            done, waited = await _unless_gone(request, self._pool.work(wish, image))
        del image
        record.stages["wait"] = waited
        record.stages |= {stage: float(value) for stage, value in done.facts.get("seconds", {}).items()}
        record.facts = {name: done.facts[name] for name in ("width", "height", "instances") if name in done.facts}
        if done.trace:
            _LOG.error("an image met an error\n%s", done.trace, extra={"request_id": record.request_id})
        if done.status != 200:
            raise ProblemError(_problem_of(done))
        self._images.add()
        self._pixels.add(record.facts["width"] * record.facts["height"])
        self._instances.add(record.facts["instances"])
        for stage, seconds in {**record.stages, "total": clock() - began}.items():
            self._seconds.add(seconds, stage=stage)
        timing = ", ".join(f"{_token(stage)};dur={seconds * 1000:.1f}" for stage, seconds in record.stages.items())
        return Response(done.content, media_type=wish.kind, headers={"Vary": "Accept", "Server-Timing": timing})


def _problem_of(done: Done) -> Problem:
    if not done.problem:
        return internal()
    kind, title, detail, advice = (str(done.problem.get(name, "")) for name in ("kind", "title", "detail", "advice"))
    retry = 10 if done.status == 503 else None
    parameter = {"parameter": "n_instances", "page": "page"}.get(kind)
    members: dict[str, Any] = {} if parameter is None else {"parameter": parameter}
    return Problem(done.status, kind, title, detail, advice, retry_after=retry, **members)


async def _unless_gone(request: Request, work: Any) -> tuple[Done, float]:
    """Wait for the result; when the client goes away first, its image is not begun any more."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise DisconnectedError
        result: tuple[Done, float] = task.result()
        return result
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _joined(headers: Headers, name: str) -> str | None:
    values = headers.getlist(name)
    return ", ".join(values) if values else None


def _token(stage: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in stage)


def _resident() -> float:
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm", "rb") as file:
        return float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return math.nan

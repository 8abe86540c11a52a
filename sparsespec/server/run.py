"""The server as a process: its socket, its signals, its log, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from sparsespec.server.app import create_app
from sparsespec.server.connection import protocol
from sparsespec.server.limits import MAX_HEAD, Limits
from sparsespec.server.logs import LOGGER, handler
from sparsespec.server.models import ServedModel

__all__ = ["ListenError", "UnusableError", "listen", "run"]

_BACKLOG = 512
_KEEP_ALIVE = 5
_LOG = logging.getLogger(LOGGER)


class ListenError(OSError):
    """There can be no server at this address: why, and what to do."""


class UnusableError(RuntimeError):
    """No worker process can open a model."""


def listen(host: str = "127.0.0.1", port: int = 8000, *, uds: str | None = None) -> socket.socket:
    """Take the address of the server.

    Parameters
    ----------
    host : str
        Name or address of this machine.
    port : int
        0 takes any that is free.
    uds : str, optional
        Path of a Unix domain socket, in place of host and port. One that a dead server has left is replaced.

    Raises
    ------
    ListenError
        It is in use, not allowed, or not this machine's.
    """
    if uds is not None:
        return _listen_at(Path(uds))
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ListenError(f"there is no address for the host '{host}': {_why(error)}") from error
    family, kind, number, _, address = found[0]
    sock = socket.socket(family, kind, number)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(_advice(error, host, port)) from error
    return sock


def _advice(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: end what uses it, or give another one (0 takes any that is free)"
    if error.errno == errno.EACCES:
        return f"port {port} is not allowed to this user: give one from 1024 on, and let a proxy listen on {port}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine: give 127.0.0.1, or 0.0.0.0 for all of its addresses"
    return f"cannot listen on port {port} of {host}: {_why(error)}"


def _listen_at(path: Path) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise ListenError("this system has no Unix domain sockets: give a host and a port")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ListenError(f"'{path}' is a file, which is left alone: give another path")
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
                else:
                    raise ListenError(f"a server listens on '{path}': end it, or give another path")
        sock.bind(str(path))
        # For the proxy, which is in the group of this process, and nobody else.
        path.chmod(0o660)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if isinstance(error, ListenError):
            raise
        raise ListenError(f"cannot listen on '{path}': {_why(error)}") from error
    return sock


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def run(
    models: Mapping[str, ServedModel],
    sock: socket.socket,
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    allowed_hosts: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    root_path: str = "",
    log_format: str = "json",
) -> int:
    """Serve until a signal comes.

    The first SIGTERM or SIGINT stops the server: it accepts nothing more, finishes what it has taken on within
    ``limits.grace`` seconds, and ends. The second ends it at once.

    Parameters
    ----------
    models, limits, workers, allowed_hosts, cors_origins, root_path
        As for :func:`sparsespec.server.app.create_app`.
    sock : socket
        Of :func:`listen`.
    log_format : str
        "text" or "json".

    Returns
    -------
    int
        0, or 128 plus the number of the signal that ended it at once.

    Raises
    ------
    UnusableError
        No worker process can open a model.
    """
    limits = limits or Limits()
    app = create_app(
        models,
        limits=limits,
        workers=workers,
        allowed_hosts=allowed_hosts,
        cors_origins=cors_origins,
        root_path=root_path,
    )
    with _logging(log_format):
        config = uvicorn.Config(
            app,
            http=protocol(limits),
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            root_path=root_path,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=int(limits.grace) + 5,
            h11_max_incomplete_event_size=MAX_HEAD,
        )
        server = _Server(config, app.state.pool, limits)
        with contextlib.closing(sock):
            url = _url(sock)
            _LOG.info("listening on %s", url, extra={"event": "listening", "url": url, "pid": os.getpid()})
            try:
                asyncio.run(server.serve([sock]))
            finally:
                if sock.family == getattr(socket, "AF_UNIX", None):
                    with contextlib.suppress(OSError):
                        os.unlink(url.removeprefix("unix:"))
        if server.unusable is not None:
            raise UnusableError(server.unusable)
        _LOG.info("stopped", extra={"event": "stopped"})
    return server.code


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, pool: Any, limits: Limits) -> None:
        super().__init__(config)
        self._pool, self._limits = pool, limits
        self.code = 0
        self.unusable: str | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end; say when the model is open, and end when it cannot be."""
        watch = asyncio.create_task(self._watch())
        try:
            with self._signals():
                await self._serve(sockets)
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        await self._pool.settled.wait()
        if self._pool.unusable is not None:
            self.unusable = self._pool.unusable
            self.should_exit = True
        else:
            _LOG.info("ready", extra={"event": "ready"})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what was taken on, for as long as may be."""
        stopping = asyncio.create_task(self._pool.stop(self._limits.grace))
        await super().shutdown(sockets)
        if self.force_exit:
            stopping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stopping
            await self._pool.stop(0.0)
        else:
            await stopping

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        # Not uvicorn's own way, which ends the process by the signal after it has stopped well.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [signal.SIGINT, signal.SIGTERM]
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handle in before.items():
                signal.signal(number, handle)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; the second time at once."""
        if self.should_exit:
            self.code = 128 + sig
            self.force_exit = True
            return
        self._pool.refuse()
        self.should_exit = True


def _url(sock: socket.socket) -> str:
    name = sock.getsockname()
    if isinstance(name, (str, bytes)):
        return f"unix:{os.fsdecode(name)}"
    host, port = name[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _logging(kind: str) -> Iterator[None]:
    """Let the log be written, that of uvicorn with it as far as it warns."""
    writer = handler(kind)
    levels = {
        LOGGER: logging.INFO,
        "uvicorn": logging.WARNING,
        "uvicorn.error": logging.WARNING,
        "asyncio": logging.WARNING,
    }
    top = (LOGGER, "uvicorn", "asyncio")
    loggers = [logging.getLogger(name) for name in levels]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger, level in zip(loggers, levels.values(), strict=True):
        logger.setLevel(level)
    # It says what is wrong with each form; the client is told.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    for name in top:
        logging.getLogger(name).addHandler(writer)
        logging.getLogger(name).propagate = False
    try:
        yield
    finally:
        for name in top:
            logging.getLogger(name).removeHandler(writer)
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate

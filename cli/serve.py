"""``sparsespec serve``: segment images over HTTP."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from ._method import method_option
from ._provider import provider_options as with_provider
from .run import Count, Directions, PositiveNumber

if TYPE_CHECKING:
    from sparsespec.server.limits import Limits
    from sparsespec.server.models import Model

__all__ = ["serve_command"]

_FAILED = 1
_NEEDED = {"starlette": "starlette", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
_LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Size(PositiveNumber):
    """A number above 0, of megabytes or megapixels."""

    name = "millions"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, in units of one."""
        number = super().convert(value, param, ctx) * 1e6
        if not math.isfinite(number):
            self.fail(f"{value} is too large.", param, ctx)
        return float(max(1, round(number)))


@click.command("serve", short_help="Segment images over HTTP.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    metavar="N",
    help="0 takes any that is free; the log says which.",
)
@click.option("--uds", type=click.Path(), metavar="PATH", help="Listen on a Unix domain socket, in place of a port.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME|FILE",
    help="A name of 'sparsespec models list', or an .onnx file, which is then known by its name without the ending."
    " Given several times, the first is the default and clients choose with ?model=NAME.  [default: default]",
)
@with_provider
@click.option(
    "--n-instances",
    type=Count(),
    default="auto",
    show_default=True,
    help="Objects in each image, where the client does not say: found out from the image, or given.",
)
@method_option
@click.option(
    "--directions",
    type=Directions(),
    default="default",
    show_default=True,
    help="As for 'sparsespec run'.",
)
@click.option(
    "--long-side",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Bring the longer side of each image to so many pixels for the network, by default 448.",
)
@click.option(
    "--max-long-side",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Largest that a client may ask for: time and memory grow with the square of it.  [default: 896]",
)
@click.option(
    "--max-instances",
    type=click.IntRange(min=1),
    metavar="N",
    help="Largest number of objects that a client may ask for: time grows with it.  [default: 50]",
)
@click.option(
    "--workers",
    type=Count(),
    default="auto",
    show_default=True,
    help="Worker processes, each at one image at a time with its share of the processors; 'auto' is one for each"
    " processor, four at most.",
)
@click.option("--max-body", type=Size(), metavar="MB", help="Largest upload.  [default: 20]")
@click.option("--max-held", type=Size(), metavar="MB", help="Memory for all uploads together.  [default: 256]")
@click.option("--max-pixels", type=Size(), metavar="MEGAPIXELS", help="Largest image.  [default: 50]")
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    metavar="N",
    help="Images that may wait while all workers are busy; one more is answered 429 at once.  [default: 32]",
)
@click.option("--wait-limit", type=PositiveNumber(), metavar="SECONDS", help="Longest wait.  [default: 60]")
@click.option("--time-limit", type=PositiveNumber(), metavar="SECONDS", help="Longest work on an image.  [default: 60]")
@click.option("--upload-limit", type=PositiveNumber(), metavar="SECONDS", help="Longest upload.  [default: 60]")
@click.option(
    "--memory-limit",
    type=Size(),
    metavar="MB",
    help="Give up an image whose worker process takes more memory. Linux.",
)
@click.option("--max-connections", type=click.IntRange(min=1), metavar="N", help="At the same time.  [default: 256]")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="To finish what was taken on when the server is told to stop.  [default: 20]",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Answer only requests to this name, several times for several. Default: this machine's own names where the"
    " server listens on a loopback address, else any.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin, such as https://example.org, use the server; several times for several.",
)
@click.option(
    "--root-path", default="", metavar="PATH", help="Path under which a proxy shows the server, such as /masks."
)
@click.option(
    "--log-format",
    type=click.Choice(["json", "text"]),
    help="Of the log on stderr.  [default: text on a terminal, else json]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of --method paper."
)
@click.pass_context
def serve_command(
    ctx: click.Context,
    host: str,
    port: int,
    uds: str | None,
    models: tuple[str, ...],
    provider: str,
    provider_options: dict[str, str],
    n_instances: int | None,
    method: str,
    directions: str | None,
    long_side: int | None,
    max_long_side: int | None,
    max_instances: int | None,
    workers: int | None,
    max_body: float | None,
    max_held: float | None,
    max_pixels: float | None,
    max_waiting: int | None,
    wait_limit: float | None,
    time_limit: float | None,
    upload_limit: float | None,
    memory_limit: float | None,
    max_connections: int | None,
    grace: float | None,
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    root_path: str,
    log_format: str | None,
    seed: int,
) -> None:
    """Segment images over HTTP.

    \b
    POST /segment      an image in; labels PNG, COCO JSON or an overlay out, by the header Accept
    GET  /             a page to drop a photograph on
    GET  /healthz /readyz /metrics /openapi.json

    \b
    Examples
      sparsespec serve
      curl --data-binary @cat.jpg http://127.0.0.1:8000/segment
      curl --data-binary @cat.jpg -H 'Accept: image/jpeg' http://127.0.0.1:8000/segment -o overlay.jpg
      sparsespec serve --host 0.0.0.0 --allowed-host masks.example.org

    It listens on 127.0.0.1 unless told otherwise, has no users and no passwords, and fetches nothing. SIGTERM or Ctrl-C
    lets it finish what it has taken on and end; the second time it ends at once.

    Exit codes: 0 stopped, 1 it could not listen or the model could not be opened, 2 wrong usage, 130 or 143 ended at
    once.
    """
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise click.UsageError(f"the server needs {' and '.join(missing)}: pip install 'sparsespec[serve]'.", ctx)
    if method == "paper" and n_instances is None:
        raise click.UsageError("--method paper needs the number of objects: add --n-instances N.", ctx)
    if method == "paper" and directions not in ("default", None):
        raise click.UsageError("--method paper uses no directions: leave --directions out.", ctx)
    if root_path and (not root_path.startswith("/") or root_path.endswith("/")):
        raise click.UsageError(f"--root-path '{root_path}' must begin with a slash and not end with one.", ctx)
    # Before NumPy is loaded, here and in the worker processes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    options: dict[str, Any] = {
        "provider": provider,
        "provider_options": provider_options,
        "n_instances": n_instances,
        "method": method,
        "directions": None if method == "paper" else directions,
        "rng": seed,
    }
    if long_side is not None:
        options["long_side"] = long_side
    limits = _limits(
        ctx,
        max_long_side=max_long_side if max_long_side is not None or long_side is None else max(896, long_side),
        max_instances=max_instances,
        max_body=_whole(max_body),
        max_held=_whole(max_held),
        max_pixels=_whole(max_pixels),
        max_waiting=max_waiting,
        wait_limit=wait_limit,
        time_limit=time_limit,
        upload_limit=upload_limit,
        memory_limit=_whole(memory_limit),
        max_connections=max_connections,
        grace=grace,
    )
    served = _served(ctx, models or ("default",), options)
    from sparsespec.server.run import ListenError, UnusableError, listen, run

    try:
        sock = listen(host, port, uds=uds)
    except ListenError as error:
        click.echo(f"sparsespec: {error}", err=True)
        ctx.exit(_FAILED)
    if not allowed_hosts and uds is None and (host == "localhost" or host == "::1" or host.startswith("127.")):
        allowed_hosts = (*_LOCAL, *([host] if host not in _LOCAL and ":" not in host else []))
    try:
        code = run(
            served,
            sock,
            limits=limits,
            workers=workers,
            allowed_hosts=allowed_hosts,
            cors_origins=cors_origins,
            root_path=root_path,
            log_format=log_format or ("text" if sys.stderr.isatty() else "json"),
        )
    except UnusableError as error:
        click.echo(f"sparsespec: cannot use the model: {error}", err=True)
        ctx.exit(_FAILED)
    ctx.exit(code)


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _limits(ctx: click.Context, **given: Any) -> Limits:
    from sparsespec.server.limits import Limits

    if given["memory_limit"] is not None and not os.path.exists("/proc/self/status"):
        raise click.UsageError("--memory-limit needs Linux, where the memory of a process can be read in /proc.", ctx)
    set_ = {name: value for name, value in given.items() if value is not None}
    if "max_body" in set_ and "max_held" not in set_:
        set_["max_held"] = max(Limits.max_held, set_["max_body"])
    try:
        return Limits(**set_)
    except ValueError as error:
        raise click.UsageError(f"{error}.", ctx) from error


def _served(ctx: click.Context, names: tuple[str, ...], options: dict[str, Any]) -> dict[str, Model]:
    """Find the models, without opening them: that is for the worker processes."""
    from pathlib import Path

    from sparsespec.models import read_trunk_metadata, resolve
    from sparsespec.server.models import Model

    served: dict[str, Model] = {}
    for name in names:
        try:
            path = resolve(name)
            read_trunk_metadata(path)
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise click.UsageError(f"cannot use the model '{name}': {text}", ctx) from error
        known = Path(name).stem if name.endswith(".onnx") else name
        if known in served:
            raise click.UsageError(f"two models are called '{known}': rename a file.", ctx)
        served[known] = Model(str(name), options)
    return served

"""``sparsespec doctor``: what this machine has, and what to do about each problem."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from ._provider import provider_options as with_provider

if TYPE_CHECKING:
    from sparsespec.diagnosis import Diagnosis

__all__ = ["doctor_command"]

_CANNOT_RUN = 1
_BYTES = ("total", "available", "limit", "peak_memory", "size_bytes")


@click.command("doctor", short_help="What this machine has, how fast it is, and what to do about each problem.")
@click.option(
    "--model",
    default="default",
    show_default=True,
    metavar="NAME|FILE",
    help="The network to try: a name of 'sparsespec models list', or an .onnx file.",
)
@with_provider
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=10,
    show_default=True,
    metavar="S",
    help="How long to measure speed, roughly; 0 leaves it out.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.pass_context
def doctor_command(
    ctx: click.Context,
    model: str,
    provider: str,
    provider_options: dict[str, str],
    seconds: float,
    as_json: bool,
) -> None:
    """Look at this machine and this installation, and time the network on a picture.

    Shown are versions, which builds of ONNX Runtime are installed and what they can run on, the processor, memory,
    where compiled kernels and models are kept, whether the model's file is whole, and how long images take. Then comes
    a line for each problem, and one that says what to do about it.

    Nothing is fetched, and nothing is written but compiled kernels.

    \b
    Examples
      sparsespec doctor
      sparsespec doctor --provider cuda
      sparsespec doctor --json --seconds 0

    Exit codes: 0 images can be segmented here, 1 they can't, 2 wrong usage.
    """
    # As for "sparsespec run", which is what is timed; before NumPy is loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from sparsespec.diagnosis import diagnose
    from sparsespec.providers import choose

    try:
        choose(provider, provider_options)
    except ValueError as error:
        raise click.UsageError(f"{error}.", ctx) from error
    found = diagnose(model, provider=provider, provider_options=provider_options or None, seconds=seconds)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else _as_text(found))
    if not found.can_run:
        ctx.exit(_CANNOT_RUN)


def _as_text(found: Diagnosis) -> str:
    lines: list[str] = []
    for section, facts in found.facts.items():
        lines.append(section)
        width = max(len(name) for name in facts)
        lines += [f"  {_caption(name).ljust(width)}  {_shown(name, value)}" for name, value in facts.items()]
    lines.append("")
    for problem in found.problems:
        lines += [f"{problem.level}: {problem.text}", f"  what to do: {problem.remedy}"]
    serious = sum(problem.level != "hint" for problem in found.problems)
    if not found.can_run:
        lines.append("images can't be segmented here")
    elif serious:
        lines.append(f"images can be segmented here; {serious} problem{'' if serious == 1 else 's'}")
    else:
        lines.append("images can be segmented here; no problems")
    return "\n".join(lines)


def _caption(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _shown(name: str, value: Any) -> str:
    if value is None or value in ([], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    if name in _BYTES:
        return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    return str(value)

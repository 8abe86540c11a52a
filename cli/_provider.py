"""The options that say what runs the network, the same for every command that runs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["pairs", "provider_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


class ProviderName(click.ParamType):
    """``auto``, the name of a provider, or ONNX Runtime's own name of one."""

    name = "provider"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Show some of the values in the help text."""
        return "auto|cpu|cuda|..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, checked."""
        from sparsespec.providers import choose

        try:
            return choose(value).name
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


def pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Turn KEY=VALUE, given any number of times, into a dict."""
    options: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not (key.strip() and equals):
            example = "anon=true" if param.name == "storage_options" else "device_id=1"
            raise click.BadParameter(f"'{value}' is not of the form {param.metavar}, such as {example}.", ctx, param)
        if key.strip() in options:
            raise click.BadParameter(f"'{key.strip()}' is given twice.", ctx, param)
        options[key.strip()] = text.strip()
    return options


def provider_options(command: _Command) -> _Command:
    """Add ``--provider`` and ``--provider-option``: a str and a dict of str to str."""
    command = click.option(
        "--provider-option",
        "provider_options",
        multiple=True,
        callback=pairs,
        metavar="KEY=VALUE",
        help="Option of that provider, handed to it as it is, such as device_id=1; may be given several times.",
    )(command)
    return click.option(
        "--provider",
        type=ProviderName(),
        default="auto",
        show_default=True,
        help="What runs the network: cpu, cuda, tensorrt, openvino, directml, coreml and others; 'auto' takes the first"
        " of CUDA, the platform's own and the CPU that is there. 'sparsespec doctor' lists what this machine has.",
    )(command)

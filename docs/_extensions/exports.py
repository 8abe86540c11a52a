"""What can be imported: the public modules, and what packages hand on from theirs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import sparsespec
import sparsespec.cli
import sparsespec.models


def is_public(module: str) -> bool:
    """Tell whether no part of a module's name begins with an underscore."""
    return not any(part.startswith("_") for part in module.split("."))


def public_modules() -> list[str]:
    """Names of all modules that users import, those of the command left out."""
    names = {"sparsespec"}
    # models/ stands elsewhere in a checkout, where the walk from the package doesn't come by.
    for package in (sparsespec, sparsespec.models):
        names.add(package.__name__)
        names.update(found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
    return sorted(name for name in names if is_public(name) and not name.startswith("sparsespec.cli"))


def is_hidden(module: str) -> bool:
    """Tell whether the package of a module has something else under its name, such as a function."""
    importlib.import_module(module)
    package, _, name = module.rpartition(".")
    return bool(package) and not isinstance(getattr(importlib.import_module(package), name, None), ModuleType)


def of_packages() -> dict[str, dict[str, Any]]:
    """For every package the names described on other pages, and those that have no other page, with their directive."""
    found: dict[str, dict[str, Any]] = {}
    for name in public_modules():
        module = importlib.import_module(name)
        if not hasattr(module, "__path__"):
            continue
        elsewhere, here = [], []
        for exported in sorted(getattr(module, "__all__", ())):
            thing = getattr(module, exported)
            home = getattr(thing, "__module__", None)
            if home is None or home == name or not home.startswith("sparsespec."):
                continue
            if is_public(home) and not is_hidden(home):
                elsewhere.append(f"{home}.{exported}".removeprefix(f"{name}."))
            else:
                here.append((exported, _directive(thing)))
        below = [each.name for each in pkgutil.iter_modules(module.__path__, f"{name}.") if is_public(each.name)]
        hidden = [each.removeprefix(f"{name}.") for each in below if is_hidden(each)]
        found[name] = {"elsewhere": elsewhere, "here": here, "hidden": hidden}
    return found


def _directive(thing: object) -> str:
    if isinstance(thing, type):
        return "autoexception" if issubclass(thing, BaseException) else "autoclass"
    return "autofunction" if inspect.isroutine(thing) else "autodata"

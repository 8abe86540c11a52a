from __future__ import annotations

import ast
import configparser
import functools
import importlib.metadata
import importlib.resources
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsespec
from tests import code_map

HEAVY = ("onnxruntime", "numba", "scipy", "skimage", "pyamg", "imageio", "PIL")
# The picture in docs/architecture.md: each may import those before it and its own part of the package.
ORDER = code_map.layers()
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}

# Files of more than 700 lines, and why each of them is one.
LONG = {
    "sparsespec.batch.cluster": "one engine: what it asks of scheduler and workers, and what it makes of the answers",
    "sparsespec.batch.remote": "one interface to every kind of store, and one table of what their errors mean",
    "sparsespec.images": "one reader: from every format, and from arrays, to the same pixels, whole or by window",
    "sparsespec.models.from_onnx": "one walk through a graph, which finds the parts in the order they are computed",
    "sparsespec.pipeline": "the stages in order, and what goes in and comes out, documented",
    "sparsespec.spectral": "one function with its solvers, the bounds of their residuals, and what follows a failure",
}


def sources() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module."""
    root = importlib.util.find_spec("sparsespec")
    packages = ["sparsespec"]
    assert root is not None
    while packages:
        package = packages.pop()
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or []:
            for path in sorted(Path(folder).glob("*.py")):
                yield (package if path.stem == "__init__" else f"{package}.{path.stem}"), path
            packages += [f"{package}.{p.parent.name}" for p in sorted(Path(folder).glob("*/__init__.py"))]
        if package == "sparsespec":
            # These stand in folders of their own.
            packages += [f"sparsespec.{name}" for name in ("cli", "models") if f"sparsespec.{name}" not in packages]


def imports(tree: ast.AST, module: str, is_package: bool, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; with top_level only when it is itself imported."""
    nodes = list(ast.iter_child_nodes(tree)) if top_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            yield from (f"{base}.{alias.name}" for alias in node.names)


@functools.cache
def parts_imported(path: Path, module: str, *, top_level: bool = False) -> frozenset[str]:
    """Which parts of the package, such as "channels" or "formats", a module imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = (n.split(".") for n in imports(tree, module, path.stem == "__init__", top_level=top_level))
    return frozenset(n[1] for n in names if n[0] == "sparsespec" and len(n) > 1 and not n[1].startswith("__"))


MODULES = dict(sources())


def test_every_module_is_found() -> None:
    assert {"sparsespec", "sparsespec.pipeline", "sparsespec._kernels.cuts", "sparsespec.formats.coco"} <= set(MODULES)
    assert {"sparsespec.cli.run", "sparsespec.models.registry", "sparsespec.batch.one"} <= set(MODULES)


def test_the_package_imports_no_part_of_itself() -> None:
    # Its names are loaded on first use.
    assert parts_imported(MODULES["sparsespec"], "sparsespec", top_level=True) == set()


def test_no_module_imports_one_downstream() -> None:
    wrong = []
    for module in MODULES.keys() - {"sparsespec"}:
        # The one tool among the modules, which checks the model it has built by running it.
        own = "models.build" if module == "sparsespec.models.build" else module.split(".")[1]
        others = parts_imported(MODULES[module], module) - {module.split(".")[1]}
        wrong += [f"{module} imports {other}" for other in others if PLACE.get(other, len(ORDER)) >= PLACE[own]]
    assert wrong == [], "not upstream of it in docs/architecture.md"


def test_the_map_has_every_part_once_and_no_other() -> None:
    parts = {module.split(".")[1] for module in MODULES if "." in module} | {"models.build"}
    assert sorted(part for layer in ORDER for part in layer) == sorted(parts)


def test_the_map_has_a_line_on_every_module() -> None:
    assert code_map.written() in code_map.PAGE.read_text(encoding="utf-8"), "out of date: python .ci/dev.py map"


def test_every_module_of_the_checkout_is_installed() -> None:
    assert set(code_map.modules()) == set(MODULES)


def test_long_files_have_a_reason() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    long = {module for module, length in lengths.items() if length > 700}
    assert long == set(LONG), "split it where it holds two ideas, or say in LONG why it is one"


def test_kernels_import_no_other_part_but_threads() -> None:
    for module, path in MODULES.items():
        if module.startswith("sparsespec._kernels."):
            assert parts_imported(path, module) <= {"_kernels", "_threads"}


def test_only_those_with_a_kernel_of_their_own_import_kernels() -> None:
    users = {m.split(".")[1] for m, path in MODULES.items() if "_kernels" in parts_imported(path, m) and "." in m}
    numerical = {
        "channels",
        "neighbors",
        "affinity",
        "_eigensolvers",
        "_multigrid",
        "spectral",
        "foreground",
        "instances",
        "refine",
    }
    assert users <= {"_kernels", *numerical}


def test_formats_do_not_know_the_pipeline() -> None:
    for module, path in MODULES.items():
        if module.startswith("sparsespec.formats"):
            assert parts_imported(path, module, top_level=True) <= {"formats", "_atomic", "_display", "_mapped"}


@pytest.mark.parametrize("part", ["", ".models", ".images", ".formats", ".batch", ".cli"])
def test_imports_that_load_nothing_heavy(part: str) -> None:
    code = f"import sys, sparsespec{part}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []


def test_public_names() -> None:
    assert dir(sparsespec) == sorted(sparsespec.__all__)
    for name in sparsespec.__all__:
        assert getattr(sparsespec, name) is not None
    assert sparsespec.segment is sparsespec.pipeline.segment


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'sparsespec' has no attribute 'nosuch'"):
        sparsespec.nosuch  # noqa: B018
    with pytest.raises(ImportError, match="nosuch"):
        from sparsespec import nosuch  # noqa: F401


def test_the_package_says_that_it_is_typed() -> None:
    assert (importlib.resources.files("sparsespec") / "py.typed").is_file()


def test_the_version_is_the_one_installed() -> None:
    assert sparsespec.__version__ == importlib.metadata.version("sparsespec")
    setup = configparser.ConfigParser()
    assert setup.read(Path(__file__).parents[1] / "setup.cfg")
    assert sparsespec.__version__ == setup["metadata"]["version"]
    releases = re.findall(r"^## \[(\d[^\]]*)\]", (code_map.ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert sparsespec.__version__ == releases[0]


def test_the_changelog_has_its_form() -> None:
    text = (code_map.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:])
    assert headings[1:] == sorted(
        headings[1:], key=lambda h: [int(n) for n in h[1 : h.index("]")].split(".")], reverse=True
    )
    kinds = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_setup_names_every_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    packages = {m for m, path in MODULES.items() if path.stem == "__init__"}
    assert set(setup["options"]["packages"].split()) == packages

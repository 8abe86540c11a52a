"""What a contributor runs, on any system: ``python .ci/dev.py setup``, then ``python .ci/dev.py check``.

``setup`` makes the virtual environment ``.venv`` with the package (editable), all extras and the hooks of git.
``check`` looks at everything a change has to pass; ``check types tests`` at some of it. ``fix`` does what needs no
decision: formatting, simple lint, the map of the code.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
EXTRAS = "dev,test,docs,browser"
# What is imported from where, as setup.cfg has it.
PACKAGE_DIR = {"sparsespec": "sparsespec", "cli": "sparsespec/cli", "models": "sparsespec/models"}


def tool(*command: str | Path) -> bool:
    """Run a module of this Python with its arguments; False if it fails."""
    return run(sys.executable, "-m", *command)


def run(*command: str | Path, folder: Path = ROOT) -> bool:
    """Run a command, with its output where ours goes, and with the tools that were installed with this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    done = subprocess.run([str(part) for part in command], cwd=folder, env={**os.environ, "PATH": path}, check=False)
    return done.returncode == 0


def setup() -> bool:
    """Make ``.venv``; again is fine, and brings it up to date."""
    if not (VENV / "pyvenv.cfg").exists() and not run(sys.executable, "-m", "venv", VENV):
        shutil.rmtree(VENV, ignore_errors=True)  # or the next try would take what is left, without pip, for all of it
        return False
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = run(python, "-m", "pip", "install", "--editable", f".[{EXTRAS}]")
    if done and (ROOT / ".git").exists():
        done = run(python, "-m", "pre_commit", "install")
    if done:
        activate = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
        print(f"\nReady. Next: {activate}, then python .ci/dev.py check")
    return done


def lint() -> bool:
    """Look for mistakes and for what is formatted otherwise."""
    found = tool("ruff", "check", "."), tool("ruff", "format", "--check", ".")
    return all(found)


def types() -> bool:
    """Check types in a copy of the sources laid out as they are installed: mypy knows nothing of ``package_dir``."""
    copy = ROOT / "build" / "types"
    shutil.rmtree(copy, ignore_errors=True)
    for source, target in PACKAGE_DIR.items():
        for path in (ROOT / source).rglob("*"):
            if path.suffix in {".py", ".pyi"} or path.name == "py.typed":
                place = copy / target / path.relative_to(ROOT / source)
                place.parent.mkdir(parents=True, exist_ok=True)
                # With its times, by which mypy knows what it has seen before.
                shutil.copy2(path, place)
    command = ["mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    command += ["-p", "sparsespec"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", *map(str, command)], cwd=copy, stdout=subprocess.PIPE, text=True, check=False
    )
    for line in done.stdout.splitlines():
        print(checkout_path(line))
    return done.returncode == 0


def checkout_path(line: str) -> str:
    """Turn the name of an installed file into that of the file in the checkout, where somebody will want to go."""
    for source, target in PACKAGE_DIR.items():
        if source != target and line.replace("\\", "/").startswith(f"{target}/"):
            return source + line[len(target) :]
    return line


def tests() -> bool:
    """Run the quick tests, on all processors."""
    return tool("pytest", "-n", "auto")


def slow() -> bool:
    """Run the tests that take longer."""
    return tool("pytest", "-n", "auto", "-m", "slow")


def docs() -> bool:
    """Build the documentation site; a link that leads nowhere is an error."""
    return tool("sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html")


def hooks() -> bool:
    """Run what git will run at a commit, over all files."""
    if not (ROOT / ".git").exists():
        print("no git repository here")
        return True
    return tool("pre_commit", "run", "--all-files", "--show-diff-on-failure")


def code_map() -> bool:
    """Write the lines on the modules in docs/architecture.md."""
    spec = importlib.util.spec_from_file_location("code_map", ROOT / "tests" / "code_map.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print("docs/architecture.md:", "written" if module.update() else "as it was")
    return True


def fix() -> bool:
    """Format, mend what ruff can mend, and bring the map of the code up to date."""
    mended = tool("ruff", "check", "--fix", "."), tool("ruff", "format", "."), code_map()
    return all(mended)


CHECKS: dict[str, Callable[[], bool]] = {"lint": lint, "types": types, "hooks": hooks, "tests": tests, "docs": docs}
MORE: dict[str, Callable[[], bool]] = {"slow": slow}


def check(names: list[str]) -> bool:
    """Run these checks, or all but the slow tests; every one of them, whatever the others say."""
    known = CHECKS | MORE
    for unknown in (name for name in names if name not in known):
        sys.exit(f"no check is called {unknown!r}: there are {', '.join(known)}")
    said = []
    for name in names or CHECKS:
        print(f"\n== {name}", flush=True)
        began = time.monotonic()
        said.append((name, known[name](), time.monotonic() - began))
    print()
    for name, good, seconds in said:
        print(f"{name:8} {'good' if good else 'FAILED'} ({seconds:.0f} s)")
    return all(good for _, good, _ in said)


def main() -> int:
    """Understand the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("setup", help="make .venv with everything in it")
    one = commands.add_parser("check", help=f"check everything, or some of {', '.join(CHECKS | MORE)}")
    one.add_argument("names", nargs="*", metavar="CHECK")
    commands.add_parser("fix", help="format, and mend what can be mended by itself")
    commands.add_parser("map", help="bring docs/architecture.md up to date")
    given = parser.parse_args()
    if given.command == "check":
        return 0 if check(given.names) else 1
    return 0 if {"setup": setup, "fix": fix, "map": code_map}[given.command]() else 1


if __name__ == "__main__":
    sys.exit(main())

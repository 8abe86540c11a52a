"""Write the files that a fuzzing run begins with: ``python tests/fuzz/seeds.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import malformed


def main() -> None:
    """Write the originals of the malformed files to the folder named on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in malformed.originals().items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()

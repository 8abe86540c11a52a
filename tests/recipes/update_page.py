"""Put the scripts of docs/recipes as they are into docs/recipes.md.

python tests/recipes/update_page.py
"""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"

BLOCK = re.compile(r"^(\[`(\w+\.py)`\]\(recipes/\2\)[^\n]*\n\n```python\n)(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A line that begins with a link to a script, and the script."""


def main() -> None:
    def filled(match: re.Match[str]) -> str:
        return match[1] + (PAGE.parent / "recipes" / match[2]).read_text(encoding="utf-8") + "```"

    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(filled, text), encoding="utf-8")


if __name__ == "__main__":
    main()

from __future__ import annotations

import sys
from pathlib import Path

# So that worker processes, which look where this one does, find the stubs as well.
sys.path.insert(0, str(Path(__file__).parent))

"""How much of a run's updates arrived, as its files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def arrived(path: Path, strategy: str) -> float:
    """The EDQ ratio of a run under a strategy, of result.json or summary.json, or the folder that holds one.

    Raises:
        ValueError: no such file, another one, or one without that strategy; named.
    """
    file = next((path / name for name in ("summary.json", "result.json") if (path / name).exists()), path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--report '{file}': cannot be read as JSON ({error})") from None
    rows = _rows(found)
    ratio = next((row.get("edq_ratio") for row in rows if row.get("strategy") == strategy), None)
    if not isinstance(ratio, int | float):
        known = ", ".join(dict.fromkeys(str(row["strategy"]) for row in rows if "strategy" in row)) or "none"
        raise ValueError(f"--report '{file}': has no EDQ ratio of '{strategy}'; strategies in it: {known}")
    return float(ratio)


def _rows(found: Any) -> list[dict[str, Any]]:
    """summary.json has a table of strategies, result.json is a row itself."""
    rows = found.get("table", [found]) if isinstance(found, dict) else found
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

"""What the tables of kept results are written with: scores cut, JSON, and Markdown."""

import json
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path

from support.safe_files import write_atomically


def cut(value: float, digits: int) -> str:
    """Return `value` with so many decimals, never rounded up: a score shown was reached."""
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR))


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def markdown(rows: list[dict[str, str]]) -> str:
    """Return rows with the same keys as a table in Markdown."""
    lines = [list(rows[0])] + [list(row.values()) for row in rows]
    head, *body = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])

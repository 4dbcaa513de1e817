"""Damage to the files of a run."""

from pathlib import Path


def damage(path: Path, old: str, new: str | None) -> None:
    """Replace a text in a file, all of it for "", or remove the file for None."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.unlink()
    if new is not None:
        # A run's files are ASCII; beyond it, this writes bytes that are not UTF-8.
        path.write_text(text.replace(old, new) if old else new, encoding="latin-1")

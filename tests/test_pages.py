"""The pages as text."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
WIDTH = 132  # as ruff holds the code to


def prose(text: str):
    """Numbers and lines without code blocks, and without tables, whose rows can't be broken."""
    text = re.sub(r"^ *```.*?^ *```", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if not line.startswith("|")]


def test_prose_is_in_lines_that_an_editor_shows_whole():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(pages) > 10
    lines = {page.name: prose(page.read_text()) for page in pages}
    assert [(name, number) for name, found in lines.items() for number, line in found if len(line) > WIDTH] == []
    assert max(len(line) for found in lines.values() for _, line in found) > WIDTH - 3  # it does look at prose

"""What documents are made of: Markdown tables, JSON without NaN, places for tables."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import written_whole


def fill_between(document: str | Path, begin: str, end: str, text: str) -> Path:
    """Replace what stands between two lines of a document.

    Args:
        document: A Markdown file.
        begin: The line before it.
        end: The line after it, the next of that text.
        text: What to write there.

    Returns:
        The document.

    Raises:
        ConfigError: If the document lacks one of the lines.
        FileNotFoundError: If there is no such document.
    """
    before, after = around(document, begin, end)
    with written_whole(document) as path:
        path.write_text(f'{before}\n{text}\n{after}', encoding='utf-8')
    return Path(document)


def around(document: str | Path, begin: str, end: str) -> tuple[str, str]:
    """What stands before and after the text between two lines of a document, these included.

    Args, Raises:
        See `fill_between`.
    """
    content = Path(document).read_text(encoding='utf-8')
    before, found, rest = content.partition(f'{begin}\n')
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ConfigError(f'{document} has no place for the tables: it needs a line {begin} and '
                          f'after it a line {end}')
    return before + found, found_end + after


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]],
                   left: Collection[str] = ('',)) -> str:
    """A table for GitHub.

    Args:
        headings: Of the columns.
        rows: Cells of each row, as text.
        left: Headings of the columns that are aligned to the left; others to the right.
    """
    marks = ['---' if heading in left else '---:' for heading in headings]
    return '\n'.join(f'| {" | ".join(cell.replace("|", chr(92) + "|") for cell in cells)} |'
                     for cells in (headings, marks, *rows))


def without_nan(value: Any) -> Any:
    """Plain types for JSON, which has no NaN and no infinity: they become None.

    Args:
        value: Numbers and text, in lists and dictionaries.
    """
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

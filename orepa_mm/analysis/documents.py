"""Documents into which measured tables are written."""

from __future__ import annotations

from pathlib import Path

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
    document = Path(document)
    content = document.read_text(encoding='utf-8')
    before, found, rest = content.partition(f'{begin}\n')
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ConfigError(f'{document} has no place for the tables: it needs a line {begin} and '
                          f'after it a line {end}')
    with written_whole(document) as path:
        path.write_text(f'{before}{found}\n{text}\n{found_end}{after}', encoding='utf-8')
    return document

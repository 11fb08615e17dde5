"""A page that needs no other file: HTML with its pictures inside."""

from __future__ import annotations

import base64
import html
import io
import shlex
from collections.abc import Sequence

from matplotlib.figure import Figure

_PAGE = '''<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }} td, th {{ padding: .25em 1em; border-bottom: 1px solid #ccc }}
td + td, th + th {{ text-align: right }} img {{ max-width: 100% }} .note {{ color: #555 }}
pre {{ background: #f4f4f4; padding: .5em 1em; overflow-x: auto }}
</style>
<h1>{title}</h1>
{body}
</html>
'''


def html_page(title: str, body: str) -> str:
    """A whole page.

    Args:
        title: As text.
        body: As HTML.
    """
    return _PAGE.format(title=html.escape(title), body=body)


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned to the right.

    Args:
        headings: Text of the columns' headings.
        rows: Text of the cells.
    """
    lines = [''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)
             for tag, cells in (('th', headings), *(('td', row) for row in rows))]
    return '<table>' + '\n'.join(f'<tr>{line}</tr>' for line in lines) + '\n</table>'


def html_commands(commands: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """What can be done, and the lines of a shell that do it.

    Args:
        commands: For each thing, what it is as text, and its command lines as words;
            they are quoted where the shell needs it.
    """
    return '\n'.join(
        f'<p>{html.escape(what)}</p>\n<pre>'
        + html.escape('\n'.join(map(shlex.join, lines)), quote=False) + '</pre>'
        for what, lines in commands)


def html_picture(png: bytes, alt: str) -> str:
    """A picture within the page.

    Args:
        png: Content of a PNG file.
        alt: What it shows, as text.
    """
    encoded = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{encoded}">'


def png_of(figure: Figure) -> bytes:
    """A figure as the content of a PNG file.

    Args:
        figure: Any.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=100)
    return buffer.getvalue()

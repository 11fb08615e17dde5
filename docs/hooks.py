"""What the site needs beyond MkDocs: sections of the README, and the configs that pages link to.

On GitHub a page links to the README and to files outside `docs/`. The site has no such files, so

- a line that is nothing but a link to a section of the README becomes that section,
- every other link to the README goes to the page that holds the section, or to the first page,
- the configs become files of the site.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
SECTION_LINE = re.compile(r'^\[[^\]]*\]\(\.\./README\.md#([\w-]+)\)$', re.MULTILINE)
README_LINK = re.compile(r'\]\(\.\./README\.md(?:#([\w-]+))?\)')


def readme_sections() -> dict[str, str]:
    """The README in pieces, with links as they would stand in a page of `docs/`.

    Returns:
        Anchor to Markdown: what stands under the title, without the title; and
        each section of the second level with its heading.
    """
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    text = text.replace('](docs/', '](').replace('](configs/', '](../configs/')
    sections = {}
    for piece in re.split(r'^##? ', text, flags=re.MULTILINE)[1:]:
        title, _, body = piece.partition('\n')
        anchor = re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-')
        sections[anchor] = f'## {piece}' if sections else body
    return sections


def pages_of_sections() -> dict[str, str]:
    """The page that holds a section of the README, by the section's anchor."""
    return {anchor: page.name for page in sorted((ROOT / 'docs').glob('*.md'))
            for anchor in SECTION_LINE.findall(page.read_text(encoding='utf-8'))}


def on_files(files: Any, config: Any) -> Any:
    """Add the configs to the files of the site; called by MkDocs."""
    for path in sorted((ROOT / 'configs').rglob('*.py')):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(),
                                    abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Put the README's sections in place, and let links end in the site; called by MkDocs.

    Raises:
        PluginError: If the README has no section of the name that a page asks for.
    """
    sections, pages = readme_sections(), pages_of_sections()

    def section(line: re.Match) -> str:
        if line[1] not in sections:
            raise PluginError(f'docs/{page.file.src_uri} asks for the section #{line[1]} of '
                              f'README.md, which has {", ".join(sections)}')
        return sections[line[1]]

    def link(found: re.Match) -> str:
        return f']({pages[found[1]]}#{found[1]})' if found[1] in pages else '](index.md)'

    markdown = README_LINK.sub(link, SECTION_LINE.sub(section, markdown))
    return markdown.replace('](../configs/', '](configs/')

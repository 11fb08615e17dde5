"""The documentation hangs together: on GitHub, where a page is read by itself, and as a site."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT

DOCS = ROOT / 'docs'
PAGES = (ROOT / 'README.md', *sorted(DOCS.glob('*.md')))
FENCE = re.compile(r'^ *```.*?^ *```$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\[[^\]]*\]\(([^)\s]+)\)')
CONFIG = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())


def prose(page):
    """The text of a page without blocks and pieces of code."""
    return re.sub(r'`[^`\n]*`', 'code', FENCE.sub('', page.read_text()))


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r'^#+ (.*)$', FENCE.sub('', page.read_text()), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


def broken_links(page):
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition('#')
        target = page.parent / path if path else page
        leads = target.exists() and (not anchor or anchor in anchors(target))
        if '://' not in link and not leads:
            broken.append(link)
    return broken


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('# One `word`, two\n[a](page.md#one-word-two) [b](page.md#three)\n[c](gone.md) '
                    '`[d](code.md)` [e](https://example.org/f.md)\n![g](gone.png)\n')
    assert broken_links(page) == ['page.md#three', 'gone.md', 'gone.png']


def test_the_navigation_names_every_page():
    named = [name for entry in CONFIG['nav'] for name in entry.values()]
    assert sorted(named) == sorted(page.name for page in DOCS.glob('*.md'))


def test_pages_lead_on():
    """No page is a dead end."""
    for page in DOCS.glob('*.md'):
        assert any(link.partition('#')[0].endswith('.md') and '../' not in link
                   for link in LINK.findall(prose(page))), page


def test_lists_in_lists_are_indented_for_the_site():
    """By four spaces; GitHub takes two, and the site would draw one list."""
    for page in PAGES:
        assert not re.findall(r'^ {1,3}(?:[-*]|\d\.) .*$', FENCE.sub('', page.read_text()),
                              re.MULTILINE), page


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    for name in ('mkdocs', 'material', 'mkdocstrings'):
        pytest.importorskip(name, reason=f'{name}, which builds the site, is not installed')
    out = tmp_path_factory.mktemp('site')
    result = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--site-dir', out],
                            cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def test_the_site_has_every_page_and_every_config(site):
    for page in DOCS.glob('*.md'):
        assert (site / f'{page.stem}.html').is_file()
    for config in (ROOT / 'configs').rglob('*.py'):
        assert (site / config.relative_to(ROOT)).read_text() == config.read_text()
    assert not (site / 'hooks.py').exists()


def test_the_first_page_holds_the_readme(site):
    page = (site / 'index.html').read_text()
    for text in ('make demo', 'id="two-commands"', 'src="demo-detections.jpg"',
                 'href="configs/faster_rcnn/faster-rcnn_orepa-r50_fpn_1x_coco.py"',
                 'href="custom-configs.html"'):
        assert text in page, text
    assert 'README.md' not in page


def test_the_api_reference_holds_what_is_public(site):
    page = (site / 'api.html').read_text()
    for name in ('reparam.expand.expand', 'reparam.reparameterize.reparameterize',
                 'reparam.verify.verify'):
        assert f'id="orepa_mm.{name}"' in page
    source = (ROOT / 'orepa_mm' / 'errors.py').read_text()
    errors = re.findall(r'^class (\w+)', source, re.MULTILINE)
    for name in errors:
        assert f'id="orepa_mm.errors.{name}"' in page
    assert errors


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob('*.html'):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?(https?:[^"> ]+)',
                            page.read_text())
        assert loaded == [], page


def test_a_warning_is_an_error(site, tmp_path):
    """`site` is asked for because it says whether MkDocs is there."""
    for name in ('mkdocs.yml', 'README.md'):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'configs').mkdir()
    shutil.copy(DOCS / 'hooks.py', tmp_path / 'docs')
    for name in (name for entry in CONFIG['nav'] for name in entry.values()):
        (tmp_path / 'docs' / name).write_text('# Page\n')
    (tmp_path / 'docs' / 'faq.md').write_text('# Page\n[a](deployment.md#nothing)\n')
    command = [sys.executable, '-m', 'mkdocs', 'build']
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "'deployment.md#nothing'" in result.stderr

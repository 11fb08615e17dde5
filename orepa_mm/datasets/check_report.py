"""What a check of data found, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from ..files import written_whole
from .check import DataCheck
from .check_findings import problem_table


def print_check(check: DataCheck, root: str | Path | None = None) -> None:
    """Print what was looked at, a table of problems for each data set, and the verdict.

    Args:
        check: From `check_data`.
        root: Folder that the table's names leave out.
    """
    console = Console()
    for data, images, opened in check.counts:
        print(f'{data}: {images} images, {opened} opened')
        findings = [finding for finding in check.findings if finding.data == data]
        if findings:
            console.print(problem_table(findings, root))
    if check.passed:
        print('nothing that stops a run or makes a metric wrong was found')
    else:
        print('the data are not fit to train and test on: see what is no note')


def save_check(check: DataCheck, path: str | Path) -> None:
    """Write what was found as JSON, with all names.

    Args:
        check: From `check_data`.
        path: The file.
    """
    content = {
        'passed': check.passed,
        'data': [dict(zip(('data', 'images', 'opened'), count, strict=True))
                 for count in check.counts],
        'findings': [{'data': finding.data, 'problem': finding.problem, 'effect': finding.effect,
                      'count': len(finding.names), 'names': finding.names}
                     for finding in check.findings]}
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')

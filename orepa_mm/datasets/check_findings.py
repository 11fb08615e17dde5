"""What a check of data found: problems, what they do to a run, and which items have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Column, Table

#: What a problem does, worst first.
STOPS, METRIC, SPOILS, NOTE = 'stops a run', 'wrong metric', 'spoils training', 'note'
EFFECTS = (STOPS, METRIC, SPOILS, NOTE)
#: Names that a table shows of each problem.
_SHOWN = 3
#: Found when annotations were converted; what it does as below.
CONVERTED = {
    'image file is missing, left out': (SPOILS, METRIC),
    'image cannot be read, left out': (SPOILS, METRIC),
    'image listed twice, left out once': (NOTE, NOTE),
    'image without a label file': (NOTE, NOTE),
    'label file is missing, image left out': (SPOILS, METRIC),
    'label file cannot be read, image left out': (SPOILS, METRIC),
    'label cannot be read, left out': (SPOILS, METRIC),
    'label of an unknown class, left out': (SPOILS, METRIC),
    'label given twice, left out once': (NOTE, NOTE),
    'box of no area, left out': (NOTE, NOTE),
    'box outside of the image, left out': (SPOILS, METRIC),
    'box begins before the first pixel, which is 1': (NOTE, NOTE),
    'size in the label file differs from that of the image': (SPOILS, METRIC),
    'difficult object, counted neither in training nor in the metric': (NOTE, NOTE),
    'keypoints are not used': (NOTE, NOTE),
}
#: Each problem: what it does in data to train on, and in data to test on.
PROBLEMS = {
    **CONVERTED,
    'data cannot be listed': (STOPS, STOPS),
    'no images': (STOPS, STOPS),
    'image file is missing': (STOPS, STOPS),
    'image file is empty': (STOPS, STOPS),
    'image cannot be read': (STOPS, STOPS),
    'image is cut off': (SPOILS, METRIC),
    'image in training and test data': (METRIC, METRIC),
    'image in two sets of test data': (NOTE, NOTE),
    # of COCO's files; what mmdet leaves out in training still counts in the metric
    'entry without an id': (STOPS, STOPS),
    'image id used twice': (SPOILS, METRIC),
    'annotation id used twice': (STOPS, STOPS),
    'category id used twice': (SPOILS, METRIC),
    'image without file name, width or height': (STOPS, STOPS),
    'box is not four numbers': (STOPS, STOPS),
    'box is NaN or infinite': (SPOILS, METRIC),
    'box of negative size': (SPOILS, METRIC),
    'box of no area': (NOTE, METRIC),
    'box outside of the image': (NOTE, METRIC),
    'box reaches out of the image': (NOTE, NOTE),
    'category id is not in the file': (SPOILS, METRIC),
    'area is missing': (STOPS, STOPS),
    'area is not positive': (NOTE, METRIC),
    'iscrowd is missing': (NOTE, STOPS),
    'mask is missing': (STOPS, STOPS),
    'mask is broken': (SPOILS, METRIC),
    'annotation of an image that is not in the file': (NOTE, NOTE),
    'category that the config does not use': (NOTE, NOTE),
    'class of the config that the file does not have': (SPOILS, METRIC),
    'image without labels': (NOTE, NOTE),
    'no labels at all': (STOPS, METRIC),
    'size differs from that in the annotation file': (SPOILS, METRIC),
    # of label maps
    'label map is missing': (STOPS, STOPS),
    'label map is empty': (STOPS, STOPS),
    'label map cannot be read': (STOPS, STOPS),
    'label map is a colour image': (STOPS, STOPS),
    'label map of another size than the image': (STOPS, STOPS),
    'label value out of range': (STOPS, METRIC),
    'label map of an image that is not there': (NOTE, NOTE),
    # of class folders and lists
    'class label out of range': (STOPS, STOPS),
    'class without images': (SPOILS, NOTE),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One problem of one data set.

    Attributes:
        data: The data set, see `Findings`.
        problem: One of `PROBLEMS`.
        effect: One of `EFFECTS`.
        names: The items that have it: images, annotations, classes.
    """

    data: str
    problem: str
    effect: str
    names: list[str]


class Findings:
    """Collects what is wrong with one data set.

    Args:
        data: Its name, for people.
        splits: What it is used for, of `train`, `val` and `test`.
    """

    def __init__(self, data: str, splits: Collection[str]) -> None:
        self.data = data
        self.training, self.testing = 'train' in splits, not {*splits} <= {'train'}
        self._names: dict[str, list[str]] = {}

    def add(self, problem: str, names: str | Iterable[str]) -> None:
        """Note a problem.

        Args:
            problem: One of `PROBLEMS`.
            names: The item that has it, or several; none is no problem.
        """
        names = [names] if isinstance(names, str) else list(names)
        if names:
            self._names.setdefault(problem, []).extend(names)

    def found(self) -> list[Finding]:
        """All problems, the worst first."""
        found = [Finding(self.data, problem, self._effect(problem), names)
                 for problem, names in self._names.items()]
        return sorted(found, key=lambda finding: EFFECTS.index(finding.effect))

    def _effect(self, problem: str) -> str:
        effects = [effect for effect, applies in zip(
            PROBLEMS[problem], (self.training, self.testing), strict=True) if applies]
        return min(effects, key=EFFECTS.index)


def problem_table(findings: Iterable[Finding], root: str | Path | None = None) -> Table:
    """A table of problems, with the first names of each.

    Args:
        findings: The problems.
        root: Folder that the names leave out.
    """
    table = Table('problem', 'how many', Column('first names', overflow='fold'), 'effect',
                  box=box.SIMPLE_HEAD)
    for finding in findings:
        names = '\n'.join(finding.names[:_SHOWN])
        names = names.replace(f'{str(root).rstrip("/")}/', '') if root else names
        # paths and boxes have brackets: no markup
        table.add_row(*map(escape, (finding.problem, str(len(finding.names)), names,
                                    finding.effect)))
    return table

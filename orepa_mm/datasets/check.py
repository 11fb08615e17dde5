"""Look for everything in a config's data that would stop a run, or make what it says wrong."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS

from ..errors import DataRootError
from .check_annotations import check_coco, has_boxes, has_file_name, read_coco
from .check_findings import CONVERTED, NOTE, Finding, Findings
from .check_images import Sample, check_files, check_image, check_label_map, same_content
from .cityscapes_layout import num_label_values
from .config_walk import SPLITS, dicts_with, find_datasets, spread, type_name
from .conversion import conversion_of

#: Of a progress bar: what is counted, how many are done, how many there are.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """What a check found.

    Attributes:
        findings: The problems of all data sets.
        counts: For each data set its name, how many images it has, and how many were opened.
    """

    findings: list[Finding]
    counts: list[tuple[str, int, int]]

    @property
    def passed(self) -> bool:
        """Whether nothing was found but notes."""
        return all(finding.effect == NOTE for finding in self.findings)


def check_data(cfg: Config, splits: Sequence[str] = SPLITS, max_images: int | None = None,
               progress: Progress | None = None) -> DataCheck:
    """Check the data that a config reads.

    Looked at are annotations in COCO format (mmdet), what was left out when they
    were converted to it, label maps (mmseg), class folders and lists of images
    (mmpretrain), the image files of all of them, and whether data to train on
    and data to test on share images.

    Args:
        cfg: From `orepa_mm.engine.load_config`, with `check=False`.
        splits: The data to check, of `train`, `val` and `test`.
        max_images: Images of each data set that are opened at most, spread
            evenly. Annotations, and whether files are there and in two sets,
            are checked for all. None: all are opened.
        progress: Called after each image.

    Returns:
        What was found.

    Raises:
        DataRootError: If the config names no data, or data of another kind.
    """
    parts: list[_Part] = []
    for found in _different(cfg, splits):
        parts.append(_part_of(*found, {part.findings.data for part in parts}))
    if not parts:
        raise DataRootError(f'the config names no data for {", ".join(splits)}')
    files, counts = [], []
    for part in parts:
        there = check_files(part.samples, part.findings) if part.listed else []
        files.append([sample.image for sample in there])
        chosen = spread(len(there), max_images)
        counts.append((part.findings.data, len(part.samples), len(chosen)))
        for done, i in enumerate(chosen, start=1):
            part.check(there[i])
            if progress is not None:
                progress(part.findings.data, done, len(chosen))
    for (one, first), (other, second) in itertools.combinations(zip(parts, files, strict=True), 2):
        _check_shared(one.findings, first, other.findings, second)
    return DataCheck([finding for part in parts for finding in part.findings.found()], counts)


class _Part:
    """A data set whose annotations were checked; what its images are checked with."""

    def __init__(self, findings: Findings, samples: list[Sample] | None = None,
                 num_values: int = 0, ignore_index: int = 255) -> None:
        self.findings = findings
        self.listed = samples is not None
        self.samples = samples or []
        self._labels = (num_values, ignore_index)

    def check(self, sample: Sample) -> None:
        size = check_image(sample, self.findings)
        if sample.label is not None:
            check_label_map(sample.label, size, *self._labels, self.findings)


def _different(cfg: Config, splits: Sequence[str]) -> list[tuple[BaseDataset, set[str], bool]]:
    """Each data set once, not loaded; what it is used for; whether masks are read."""
    found: dict[tuple, tuple[BaseDataset, set[str], bool]] = {}
    for split in splits:
        for dataset in find_datasets(cfg, [split]):
            masks = any(dicts_with('with_mask', dataset.get('pipeline')))
            built = DATASETS.build({**dataset, 'pipeline': [], 'lazy_init': True,
                                    '_scope_': cfg.get('default_scope', 'mmengine')})
            key = (type_name(dataset), built.ann_file, masks, *sorted(built.data_prefix.items()))
            found.setdefault(key, (built, set(), masks))[1].add(split)
    return list(found.values())


def _part_of(dataset: BaseDataset, used: set[str], masks: bool, taken: set[str]) -> _Part:
    prefix = dataset.data_prefix.get('img_path') or dataset.data_prefix.get('img') or ''
    source = Path(dataset.ann_file or prefix)
    purpose = ', '.join(split for split in SPLITS if split in used)
    name = f'{purpose} ({source.name})'
    findings = Findings(f'{purpose} ({source})' if name in taken else name, used)
    if source.suffix == '.json':
        return _coco_part(dataset, source, Path(prefix), masks, findings)
    if 'img_path' not in dataset.data_prefix:
        raise _unknown(dataset)
    try:
        samples = dataset.load_data_list()
    except (OSError, RuntimeError, AssertionError) as error:  # of a list or folder
        findings.add('data cannot be listed', str(error))
        return _Part(findings)
    if not all(isinstance(sample.get('img_path'), str) for sample in samples):
        raise _unknown(dataset)
    if 'seg_map_path' in dataset.data_prefix:
        return _label_map_part(dataset, samples, findings)
    if all('gt_label' in sample for sample in samples):
        return _class_part(dataset, samples, findings)
    raise _unknown(dataset)


def _coco_part(dataset: BaseDataset, annotation: Path, folder: Path, masks: bool,
               findings: Findings) -> _Part:
    if not annotation.is_file():
        findings.add('data cannot be listed', f'{annotation} is missing')
        return _Part(findings)
    content = read_coco(annotation)
    if content is None or not has_boxes(content):
        raise _unknown(dataset)
    sizes = check_coco(content, findings, masks)
    for problem, names in conversion_of(dataset.data_root, annotation).get('problems', {}).items():
        if problem in CONVERTED:  # the others were found again
            findings.add(problem, names)
    names = {category.get('name') for category in content['categories']}
    classes = dataset.metainfo.get('classes') or ()
    findings.add('class of the config that the file does not have',
                 [name for name in classes if name not in names])
    findings.add('category that the config does not use',
                 [str(name) for name in names if name not in classes])
    return _Part(findings, [
        Sample(folder / image['file_name'], sizes.get(image.get('id')))
        for image in content['images'] if has_file_name(image)])


def _label_map_part(dataset: BaseDataset, samples: list[dict], findings: Findings) -> _Part:
    if not dataset.metainfo.get('classes'):
        raise DataRootError(f'{findings.data}: neither the config nor a file classes.txt names '
                            'the classes')
    labels = [Path(sample['seg_map_path']) for sample in samples]
    if not dataset.ann_file:  # a list may leave out images on purpose
        folder = Path(dataset.data_prefix['seg_map_path'])
        there = {folder / name for name in list_dir_or_file(
            folder, list_dir=False, suffix=dataset.seg_map_suffix, recursive=True)
        } if folder.is_dir() else set()
        findings.add('label map of an image that is not there',
                     sorted(map(str, there - set(labels))))
    return _Part(findings, [Sample(Path(sample['img_path']), label=label)
                            for sample, label in zip(samples, labels, strict=True)],
                 num_label_values(dataset), dataset.ignore_index)


def _class_part(dataset: BaseDataset, samples: list[dict], findings: Findings) -> _Part:
    classes = dataset.metainfo.get('classes') or ()
    seen = {label for sample in samples for label in _labels_of(sample)}
    if classes:
        findings.add('class without images', [name for label, name in enumerate(classes)
                                              if label not in seen])
        findings.add('class label out of range', [
            f'{sample["img_path"]}: {label}' for sample in samples for label in _labels_of(sample)
            if not 0 <= label < len(classes)])
    return _Part(findings, [Sample(Path(sample['img_path'])) for sample in samples])


def _labels_of(sample: dict) -> list[int]:
    """One label; several where images have several."""
    label = sample['gt_label']
    return list(label) if isinstance(label, (list, tuple)) else [int(label)]


def _check_shared(one: Findings, first: list[Path], other: Findings, second: list[Path]) -> None:
    """Images that two data sets share; two that are both for training may."""
    if one.testing or other.testing:
        problem = ('image in training and test data' if one.training or other.training
                   else 'image in two sets of test data')
        other.add(problem, [f'{path} is {same}' for same, path in same_content(first, second)])


def _unknown(dataset: BaseDataset) -> DataRootError:
    return DataRootError(
        f'{type(dataset).__name__} is not known here: checked are data sets that read boxes from a '
        'file in COCO format (mmdet), label maps (mmseg), or class folders and lists of images '
        '(mmpretrain)')

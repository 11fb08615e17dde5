"""What a comparison of ONNX Runtime with PyTorch found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...reparam.verify import TOLERANCE

#: A final box whose corners lie further away, in pixels (beyond 1000 pixels: in thousandths
#: of the coordinate), is not the same one.
BOX_TOLERANCE = 0.1
#: Largest difference of the scores of the same box.
SCORE_TOLERANCE = 1e-3
#: Share of final boxes that may be another selection: rounding decides where an overlap or a
#: rank is at a threshold. And of pixels of label maps that may have another label, and of
#: masks that may be in or out.
UNMATCHED_TOLERANCE, PIXEL_TOLERANCE = 0.01, 1e-3
#: Probabilities of masks go from 0 to 255. Above this a pixel is inside; where those of the two
#: sides are one step apart, rounding decides.
_HALF, _MASK_STEPS = 127, 1


@dataclass(frozen=True)
class GraphError:
    """The difference of one output of one graph on one input.

    Attributes:
        graph: `network`, `bbox` or `mask`.
        output: The output's name in the file, e.g. `cls_scores_0`.
        shape: Shape of the images `(N, 3, H, W)`.
        error: Scale-relative, see `scale_relative_error`.
        tolerance: Largest error that counts as equal.
    """

    graph: str
    output: str
    shape: tuple[int, ...]
    error: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass
class BoxComparison:
    """Final boxes of MMDetection's post-processing on the outputs of PyTorch and ONNX Runtime.

    Attributes:
        boxes: Number of boxes by PyTorch.
        matched: How many have a counterpart: same label, corners within `BOX_TOLERANCE`.
        at_edge: Boxes of either side without one, whose score lies where `score_thr` or
            `max_per_img` cuts.
        unmatched: Other boxes of either side without one.
        coordinate_difference: Largest difference of a matched box's coordinate, in pixels.
        score_difference: Largest difference of a matched box's score.
        mask_pixels: Number of pixels of all matched masks.
        mask_flips: How many of these only one side has, by more than rounding.
        mask_difference: Largest difference of the probabilities of a pixel that only one side has.
    """

    boxes: int = 0
    matched: int = 0
    at_edge: int = 0
    unmatched: int = 0
    coordinate_difference: float = 0.0
    score_difference: float = 0.0
    mask_pixels: int = 0
    mask_flips: int = 0
    mask_difference: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all differences are within their tolerances."""
        return (self.unmatched <= UNMATCHED_TOLERANCE * self.boxes
                and self.score_difference <= SCORE_TOLERANCE
                and self.mask_flips <= PIXEL_TOLERANCE * self.mask_pixels)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {'passed': self.passed, **asdict(self)}

    def add(self, expected: Any, found: Any, score_thr: float, max_per_img: int) -> None:
        """Match the boxes of one image.

        Args:
            expected: `InstanceData` with `bboxes (n, 4)`, `scores (n,)`, `labels (n,)`, maybe
                `masks (n, h, w)`: probabilities of 0 to 255, rounded.
            found: The same, by ONNX Runtime.
            score_thr: Lower scores were dropped.
            max_per_img: No more boxes were kept.
        """
        distance = (expected.bboxes[:, None] - found.bboxes[None]).abs().amax(-1)
        # float32 has but seven digits for coordinates far outside of an image
        distance /= expected.bboxes.abs().amax(-1, keepdim=True).div(1000).clamp(min=1)
        distance[expected.labels[:, None] != found.labels[None]] = torch.inf
        pairs = []
        for index, row in enumerate(distance):
            if row.numel() and row.min() <= BOX_TOLERANCE:
                pairs.append((index, int(row.argmin())))
                distance[:, pairs[-1][1]] = torch.inf  # each box once
        left, right = ([pair[side] for pair in pairs] for side in (0, 1))
        self.boxes += len(expected)
        self.matched += len(pairs)
        for index, other in pairs:
            self.coordinate_difference = max(self.coordinate_difference, float(
                (expected.bboxes[index] - found.bboxes[other]).abs().max()))
            self.score_difference = max(self.score_difference, float(
                (expected.scores[index] - found.scores[other]).abs()))
        edge = score_thr
        for kept in (expected, found):
            if len(kept) >= max_per_img > 0:
                edge = max(edge, float(kept.scores.min()))
        for kept, used in ((expected, left), (found, right)):
            alone = [i for i in range(len(kept)) if i not in set(used)]
            at_edge = int((kept.scores[alone] <= edge + SCORE_TOLERANCE).sum())
            self.at_edge += at_edge
            self.unmatched += len(alone) - at_edge
        if 'masks' in expected and 'masks' in found and len(left):
            one, other = expected.masks[left].int(), found.masks[right].int()
            inside, other_inside = one > _HALF, other > _HALF
            difference = torch.where(inside != other_inside, (one - other).abs(), 0)
            self.mask_pixels += int((inside | other_inside).sum())
            self.mask_flips += int((difference > _MASK_STEPS).sum())
            self.mask_difference = max(self.mask_difference, int(difference.max()) / 255)


@dataclass(frozen=True)
class OnnxReport:
    """What `compare_onnx` measured.

    Attributes:
        errors: One entry per graph, output and shape of the images.
        boxes: Final boxes of a detector; None if the model is none, or one whose
            post-processing cannot be run on the outputs.
    """

    errors: tuple[GraphError, ...]
    boxes: BoxComparison | None = None

    @property
    def passed(self) -> bool:
        """Whether all is within tolerance; false if nothing was compared."""
        return (bool(self.errors) and all(error.passed for error in self.errors)
                and (self.boxes is None or self.boxes.passed))

    @property
    def largest(self) -> float:
        """The largest error of all outputs."""
        return max((error.error for error in self.errors), default=float('inf'))

    def explain(self) -> str:
        """What failed and how much; or that all is equal."""
        if not self.errors:
            return 'there was no input to compare ONNX Runtime and PyTorch on'
        worst: dict[tuple[str, str], GraphError] = {}  # of the shapes of images
        for error in sorted(self.errors, key=lambda e: e.error):
            worst[error.graph, error.output] = error
        failed = sorted((e for e in worst.values() if not e.passed), key=lambda e: -e.error)
        lines = [f'  {e.output} of the graph {e.graph}, images {"x".join(map(str, e.shape))}: '
                 f'{e.error:.2e}, allowed {e.tolerance:.0e}' for e in failed[:8]]
        if failed:
            lines.insert(0, 'scale-relative errors of ONNX Runtime (infinite: not a finite '
                            'number, or another shape):')
        if len(failed) > 8:
            lines.append(f'  and {len(failed) - 8} more')
        if self.boxes is not None and not self.boxes.passed:
            lines.append('the final boxes differ: ' + ', '.join(
                f'{key} {value}' for key, value in self.boxes.as_dict().items()))
        if self.boxes is not None and not self.boxes.boxes:
            lines.append('there were no final boxes to compare')
        return '\n'.join(lines) or 'ONNX Runtime computes what PyTorch computes'

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a file."""
        return {'passed': self.passed, 'errors': [asdict(error) for error in self.errors],
                'boxes': self.boxes and self.boxes.as_dict()}


@dataclass
class EndToEndReport:
    """What `compare_end2end` found.

    Attributes:
        task: `detection`, `segmentation` or `classification`.
        boxes: Final boxes and masks of a detector, in pixels of the input.
        images: How many were compared.
        pixels: Number of pixels of all label maps.
        pixel_flips: How many of these have another label.
        probability_difference: Largest difference of a class's probability.
    """

    task: str
    boxes: BoxComparison | None = None
    images: int = 0
    pixels: int = 0
    pixel_flips: int = 0
    probability_difference: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all is within tolerance; false if nothing was compared."""
        return (self.images > 0 and (self.boxes is None or self.boxes.passed)
                and self.pixel_flips <= PIXEL_TOLERANCE * self.pixels
                and self.probability_difference <= SCORE_TOLERANCE)

    def explain(self) -> str:
        """What differs, in words."""
        if not self.images:
            return 'there was no image to compare the end-to-end ONNX file and PyTorch on'
        if self.passed:
            return 'the end-to-end ONNX file predicts what PyTorch predicts'
        differences = self.boxes.as_dict() if self.boxes else {
            'pixels': self.pixels, 'pixel_flips': self.pixel_flips,
            'probability_difference': self.probability_difference}
        return 'predictions of the end-to-end ONNX file differ: ' + ', '.join(
            f'{key} {value}' for key, value in differences.items())

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a file."""
        return {'passed': self.passed, **asdict(self),
                'boxes': self.boxes and self.boxes.as_dict()}

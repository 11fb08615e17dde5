"""What the branches of every layer do: how alike they are, and what each adds to the kernel."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..checkpoints import load_weights
from ..layers import branched_layers, mean_similarity, relative_norms, shares, similarities
from .documents import markdown_table, without_nan
from .networks import require_training_form

#: With the scaling vectors or without them, by the field of `LayerBranches`.
FORMS = {'scaled': 'with scales', 'unscaled': 'without scales'}
EXPLANATION = (
    'Share of a branch B in the sum W of all branches: <B, W> / <W, W>. They sum to 1; a negative '
    'one works against the sum.\nSimilarity: absolute cosine between the kernels of two branches, '
    'mean over the pairs of a layer; branches of zeros are left out.\nThe scales of a Diverse '
    'Branch Block are its BNs. A stem is listed by the kernels that it is a chain of.')


@dataclass(frozen=True)
class BranchMeasures:
    """What the `n` branches of a layer do; see the functions of `orepa_mm.layers` of these names.

    Attributes:
        similarities: Cosines between every two kernels, `n` rows of `n`; NaN for
            a branch of zeros.
        mean_similarity: Mean absolute one of different branches; NaN if there is none.
        shares: In the kernel that they sum to, `n`; NaN if that is zero.
        relative_norms: Norm over that of the kernel, `n`; NaN or infinite if that is zero.
    """

    similarities: tuple[tuple[float, ...], ...]
    mean_similarity: float
    shares: tuple[float, ...]
    relative_norms: tuple[float, ...]

    @classmethod
    def of(cls, branches: Mapping[str, Tensor]) -> BranchMeasures:
        """Measure kernels.

        Args:
            branches: By name, from `branch_kernels`, `(o, i, k, k)` each.
        """
        matrix = similarities(branches)
        return cls(tuple(map(tuple, matrix.tolist())), mean_similarity(matrix).item(),
                   tuple(shares(branches).tolist()), tuple(relative_norms(branches).tolist()))


@dataclass(frozen=True)
class LayerBranches:
    """What the branches of one layer do.

    Attributes:
        layer: Name in the model.
        kind: Class of the layer.
        names: Of the branches.
        scaled: Of the branches as they are summed.
        unscaled: Of the branches without their scaling vectors: of what these get to weigh.
    """

    layer: str
    kind: str
    names: tuple[str, ...]
    scaled: BranchMeasures
    unscaled: BranchMeasures

    def measures(self, form: str) -> BranchMeasures:
        """Those of a form.

        Args:
            form: A key of `FORMS`.
        """
        return self.scaled if form == 'scaled' else self.unscaled

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a file; None for what is not defined."""
        return without_nan(asdict(self))


def measure_branches(model: nn.Module) -> list[LayerBranches]:
    """Say of every layer with branches what they do.

    Args:
        model: In training form.

    Returns:
        One entry per layer, in the model's order; the generators inside a stem
        stand for it.

    Raises:
        NothingToConvertError: If the model is not in training form.
    """
    require_training_form(model)
    return [LayerBranches(name, type(layer).__name__.lstrip('_'), tuple(layer.branch_names),
                          BranchMeasures.of(layer.branch_kernels()),
                          BranchMeasures.of(layer.branch_kernels(scaled=False)))
            for name, layer in branched_layers(model)]


def measure_checkpoint(cfg: Config, checkpoint: str | Path) -> list[LayerBranches]:
    """Say of a trained model what its branches do; no data is needed.

    Args:
        cfg: A training config, from `orepa_mm.engine.load_config`.
        checkpoint: A checkpoint of it, in training form.

    Returns:
        As `measure_branches`.

    Raises:
        CheckpointError: If the checkpoint does not belong to the config.
        FileNotFoundError: If there is no such checkpoint.
        NothingToConvertError: If the config's model is not in training form.
    """
    model = MODELS.build(cfg.model)
    require_training_form(model)  # before the checkpoint is compared with it
    load_weights(model, checkpoint)
    return measure_branches(model)


def branch_cells(layers: Sequence[LayerBranches], form: str) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of a table as text: shares by branch, similarity; at last the means.

    Args:
        layers: From `measure_branches`.
        form: A key of `FORMS`.
    """
    names = list(dict.fromkeys(name for entry in layers for name in entry.names))
    rows = [(entry.layer, dict(zip(entry.names, entry.measures(form).shares)),
             entry.measures(form).mean_similarity) for entry in layers]
    rows.append(('mean', {name: _mean([row[1][name] for row in rows if name in row[1]])
                          for name in names}, _mean([row[2] for row in rows])))
    return ['layer', *names, 'mean |similarity|'], [
        [layer, *(_text(values.get(name)) for name in names), _text(similarity)]
        for layer, values, similarity in rows]


def print_branches(layers: Sequence[LayerBranches]) -> None:
    """Print the table with the scaling vectors and the one without, and what they mean.

    Args:
        layers: From `measure_branches`.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    for form, text in FORMS.items():
        headings, lines = branch_cells(layers, form)
        table = Table(title=f'shares of the branches in the kernel, and their similarity: {text}')
        for heading in headings:
            table.add_column(heading, justify='left' if heading == 'layer' else 'right',
                             no_wrap=heading == 'layer')
        for line in lines[:-1]:
            table.add_row(*line)
        table.add_section()
        table.add_row(*lines[-1])
        console.print(table)
    print(EXPLANATION)


def branch_markdown(layers: Sequence[LayerBranches], title: str) -> str:
    """Both tables as Markdown.

    Args:
        layers: From `measure_branches`.
        title: What stands above them, e.g. whose branches these are.
    """
    parts = [f'### {title}']
    for form, text in FORMS.items():
        headings, lines = branch_cells(layers, form)
        parts += [f'{text.capitalize()}:', markdown_table(headings, lines, left=('layer',))]
    return '\n\n'.join([*parts, EXPLANATION]) + '\n'


def _mean(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).nanmean().item()


def _text(value: float | None) -> str:
    """Empty where a layer has no such branch, a dash where nothing is defined."""
    if value is None:
        return ''
    return f'{value:.3f}' if math.isfinite(value) else '-'

"""From a trained checkpoint to a deployed one, with proof that nothing changed."""

from __future__ import annotations

import json
import math
import platform
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from torch import nn

from ..backbones.registration import PACKAGES
from ..checkpoints import written_whole
from ..engine import bare_model, build_test_runner
from ..version import __version__
from .export import deploy_config, save_deployed
from .measure import count_multiply_adds, count_parameters, measure_latency
from .metrics import tested_metrics
from .reparameterize import reparameterize
from .verify import VerificationReport, exact_float32, verify

#: Largest change of a metric (AP, mIoU, accuracy, as fractions of 1) that is let pass.
METRIC_TOLERANCE = 1e-4
FORMS = ('training', 'deployed')


class VerificationError(RuntimeError):
    """The two forms differ: nothing was saved. The message says where and how much."""


def reparameterize_checkpoint(cfg: Config, checkpoint: str | Path, folder: str | Path,
                              test: bool = True, num_images: int = 4,
                              latency_rounds: int = 20) -> dict[str, Any]:
    """Re-parameterize a trained model, verify, test both forms, and save the deployed one.

    Writes `model.pth`, `config.py` (the stock model, which does not need this
    package) and `report.json` into `folder`, or nothing.

    Args:
        cfg: The training config, from `orepa_mm.engine.load_config`.
        checkpoint: A checkpoint that the runner saved.
        folder: Where to write.
        test: Whether to test both forms on the whole test set.
        num_images: Test images on which raw outputs are compared.
        latency_rounds: Timed forward passes of each form.

    Returns:
        The content of `report.json`.

    Raises:
        CheckpointError: If the checkpoint does not belong to the config.
        NothingToConvertError: If the model has nothing to re-parameterize.
        VerificationError: If outputs or a metric of the two forms differ.
        FileExistsError: If the output would overwrite the checkpoint.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    if (folder / 'model.pth').resolve() == checkpoint.resolve():
        raise FileExistsError(f'the output {folder / "model.pth"} would overwrite the input: '
                              'choose another folder with --out')
    runner = build_test_runner(cfg, checkpoint)
    before = bare_model(runner)
    before.eval()
    after = reparameterize(before)
    batches = [before.data_preprocessor(data, False)
               for data in islice(runner.test_dataloader, num_images)]
    verification = verify(before, after, batches)
    _require_equal(verification)

    stock = deploy_config(cfg)
    meta = {'form': 'deployed', 'orepa_mm_version': __version__,
            'verification': verification.as_dict(),
            'dataset_meta': getattr(before, 'dataset_meta', None)}
    report = {
        'checkpoint': str(checkpoint),
        'package': PACKAGES.get(cfg.get('default_scope'), ('',))[0],
        'verification': verification.as_dict(),
        'largest_difference': {dtype: verification.largest(dtype).error
                               for dtype in ('float32', 'float64')},
        'parameters': dict(zip(FORMS, map(count_parameters, (before, after)))),
        **_costs(before, after, batches[0], latency_rounds),
        'machine': {'torch': torch.__version__, 'threads': torch.get_num_threads(),
                    'device': _device_name(before), 'processor': platform.machine()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.reparam-', dir=folder) as temporary:
        model_file, config_file = save_deployed(after, stock, temporary, meta)
        report['file_bytes'] = {'training': checkpoint.stat().st_size,
                                'deployed': model_file.stat().st_size}
        if test:
            # The deployed form is tested as a user gets it: from the written files.
            deployed_cfg = Config.fromfile(config_file)
            deployed_cfg.work_dir, deployed_cfg.launcher = cfg.work_dir, cfg.launcher
            deployed_runner = build_test_runner(deployed_cfg, model_file)
            with exact_float32():
                report['metrics'] = {'training': tested_metrics(runner, temporary),
                                     'deployed': tested_metrics(deployed_runner, temporary)}
            _require_equal_metrics(report['metrics'])
        for path in (model_file, config_file):
            path.replace(folder / path.name)
    with written_whole(folder / 'report.json') as path:
        path.write_text(json.dumps(report, indent=1))
    return report


def print_report(report: dict[str, Any]) -> None:
    """Print the table of both forms.

    Args:
        report: From `reparameterize_checkpoint`.
    """
    table = Table(title='before and after re-parameterization')
    for heading, justify in (('', 'left'), ('training form', 'right'), ('deployed', 'right')):
        table.add_column(heading, justify=justify)
    for row in report_rows(report):
        table.add_row(*row)
    Console().print(table)


def report_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table of both forms as text: (quantity, training form, deployed).

    Args:
        report: From `reparameterize_checkpoint`.
    """
    rows = []
    metrics = report.get('metrics', {form: {} for form in FORMS})
    for name in metrics['training']:
        if metrics['training'][name] != -1:  # COCO's mark for: no such object
            rows.append((name, *(f'{metrics[form][name]:.4f}' for form in FORMS)))
    for name, key, unit, digits in (('parameters (M)', 'parameters', 1e6, 2),
                                    ('multiply-adds (G)', 'multiply_adds', 1e9, 2),
                                    ('checkpoint file (MB)', 'file_bytes', 1e6, 1),
                                    ('latency, median (ms)', 'latency_ms', 1, 1)):
        rows.append((name, *(f'{report[key][form] / unit:.{digits}f}' for form in FORMS)))
    rows.append(('latency with kernels squeezed at every call (ms)',
                 f'{report["latency_ms"]["squeezing"]:.1f}', ''))
    for dtype, error in report['largest_difference'].items():
        rows.append((f'largest relative output difference, {dtype}', '', f'{error:.1e}'))
    return rows


def _costs(before: nn.Module, after: nn.Module, batch: dict, rounds: int) -> dict[str, Any]:
    """Multiply-adds of the raw network and latency of the whole prediction."""
    samples = batch.get('data_samples')

    def predict(model: nn.Module) -> object:
        return model(batch['inputs'], samples, mode='predict')

    def squeeze_and_predict(model: nn.Module) -> object:
        model.eval()  # drops the kept kernels
        return predict(model)

    multiply_adds = {
        form: count_multiply_adds(lambda model=model: squeeze_and_predict(model))
        for form, model in zip(FORMS, (before, after))
    }
    with torch.no_grad():
        latency = measure_latency({'training': lambda: predict(before),
                                   'deployed': lambda: predict(after),
                                   'squeezing': lambda: squeeze_and_predict(before)}, rounds)
    return {'multiply_adds': multiply_adds, 'latency_ms': latency,
            'input_shape': list(batch['inputs'].shape)}


def _device_name(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type


def _require_equal(verification: VerificationReport) -> None:
    if not verification.errors:
        raise VerificationError('there was no test image to compare the two forms on, '
                                'nothing was saved')
    failed = [error for error in verification.errors if not error.passed]
    if failed:
        lines = '\n'.join(f'  {e.name} in {e.dtype}: {e.error:.2e}' for e in failed)
        raise VerificationError('the re-parameterized model does not compute the same function, '
                                f'nothing was saved. Scale-relative errors:\n{lines}')


def _require_equal_metrics(metrics: dict[str, dict[str, float]]) -> None:
    for name, value in metrics['training'].items():
        deployed = metrics['deployed'].get(name, math.nan)
        unit = 100 if max(value, deployed) > 1 else 1  # mIoU and accuracy are in percent
        # NaN in both: MMDetection's mark for a class without objects
        if not (abs(value - deployed) <= METRIC_TOLERANCE * unit
                or (math.isnan(value) and math.isnan(deployed))):
            raise VerificationError(f'{name} is {value:.5f} in training form but {deployed:.5f} '
                                    'deployed: nothing was saved')

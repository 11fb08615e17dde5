"""From a trained checkpoint to a deployed one, with proof that nothing changed."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.dist import is_distributed
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..analysis.measure import (
    count_multiply_adds,
    count_parameters,
    measure_latency,
)
from ..backbones.registration import PACKAGES
from ..checkpoints import load_checkpoint, load_weights
from ..engine import (
    bare_model,
    build_test_runner,
    on_main_process,
    show_predictions,
    with_tta,
    without_reparam_test,
)
from ..engine.metrics import changed_metrics, metrics_at_chance, tested_metrics
from ..errors import CheckpointError, ConfigError, VerificationError
from ..export.onnx import (
    compare_end2end,
    compare_onnx,
    export_end2end,
    export_onnx,
    require_onnx,
)
from ..export.stock import deploy_config, require_safetensors, save_deployed, used_detector
from ..files import folder_written_whole
from ..layers.precision import exact_float32
from ..reparam import is_training_form, reparameterize
from ..reparam.verify import verify
from .end2end import resizing, tested_end2end
from .evidence import (
    built_model,
    checkpoint_meta,
    config_of_files,
    first_images,
    largest_differences,
    machine_of,
)
from .onnx_model import network_meta
from .quantization import quantize_deployed
from .summary import FORMS

#: All files that a re-parameterization may write.
_OUTPUTS = ('model.pth', 'config.py', 'model.safetensors', 'report.json')


def reparameterize_checkpoint(
    cfg: Config, checkpoint: str | Path, folder: str | Path, *, form: str = 'plain',
    test: bool = True, onnx: bool = False, end2end: bool = False,
    int8: Mapping[str, Any] | None = None, safetensors: bool = False,
    save_unverified: bool = False, tta: bool = False, show_dir: str | Path | None = None,
    num_images: int = 4, latency_rounds: int = 20,
) -> dict[str, Any]:
    """Re-parameterize a trained model, verify, test both forms, and save the deployed one.

    Writes `model.pth`, `config.py` and `report.json` into `folder`, and what
    else is asked for, or nothing, see `folder_written_whole`. What is compared
    with the training form is the model that these files build. In a
    distributed run all processes test; the main one compares and writes.

    Args:
        cfg: The training config, from `orepa_mm.engine.load_config`.
        checkpoint: A checkpoint that the runner saved.
        folder: Where to write.
        form: `plain`, the stock model, which does not need this package;
            `folded`, the same with BN folded into the convolutions.
        test: Whether to test both forms on the whole test set.
        onnx: Whether to export to ONNX as well, and to compare it in ONNX Runtime.
        end2end: Whether to write one ONNX file from the image to boxes as well, and to
            compare and test it.
        int8: Options of `quantize_deployed` to write the ONNX network in int8 as well; None:
            it is not written. Needs `form='folded'` and `onnx=True`.
        safetensors: Whether to write the weights as safetensors as well.
        save_unverified: Save although the two forms differ; the report and the
            checkpoint's meta say so.
        tta: Whether to test with test-time augmentation.
        show_dir: Folder into which the deployed form's predictions are drawn.
        num_images: Test images on which raw outputs are compared.
        latency_rounds: Timed forward passes of each form.

    Returns:
        The content of `report.json`.

    Raises:
        CheckpointError: If the checkpoint does not belong to the config, or is
            deployed already.
        ConfigError: If the config has no deployed counterpart, or int8 lacks what it needs.
        NothingToConvertError: If the model has nothing to re-parameterize.
        VerificationError: If outputs of the two forms differ, or a metric does
            and not every output could be compared (else it is a warning), or int8 loses
            more than it may.
        FileExistsError: If the output would overwrite the checkpoint, or cannot
            replace an earlier one as a whole.
        OnnxExportError: If the model has no ONNX form.
        ImportError: If what ONNX or safetensors needs is not installed.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    _require_files(folder, checkpoint)
    if int8 is not None and (form != 'folded' or not onnx):
        raise ConfigError('int8 is made of the folded ONNX network: form must be folded, and onnx '
                          'asked for')
    if onnx or end2end:
        require_onnx()
    if safetensors:
        require_safetensors()
    cfg = without_reparam_test(cfg)  # it would test the deployed form in place of the training form
    deployed_cfg = deploy_config(cfg, form)
    runner = build_test_runner(with_tta(cfg) if tta else cfg, checkpoint)
    before = used_detector(bare_model(runner))
    before.eval()
    if not is_training_form(before):
        _require_training_form(before, checkpoint)
    with contextlib.ExitStack() as stack:
        # the same folder for all processes; on success its files move into theirs
        temporary = Path(on_main_process(lambda: str(stack.enter_context(
            folder_written_whole(folder, is_output)))))
        job = _Deployment(cfg, deployed_cfg, checkpoint, form, before, temporary)
        report = on_main_process(lambda: job.verify(runner, num_images, latency_rounds))
        problems = report['problems']
        if problems and not save_unverified:
            raise VerificationError('the re-parameterized model does not compute the same '
                                    'function, nothing was saved.\n' + '\n'.join(problems))
        exports = {'onnx': (onnx, job.export), 'end2end': (end2end, job.export_end2end)}
        for name in [name for name, (wanted, _) in exports.items() if wanted]:
            # before the test, which takes longer
            report[name], different = on_main_process(exports[name][1])
            problems += different
            if problems and not save_unverified:
                raise VerificationError('the ONNX file does not compute the same, nothing was '
                                        'saved.\n' + '\n'.join(problems))
        if test:
            report['metrics'] = _tested(runner, cfg, temporary, tta, show_dir)
            moved = changed_metrics(report['metrics'])
            if report['verification']['complete']:  # on a small set, one rank that flips
                report['warnings'] += moved
            else:
                problems += moved
            if problems and not save_unverified:
                raise VerificationError(
                    'a metric moved, nothing was saved.\n' + '\n'.join(problems) + '\nThe raw '
                    f'outputs agree on {report["images"]} images, but not all could be compared:\n'
                    f'{report["verification"]["explanation"]}')
        if end2end:
            job.test_end2end(runner, report, tta)
            if problems and not save_unverified:
                raise VerificationError('a metric of the end-to-end ONNX file is another, nothing '
                                        'was saved.\n' + '\n'.join(problems))
        if int8 is not None:
            report['int8'] = quantize_deployed(cfg, temporary, **int8)
        report['notes'] += _notes(report, before)
        on_main_process(lambda: job.finish(report, safetensors))
        on_main_process(stack.close)
    return report


def is_output(name: str) -> bool:
    """Whether a file belongs to the result of a re-parameterization.

    Args:
        name: Its name.
    """
    return name in _OUTPUTS or re.fullmatch(r'model(_\w+)?\.onnx', name) is not None


class _Deployment:
    """The work of the main process."""

    def __init__(self, cfg: Config, deployed_cfg: Config, checkpoint: Path, form: str,
                 before: nn.Module, folder: Path) -> None:
        self.cfg, self.deployed_cfg, self.checkpoint = cfg, deployed_cfg, checkpoint
        self.form, self.before, self.folder = form, before, folder

    def verify(self, runner: Runner, num_images: int, rounds: int) -> dict[str, Any]:
        """Write the deployed form, build it from its files, and compare it; the report so far."""
        save_deployed(reparameterize(self.before, fold_bn=self.form == 'folded'),
                      self.deployed_cfg, self.folder, {'form': self.form})
        device = next(self.before.parameters()).device
        self.after = _built_from_files(self.folder).to(device)
        self.after.eval()
        loader = Runner.build_dataloader(self.cfg.test_dataloader, seed=runner.seed)
        self.batches = first_images(loader, self.before, num_images)
        verification = verify(self.before, self.after, self.batches)
        report = {
            'checkpoint': str(self.checkpoint), 'form': self.form,
            'package': PACKAGES.get(self.cfg.get('default_scope'), ('',))[0],
            'verification': verification.as_dict(),
            'images': sum(len(batch['inputs']) for batch in self.batches),
            'largest_difference': largest_differences(verification),
            'problems': [] if verification.passed else [verification.explain()],
            'warnings': [], 'notes': [],
            'parameters': dict(zip(FORMS, map(count_parameters, (self.before, self.after)))),
            'machine': machine_of(self.before),
            'file_bytes': {'training': self.checkpoint.stat().st_size,
                           'deployed': (self.folder / 'model.pth').stat().st_size},
            'dropped_bytes': _dropped(self.checkpoint),
        }
        if verification.passed and not verification.complete:
            report['notes'].append(verification.explain())
        if self.batches:
            report.update(_costs(self.before, self.after, self.batches[0], rounds))
        self.meta = checkpoint_meta(self.before, self.checkpoint, report, loader.dataset)
        self.after.dataset_meta = self.meta.get('dataset_meta')  # for what is exported of it
        return report

    def export(self) -> tuple[dict[str, Any], list[str]]:
        """Write ONNX; what is in it, how it compares with PyTorch, and what is wrong with it."""
        print_log('exporting to ONNX', 'current')
        exported = export_onnx(self.after, self.batches[0], self.folder / 'model.onnx',
                               meta={**self._source(),
                                     **network_meta(self.deployed_cfg, self.batches[0])})
        print_log('comparing ONNX Runtime with PyTorch', 'current')
        comparison = compare_onnx(self.after, self.batches, self.folder / 'model.onnx')
        report = {**exported.as_dict(), **comparison.as_dict(), 'largest': comparison.largest}
        return report, [] if comparison.passed else [comparison.explain()]

    def export_end2end(self) -> tuple[dict[str, Any], list[str]]:
        """Write one file from pixels to predictions; as of `export`."""
        path = self.folder / 'model_end2end.onnx'
        print_log('exporting to one ONNX file from the image to the end', 'current')
        how, fill = resizing(self.cfg, self.batches[0])
        exported = export_end2end(self.after, self.batches[0], path, fill=fill,
                                  meta={**self._source(), **how})
        comparison = compare_end2end(self.after, self.batches, path)
        report = {**exported.as_dict(), **how, **comparison.as_dict()}
        return report, [] if comparison.passed else [comparison.explain()]

    def test_end2end(self, runner: Runner, report: dict[str, Any], tta: bool) -> None:
        """Add the metrics of that file to the report, and what of them moved."""
        reason = ('no metric was tested' if 'metrics' not in report else
                  'test-time augmentation is not in it' if tta else
                  'one process alone tests it' if is_distributed() else
                  'label maps have the size of its input, and the metric is that of the original '
                  'images' if report['end2end']['task'] == 'segmentation' else None)
        if reason:
            report['notes'].append(f'the end-to-end ONNX file was compared on {report["images"]} '
                                   f'images, and not tested: {reason}')
            return
        print_log('testing the end-to-end ONNX file', 'current')
        found = tested_end2end(runner, self.after, self.folder / 'model_end2end.onnx',
                               report['metrics']['deployed'])
        report['end2end'].update(found)
        if found['other_size']:  # no two sizes of padding give the same features
            report['notes'].append(
                f'{found["other_size"]} test images are not of the size of the end-to-end ONNX '
                'file: it saw them with other padding, or cut')
            report['warnings'] += found['moved']
        else:
            report['problems'] += found['moved']

    def _source(self) -> dict[str, Any]:
        return {key: self.meta[key]
                for key in ('form', 'source', 'source_sha256', 'versions', 'verified')}

    def finish(self, report: dict[str, Any], safetensors: bool) -> None:
        """Write the files once more, now that all is known that they say."""
        self.meta.update(verified=not report['problems'],
                         metrics=report.get('metrics', {}).get('deployed'))
        save_deployed(self.after, self.deployed_cfg, self.folder, self.meta, safetensors)
        (self.folder / 'report.json').write_text(json.dumps(report, indent=1))


def _require_files(folder: Path, checkpoint: Path) -> None:
    """Refuse to overwrite the input, before long work."""
    if not checkpoint.is_file():
        raise FileNotFoundError(f'there is no checkpoint {checkpoint}')
    if checkpoint.resolve() in {(folder / name).resolve() for name in _OUTPUTS}:
        raise FileExistsError(f'the output {folder / checkpoint.name} would overwrite the input: '
                              'choose another folder with --out')


def _require_training_form(model: nn.Module, checkpoint: Path) -> None:
    """Tell a deployed model from one that never had anything to re-parameterize."""
    form = (load_checkpoint(checkpoint).get('meta') or {}).get('form')
    if form is not None:
        raise CheckpointError(
            f'{checkpoint} is in {form} form already, where the training form is expected. Give '
            'the config and the checkpoint that it was made from:\n'
            '  mim run orepa_mm reparam TRAINING_CONFIG TRAINING_CHECKPOINT')


def _built_from_files(folder: Path) -> nn.Module:
    """The deployed model as a user gets it; an error if the weights do not fit strictly."""
    model = built_model(Config.fromfile(folder / 'config.py'))
    try:
        load_weights(model, folder / 'model.pth')
    except CheckpointError as error:
        raise VerificationError(
            'the config of the deployed form builds another model than the re-parameterized one, '
            f'nothing was saved. {error}') from error
    return model


def _notes(report: Mapping[str, Any], model: nn.Module) -> list[str]:
    """What must be known to read the result."""
    if 'metrics' not in report:
        return ['no metric was tested: that both forms are equal is proven by the raw outputs and '
                'the layers alone']
    classes = (getattr(model, 'dataset_meta', None) or {}).get('classes')
    if metrics_at_chance(report['metrics']['training'], classes and len(classes)):
        return ['a metric at chance proves nothing: that both forms are equal is proven by the raw '
                'outputs and the layers alone']
    return []


def _dropped(checkpoint: Path) -> dict[str, int]:
    """Bytes of the tensors that the checkpoint held beside the weights, by entry."""
    content = load_checkpoint(checkpoint)
    if 'state_dict' not in content:
        return {}
    return {key: sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
            for key, value in content.items() if key not in ('state_dict', 'meta')}


def _tested(runner: Runner, cfg: Config, folder: Path, tta: bool, show_dir: str | Path | None
            ) -> dict[str, dict[str, float]]:
    """Metrics of both forms; the deployed one is tested from its files, as a user gets it."""
    deployed_cfg = config_of_files(folder / 'config.py', cfg, 'deployed')
    if show_dir:
        show_predictions(deployed_cfg, show_dir)
    if tta:
        deployed_cfg = with_tta(deployed_cfg)
    deployed_runner = build_test_runner(deployed_cfg, folder / 'model.pth')
    with exact_float32():
        metrics = {}
        for form, tested in zip(FORMS, (runner, deployed_runner)):
            print_log(f'testing the {form} form', 'current')
            metrics[form] = tested_metrics(tested, folder)
    # exact in the main process, where the results lie; every process must decide alike
    return on_main_process(lambda: metrics)


def _costs(before: nn.Module, after: nn.Module, batch: dict, rounds: int) -> dict[str, Any]:
    """Multiply-adds of the raw network and latency of the whole prediction."""
    samples = batch.get('data_samples')

    def predict(model: nn.Module) -> object:
        return model(batch['inputs'], samples, mode='predict')

    multiply_adds = {
        form: count_multiply_adds(lambda model=model: predict(model))
        for form, model in zip(FORMS, (before, after))
    }
    with torch.no_grad():
        latency = measure_latency({'training': lambda: predict(before),
                                   'deployed': lambda: predict(after)}, rounds)
    return {'multiply_adds': multiply_adds, 'latency_ms': latency,
            'input_shape': list(batch['inputs'].shape)}

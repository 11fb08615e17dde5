"""From a trained checkpoint to a deployed one, with proof that nothing changed."""

from __future__ import annotations

import contextlib
import json
import platform
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..analysis.measure import (
    count_multiply_adds,
    count_parameters,
    forget_kernels,
    measure_latency,
)
from ..backbones.registration import PACKAGES
from ..checkpoints import load_checkpoint
from ..engine import (
    bare_model,
    build_test_runner,
    on_main_process,
    show_predictions,
    with_tta,
    without_reparam_test,
)
from ..engine.metrics import changed_metrics, tested_metrics
from ..errors import CheckpointError, VerificationError
from ..export.onnx import compare_onnx, export_onnx, require_onnx
from ..export.stock import deploy_config, require_safetensors, save_deployed
from ..files import sha256
from ..reparam import is_training_form, reparameterize
from ..reparam.verify import VerificationReport, exact_float32, verify
from ..version import __version__
from .summary import FORMS

#: All files that a re-parameterization may write.
_OUTPUTS = ('model.pth', 'config.py', 'model.safetensors', 'report.json')


def reparameterize_checkpoint(
    cfg: Config, checkpoint: str | Path, folder: str | Path, *, form: str = 'plain',
    test: bool = True, onnx: bool = False, safetensors: bool = False,
    save_unverified: bool = False, tta: bool = False, show_dir: str | Path | None = None,
    num_images: int = 4, latency_rounds: int = 20,
) -> dict[str, Any]:
    """Re-parameterize a trained model, verify, test both forms, and save the deployed one.

    Writes `model.pth`, `config.py` and `report.json` into `folder`, and what
    else is asked for, or nothing. In a distributed run all processes test; the
    main one compares and writes.

    Args:
        cfg: The training config, from `orepa_mm.engine.load_config`.
        checkpoint: A checkpoint that the runner saved.
        folder: Where to write.
        form: `plain`, the stock model, which does not need this package;
            `folded`, the same with BN folded into the convolutions.
        test: Whether to test both forms on the whole test set.
        onnx: Whether to export to ONNX as well, and to compare it in ONNX Runtime.
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
        ConfigError: If the config has no deployed counterpart.
        NothingToConvertError: If the model has nothing to re-parameterize.
        VerificationError: If outputs or a metric of the two forms differ.
        FileExistsError: If the output would overwrite the checkpoint.
        OnnxExportError: If the model has no ONNX form.
        ImportError: If what ONNX or safetensors needs is not installed.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    _require_files(folder, checkpoint)
    if onnx:
        require_onnx()
    if safetensors:
        require_safetensors()
    cfg = without_reparam_test(cfg)  # it would test the deployed form in place of the training form
    deployed_cfg = deploy_config(cfg, form)
    runner = build_test_runner(with_tta(cfg) if tta else cfg, checkpoint)
    before = bare_model(runner)
    before.eval()
    if not is_training_form(before):
        _require_training_form(before, checkpoint)
    after = reparameterize(before, fold_bn=form == 'folded')
    batches = _batches(runner, cfg, before, num_images) if is_main_process() else []
    report, problems = on_main_process(lambda: _compared(before, after, batches, latency_rounds))
    if problems and not save_unverified:
        raise VerificationError('the re-parameterized model does not compute the same function, '
                                'nothing was saved.\n' + '\n'.join(problems))
    report = {'checkpoint': str(checkpoint), 'form': form,
              'package': PACKAGES.get(cfg.get('default_scope'), ('',))[0], **report}
    meta = on_main_process(lambda: _meta(before, checkpoint, report))
    with _shared_temporary_folder(folder) as temporary:
        on_main_process(lambda: save_deployed(after, deployed_cfg, temporary, meta)[0].name)
        report['file_bytes'] = {'training': checkpoint.stat().st_size,
                                'deployed': (temporary / 'model.pth').stat().st_size}
        report['dropped_bytes'] = on_main_process(lambda: _dropped(checkpoint))
        if onnx:  # before the test, which takes longer
            report['onnx'], different = on_main_process(
                lambda: _exported(after, batches, temporary, meta))
            problems += different
            if problems and not save_unverified:
                raise VerificationError('the ONNX file does not compute the same, nothing was '
                                        'saved.\n' + '\n'.join(problems))
        if test:
            report['metrics'] = _tested(runner, cfg, temporary, tta, show_dir)
            problems += changed_metrics(report['metrics'])
            if problems and not save_unverified:
                largest = report['verification']['errors']
                raise VerificationError(
                    'a metric moved, nothing was saved.\n' + '\n'.join(problems) + '\nThe raw '
                    f'outputs agree on {num_images} images, the largest error is '
                    f'{max(error["error"] for error in largest):.1e}: no layer differs by more '
                    'than rounding there. More images (--num-images) may show one.')
        report['problems'] = problems
        meta.update(verified=not problems, metrics=report.get('metrics', {}).get('deployed'))

        def finish() -> None:
            # once more, now that all is known that the meta says
            save_deployed(after, deployed_cfg, temporary, meta, safetensors)
            (temporary / 'report.json').write_text(json.dumps(report, indent=1))
            for path in sorted(temporary.iterdir()):
                if path.name in _OUTPUTS or path.suffix == '.onnx':
                    path.replace(folder / path.name)

        on_main_process(finish)
    return report


def _require_files(folder: Path, checkpoint: Path) -> None:
    """Refuse to overwrite the input, or to mix with files of an earlier run; before long work."""
    if not checkpoint.is_file():
        raise FileNotFoundError(f'there is no checkpoint {checkpoint}')
    if checkpoint.resolve() in {(folder / name).resolve() for name in _OUTPUTS}:
        raise FileExistsError(f'the output {folder / checkpoint.name} would overwrite the input: '
                              'choose another folder with --out')
    stale = sorted(path.name for path in folder.glob('*')
                   if path.suffix == '.onnx' or path.name == 'model.safetensors')
    if stale:
        raise FileExistsError(f'{folder} holds {", ".join(stale)} of an earlier run, which would '
                              'not belong to the new checkpoint: delete it, or choose another '
                              'folder with --out')


def _require_training_form(model: nn.Module, checkpoint: Path) -> None:
    """Tell a deployed model from one that never had anything to re-parameterize."""
    form = load_checkpoint(checkpoint).get('meta', {}).get('form')
    if form is not None:
        raise CheckpointError(
            f'{checkpoint} is in {form} form already, where the training form is expected. Give '
            'the config and the checkpoint that it was made from:\n'
            '  mim run orepa_mm reparam TRAINING_CONFIG TRAINING_CHECKPOINT')


def _batches(runner: Runner, cfg: Config, model: nn.Module, count: int) -> list[dict]:
    """The first test batches, preprocessed, without augmentation."""
    loader = Runner.build_dataloader(cfg.test_dataloader, seed=runner.seed)
    return [model.data_preprocessor(data, False) for data in islice(loader, count)]


def _compared(before: nn.Module, after: nn.Module, batches: list[dict], rounds: int
              ) -> tuple[dict[str, Any], list[str]]:
    """Raw outputs and costs of both forms, and what is wrong with them."""
    verification = verify(before, after, batches)
    report = {
        'verification': verification.as_dict(),
        'largest_difference': {dtype: verification.largest(dtype).error
                               for dtype in ('float32', 'float64') if verification.errors},
        'parameters': dict(zip(FORMS, map(count_parameters, (before, after)))),
        'machine': {'torch': torch.__version__, 'threads': torch.get_num_threads(),
                    'device': _device_name(before), 'processor': platform.machine()},
    }
    if batches:
        report.update(_costs(before, after, batches[0], rounds))
    return report, _problems(verification)


def _problems(verification: VerificationReport) -> list[str]:
    return [] if verification.passed else [verification.explain()]


def _meta(model: nn.Module, checkpoint: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint says about itself; plain types only."""
    verification = report['verification']
    return {
        'form': report['form'],
        'source': checkpoint.name,
        'source_sha256': sha256(checkpoint),
        'versions': {'orepa_mm': __version__, 'torch': torch.__version__.split('+')[0],
                     **{name: import_module(name).__version__
                        for name in ('mmengine', 'mmcv', *(
                            name for name, (package, *_) in PACKAGES.items()
                            if package == report['package']))}},
        'verified': verification['passed'],
        'largest_difference': dict(report['largest_difference']),
        'verification': verification,
        'dataset_meta': getattr(model, 'dataset_meta', None),
    }


def _dropped(checkpoint: Path) -> dict[str, int]:
    """Bytes of the tensors that the checkpoint held beside the weights, by entry."""
    content = load_checkpoint(checkpoint)
    if 'state_dict' not in content:
        return {}
    return {key: sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
            for key, value in content.items() if key not in ('state_dict', 'meta')}


@contextlib.contextmanager
def _shared_temporary_folder(folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, the same for all processes, gone afterwards."""
    existed = folder.exists()
    with contextlib.ExitStack() as stack:

        def create() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            return stack.enter_context(tempfile.TemporaryDirectory(prefix='.reparam-', dir=folder))

        try:
            yield Path(on_main_process(create))
        except BaseException:
            if is_main_process():
                stack.close()
                if not existed and not any(folder.iterdir()):
                    folder.rmdir()
            raise


def _tested(runner: Runner, cfg: Config, folder: Path, tta: bool, show_dir: str | Path | None
            ) -> dict[str, dict[str, float]]:
    """Metrics of both forms; the deployed one is tested from its files, as a user gets it."""
    deployed_cfg = Config.fromfile(folder / 'config.py')
    deployed_cfg.work_dir, deployed_cfg.launcher = cfg.work_dir, cfg.launcher
    # MMEngine keeps one visualizer for each name, with the folder of the first
    if deployed_cfg.get('visualizer'):
        deployed_cfg.visualizer.name = f'{deployed_cfg.visualizer.get("name", "")}-deployed'
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

    def squeeze_and_predict(model: nn.Module) -> object:
        forget_kernels(model)
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


def _exported(model: nn.Module, batches: list[dict], folder: Path, meta: Mapping[str, Any]
              ) -> tuple[dict[str, Any], list[str]]:
    """Write ONNX; what is in it, how it compares with PyTorch, and what is wrong with it."""
    print_log('exporting to ONNX', 'current')
    exported = export_onnx(model, batches[0], folder / 'model.onnx', meta={
        key: meta[key] for key in ('form', 'source', 'source_sha256', 'versions', 'verified')})
    print_log('comparing ONNX Runtime with PyTorch', 'current')
    comparison = compare_onnx(model, batches, folder / 'model.onnx')
    report = {**exported.as_dict(), **comparison.as_dict(), 'largest': comparison.largest}
    return report, [] if comparison.passed else [comparison.explain()]


def _device_name(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type

"""Tiny training batches in the form that each package's data loader gives."""

import torch


def tiny_batch(scope, size=64, count=2):
    """A batch for `model.train_step`: `count` noise images with labels of every kind."""
    return {'mmdet': _detection, 'mmseg': _segmentation,
            'mmpretrain': _classification}[scope](size, count)


def _images(size, count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)
            for _ in range(count)]


def _detection(size, count):
    from mmdet.testing import demo_mm_inputs

    batch = demo_mm_inputs(count, (3, size, size), num_items=[2] * count, num_classes=3,
                           with_mask=True)
    return {**batch, 'inputs': _images(size, count)}


def _segmentation(size, count):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for index in range(count):
        sample = SegDataSample(gt_sem_seg=PixelData(
            data=torch.arange(size).remainder(5).add(index).expand(1, size, size).clone()))
        sample.set_metainfo({'img_shape': (size, size), 'ori_shape': (size, size),
                             'pad_shape': (size, size)})
        samples.append(sample)
    return {'inputs': _images(size, count), 'data_samples': samples}


def _classification(size, count):
    from mmpretrain.structures import DataSample

    return {'inputs': _images(size, count),
            'data_samples': [DataSample().set_gt_label(index) for index in range(count)]}

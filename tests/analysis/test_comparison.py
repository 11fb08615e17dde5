"""What a comparison says, against formulas and a table of Student's t."""

import math
import statistics

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from mmengine.config import Config

from orepa_mm.analysis.comparison import (
    Outcome,
    chosen_metric,
    compare,
    form_differences,
    smaller_is_better,
)
from orepa_mm.analysis.comparison_figure import draw_metric, draw_training
from orepa_mm.errors import ConfigError

#: Quantiles 0.975 of Student's t, from a table: by degrees of freedom.
T = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445}


def outcome(variant, seed, metric, training=None, seconds=0.1, peak=None, step=math.nan):
    return Outcome(variant, seed, metric, training, seconds, peak, step, 1000)


def outcomes(**values):
    """One for each seed 0, 1, ... of each variant."""
    return [outcome(variant, seed, metric) for variant, metrics in values.items()
            for seed, metric in enumerate(metrics)]


def interval_of(values):
    half = T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return pytest.approx((statistics.mean(values) - half, statistics.mean(values) + half),
                         rel=1e-6)


def test_the_numbers_of_five_seeds():
    plain, orepa = (0.549, 0.552, 0.546, 0.541, 0.550), (0.555, 0.560, 0.549, 0.546, 0.561)
    result = compare(outcomes(plain=plain, orepa=orepa), 'mAP')
    first, second = result.spreads
    assert (first.mean, first.deviation) == pytest.approx((statistics.mean(plain),
                                                           statistics.stdev(plain)))
    assert second.interval == interval_of(orepa)
    pair, = result.pairs
    differences = [b - a for a, b in zip(plain, orepa)]
    assert list(pair.differences.values()) == differences
    assert pair.mean == pytest.approx(statistics.mean(differences))
    assert pair.interval == interval_of(differences)  # paired: not that of two samples
    assert pair.sentence == (
        f'orepa is better than plain by {pair.mean:.4f} (95 % interval of the difference '
        f'{pair.interval[0]:+.4f} to {pair.interval[1]:+.4f}, 5 seeds)')
    assert not any('comparisons are made' in note for note in result.notes)


def test_chance_is_not_called_a_difference():
    result = compare(outcomes(plain=(0.549, 0.549, 0.546), orepa=(0.545, 0.547, 0.534)), 'mAP')
    pair, = result.pairs
    assert pair.interval[0] < 0 < pair.interval[1]
    assert pair.sentence.startswith('no difference between orepa and plain that these 3 seeds can '
                                    'tell from chance (mean difference -0.0060, 95 % interval ')
    assert 'worse' not in pair.sentence


@pytest.mark.parametrize(('smaller', 'word'), [(False, 'worse'), (True, 'better')])
def test_the_other_direction(smaller, word):
    result = compare(outcomes(plain=(5.0, 5.1, 5.2), orepa=(4.0, 4.2, 4.1)), 'rate',
                     smaller_is_better=smaller)
    unit = '' if smaller else ' points'
    digits = 4 if smaller else 2
    assert result.pairs[0].sentence.startswith(
        f'orepa is {word} than plain by {1:.{digits}f}{unit} (95 %')
    assert result.percent is not smaller


def test_percentages_are_points():
    result = compare(outcomes(plain=(54.0, 55.0), orepa=(56.0, 56.5)), 'accuracy/top1')
    assert 'mean difference +1.75 points' in result.pairs[0].sentence
    assert any('in percent; differences are points' in note for note in result.notes)


def test_one_seed_has_no_interval():
    result = compare(outcomes(plain=(0.5,), orepa=(0.6,)), 'mAP')
    assert result.spreads[0].deviation is result.spreads[0].interval is None
    assert result.pairs[0].interval is None
    assert result.pairs[0].sentence == ('orepa minus plain is +0.1000: one seed says nothing '
                                        'about chance')


def test_differences_without_spread_have_no_interval():
    # equal but for rounding: 0.6 - 0.5 is not 0.4 - 0.3
    result = compare(outcomes(plain=(0.5, 0.3, 0.2), orepa=(0.6, 0.4, 0.3), dbb=(0.5, 0.3, 0.2)),
                     'mAP')
    for pair, difference in zip(result.pairs, ('+0.1000', '+0.0000')):
        assert pair.interval is None
        assert f'is {difference} with each of 3 seeds: without spread' in pair.sentence
    assert compare(outcomes(plain=(0.0, 0.0)), 'mAP').spreads[0].interval is None


def test_only_common_seeds_are_compared():
    rows = [*outcomes(plain=(0.5, 0.6, 0.7, math.nan)), outcome('orepa', 1, 0.65),
            outcome('orepa', 2, 0.73), outcome('orepa', 3, 0.9), outcome('orepa', 8, 0.1),
            outcome('dbb', 9, 0.4)]
    result = compare(rows, 'mAP')
    orepa, dbb = result.pairs
    assert orepa.differences == pytest.approx({1: 0.05, 2: 0.03})
    assert orepa.interval == interval_of((0.05, 0.03))
    assert dbb.mean is None
    assert dbb.sentence == ('dbb and plain have no seed in common with a number for both: nothing '
                            'can be compared')
    text = '\n'.join(result.notes)
    assert 'plain: the metric is no number with seed 3; left out' in text
    assert 'plain has no result with seeds 8, 9' in text
    assert 'orepa has no result with seeds 0, 9' in text
    assert '2 comparisons are made' in text
    assert 'in up to 10 of 100' in text


def test_a_metric_that_is_nowhere_a_number():
    result = compare(outcomes(plain=(math.nan,), orepa=(-1,)), 'mAP_s')  # COCO's mark
    assert [spread.mean for spread in result.spreads] == [None, None]
    assert result.text(result.spreads[0].mean) == '-'
    assert 'nothing can be compared' in result.pairs[0].sentence
    draw_metric(result)


def test_cost_is_compared_seed_by_seed():
    rows = [outcome('plain', 0, 0.5, seconds=1.0, peak=5, step=0.1),
            outcome('plain', 1, 0.5, seconds=4.0, peak=None, step=math.nan),
            outcome('orepa', 0, 0.5, seconds=2.0, peak=7, step=0.2),
            outcome('orepa', 1, 0.5, seconds=4.0, peak=6, step=0.4),
            outcome('orepa', 2, 0.5, seconds=9.0)]
    plain, orepa = compare(rows, 'mAP').spreads
    assert (plain.time_ratio, orepa.time_ratio) == (1.0, 1.5)
    assert (plain.seconds_per_iteration, orepa.seconds_per_iteration) == (2.5, 5.0)
    assert (plain.peak_bytes, orepa.peak_bytes) == (5, 7)
    assert (plain.kernel_step, orepa.kernel_step) == pytest.approx((0.1, 0.3))


def test_another_reference():
    rows = outcomes(plain=(0.5, 0.6), dbb=(0.6, 0.8), orepa=(0.7, 0.9))
    result = compare(rows, 'mAP', 'dbb')
    assert result.reference == 'dbb'
    assert [(pair.variant, pair.reference) for pair in result.pairs] == [('plain', 'dbb'),
                                                                         ('orepa', 'dbb')]
    with pytest.raises(ConfigError, match='reference expand has finished; there are plain, dbb'):
        compare(rows, 'mAP', 'expand')
    with pytest.raises(ConfigError, match='plain has seed 1 twice'):
        compare([*rows, outcome('plain', 1, 0.5)], 'mAP')
    with pytest.raises(ConfigError, match='no run has finished'):
        compare([], 'mAP')


def test_both_forms():
    assert form_differences(outcome('plain', 0, 0.5), 'mAP') == []
    assert form_differences(outcome('orepa', 0, 0.5, 0.50005), 'mAP') == []
    assert form_differences(outcome('orepa', 0, 50.0, 50.005), 'mIoU') == []
    line, = form_differences(outcome('orepa', 4, 0.5, 0.5002), 'mAP')
    assert line.startswith('orepa, seed 4: mAP is 0.50020 in training form but 0.50000 deployed')
    result = compare([outcome('orepa', 4, 0.5, 0.5002)], 'mAP')
    assert f'THE TWO FORMS DIFFER: {line}' in result.notes


def config(**checkpoint):
    return Config({'default_hooks': {'checkpoint': checkpoint}})


@pytest.mark.parametrize(('cfg', 'metrics', 'name'), [
    (config(save_best='coco/bbox_mAP_50'), ('coco/bbox_mAP', 'coco/bbox_mAP_50'),
     'coco/bbox_mAP_50'),
    (config(save_best=['other', 'mAcc']), ('aAcc', 'mIoU', 'mAcc'), 'mAcc'),
    (config(save_best='auto'), ('coco/car_precision', 'coco/bbox_mAP'), 'coco/bbox_mAP'),
    (config(), ('aAcc', 'mIoU', 'mAcc'), 'mIoU'),
    (Config({}), ('accuracy/top1', 'accuracy/top5'), 'accuracy/top1'),
])
def test_the_metric_of_a_config(cfg, metrics, name):
    assert chosen_metric(cfg, dict.fromkeys(metrics, 0.5)) == name


def test_a_metric_by_name():
    metrics = {'mIoU': 50.0, 'aAcc': 90.0, 'AP_classwise': [1, 2]}
    assert chosen_metric(config(save_best='mIoU'), metrics, 'aAcc') == 'aAcc'
    with pytest.raises(ConfigError, match="no metric 'AP_classwise'; there are mIoU, aAcc"):
        chosen_metric(config(), metrics, 'AP_classwise')
    with pytest.raises(ConfigError, match='no metric of all classes'):
        chosen_metric(config(), {'coco/car_precision': 0.5})


def test_what_is_an_error_and_what_a_quality():
    assert smaller_is_better(config(save_best='rmse', rule='less'), 'rmse')
    assert not smaller_is_better(config(save_best='rmse', rule='less'), 'mIoU')
    several = config(save_best=['mIoU', 'rmse'], rule=['greater', 'less'])
    assert smaller_is_better(several, 'rmse')
    assert not smaller_is_better(several, 'mIoU')
    assert smaller_is_better(config(save_best=['mae', 'rmse'], rule='less'), 'rmse')
    assert smaller_is_better(Config({}), 'val_loss')
    assert not smaller_is_better(config(), 'coco/bbox_mAP')


def test_the_picture_of_the_metric():
    figure = draw_metric(compare(outcomes(plain=(0.5, 0.6), orepa=(0.7, 0.9)), 'mAP'))
    axes, = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ['plain (n = 2)',
                                                                      'orepa (n = 2)']
    points = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == 'o']
    assert points == [[0.5, 0.6], [0.7, 0.9]]
    bar = axes.collections[1].get_segments()[0][:, 0]
    assert tuple(bar) == interval_of((0.7, 0.9))


def test_long_names_stay_in_the_figure():
    name = 'orepa:lr=2e-3,' + ','.join(f'model.backbone.init_cfg.{key}=Kaiming' for key in 'abc')
    figure = draw_metric(compare(outcomes(**{'plain': (0.5, 0.6), name: (0.7, 0.9)}), 'mAP'))
    FigureCanvasAgg(figure).draw()
    labels = figure.axes[0].get_yticklabels()
    assert labels[1].get_text().replace('\n', '') == f'{name} (n = 2)'
    boxes = [label.get_window_extent() for label in labels]
    assert min(box.x0 for box in boxes) >= 0
    assert boxes[1].y1 < boxes[0].y0  # from above


def test_the_curves():
    def seed(offset, steps):
        return {'loss': {step: step + offset for step in steps}, 'mAP': {40: 0.4 + offset / 10}}

    figure = draw_training({'plain': [seed(0, range(1, 41)), seed(2, range(1, 61))],
                            'orepa': [{}]}, 'mAP', 'epoch')
    losses, metrics = figure.axes
    line, = losses.lines
    # 40 common steps, means over two: at step 2 of 1 and 2, mean of the seeds 1 higher
    assert list(line.get_xdata()) == list(range(2, 41))
    assert list(line.get_ydata()) == pytest.approx([step + 0.5 for step in range(2, 41)])
    band = losses.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(2.0, 1.5), (2.0, 3.5), (40.0, 39.5), (40.0, 41.5)}
    assert losses.get_title() == 'training loss, running mean of 2 logged values'
    assert metrics.lines[0].get_ydata() == pytest.approx([0.5])
    assert metrics.get_xlabel() == 'epoch'
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['plain']


def test_nothing_was_logged():
    figure = draw_training({'plain': [{}]}, 'mAP')
    assert [axes.texts[0].get_text() for axes in figure.axes] == ['not logged', 'not logged']
    assert not figure.legends


def test_a_colour_for_each_of_six_variants():
    names = ('a', 'b', 'c', 'd', 'e', 'f')
    figure = draw_training({name: [{'loss': {1: 1.0, 2: 2.0}}] for name in names}, 'mAP')
    assert len({line.get_color() for line in figure.axes[0].lines}) == 6

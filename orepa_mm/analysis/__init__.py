"""What a form of a model costs and how its weights spread: measured, as tables and figures."""

from .benchmark import Benchmark, benchmark_config
from .benchmark_table import print_benchmark, progress_bars
from .weight_ranges import weight_ranges

__all__ = ['Benchmark', 'benchmark_config', 'print_benchmark', 'progress_bars', 'weight_ranges']

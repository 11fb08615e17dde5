"""ONNX files of a deployed model, and proof in ONNX Runtime that they compute the same.

The files hold the whole network, RoIAlign included, but no selection: anchors, decoding of
boxes, NMS and pasting of masks stay the code of MMDetection.
"""

from ...errors import OnnxExportError
from .compare import compare_onnx
from .export import OnnxExport, export_onnx
from .graphs import require_onnx
from .report import BoxComparison, GraphError, OnnxReport

__all__ = ['BoxComparison', 'GraphError', 'OnnxExport', 'OnnxExportError', 'OnnxReport',
           'compare_onnx', 'export_onnx', 'require_onnx']

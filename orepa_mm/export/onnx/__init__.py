"""ONNX files of a deployed model, and proof in ONNX Runtime that they compute the same.

`export_onnx` writes the whole network, RoIAlign included, but no selection: anchors, decoding
of boxes, NMS and pasting of masks stay the code of MMDetection. `export_end2end` writes one
file from pixels to boxes, label maps or probabilities.
"""

from ...errors import OnnxExportError
from .compare import compare_onnx
from .end2end import EndToEndExport, export_end2end
from .end2end_run import EndToEndModel, compare_end2end
from .export import OnnxExport, export_onnx
from .graphs import require_onnx
from .report import BoxComparison, EndToEndReport, GraphError, OnnxReport

__all__ = ['BoxComparison', 'EndToEndExport', 'EndToEndModel', 'EndToEndReport', 'GraphError',
           'OnnxExport', 'OnnxExportError', 'OnnxReport', 'compare_end2end', 'compare_onnx',
           'export_end2end', 'export_onnx', 'require_onnx']

"""What leaves the house: stock configs and checkpoints, converted checkpoints, ONNX files."""

from .checkpoint import CONVERTED_FORMS, Conversion, convert_checkpoint_file
from .onnx import OnnxExport, OnnxReport, compare_onnx, export_onnx
from .stock import DEPLOYED_FORMS, deploy_config, save_deployed

__all__ = ['CONVERTED_FORMS', 'DEPLOYED_FORMS', 'Conversion', 'OnnxExport', 'OnnxReport',
           'compare_onnx', 'convert_checkpoint_file', 'deploy_config', 'export_onnx',
           'save_deployed']

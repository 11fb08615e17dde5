"""An ONNX file in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from .graphs import as_list


class Session:
    """A file in ONNX Runtime, on the CPU: tensors in, tensors by name out.

    Args:
        path: The file.

    Attributes:
        meta: The file's metadata.
        inputs: Shapes of the inputs by name; None stands for a dynamic size.
        outputs: Names of the outputs.
        size: Height and width of the images, if the file takes no others.

    Raises:
        ImportError: If ONNX Runtime is missing.
        FileNotFoundError: If there is no such file.
        CheckpointError: If ONNX Runtime cannot read it.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError('an ONNX file needs ONNX Runtime to run: pip install onnxruntime'
                              ) from error
        if not path.is_file():
            raise FileNotFoundError(f'there is no ONNX file {path}')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors; they are raised
        try:
            self.session = onnxruntime.InferenceSession(str(path), options,
                                                        ['CPUExecutionProvider'])
        except Exception as error:  # of classes that ONNX Runtime does not publish
            raise CheckpointError(f'{path} cannot be read as ONNX: {error}') from error
        self.path = path
        self.meta: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        self.inputs = {value.name: [length if isinstance(length, int) else None
                                    for length in value.shape]
                       for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        size = tuple(next(iter(self.inputs.values()))[2:4])
        self.size = size if len(size) == 2 and None not in size else None

    def __call__(self, inputs: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """Run it.

        Args:
            inputs: In the file's order.

        Returns:
            The outputs by name.

        Raises:
            ConfigError: If the file takes images of another size only.
        """
        tensors = dict(zip(self.inputs, as_list(inputs)))
        for name, tensor in tensors.items():
            if any(length not in (None, found)
                   for length, found in zip(self.inputs[name][1:], tensor.shape[1:])):
                raise ConfigError(f'{self.path} takes {name} of the shape '
                                  f'{_shown(self.inputs[name])} only, and got '
                                  f'{_shown(tensor.shape)}')
        found = self.session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
        return dict(zip(self.outputs, map(torch.from_numpy, found)))


def _shown(shape: object) -> str:
    return ' x '.join('N' if length is None else str(length) for length in shape)

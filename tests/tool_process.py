"""Processes for tools, forked where the big packages are imported already: that takes 5 seconds.

Nothing of orepa_mm and no toolbox is imported beforehand: a tool does that as it does in its
own process.
"""

import multiprocessing.forkserver
import os
import runpy
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

#: What is imported once.
PRELOADED = ['torch', 'torch.utils.data', 'torchvision', 'mmengine.runner', 'mmcv.ops', 'cv2',
             'matplotlib.pyplot', 'scipy.stats', 'pycocotools.coco', 'rich.progress',
             'onnxruntime', 'quick_start']
#: Beside the one that other tests use, which may have more imported.
_SERVER = multiprocessing.forkserver.ForkServer()
_SERVER.set_forkserver_preload(PRELOADED)


def run_forked(command, folder):
    """Run what `python COMMAND...` runs, in `folder`; exit code and output."""
    with tempfile.NamedTemporaryFile() as output:
        process = multiprocessing.get_context('forkserver').Process(target=_become, args=(
            list(map(str, command)), str(folder), output.name, dict(os.environ)))
        with mock.patch.object(multiprocessing.forkserver, 'connect_to_new_process',
                               _SERVER.connect_to_new_process):
            process.start()
        process.join()
        return process.exitcode, output.read().decode(errors='replace')


def _become(command, folder, output, environment):
    """Be the process of a command."""
    with open(output, 'a') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tests = str(Path(__file__).parent)
    sys.path[:] = [path for path in sys.path if path and not path.startswith(tests)]
    kind, *arguments = command
    if kind == '-c':
        code, *arguments = arguments
        sys.path.insert(0, '')
        sys.argv = ['-c', *arguments]
        main = sys.modules['__main__'] = types.ModuleType('__main__')
        exec(compile(code, '<string>', 'exec'), main.__dict__)
    elif kind == '-m':
        sys.path.insert(0, '')
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, str(Path(kind).resolve().parent))
        sys.argv = command
        runpy.run_path(kind, run_name='__main__')

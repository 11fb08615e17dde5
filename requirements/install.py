"""Build the project's virtual environment, with the standard library alone.

uv installs the extras of setup.py in the versions of constraints.txt: it goes on from its cache,
and takes other packages for some that OpenMMLab asks for (overrides.txt). Where there is no uv
for a machine, pip does. mmcv's operators come from torchvision (mmcv_ext.py), or with MMCV=full
from a compiler. Nothing that this file did not make is changed.

Usage: [MMCV=lite|full] [UV_TORCH_BACKEND=cpu|cu130|...] python requirements/install.py
       [--stack onedl] [--venv .venv] [--extra test] [--extra dev]
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OPERATORS = HERE / 'mmcv_ext.py'
#: What every Python of the environment runs first: 3.14 dropped a name that MMEngine and mmcv call,
#: and deployed models need nothing of this package, which puts it back too (patches.py).
FIND_LOADER = (
    'import pkgutil, importlib.util; hasattr(pkgutil, "find_loader") or setattr(pkgutil, "find_'
    'loader", lambda name: getattr(importlib.util.find_spec(name), "loader", None))\n')
#: OpenMMLab's own packages and the maintained forks have the same import names, so each has an
#: environment of its own: constraints, extra, mmcv without operators and compiled, Pythons.
STACKS = {
    'official': ('constraints.txt', 'openmmlab', 'mmcv-lite', 'mmcv==2.1.0', range(10, 15)),
    'onedl': ('constraints-onedl.txt', 'onedl', 'onedl-mmcv', 'onedl-mmcv==2.3.6', range(10, 14))}


class SetupError(RuntimeError):
    """A step failed; the message says which and what to do."""


def output(*command, **variables) -> str | None:
    """What a command prints, None where it fails or is not there."""
    try:
        return subprocess.run([str(part) for part in command], text=True, check=True,
                              env={**os.environ, **variables}, capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def find_python(minors: range) -> str:
    """This Python if its version will do, else the newest one on PATH that does."""
    for python in [sys.executable, *(f'python3.{minor}' for minor in reversed(minors))]:
        version = output(python, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])')
        if version in [f'3.{minor}' for minor in minors]:
            return python
    raise SetupError(f'Python 3.{minors[0]} to 3.{minors[-1]} is needed, but this is '
                     f'{sys.version.split()[0]} and no other was found on PATH. Install one and '
                     f'call: make setup PYTHON=/path/to/python3.{minors[-2]}')


def has_nvidia_driver() -> bool:
    return bool(shutil.which('nvidia-smi')) or Path('/proc/driver/nvidia/version').exists()


class Environment:
    """A virtual environment: its folder, and which stack (a key of `STACKS`) it holds."""

    def __init__(self, path: Path, stack: str) -> None:
        self.path, self.stack = path, stack
        self.python, self.stamp = path / 'bin' / 'python', path / 'setup.json'
        constraints, self.extra, self.lite, self.full, self.minors = STACKS[stack]
        self.constraints = HERE / constraints
        # pip's settings that would put packages elsewhere; a configuration file may say user too
        self.variables = {name: value for name, value in os.environ.items() if name not in (
            'PIP_TARGET', 'PIP_PREFIX', 'PIP_ROOT', 'PIP_DRY_RUN', 'PIP_NO_DEPS', 'PYTHONPATH')}
        self.variables |= {'PIP_USER': '0', 'MMCV_WITH_OPS': '0'}
        self.uv: Path | None = None

    def made(self) -> dict:
        """What the set-up noted in the environment."""
        try:
            return json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}

    def note(self, **facts) -> None:
        temporary = self.stamp.with_suffix('.tmp')
        temporary.write_text(json.dumps({**self.made(), **facts}, indent=1))
        temporary.replace(self.stamp)

    def create(self) -> None:
        """Make the environment, or see that the one there is ours and starts."""
        made, place = self.made(), str(self.path.resolve())
        if os.path.lexists(self.path) and not made and (
                not self.path.is_dir() or any(self.path.iterdir())):
            problem = 'was not made by this set-up'
        elif made.get('stack', self.stack) != self.stack:
            problem = f'holds the stack {made["stack"]}, which has the same import names'
        elif made and made['environment'].rpartition(' ')[0] != place:
            problem = f'was moved: its programs name {made["environment"].rpartition(" ")[0]}'
        elif output(self.python, '-m', 'pip', '--version'):
            return
        elif 'extras' in made:
            problem = 'was finished, but its Python no longer starts: was that removed?'
        else:
            python = find_python(self.minors)
            shutil.rmtree(self.path / 'bin', ignore_errors=True)  # ours, of an interrupted set-up
            self.path.mkdir(parents=True, exist_ok=True)
            self.note(environment=f'{place} {python}', stack=self.stack)
            return self.run(python, '-m', 'venv', self.path)
        raise SetupError(f'{self.path} {problem}. It is left as it is: give another folder (make '
                         f'setup VENV=FOLDER), or move this one away.')

    def run(self, *command, **variables) -> None:
        """Run a command, whose output is shown; raise `SetupError` where it fails."""
        if subprocess.call(list(map(str, command)), env={**self.variables, **variables}):
            pip = [self.python, '-m', 'pip']
            silent = output(*pip, '--version') and not output(*pip, 'index', 'versions', 'pip')
            raise SetupError(f'this command failed:\n  {" ".join(map(str, command))}' + (
                '\nThe package index does not answer: there is no network, or pip is not set up '
                'for the one that there is (proxy, mirror, certificates: pip config list).'
                if silent else ''))

    def pip(self, *arguments) -> None:
        self.run(self.python, '-m', 'pip', '--disable-pip-version-check', *arguments)

    def installer(self) -> list:
        """The command that installs, without what it installs."""
        if self.uv is None:
            return [self.python, '-m', 'pip', 'install', '-c', self.constraints]
        return [self.uv, 'pip', 'install', '--python', self.python, '-c', self.constraints,
                '--override', HERE / 'overrides.txt']

    def install(self, *requirements) -> None:
        self.run(*self.installer(), *requirements)

    def find_uv(self) -> None:
        """Install pip and uv, and give uv the index and the certificates that pip has."""
        self.pip('install', '-q', '-c', self.constraints, 'pip')
        try:
            self.pip('install', '-q', '--only-binary', ':all:', '-c', self.constraints, 'uv')
        except SetupError:
            return print('there is no uv for this machine: pip goes on, which takes longer')
        self.uv = self.path / 'bin' / 'uv'
        names = {'index-url': 'UV_DEFAULT_INDEX', 'cert': 'SSL_CERT_FILE'}
        for setting, value in re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", output(
                self.python, '-m', 'pip', 'config', 'list', **self.variables) or '', re.M):
            if setting in names:
                self.variables.setdefault(names[setting], value)

    def lacks_cuda(self) -> bool:
        """Whether a build for processors meets a driver, as from a login node to a GPU."""
        return ('UV_TORCH_BACKEND' not in os.environ and has_nvidia_driver() and output(
            self.python, '-c', 'import torch; print(torch.version.cuda)') == 'None')

    def install_torch(self) -> None:
        """The build for this machine's driver, from PyTorch's own index where that answers."""
        pair, asked = ['torch', 'torchvision'], os.environ.get('UV_TORCH_BACKEND')
        if self.uv is None:
            return self.install(*pair)
        options = ['--torch-backend', asked or 'auto']
        if self.lacks_cuda():
            options += ['--reinstall-package', 'torch', '--reinstall-package', 'torchvision']
        if not asked and output(*self.installer(), '--dry-run', *pair, *options,
                                **self.variables | {'UV_HTTP_RETRIES': '1'}) is None:
            print("PyTorch's own index does not answer: torch comes from the default one" + (
                '' if has_nvidia_driver() else
                ', with 3.4 GB of CUDA libraries that nothing here uses'), flush=True)
            options = options[2:]
        return self.install(*pair, *options)

    def install_mmcv(self, kind: str) -> None:
        packages = Path(output(self.python, '-c', 'import sysconfig; '
                               'print(sysconfig.get_path("purelib"))'))
        (packages / 'find_loader.pth').write_text(FIND_LOADER)
        operators = packages / 'mmcv' / '_ext.py'
        if operators.parent.exists() and operators.exists() != (kind == 'lite'):
            # both kinds have the same files
            self.pip('uninstall', '-qy', self.lite, self.full.partition('==')[0])
        if kind == 'lite':
            self.install('--no-deps', self.lite)
            shutil.copyfile(OPERATORS, operators)
        elif not self.has_operators():
            print(f'compiling {self.full}: 7 to 13 minutes on 2 cores. It needs a C++17 compiler '
                  "and Python's headers (Debian: apt-get install g++ python3-dev)", flush=True)
            self.install('ninja', 'psutil', 'wheel', 'packaging')
            self.run(self.python, '-m', 'pip', 'install', '-v', '--no-deps', '--force-reinstall',
                     # pip's cache would give a wheel that was compiled for another torch
                     '--no-cache-dir', '--no-binary', ':all:', '--no-build-isolation', self.full,
                     MMCV_WITH_OPS='1',
                     MAX_JOBS=os.environ.get('MAX_JOBS', str(os.cpu_count() or 2)),
                     # its setup.py calls the ninja of the environment
                     PATH=f'{self.path.resolve() / "bin"}{os.pathsep}{os.environ["PATH"]}')

    def has_operators(self) -> bool:
        """Whether mmcv's are compiled for this torch, and for the GPU if it reaches one."""
        return output(self.python, '-c', 'import torch, mmcv.ops as ops; assert ops.'
                      'get_compiling_cuda_version() != "not available" or not '
                      'torch.cuda.is_available()') is not None

    def set_up(self, extras: list[str]) -> None:
        """Bring the environment to what is asked for; do nothing where it is there."""
        self.create()
        made = self.made()
        kind = os.environ.get('MMCV') or made.get('mmcv', 'lite')
        if kind not in ('full', 'lite'):
            raise SetupError(f'MMCV={kind} is neither full nor lite.')
        extras = sorted({*extras, *made.get('extras', [])})
        sources = (ROOT / 'setup.py', self.constraints, HERE / 'overrides.txt', OPERATORS,
                   HERE / 'install.py')
        key = hashlib.sha256(repr([kind, extras, os.environ.get('UV_TORCH_BACKEND'), *(
            source.read_text() for source in sources)]).encode()).hexdigest()
        if made.get('done') == key and not self.lacks_cuda() and (
                kind == 'lite' or not has_nvidia_driver() or self.has_operators()):
            return
        self.find_uv()
        self.install_torch()
        self.install('setuptools', 'opencv-python-headless')
        wanted = [self.extra, 'onnx', 'safetensors', *extras]
        legacy = ['--no-use-pep517', '--no-build-isolation', '-e']  # mim follows no other install
        if self.uv:
            self.install('-r', ROOT / 'setup.py', *(f'--extra={extra}' for extra in wanted))
            self.pip('install', '-qq', '--no-deps', *legacy, ROOT)
        else:
            self.install('-qq', *legacy, f'{ROOT}[{",".join(wanted)}]')
        if output(self.python, '-m', 'pip', 'show', 'opencv-python'):  # of the same files
            self.pip('uninstall', '-qy', 'opencv-python', 'opencv-python-headless')
            self.install('--no-deps', 'opencv-python-headless')
        self.install_mmcv(kind)
        self.run(self.python, '-m', 'orepa_mm.doctor')
        self.note(done=key, mmcv=kind, extras=extras)


def main() -> int:
    parser = argparse.ArgumentParser(description='Set up the virtual environment of orepa_mm.')
    parser.add_argument('--stack', choices=list(STACKS), default='official',
                        help="OpenMMLab's own packages (default) or the maintained forks")
    parser.add_argument('--venv', type=Path,
                        help='where to build it (default: .venv, and .venv-onedl for the forks)')
    parser.add_argument('--extra', action='append', default=[], choices=['test', 'dev'],
                        help='what tests or development need, beside what users need')
    args = parser.parse_args()
    try:
        name = '.venv' if args.stack == 'official' else f'.venv-{args.stack}'
        Environment(args.venv or ROOT / name, args.stack).set_up(args.extra)
    except SetupError as error:
        print(f'\nset-up stopped: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted: call the same command again to go on.', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())

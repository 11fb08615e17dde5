"""Build the project's virtual environment, one resumable step at a time.

Standard library only: this runs before anything is installed. Each finished
step leaves a stamp in the environment, so that a second call skips it and an
interrupted call goes on where it stopped. mmcv exists on the package index as
source only; its wheel is compiled once and kept in a cache outside the project,
keyed by everything that its binary depends on. Where nothing can compile it, or
with MMCV=lite, its operators come from torchvision, see mmcv_ext.py.

There are two stacks, OpenMMLab's own packages and the maintained forks of them.
They share their import names, so each has an environment of its own.

Usage: [MMCV=full|lite] python requirements/install.py [--stack onedl] [--venv .venv]
       [--cache DIR]
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = ROOT / 'requirements' / 'mmcv_ext.py'
DEFAULT_CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'orepa_mm'

PYTHONS = ('3.10', '3.11', '3.12')
# pip 25.3 dropped the legacy editable install, the only one that mim can follow.
PIP = 'pip>=23,<25.3'
DEPLOYMENT = ['onnx', 'onnxscript', 'onnxruntime', 'safetensors']  # of the constraint file
DEVELOPMENT = ['pytest==9.0.3', 'pytest-xdist==3.8.0', 'ruff==0.14.5', 'mypy==2.4.1',
               'timm==1.0.31', 'tensorboard==2.21.0',
               'hypothesis',  # of the constraint file
               # the site of `make docs`; mkdocstrings for Python 3.10 needs this pymdown-extensions
               'mkdocs==1.6.1', 'mkdocs-material==9.7.1', 'mkdocstrings==1.0.0',
               'mkdocstrings-python==2.0.1', 'pymdown-extensions==10.19']


@dataclass(frozen=True)
class Stack:
    """What differs between OpenMMLab's own packages and the maintained forks.

    Attributes:
        constraints: Versions that were seen to work together.
        setuptools: Version.
        packages: All but mmcv.
        mmcv: Distribution that has mmcv's operators, compiled from its source.
        lite: What pip is given for mmcv's Python files alone.
    """

    constraints: Path
    setuptools: str
    packages: list[str]
    mmcv: str
    lite: list[str]

    @property
    def torch(self) -> list[str]:
        """What is there before the packages are."""
        return ['torch==2.12.1', 'torchvision==0.27.1', f'setuptools=={self.setuptools}',
                'wheel', 'ninja', 'psutil', 'packaging']

    @property
    def mmcv_names(self) -> list[str]:
        """Distributions of the module mmcv."""
        return list(dict.fromkeys(requirement.partition('==')[0]
                                  for requirement in (self.mmcv, self.lite[-1])))


STACKS = {
    'official': Stack(
        ROOT / 'requirements' / 'constraints.txt', '79.0.1',
        ['mmengine==0.10.7', 'mmdet==3.3.0', 'mmsegmentation==1.2.2', 'mmpretrain==1.2.0', 'ftfy',
         'regex', 'openmim==0.3.9', 'openxlab==0.0.11'], 'mmcv==2.1.0', ['mmcv-lite==2.1.0']),
    'onedl': Stack(
        ROOT / 'requirements' / 'constraints-onedl.txt', '81.0.0',
        ['onedl-mmengine==0.10.12', 'onedl-mmdetection==3.5.1', 'onedl-mmsegmentation==1.4.2',
         'onedl-mmpretrain==1.3.6', 'onedl-mim==0.5.1', 'openxlab==0.0.11'], 'onedl-mmcv==2.3.6',
        # there is no -lite: its set-up leaves the operators out where it sees no torch, as in
        # the environment that pip builds it in; a wheel that pip kept may be a compiled one
        ['--no-cache-dir', 'onedl-mmcv==2.3.6'])}


class SetupError(RuntimeError):
    """A set-up step failed; the message says which and what to do."""


def say(text: str) -> None:
    print(text, flush=True)


def run(command: list, **kwargs) -> None:
    """Run a command, streaming its output; raise `SetupError` on failure."""
    code = subprocess.call([str(part) for part in command], **kwargs)
    if code:
        raise SetupError(f'this command ended with code {code}:\n  '
                         + ' '.join(str(part) for part in command))


def version_of(python: str) -> str | None:
    """'3.11' for a Python that starts, None otherwise."""
    try:
        return subprocess.run(
            [python, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])'],
            capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def find_python() -> str:
    """This Python if its version will do, else the newest one on PATH that does."""
    for python in [sys.executable] + [f'python{v}' for v in reversed(PYTHONS)]:
        if version_of(python) in PYTHONS:
            return python
    raise SetupError(f'Python {PYTHONS[0]} to {PYTHONS[-1]} is needed (torch and mmcv are '
                     f'pinned to them), but this is {sys.version.split()[0]} and no other was '
                     'found on PATH. Install one and call: make setup PYTHON=/path/to/python3.11')


@contextmanager
def locked(path: Path):
    """Hold an exclusive lock, so that two set-ups do not compile in one folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'    waiting for another set-up that holds {path}')
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class Environment:
    """A virtual environment whose finished steps are remembered in a stamp file."""

    def __init__(self, path: Path, cache: Path, stack: str = 'official') -> None:
        self.path, self.cache = path, cache
        self.stack_name, self.stack = stack, STACKS[stack]
        self.python = path / 'bin' / 'python'
        self.stamp_file = path / 'setup.json'

    def create(self) -> None:
        # Scripts in an environment hold its absolute path: a moved one is rebuilt.
        python = find_python()
        identity = f'{self.path.resolve()} {version_of(python)}'
        if self._stamps().get('environment') == identity and version_of(str(self.python)):
            if (there := self._stamps().get('stack', 'official')) != self.stack_name:
                raise SetupError(f'{self.path} holds the packages of the stack {there}, which have '
                                 f'the same import names as those of {self.stack_name}: give '
                                 'another folder with --venv, or remove this one.')
            return
        say(f'    creating {self.path} with Python {version_of(python)}')
        if self.path.exists() and not (self.path / 'pyvenv.cfg').exists():
            raise SetupError(f'{self.path} exists and is no virtual environment: move it away.')
        run([python, '-m', 'venv', '--clear', self.path])
        self._write_stamps({'environment': identity, 'stack': self.stack_name})

    def step(self, name: str, key: list, action) -> None:
        """Run `action` unless it was already done with the same `key`."""
        digest = hashlib.sha256(json.dumps([str(k) for k in key]).encode()).hexdigest()
        if self._stamps().get(name) == digest:
            say(f'    {name}: already done')
            return
        say(f'    {name} ...')
        start = time.time()
        action()
        self._write_stamps({**self._stamps(), name: digest})
        say(f'    {name}: done in {time.time() - start:.0f} s')

    def pip_install(self, *arguments) -> None:
        run([self.python, '-m', 'pip', 'install', '--disable-pip-version-check', *arguments])

    def remembered(self, name: str) -> str | None:
        """What was noted of an earlier set-up."""
        return self._stamps().get(name)

    def remember(self, name: str, value: str) -> None:
        """Note something for the next set-up."""
        self._write_stamps({**self._stamps(), name: value})

    def ask(self, code: str) -> str:
        """What `print(...)` of this environment's Python says."""
        return subprocess.run([str(self.python), '-c', code], check=True, text=True,
                              capture_output=True).stdout.strip()

    def _stamps(self) -> dict:
        try:
            return json.loads(self.stamp_file.read_text())
        except (OSError, ValueError):
            return {}

    def _write_stamps(self, stamps: dict) -> None:
        temporary = self.stamp_file.with_suffix('.tmp')
        temporary.write_text(json.dumps(stamps, indent=1))
        temporary.replace(self.stamp_file)


def mmcv_kind(env: Environment) -> str:
    """full: with compiled operators; lite: with those of torchvision, see mmcv_ext.py.

    What was asked for, now or before; else full where it can be compiled, or was.
    """
    asked = os.environ.get('MMCV') or env.remembered('mmcv kind')
    if asked not in (None, 'full', 'lite'):
        raise SetupError(f'MMCV={asked} is neither full nor lite.')
    if asked is None:
        folder, cuda = wheel_folder(env)
        missing = [] if list(folder.glob('*.whl')) else missing_for_mmcv(env, cuda)
        asked = 'lite' if missing else 'full'
        if missing:
            say(f'    mmcv cannot be compiled here, there is no {" and no ".join(missing)}: its '
                'operators will be those of torchvision (compile them later: make setup MMCV=full)')
    env.remember('mmcv kind', asked)
    return asked


def missing_for_mmcv(env: Environment, cuda: bool) -> list[str]:
    """What mmcv's operators are compiled with, and this machine does not have."""
    headers = env.ask('import sysconfig; print(sysconfig.get_path("include"))')
    tools = {'C++ compiler': os.environ.get('CXX') or shutil.which('c++') or shutil.which('g++'),
             'Python.h': (Path(headers) / 'Python.h').exists()}
    if cuda:
        tools['nvcc'] = os.environ.get('CUDA_HOME') or shutil.which('nvcc')
    return [name for name, found in tools.items() if not found]


def install_mmcv(env: Environment, kind: str) -> None:
    """Install mmcv in place of whichever there is: both kinds have the same files."""
    wheel = [mmcv_wheel(env)] if kind == 'full' else env.stack.lite
    run([env.python, '-m', 'pip', '--disable-pip-version-check', 'uninstall', '-qy',
         *env.stack.mmcv_names], stderr=subprocess.DEVNULL)  # it warns of what is not there
    env.pip_install('-q', '--no-deps', *wheel)
    if kind == 'lite':
        packages = env.ask('import sysconfig; print(sysconfig.get_path("purelib"))')
        shutil.copyfile(OPERATORS, Path(packages) / 'mmcv' / '_ext.py')


def wheel_folder(env: Environment) -> tuple[Path, bool]:
    """Where the compiled wheel for this environment is kept, and whether it has CUDA operators."""
    facts = env.ask('import sys, torch, platform; '
                    'print(f"cp{sys.version_info[0]}{sys.version_info[1]}", torch.__version__, '
                    'platform.machine(), torch.cuda.is_available())').split()
    cuda = facts.pop() == 'True' or os.environ.get('FORCE_CUDA', '0') == '1'
    key = '-'.join([env.stack.mmcv.replace('==', ''), *facts, 'cuda' if cuda else 'cpu'])
    return env.cache / 'wheels' / key, cuda


def mmcv_wheel(env: Environment) -> Path:
    """The compiled mmcv wheel for this environment, from the cache or built into it."""
    folder, cuda = wheel_folder(env)
    with locked(folder.with_name(f'{folder.name}.lock')):
        if not list(folder.glob('*.whl')):
            build_mmcv(env, folder, cuda)
        wheel = next(folder.glob('*.whl'))
    say(f'    wheel: {wheel}')
    return wheel


def build_mmcv(env: Environment, folder: Path, cuda: bool) -> None:
    """Compile mmcv with its operators; an interrupted build goes on where it was."""
    say(f'    compiling {env.stack.mmcv} ({"CUDA" if cuda else "CPU"} operators), once for this '
        'torch: 7 to 13 minutes on 2 cores')
    folder.mkdir(parents=True, exist_ok=True)
    name = env.stack.mmcv.replace('-', '_').replace('==', '-')
    source = folder / 'source' / name
    pip = [env.python, '-m', 'pip', '--disable-pip-version-check']
    if not source.exists():
        run([*pip, 'download', '--no-binary', ':all:', '--no-deps', '--no-build-isolation',
             '--no-cache-dir', '-q', '-d', folder / 'source', env.stack.mmcv])
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            with tarfile.open(folder / 'source' / f'{name}.tar.gz') as archive:
                # early patch releases of Python 3.10 and 3.11 know no filters
                safe = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}
                archive.extractall(temporary, **safe)
            (Path(temporary) / name).rename(source)
    environment = dict(os.environ, MMCV_WITH_OPS='1', FORCE_CUDA='1' if cuda else '0',
                       MAX_JOBS=os.environ.get('MAX_JOBS', str(os.cpu_count() or 2)),
                       # setup.py calls the ninja that lies beside the environment's Python
                       PATH=f'{env.path.resolve() / "bin"}{os.pathsep}{os.environ["PATH"]}')
    log_file, built = folder / 'build.log', folder / 'built'
    command = [*pip, 'wheel', '-v', '--no-build-isolation', '--no-deps', '--no-cache-dir',
               '-w', built, source]
    with log_file.open('w') as log:
        process = subprocess.Popen([str(part) for part in command], env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in process.stdout:
            log.write(line)
            done = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if done and (int(done[1]) % 10 == 0 or done[1] == done[2]):
                say(f'      compiled {done[1]} of {done[2]} files')
    if process.wait():
        tail = ''.join(log_file.read_text().splitlines(keepends=True)[-30:])
        raise SetupError(f'mmcv did not compile. The end of {log_file}:\n{tail}\n'
                         "Are a C++17 compiler and Python's headers installed? "
                         '(Debian: apt-get install g++ python3-dev)')
    wheel = next(built.glob('*.whl'))
    wheel.rename(folder / wheel.name)
    for leftover in (built, folder / 'source'):
        shutil.rmtree(leftover)


def set_up(env: Environment) -> None:
    stack, constraints = env.stack, ['-c', env.stack.constraints]
    pins = stack.constraints.read_text()
    say(f'Setting up {env.path} (cache: {env.cache})')
    env.create()
    env.step('pip', [PIP], lambda: env.pip_install('-q', PIP))
    env.step('torch', [stack.torch, pins], lambda: env.pip_install(*constraints, *stack.torch))
    env.step('OpenMMLab', [stack.packages, pins],
             lambda: env.pip_install(*constraints, *stack.packages))
    kind, version = mmcv_kind(env), stack.mmcv.partition('==')[2]
    key = ([version, stack.torch, os.environ.get('FORCE_CUDA', '0')] if kind == 'full' else
           [version, kind, OPERATORS.read_text()])
    env.step('mmcv', key, lambda: install_mmcv(env, kind))
    env.step('ONNX and safetensors', [DEPLOYMENT, pins],
             lambda: env.pip_install('-q', *constraints, *DEPLOYMENT))
    env.step('test tools', [DEVELOPMENT], lambda: env.pip_install('-q', *constraints, *DEVELOPMENT))
    env.step('orepa_mm', [(ROOT / 'setup.py').read_text()], lambda: env.pip_install(
        '-q', '--no-use-pep517', '--no-build-isolation', '--no-deps', '-e', ROOT))
    env.step('check', [pins, kind, stack.packages, DEPLOYMENT, DEVELOPMENT],
             lambda: run([env.python, '-m', 'orepa_mm.doctor']))


def main() -> int:
    parser = argparse.ArgumentParser(description='Set up the virtual environment of orepa_mm.')
    parser.add_argument('--stack', choices=list(STACKS), default='official',
                        help="OpenMMLab's own packages (default) or the maintained forks")
    parser.add_argument('--venv', type=Path,
                        help='where to build it (default: .venv, and .venv-onedl for the forks)')
    parser.add_argument('--cache', type=Path, default=DEFAULT_CACHE,
                        help='where the compiled mmcv wheel is kept')
    args = parser.parse_args()
    try:
        name = '.venv' if args.stack == 'official' else f'.venv-{args.stack}'
        set_up(Environment(args.venv or ROOT / name, args.cache, args.stack))
    except SetupError as error:
        print(f'\nset-up stopped: {error}\nWhat was done is kept: call the same command again '
              'to go on.', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted: call the same command again to go on.', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())

"Runs inputs in a process of their own, with a limit of time and of memory for each; what ends otherwise than it should is a find."
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .inputs import KINDS, Input, draw_input, make_sound

#: CPU seconds and bytes (beside what the process has to begin with) that an input may take, and seconds by the clock on a busy machine.
SECONDS, MEMORY, PATIENCE = 20.0, 3 << 30, 90.0
ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).resolve().parent / 'corpus'


@dataclass(frozen=True)
class Find:
    "An input that ended otherwise than in success or a clear error."
    input: Input
    problem: str

    @property
    def file(self) -> str:
        "What it is called in the corpus."
        return f'{self.input.kind}-{hashlib.sha256(self.input.to_json().encode()).hexdigest()[:10]}.json'


def run_here(given: Input, sound: Path) -> tuple[str, str]:
    "'fine', 'refused' or 'find', and what was said."
    from neuroseg3d.core import InputError
    with tempfile.TemporaryDirectory(prefix='fuzz-') as folder:
        place = Path(folder) / 'sound'
        shutil.copytree(sound, place)
        (place / given.name).write_bytes(given.content)
        raised: list[str] = []
        began = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                with _unexpected() as raised:
                    KINDS[given.kind].entry(place)
            end, said = 'fine', ''
        except InputError as error:
            end, said = 'refused', str(error)
        except Exception as error:
            end, said = 'find', _described(error)
        if raised:
            end, said = 'find', f'the failure of a case is no clear error: {raised[0]}'
        took = time.process_time() - began
    if took > SECONDS:
        return 'find', f'took {took:.1f} s of the processor ({end}: {said[:200]})'
    if len(said) > 3000:
        return 'find', f'an error of {len(said):,} characters: {said[:200]}'
    return end, said


@contextlib.contextmanager
def _unexpected() -> Iterator[list[str]]:
    "The errors of single cases that are no `InputError`: a cohort goes on after them, so that they would not be seen."
    from neuroseg3d.system import failures
    from neuroseg3d.core import InputError
    raised, usual = [], failures.said_of

    def noted(error: Exception) -> str:
        if not isinstance(error, InputError):
            raised.append(_described(error))
        return usual(error)
    failures.said_of = noted
    try:
        yield raised
    finally:
        failures.said_of = usual


def _described(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f'{type(error).__name__}: {str(error)[:200]} ({Path(frame.filename).name}:{frame.lineno})'


def work() -> None:
    "The process that reads inputs from its standard input, one a line, and answers each with a line."
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    sys.stdout = sys.stderr
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    import torch
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix='fuzz-sound-') as folder:
        sound = Path(folder) / 'sound'
        sound.mkdir()
        make_sound(sound)
        _limit_memory()
        print(json.dumps({'sound': str(sound)}), file=answers, flush=True)
        for line in sys.stdin:
            task = json.loads(line)
            print(json.dumps(_done(task, sound)), file=answers, flush=True)


def _done(task: dict, sound: Path) -> dict:
    "How a task has ended; an input that cannot be made is a fault of the harness, and a find as well."
    try:
        if 'kind' in task:  # nothing is damaged
            given = Input(task['kind'], 'words.json', (sound / 'words.json').read_bytes())
        else:
            given = draw_input(task['seed'], task['number'], sound) if 'seed' in task else Input.from_json(task['input'])
    except Exception:
        return {'end': 'find', 'said': f'the input cannot be made: {traceback.format_exc(limit=-3)}', 'kind': '', 'input': None}
    began = time.process_time()
    end, said = run_here(given, sound)
    return {'end': end, 'said': said, 'took': time.process_time() - began, 'kind': given.kind, 'input': given.to_json() if end == 'find' else None}


def _limit_memory() -> None:
    try:
        import resource
        pages = int(Path('/proc/self/statm').read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    except (ImportError, OSError, ValueError):
        pass  # no such limit on this system


class Worker:
    "A process for inputs, started anew where one has ended it."

    def __init__(self):
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
        code = 'from tests.fuzz.runner import work; work()'
        self.process = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if self.answer(600) is None:
            raise RuntimeError('the process for inputs does not start')

    def answer(self, seconds: float) -> dict | None:
        "Its next line; None where none comes."
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b''
        return json.loads(line) if line else None

    def run(self, task: dict) -> dict:
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps(task).encode() + b'\n')
        self.process.stdin.flush()
        found = self.answer(PATIENCE)
        if found is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            code = self.process.poll()
            self.stop()
            problem = f'no end after {PATIENCE:g} s' if code is None else f'ended the process ({code})'
            return {'end': 'find', 'said': problem, 'kind': '', 'input': None}
        return found

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


@contextlib.contextmanager
def a_worker() -> Iterator[Worker]:
    "A process for inputs, for as long as it is needed."
    worker = Worker()
    try:
        yield worker
    finally:
        worker.stop()


def run_all(tasks: Iterable[dict], worker: Worker) -> Iterator[tuple[dict, dict]]:
    "Each task with how it ended."
    for task in tasks:
        yield task, worker.run(task)


def drawn(n: int, seed: int = 0, first: int = 0) -> list[dict]:
    "Tasks: so many inputs of a seed."
    return [{'seed': seed, 'number': i} for i in range(first, first + n)]


def undamaged() -> dict[str, dict]:
    "Tasks: the files as they should be, by kind."
    return {kind: {'kind': kind} for kind in KINDS}


def kept() -> dict[str, dict]:
    "Tasks: the inputs of the corpus, by file."
    return {path.name: {'input': path.read_text(encoding='utf-8')} for path in sorted(CORPUS.glob('*.json'))}

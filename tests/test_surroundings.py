"""Every command in surroundings that nobody has asked for: it works, or one line says what is in the way. An internal error is a defect.

The commands of one row run in one process, which is started in those surroundings: by that user, under that umask, on that file system.
"""
from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import COMMANDS, make_kit, run_commands

LIGHT = tuple(c for c in COMMANDS if c not in ('phantom', 'train', 'report', 'demo'))
COPIED = ('postprocess', 'calibrate', 'ensemble')  # they write beside what they are given
NO_NAME = {'HOME': None, 'USER': None, 'LOGNAME': None, 'USERNAME': None, 'LNAME': None}
USER = ('setpriv', '--reuid', '54321', '--regid', '54321', '--clear-groups', '--inh-caps', '+dac_read_search', '--ambient-caps', '+dac_read_search')


@dataclass(frozen=True)
class Surrounding:
    "Where commands run, and what becomes of them."
    commands: Sequence[str]  # of COMMANDS
    environment: dict[str, str | None] = field(default_factory=dict)  # changes; None takes a variable away
    before: str = ''  # lines of sh, which find $KIT and $OUT
    nameless: bool = False  # as user 54321, whom no list knows
    mounts: bool = False  # `before` mounts, in a mount namespace of its own
    folder: str = 'out'  # name of the folder for results
    says: str = ''  # what each command that fails must say; nothing: none may fail
    passes: Sequence[str] = ()  # those that do not fail all the same


NOWHERE = """
mount -t tmpfs none /mnt && mkdir /mnt/kit /mnt/out && mount --bind "$KIT" /mnt/kit && mount --bind "$OUT" /mnt/out
for folder in /tmp /var/tmp; do mount -t tmpfs -o ro none $folder; done
cd /
"""
TABLE = {
    'a user without a name or a home': Surrounding([c for c in COMMANDS if c not in ('phantom', 'train', 'report')], NO_NAME, 'umask 077', nameless=True),
    'a disk that is read-only but for the results': Surrounding(
        ['eda', 'train', 'infer'], NO_NAME | {'HOME': '/', 'TMPDIR': '/absent', 'MPLCONFIGDIR': '/absent', 'TORCHINDUCTOR_CACHE_DIR': '/absent/a'},
        NOWHERE, nameless=True, mounts=True),
    'no temporary folder, nor shared memory': Surrounding(
        LIGHT, NO_NAME | {'TMPDIR': '/absent'}, f'{NOWHERE}\nmount -t tmpfs -o ro none /dev/shm', nameless=True, mounts=True,
        says='No usable temporary directory found in .*; set TMPDIR to a folder that can be written to'),
    'chmod, links, times and fsync are refused': Surrounding([*LIGHT, 'train'], {'SPOILT': 'chmod links fsync'}),
    'locale C, one column, ASCII': Surrounding(
        [c for c in LIGHT if c != 'ensemble'], {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': 'ascii', 'COLUMNS': '1',
                                                'LINES': '1', 'TERM': 'dumb'}, folder='Ergebnis Müller'),
    'cp932, odd variables, 40 open files, 4 GB of addresses': Surrounding(
        ['eda', 'infer', 'explain', 'evaluate'], {
            'PYTHONIOENCODING': 'cp932', 'MPLBACKEND': 'nonsense', 'TZ': 'nonsense', 'COLUMNS': '0', 'OMP_NUM_THREADS': 'none', 'HOME': '',
            'PYTHONWARNINGS': 'error', 'XDG_CACHE_HOME': 'here'}, 'ulimit -n 40; ulimit -v 4000000'),
    'too little memory': Surrounding(['infer', 'eda'], {}, 'ulimit -v 1000000', says='not enough memory'),
    'a folder that was removed': Surrounding(LIGHT, {}, 'mkdir "$OUT/gone"; cd "$OUT/gone"; rmdir "$OUT/gone"', says='the folder that you are in: No such file'),
    'a full disk': Surrounding(
        [c for c in LIGHT if c not in COPIED], {}, 'mount -t tmpfs -o size=64k none "$OUT" && head -c 61440 /dev/zero > "$OUT/all"', mounts=True,
        says='No space left on device', passes=['model']),
    'read-only results': Surrounding(
        [*(c for c in LIGHT if c != 'ensemble'), 'phantom', 'train'], {}, 'mount --bind "$OUT" "$OUT" && mount -o remount,ro,bind "$OUT"', nameless=True,
        mounts=True, says='nothing can be written there: (Read-only file system|Permission denied)', passes=['model']),
    'a standard output that is full': Surrounding(['convert', 'model'], {}, 'exec >/dev/full', says='standard output: No space left on device', passes=['model']),
}


def may(*words: str) -> bool:
    "Whether a command is there and permitted."
    return shutil.which(words[0]) is not None and subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture(scope='session')
def kit(tmp_path_factory) -> Path:
    "What the commands work on, readable by all."
    return opened(make_kit(tmp_path_factory.mktemp('kit')))


def opened(folder: Path) -> Path:
    "A folder of pytest's that any user may enter."
    for path in (folder, *(p for p in folder.parents if 'pytest' in p.name)):
        path.chmod(0o755)
    return folder


def surround(row: Surrounding, kit: Path, folder: Path) -> dict:
    "Run the commands of a row."
    if row.nameless and not may(*USER, 'true'):
        pytest.skip('a user without a name needs root and setpriv')
    if row.mounts and not may('unshare', '-m', 'mount', '-t', 'tmpfs', 'none', '/mnt'):
        pytest.skip('mounts are not permitted here')
    out = opened(folder) / row.folder
    out.mkdir()
    out.chmod(0o777)
    prefix = [*(('unshare', '-m') if row.mounts else ()), 'sh', '-c', f'{row.before}\nexec "$@"', 'sh', *(USER if row.nameless else ())]
    hidden = '/mnt/out' in row.before
    return run_commands(row.commands, Path('/mnt/kit') if hidden else kit, Path('/mnt/out') if hidden else out, prefix,
                        {**row.environment, 'KIT': str(kit), 'OUT': str(out)}, cwd=out)


@pytest.mark.contract('works', 'surroundings', 'every command: as a user without a name or a home (`docker run --user 54321`), with a read-only home, a read-only disk but for '
                      'the results, no temporary folder, a file system that refuses chmod and links, locale C, ASCII, cp932, one column, odd variables, 40 open files',
                      'it does the same as anywhere')
@pytest.mark.parametrize('name', [n for n, row in TABLE.items() if not row.says])
def test_every_command_works(name, kit, tmp_path):
    found = surround(TABLE[name], kit, tmp_path)
    wrong = {n: (r.code, r.err[-600:]) for n, r in found.items() if r.code or 'Traceback' in r.err or 'internal error' in r.err}
    assert not wrong


@pytest.mark.contract('refused', 'surroundings', 'a full disk, a read-only folder of results, too little memory, nowhere for temporary files, a current folder that was removed, '
                      'a standard output that is full',
                      'one line says what is in the way; nothing is an internal error')
@pytest.mark.parametrize('name', [n for n, row in TABLE.items() if row.says])
def test_every_command_says_what_is_in_the_way(name, kit, tmp_path):
    row = TABLE[name]
    found = surround(row, kit, tmp_path)
    wrong = {n: (r.code, r.err[-600:]) for n, r in found.items() if n not in row.passes
             and (r.code not in (1, 2) or 'Traceback' in r.err or 'internal error' in r.err or not re.search(row.says, r.err))}
    assert not wrong


def memory_group(name: str, limit: int) -> tuple[Path, str]:
    "A control group of a process' memory, and the line of sh that enters it."
    for top, file in ((Path('/sys/fs/cgroup'), 'memory.max'), (Path('/sys/fs/cgroup/memory'), 'memory.limit_in_bytes')):
        folder = top / name
        if (top / 'cgroup.procs').is_file():  # it is one, of version 2 or 1
            try:
                folder.mkdir()
                (folder / file).write_text(str(limit))
                return folder, f'echo $$ > {folder}/cgroup.procs'
            except OSError:
                if folder.is_dir():
                    folder.rmdir()
    pytest.skip('control groups cannot be made here')


@pytest.mark.contract('works', 'surroundings', 'a training in a container with 1.2 GB of memory', 'it plans with what is left of that, and keeps within it')
def test_training_keeps_within_the_memory_of_a_container(kit, tmp_path):
    limit = 1_200_000_000
    group, enter = memory_group(f'neuroseg3d-{os.getpid()}', limit)
    try:
        found = surround(Surrounding(['train'], {}, enter), kit, tmp_path)
        assert not {n: (r.code, r.err[-600:]) for n, r in found.items() if r.code}
        free = float(found['train'].out.split(' GB of RAM')[0].split()[-1])
        assert free < limit / 1e9
    finally:
        group.rmdir()


def test_the_table_knows_every_command():
    from neuroseg3d.cli import make_parser
    assert set(COMMANDS) == set(make_parser()._subparsers._group_actions[0].choices)
    assert set().union(*(row.commands for row in TABLE.values())) >= set(COMMANDS) - {'report'}  # which the demo makes

"Tracking: what an offline W&B run holds, that a resumed run is the same run, and that no server can stop a training."
from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from balls import ball_cohort
from wandb.proto.wandb_internal_pb2 import Record

from neuroseg3d.config import build
from neuroseg3d.core import InputError
from neuroseg3d.training.tracking import MetricsFile
from neuroseg3d.training.task import Config, ProgressLines, fit

BIN = Path(sys.executable).parent
SETTINGS = {'data.n_folds': 2, 'data.patch_size': 16, 'data.loader': 'none', 'space.spacing_mm': 6.0, 'model.preset': 'tiny',
            'model.filters': [4, 8, 8, 8], 'trainer.max_steps': 4, 'trainer.val_every_steps': 2, 'trainer.accelerator': 'cpu',
            'logger.kind': 'wandb', 'logger.every_steps': 2}
SECTIONS = {s: {k.split('.')[1]: v for k, v in SETTINGS.items() if k.startswith(s)} for s in {k.split('.')[0] for k in SETTINGS}}


def settings(cohort: Path, folder: Path, **logger) -> Config:
    return build(Config, {**SECTIONS, 'data': {**SECTIONS['data'], 'root': str(cohort)},
                          'trainer': {**SECTIONS['trainer'], 'output_dir': str(folder)}, 'logger': {**SECTIONS['logger'], **logger}})


def records(path: Path) -> list[Record]:
    "The records of a W&B run's file: blocks of 32 KiB after a header of 7 bytes, as in LevelDB's log."
    data, position, part, out = path.read_bytes(), 7, b'', []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack('<HB', data[position + 4:position + 7])
        part = (part if kind in (3, 4) else b'') + data[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            out.append(Record.FromString(part))
    return out


def rows_of(found: list[Record]) -> list[dict]:
    "What was logged, a dictionary a row; names of nested items are joined by dots."
    return [{'.'.join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
            for r in found if r.WhichOneof('record_type') == 'history']


def parts(folder: Path) -> list[list[Record]]:
    "The records of a run's processes, the earlier first."
    return [records(f) for f in sorted((folder / 'run' / 'logs' / 'wandb').glob('offline-run-*/run-*.wandb'))]


def wait_for(condition) -> None:
    "Return as soon as a condition holds."
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope='module')
def cohort(tmp_path_factory) -> Path:
    return ball_cohort(tmp_path_factory.mktemp('data') / 'cohort', n=2)


#: A training that stands still after its first validation; W&B's own process goes on, and writes what it has got.
STANDING = """
import os, signal, sys
import neuroseg3d.training.task as train
from neuroseg3d.cli import main

class Stand(train.pl.Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)

make = train.make_trainer

def standing(*args):
    trainer = make(*args)
    trainer.callbacks.append(Stand())
    return trainer

train.make_trainer = standing
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope='module')
def interrupted(cohort, tmp_path_factory) -> Path:
    "A run without an account, killed after its first validation and resumed; what it said is in said.txt."
    folder = tmp_path_factory.mktemp('work')
    env = {k: v for k, v in os.environ.items() if not k.startswith('WANDB')} | {'HOME': str(folder), 'NETRC': str(folder / 'none')}
    given = {k: v for k, v in SETTINGS.items() if k != 'logger.kind'}
    words = [sys.executable, '-c', STANDING, 'train', '--logger', 'wandb', '--data.root', cohort, '--trainer.output_dir', 'run',
             *(w for k, v in given.items() for w in (f'--{k}', str(v)))]
    first = subprocess.Popen([str(w) for w in words], cwd=folder, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert any(line.startswith('step 2/4') for line in first.stdout)
    wait_for(lambda: any('val/dice_ET' in row for row in rows_of(parts(folder)[0])))
    wait_for(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED)
    first.kill()
    first.communicate()
    with pytest.MonkeyPatch.context() as patch, open(folder / 'said.txt', 'w') as said, contextlib.redirect_stdout(said):
        for name in [k for k in os.environ if k.startswith('WANDB')]:
            patch.delenv(name)
        patch.setenv('NETRC', str(folder / 'none'))
        fit(settings(cohort, folder / 'run'), resume='auto')
    wait_for(lambda: any(r.WhichOneof('record_type') == 'exit' for r in parts(folder)[-1]))  # it reaches the disk a little later
    return folder


def test_offline_run_holds_what_happened(interrupted):
    last = parts(interrupted)[-1]
    rows = rows_of(last)
    for key in ('train/loss', 'lr-AdamW/pg1', 'train/voxels_per_s', 'system/ram_mb', *(f'val/dice_{r}' for r in ('WT', 'TC', 'ET')),
                *(f'val/hd95_mm_{r}' for r in ('WT', 'TC', 'ET'))):
        found = [r for r in rows if key in r]
        assert found and all(r['trainer/global_step'] == 3 for r in found), key
    assert all(0 <= r['val/dice_ET'] <= 1 for r in rows if 'val/dice_ET' in r)
    figures = {k: r[k] for r in rows for k in r if re.fullmatch(r'figures/BALL_Tr\d+\.path', k)}
    assert len(figures) == 1
    for path in figures.values():
        png = next((interrupted / 'run' / 'logs' / 'wandb').glob(f'offline-run-*/files/{path}')).read_bytes()
        assert png[:8] == b'\x89PNG\r\n\x1a\n' and struct.unpack('>I', png[16:20])[0] >= 600


def test_offline_run_holds_configuration_and_origin(interrupted):
    from neuroseg3d.training.tracking import git_revision
    last = parts(interrupted)[-1]
    settings = {u.key: json.loads(u.value_json) for r in last for c in (r.run.config, r.config) for u in c.update}
    assert settings['model']['preset'] == 'tiny' and settings['optim']['learning_rate'] == 1e-3
    split = json.loads((interrupted / 'run' / 'split.json').read_text())
    assert len(split['cases']) == 2 and settings['origin']['schema'] == 'msd'
    assert re.fullmatch('[0-9a-f]{64}', settings['origin']['split_sha256'])
    assert settings['origin']['git_revision'] == git_revision()


def test_model_is_an_artifact_with_names(interrupted):
    both = parts(interrupted)
    stored = [a for found in both for r in found if (a := r.artifact).name]
    assert stored and {s.type for s in stored} == {'model'} and len({s.name for s in stored}) == 1
    assert {a for s in stored for a in s.aliases} == {'best', 'latest'}
    newest = [s for s in stored if 'latest' in s.aliases][-1]
    assert json.loads(newest.metadata) == {'step': 4}
    files = {c.path: Path(c.local_path) for c in newest.manifest.contents}
    assert set(files) == {'model.safetensors', 'model.json'} and all(f.is_file() for f in files.values())
    assert all(interrupted in f.parents for f in files.values())
    from neuroseg3d.networks.checkpoint import read_export
    renamed = interrupted / 'model.safetensors'
    renamed.write_bytes(files['model.safetensors'].read_bytes())
    assert read_export(renamed)[1]['step'] == 4


def test_resumed_run_is_the_same_run(interrupted):
    first, second = parts(interrupted)
    ids = [next(r.run.run_id for r in found if r.run.run_id) for found in (first, second)]
    assert ids[0] == ids[1]
    assert f'wandb sync {interrupted}/run/logs/wandb/offline-run-*-{ids[0]}' in (interrupted / 'said.txt').read_text()
    steps = [[r['trainer/global_step'] for r in rows_of(found) if 'train/loss' in r] for found in (first, second)]
    assert steps == [[1], [3]]
    table = list(csv.DictReader(open(interrupted / 'run' / 'logs' / 'metrics.csv')))
    assert [r['step'] for r in table] == ['1', '3'] and all(r['train/loss'] and r['val/dice_ET'] for r in table)


# ---- servers

class Server:
    "As much of a W&B server as a run needs, on loopback, which can fail in several ways."

    def __init__(self, fails: str):
        self.fails, self.failed, self.history, self.artifacts = fails, threading.Event(), {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *args):
                pass

            def answer(self):
                body = self.rfile.read(int(self.headers.get('content-length') or 0))
                body = gzip.decompress(body) if self.headers.get('content-encoding') == 'gzip' else body
                if outer.failed.is_set() and outer.fails == 'silent':
                    outer.closed.wait()  # takes the request and never answers
                status, reply = outer.reply(self.path, body)
                content = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header('content-length', str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            do_GET = do_POST = do_PUT = answer
        self.closed = threading.Event()
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.http.handle_error = lambda *args: None  # clients hang up when they are killed
        self.address = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def reply(self, path: str, body: bytes) -> tuple[int, dict]:
        if self.failed.is_set() and self.fails:
            return (500, {'error': 'out of order'}) if self.fails == 'error' else (200, {'data': {}})
        if path.endswith('/file_stream'):
            return 200, self.stream(json.loads(body))
        return 200, {'data': self.graphql(json.loads(body)) if path == '/graphql' else {}}

    def stream(self, content: dict) -> dict:
        new = content.get('files', {}).get('wandb-history.jsonl', {'offset': 0, 'content': []})
        self.history |= {new['offset'] + n: json.loads(row) for n, row in enumerate(new['content'])}
        if new['content']:
            self.failed.set()
        return {}

    def graphql(self, request: dict) -> dict:
        query, given = request['query'], request.get('variables') or {}
        project = {'id': 'p', 'name': 'neuroseg3d', 'entity': {'id': 'e', 'name': 'me'}}
        if 'upsertBucket(' in query:
            run = dict.fromkeys(('description', 'config', 'sweepName', 'historyLineCount'))
            return {'upsertBucket': {'bucket': {**run, 'id': 'r', 'name': given['name'], 'displayName': 'run', 'project': project},
                                     'inserted': True}}
        if 'createRunFiles(' in query:
            files = [{'name': f, 'uploadUrl': f'{self.address}/upload'} for f in given['files']]
            return {'createRunFiles': {'runID': 'r', 'uploadHeaders': [], 'files': files}}
        if 'createArtifact(' in query:
            self.artifacts.append([a['alias'] for a in given['input']['aliases']])
            return {'createArtifact': {'artifact': {'id': 'a', 'state': 'COMMITTED', 'artifactSequence': {'latestArtifact': None}}}}
        return {}

    def close(self):
        self.closed.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def account(monkeypatch, tmp_path):
    "Credentials for a server on loopback."
    for name in [k for k in os.environ if k.startswith('WANDB')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('WANDB_API_KEY', 'a' * 40)
    monkeypatch.setenv('WANDB__FILE_STREAM_TRANSMIT_INTERVAL', '0.5')  # seconds; 15 otherwise
    monkeypatch.setenv('HOME', str(tmp_path))

    def use(server: Server):
        monkeypatch.setenv('WANDB_BASE_URL', server.address)
        return server
    return use


@pytest.mark.parametrize('fails', ['nonsense', 'silent'])
def test_server_that_fails_in_the_middle(cohort, tmp_path, account, monkeypatch, capfd, fails):
    server = account(Server(fails))
    said = ProgressLines.on_validation_end

    def wait_for_failure(self, trainer, module):  # the server fails after it has seen the first rows, before the run's end
        said(self, trainer, module)
        assert server.failed.wait(60)
    monkeypatch.setattr(ProgressLines, 'on_validation_end', wait_for_failure)
    fit(settings(cohort, tmp_path / 'run', upload_wait_s=1))
    out = capfd.readouterr().out
    assert (tmp_path / 'run' / 'checkpoints' / 'best.ckpt').is_file() and 'step 4/4' in out
    command = re.search(r'the upload is not complete; complete it with: (wandb sync .*)', out).group(1)

    missing = {r['trainer/global_step'] for r in server.history.values()} ^ {1, 3}
    assert missing  # the server did not get everything
    server.fails = ''  # it is repaired
    script = f'unset WANDB_SERVICE; PATH={shlex.quote(str(BIN))}:$PATH; {command}'
    done = subprocess.run(['bash', '-c', script], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr
    received = [r for r in server.history.values() if 'train/loss' in r]
    assert [r['trainer/global_step'] for r in received] == [1, 3]
    assert sorted({a for aliases in server.artifacts for a in aliases}) == ['best', 'latest']
    server.close()


def test_whole_run_is_uploaded_while_it_goes_on(cohort, tmp_path, account, capfd):
    server = account(Server(''))
    fit(settings(cohort, tmp_path / 'run'))
    assert f'W&B: uploaded: {server.address}/me/neuroseg3d/runs/' in capfd.readouterr().out
    assert [r['trainer/global_step'] for r in server.history.values() if 'val/dice' in r] == [1, 3]
    server.close()


def test_server_that_is_not_there(cohort, tmp_path, account, capfd):
    server = account(Server(''))
    server.close()
    fit(settings(cohort, tmp_path / 'run', upload_wait_s=1))
    assert 'the upload is not complete; complete it with: wandb sync' in capfd.readouterr().out


def test_tensorboard_gets_numbers_and_figures(cohort, tmp_path):
    fit(settings(cohort, tmp_path / 'run', kind='tensorboard'), verbose=False)
    from tensorboardX.proto.event_pb2 import Event
    data, position, tags = next((tmp_path / 'run' / 'logs').glob('events.*')).read_bytes(), 0, set()
    while position < len(data):
        length = struct.unpack('<Q', data[position:position + 8])[0]
        tags |= {v.tag for v in Event.FromString(data[position + 12:position + 12 + length]).summary.value}
        position += length + 16
    assert {'train/loss', 'val/dice_ET', 'val/hd95_mm_WT', 'lr-AdamW/pg1', 'system/ram_mb'} <= tags
    assert len([t for t in tags if t.startswith('figures/')]) == 1


@pytest.mark.contract('refused', 'outputs', 'a log (metrics.csv) of a run to go on with that is damaged', 'the error names file, line and what was expected')
@pytest.mark.parametrize(('content', 'said'), [
    (b'step,loss\n1,0.5\nx,0.25\n', "line 3: found the step 'x', expected a whole number"),
    (b'stop,loss\n1,0.5\n', "line 2: found the step '', expected a whole number"),
    (b'step,loss\n1,0.5,7\n', 'line 2: found more values than columns'),
    (b'step,loss\n1,\xff\n', 'found byte 0xff at 12, expected text as UTF-8'),
    (b'step,loss\n1,"' + b'x' * 200_000, 'line 1: not valid CSV: field larger than'),
])
def test_a_damaged_log_is_refused(tmp_path, content, said):
    (tmp_path / 'metrics.csv').write_bytes(content)
    with pytest.raises(InputError, match=f'metrics.csv: {said}'):
        MetricsFile(tmp_path, 9)

"Downloads that are cut, that cannot be resumed, that are not what was published, and archives that mean harm."
from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from neuroseg3d.core import InputError
from neuroseg3d.studies.download import download, extract, fetch


def pack(files: dict, **special) -> bytes:
    "A tar file: name -> content, and members given as TarInfo."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in special.items():
            info = tarfile.TarInfo(f'Task/{name}')
            info.type, info.linkname = kind, '/etc/passwd'
            tar.addfile(info)
    return buffer.getvalue()


CONTENT = np.random.default_rng(0).bytes(700_000)
ARCHIVE = pack({'Task/dataset.json': b'{}', 'Task/imagesTr/a.nii.gz': CONTENT, 'Task/imagesTr/._a.nii.gz': b'mac',
                '._Task': b'mac'})
MD5 = hashlib.md5(ARCHIVE).hexdigest()


class Server(ThreadingHTTPServer):
    "Serves one archive; how badly is a matter of its attributes."
    daemon_threads = True

    def __init__(self, body: bytes = ARCHIVE):
        super().__init__(('127.0.0.1', 0), Handler)
        self.body, self.asked, self.statuses = body, [], []
        self.ranges, self.cut_after, self.delay_s, self.length, self.chunk = True, None, 0.0, True, 50_000
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}/Task.tar'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        start = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        server.asked.append(start)
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        if server.ranges and start >= len(server.body):
            return self.send_error(416)
        ranged = server.ranges and 'Range' in self.headers
        body = server.body[start:] if ranged else server.body
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header('Content-Range', f'bytes {start}-{len(server.body) - 1}/{len(server.body)}')
        if server.length:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        sent = body[:server.cut_after] if server.cut_after else body
        with contextlib.suppress(ConnectionError):  # who asked has had enough
            for i in range(0, len(sent), server.chunk):
                self.wfile.write(sent[i:i + server.chunk])
                time.sleep(server.delay_s)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    found = Server()
    yield found
    found.shutdown()
    found.server_close()


def check(root):
    assert (root / 'imagesTr' / 'a.nii.gz').read_bytes() == CONTENT
    assert sorted(p.name for p in root.rglob('*')) == ['a.nii.gz', 'dataset.json', 'imagesTr']
    assert sorted(p.name for p in root.parent.iterdir()) == [root.name]


def test_whole(server, tmp_path):
    root = download(tmp_path / 'Task', server.url, MD5, progress=False)
    check(root)
    download(root, server.url, MD5, progress=False)
    assert server.asked == [0]  # what is there is not fetched again


def test_another_name(server, tmp_path):
    check(download(tmp_path / 'Task01_BrainTumour', server.url, MD5, progress=False))


def test_keep_archive(server, tmp_path):
    download(tmp_path / 'Task', server.url, MD5, progress=False, keep_archive=True)
    assert (tmp_path / 'Task.tar').read_bytes() == ARCHIVE


@pytest.mark.contract('works', 'downloads', 'a connection that breaks in the middle', 'goes on where it stopped')
def test_cut_in_the_middle_is_resumed(server, tmp_path):
    server.cut_after = 200_000
    check(download(tmp_path / 'Task', server.url, MD5, progress=False))
    assert server.asked[:4] == [0, 200_000, 400_000, 600_000]


def test_server_without_ranges_starts_anew(server, tmp_path):
    server.ranges = False
    (tmp_path / 'Task.tar.part').write_bytes(ARCHIVE[:300_000])
    check(download(tmp_path / 'Task', server.url, MD5, progress=False))
    assert server.asked == [300_000]


def test_no_content_length(server, tmp_path):
    server.length = False
    check(download(tmp_path / 'Task', server.url, MD5, progress=False))


def test_complete_part_is_used(server, tmp_path):
    (tmp_path / 'Task.tar.part').write_bytes(ARCHIVE)
    check(download(tmp_path / 'Task', server.url, MD5, progress=False))


def test_server_errors_are_retried(server, tmp_path):
    server.statuses = [503, 500]
    check(download(tmp_path / 'Task', server.url, MD5, progress=False))


def test_missing_file_is_not_retried(server, tmp_path):
    server.statuses = [404] * 9
    with pytest.raises(InputError, match='answers 404'):
        download(tmp_path / 'Task', server.url, MD5, progress=False)
    assert len(server.asked) == 1


def test_gives_up_and_keeps_what_came(tmp_path):
    server = Server()
    url = server.url
    part = tmp_path / 'Task.tar.part'
    part.write_bytes(ARCHIVE[:200_000])
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match='200000 bytes are kept in .*Task.tar.part'):
        fetch(url, tmp_path / 'Task.tar', MD5, progress=False, retries=2)
    assert part.read_bytes() == ARCHIVE[:200_000]
    part.unlink()
    with pytest.raises(InputError) as error:
        fetch(url, tmp_path / 'Task.tar', MD5, progress=False, retries=1)
    assert 'kept' not in str(error.value)


@pytest.mark.contract('refused', 'downloads', 'a download with another checksum than the published one', 'removed; the error names both checksums')
def test_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(InputError, match=f'MD5 is {MD5}, expected 0000'):
        download(tmp_path / 'Task', server.url, '0000', progress=False)
    assert not list(tmp_path.iterdir())


def test_corrupt_part_is_noticed(server, tmp_path):
    (tmp_path / 'Task.tar.part').write_bytes(b'\0' * 300_000)
    with pytest.raises(InputError, match='the file was removed, try again'):
        download(tmp_path / 'Task', server.url, MD5, progress=False)
    check(download(tmp_path / 'Task', server.url, MD5, progress=False))


def test_killed_process_goes_on(server, tmp_path):
    server.delay_s = 0.2
    code = ('import sys; from neuroseg3d.studies.download import download; '
            'download(sys.argv[1], sys.argv[2], sys.argv[3], progress=False)')
    child = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'Task'), server.url, MD5])
    part = tmp_path / 'Task.tar.part'
    limit = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert part.stat().st_size < len(ARCHIVE)
    server.delay_s = 0
    check(download(tmp_path / 'Task', server.url, MD5, progress=False))
    assert server.asked[-1] > 0


@pytest.mark.parametrize('name', ['../evil.txt', 'Task/../../evil.txt', '/tmp/neuroseg3d_evil.txt'])
@pytest.mark.contract('refused', 'downloads', 'an archive with a path that leaves its folder', 'nothing is written outside')
def test_archive_that_climbs_out_is_refused(tmp_path, name):
    archive = tmp_path / 'evil.tar'
    archive.write_bytes(pack({'Task/good.txt': b'x', name: b'evil'}))
    with pytest.raises(InputError, match='outside the target folder'):
        extract(archive, tmp_path / 'into')
    assert [p.name for p in tmp_path.rglob('*')] in (['into', 'evil.tar'], ['evil.tar', 'into'])
    assert not os.path.exists('/tmp/neuroseg3d_evil.txt')


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.contract('refused', 'downloads', 'an archive with links, pipes or devices', 'nothing is unpacked')
def test_archive_with_links_or_devices_is_refused(tmp_path, kind):
    archive = tmp_path / 'evil.tar'
    archive.write_bytes(pack({'Task/good.txt': b'x'}, link=kind))
    with pytest.raises(InputError, match='is a link or device'):
        extract(archive, tmp_path / 'into')
    assert not list((tmp_path / 'into').iterdir())


@pytest.mark.contract('refused', 'downloads', 'an archive that ends too early', 'nothing is unpacked')
def test_truncated_archive_leaves_nothing(tmp_path):
    archive = tmp_path / 'short.tar'
    archive.write_bytes(ARCHIVE[:300_000])
    with pytest.raises(InputError, match='not a complete tar file'):
        extract(archive, tmp_path / 'into')
    assert not list((tmp_path / 'into').iterdir())


@pytest.mark.contract('refused', 'downloads', 'a folder that is already there', 'left as it is')
def test_existing_folder_is_never_overwritten(tmp_path):
    archive = tmp_path / 'Task.tar'
    archive.write_bytes(ARCHIVE)
    (tmp_path / 'Task').mkdir()
    (tmp_path / 'Task' / 'mine.txt').write_text('mine')
    with pytest.raises(InputError, match='already there'):
        extract(archive, tmp_path)
    assert (tmp_path / 'Task' / 'mine.txt').read_text() == 'mine'


@pytest.mark.contract('refused', 'downloads', 'an archive with holes, or that is far larger unpacked', 'nothing is unpacked')
@pytest.mark.parametrize('kind', ['sparse', 'zeros', 'many'])
def test_archive_that_would_fill_the_disk_is_refused(tmp_path, kind):
    archive = tmp_path / 'bomb.tar.gz'
    with tarfile.open(archive, 'w:gz') as tar:
        if kind == 'sparse':  # a megabyte that claims to be a petabyte
            info = tarfile.TarInfo('Task/hole.nii')
            info.size, info.pax_headers = 512, {'GNU.sparse.major': '0', 'GNU.sparse.minor': '1', 'GNU.sparse.name': 'Task/hole.nii', 'GNU.sparse.size': str(2**50),
                                                'GNU.sparse.numblocks': '1', 'GNU.sparse.map': '0,512'}
            tar.addfile(info, io.BytesIO(bytes(512)))
        for n in range({'sparse': 0, 'zeros': 1, 'many': 40}[kind]):
            info = tarfile.TarInfo(f'Task/zeros{n}.nii')
            info.size = 40_000_000 // (40 if kind == 'many' else 1)
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(InputError, match='refused, .* would be [0-9,]+ bytes, from an archive of [0-9,]+; expected 50 times its size at most, and no holes'):
        extract(archive, tmp_path / 'into')
    assert not list((tmp_path / 'into').iterdir())


@pytest.mark.contract('refused', 'downloads', 'a server that announces or sends more than the file has, or next to nothing', 'it ends; the error counts the bytes')
@pytest.mark.parametrize('how', ['announces', 'sends', 'trickles'])
def test_a_server_that_goes_on_without_end(server, tmp_path, how):
    server.length = how != 'sends'
    options = {'largest': 300_000}
    if how == 'trickles':
        server.chunk, server.delay_s, options = 1, 0.05, {'timeout_s': 0.3}
    message = {'announces': r'the server announces [0-9,]+ bytes, expected 300,000 at most', 'sends': r'has sent more than 300,000 bytes and goes on; expected 300,000 at most',
               'trickles': r'[0-9]+ bytes in 0.3 s, expected 100 a second at least'}[how]
    began = time.monotonic()
    with pytest.raises(InputError, match=message):
        fetch(server.url, tmp_path / 'Task.tar', MD5, False, 1, **options)
    assert time.monotonic() - began < 20 and not (tmp_path / 'Task.tar').exists()
    part = tmp_path / 'Task.tar.part'
    assert not part.exists() or part.stat().st_size < 300_000 + 2 * (1 << 20)

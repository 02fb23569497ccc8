"Ways to damage a file: JSON and YAML by their structure and by their bytes, NIfTI by the fields of its header, archives by their members."
from __future__ import annotations

import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import nibabel as nib
import numpy as np

#: What a value may be replaced by: other types, limits of numbers, text that means something to somebody.
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 255, 256, 2**31, -2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e-30, 1e30, 1e308, -1e308, float('nan'), float('inf'),
    '', ' ', 'a', '0', '1', '-1', 'nan', '²', '٣', 'x' * 300, 'x' * 100_000, 'a\0b', '\ud800', '../../x', '/etc/passwd', '~', 'C:\\x', '$\\foo$', '$x', '{}', '%s%n',
    '<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', '&amp;', '=1+1', '\n', '\r\n', '\u202e', '😀', 'none', 'training', 'FLAIR', 'msd', 'brats2023',
    [], [[]], [None], [1, 2, 3], ['a'] * 10_000, [0] * 3, [1e30] * 3, [[1]] * 4, {}, {'': 0}, {'a': {'b': {}}}, {'0': 'FLAIR'},
]
#: Texts that replace a whole value in the bytes of a JSON file.
TOKENS: list[str] = ['NaN', 'Infinity', '-Infinity', '9' * 5000, '-' + '9' * 400, '1e999', '1E400', '[' * 100_000, '{"a":' * 5000, '"\\u0000"', '"\\ud800"', '01', '+1', '.5', "'a'",
                     'nul', 'TRUE', '/* */', '"', '\\', '[1,]', '{"a":1,"a":2}', '\ufeff']
#: The same for YAML.
YAML_TOKENS: list[str] = ['*a', '&a [*a]', '&a [x, x]\nb: *a', '!!python/object:os.system {}', '!!binary x', '!!int ""', '!!float ""', '!!timestamp x', '!!set {a, b}', '.nan', '.inf', '-.inf',
                          '0x' + 'f' * 5000, '9' * 5000, '2026-13-45', '1:60:60', '[' * 5000, '- ' * 5000, '{' * 1000, '? a\n? b', '<<: [1]', '|\n  x', '%YAML 9.9', '---\na: 1\n---\nb: 2',
                          '\t', '@', '`', '\0', '\x85', '0o777', '1_000', 'yes', '~', 'null', '"\\x00"', '!!str 1', '=', '!<a>', '&a', '*']


def places(value: Any, at: tuple = ()) -> list[tuple]:
    "The place of every value in a document."
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for k, v in inside for p in places(v, (*at, k)))]


def replaced(value: Any, at: tuple, new: Callable[[Any], Any]) -> Any:
    "A document with another value at one place."
    if not at:
        return new(value)
    if isinstance(value, dict):
        return {k: replaced(v, at[1:], new) if k == at[0] else v for k, v in value.items()}
    return [replaced(v, at[1:], new) if i == at[0] else v for i, v in enumerate(value)]


def mutated_values(draw: random.Random, document: Any) -> Any:
    "A document with one to three values replaced, taken away, added or renamed."
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.choice(places(document))
        how = draw.choice(('replace', 'replace', 'replace', 'drop', 'add', 'rename', 'wrap'))
        nasty = draw.choice(NASTY)
        if how == 'replace' or not at:
            document = replaced(document, at, lambda v: nasty)
        elif how == 'drop':
            document = replaced(document, at[:-1], lambda v: {k: x for k, x in v.items() if k != at[-1]} if isinstance(v, dict) else [x for i, x in enumerate(v) if i != at[-1]])
        elif how == 'add':
            document = replaced(document, at, lambda v: {**v, str(nasty)[:50]: nasty} if isinstance(v, dict) else [*v, nasty] if isinstance(v, list) else nasty)
        elif how == 'rename':
            document = replaced(document, at[:-1], lambda v: {(str(nasty)[:50] if k == at[-1] else k): x for k, x in v.items()} if isinstance(v, dict) else v)
        else:
            document = replaced(document, at, lambda v: draw.choice(([v], {'a': v}, [v] * 3)))
    return document


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    "A file with bits turned, bytes cut out, doubled, overwritten, or its end cut off."
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 30))):
        if not data:
            return bytes(data)
        at, how = draw.randrange(len(data)), draw.choice(('turn', 'turn', 'set', 'cut', 'end', 'double', 'insert'))
        if how == 'turn':
            data[at] ^= 1 << draw.randrange(8)
        elif how == 'set':
            data[at:at + 4] = draw.choice((b'\0' * 4, b'\xff' * 4, b'\x7f\xff\xff\xff', draw.randbytes(4)))
        elif how == 'cut':
            del data[at:at + draw.choice((1, 8, 512))]
        elif how == 'end':
            del data[at:]
        elif how == 'double':
            data[at:at] = data[at:at + draw.choice((1, 16, 1024))]
        else:
            data[at:at] = draw.randbytes(draw.choice((1, 16)))
    return bytes(data)


def mutated_json(draw: random.Random, document: Any) -> bytes:
    "A JSON file of a damaged document, with damage of its own in one of three."
    text = json.dumps(mutated_values(draw, document) if draw.random() < 0.8 else document, indent=draw.choice((None, 1)))
    if draw.random() < 0.25:
        marks = [i for i, c in enumerate(text) if c in ':,[{']
        at = draw.choice(marks) + 1 if marks else 0
        text = text[:at] + draw.choice(TOKENS) + text[at + draw.choice((0, 0, 3, 10)):]
    content = text.encode('utf-8', 'surrogatepass')
    return mutated_bytes(draw, content) if draw.random() < 0.2 else content


def mutated_yaml(draw: random.Random, document: Any, dump: Callable[[Any], str]) -> bytes:
    "A YAML file of a damaged document, or with odd YAML in one place."
    if draw.random() < 0.5:
        document = mutated_values(draw, document)
    try:
        text = dump(document)
    except Exception:  # not everything can be written as YAML
        text = json.dumps(document)
    if draw.random() < 0.6:
        lines = text.split('\n')
        at = draw.randrange(len(lines))
        head = lines[at].partition(':')[0]
        lines[at] = draw.choice((f'{head}: {draw.choice(YAML_TOKENS)}', draw.choice(YAML_TOKENS), f'{lines[at]}\n{lines[at]}'))
        text = '\n'.join(lines)
    content = text.encode('utf-8', 'surrogatepass')
    return mutated_bytes(draw, content) if draw.random() < 0.2 else content


_FIELDS = [n for n in nib.Nifti1Header.template_dtype.names]
_OFTEN = ('dim', 'pixdim', 'datatype', 'bitpix', 'vox_offset', 'scl_slope', 'scl_inter', 'qform_code', 'sform_code', 'srow_x', 'srow_y', 'srow_z', 'quatern_b', 'qoffset_x', 'xyzt_units',
          'magic', 'sizeof_hdr', 'intent_code')


def mutated_header(draw: random.Random, content: bytes) -> bytes:
    "A NIfTI file (not compressed) with one to four fields of its header changed."
    data, dtype = bytearray(content), nib.Nifti1Header.template_dtype
    for _ in range(draw.choice((1, 1, 2, 4))):
        name = draw.choice(_OFTEN if draw.random() < 0.8 else _FIELDS)
        kind, offset = dtype.fields[name][:2]
        count = int(np.prod(kind.shape)) if kind.shape else 1
        base = kind.base
        at = offset + draw.randrange(count) * base.itemsize
        if base.kind == 'f':
            value = draw.choice((0.0, -1.0, 1.0, 1e-30, 1e30, 3e38, -3e38, float('nan'), float('inf'), 0.05, 0.001, 25.0, 1000.0, 352.0, 348.0, 1e9, 2e9, draw.uniform(-3, 3)))
            new = struct.pack('<f' if base.itemsize == 4 else '<d', value)
        elif base.kind in 'iu':
            limit = np.iinfo(base)
            value = draw.choice((0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 64, 128, 256, 512, 768, 1024, 1280, 1536, 2304, 30000, limit.max, limit.min, draw.randint(limit.min, limit.max)))
            new = np.array(max(limit.min, min(limit.max, value)), base.newbyteorder('<')).tobytes()
        else:
            new = draw.choice((b'\0' * base.itemsize, b'\xff' * base.itemsize, draw.randbytes(base.itemsize), b'n+1\0', b'ni1\0', b'n+2\0'))[:base.itemsize]
        data[at:at + len(new)] = new
    return bytes(data)


def with_extension(draw: random.Random, content: bytes) -> bytes:
    "A NIfTI file with a damaged extension behind its header."
    text = draw.choice((b'[' * 100_000, b'{"schema": 3}', b'{"schema": "x"}', b'{"schema": null}', b'{"volumes": 1}', b'\xff\xfe', b'{"a":' * 2000, b'9' * 5000, json.dumps(draw.choice(NASTY)).encode()))
    size = draw.choice((len(text) + 8, 16 * ((len(text) + 23) // 16), 0, 8, -16, 2**31 - 1, 7))
    body = struct.pack('<ii', size, draw.choice((6, 6, 6, 0, 2, 4, -1, 999))) + text
    body += bytes(-len(body) % 16)
    data = bytearray(content[:348] + b'\1\0\0\0' + body + content[352:])
    data[108:112] = struct.pack('<f', draw.choice((352 + len(body), 352 + len(body), 352, 0, 1e6)))
    return bytes(data)


def mutated_nifti(draw: random.Random, content: bytes, compressed: bool) -> bytes:
    "A NIfTI file, damaged before or after it was compressed."
    how = draw.choice(('header', 'header', 'header', 'header', 'extension', 'bytes', 'gzip', 'end', 'other'))
    if how == 'header':
        content = mutated_header(draw, content)
    elif how == 'extension':
        content = with_extension(draw, content)
    elif how == 'bytes':
        content = mutated_bytes(draw, content)
    elif how == 'other':
        return draw.choice((b'', b'\x1f\x8b', b'\0' * 400, b'PK\3\4', gzip.compress(b''), gzip.compress(bytes(5_000_000)), gzip.compress(content) + b'x' * 100, gzip.compress(content) * 2, content[:348]))
    packed = gzip.compress(content, 1, mtime=0) if compressed else content
    if how == 'gzip':
        return mutated_bytes(draw, packed)
    return packed[:draw.randrange(len(packed))] if how == 'end' else packed


def mutated_zip(draw: random.Random, content: bytes) -> bytes:
    "A zip with a member changed (its checksum put right), left out, compressed, given twice, or with damaged bytes."
    if draw.random() < 0.25:
        return mutated_bytes(draw, content)
    out, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(content))
    names = source.namelist()
    chosen = draw.choice(names) if draw.random() < 0.4 else next(n for n in names if n.endswith('data.pkl'))
    how = draw.choice(('bytes', 'bytes', 'bytes', 'drop', 'bomb', 'twice', 'empty', 'long'))
    with zipfile.ZipFile(out, 'w') as target:
        for name in names:
            data = source.read(name)
            if name == chosen and how == 'drop':
                continue
            if name == chosen and how in ('bytes', 'empty', 'long'):
                data = {'bytes': lambda: mutated_bytes(draw, data), 'empty': lambda: b'', 'long': lambda: data + bytes(2_000_000)}[how]()
            target.writestr(name, data, zipfile.ZIP_DEFLATED if name == chosen and how == 'bomb' else zipfile.ZIP_STORED)
            if name == chosen and how == 'twice':
                target.writestr(name, mutated_bytes(draw, data))
    return out.getvalue()


def mutated_safetensors(draw: random.Random, content: bytes) -> bytes:
    "A safetensors file with a damaged header or damaged bytes."
    if draw.random() < 0.3:
        return mutated_bytes(draw, content)
    length = struct.unpack('<Q', content[:8])[0]
    header = json.loads(content[8:8 + length])
    if draw.random() < 0.7 and '__metadata__' in header:  # what the file says about itself
        facts = header['__metadata__']
        said = {k: mutated_json(draw, json.loads(v)).decode('utf-8', 'replace') for k, v in facts.items() if k != 'sha256'}
        if draw.random() < 0.8:
            return _sealed(content, said)
        header['__metadata__'] = {**facts, **said}
    else:
        header = mutated_values(draw, header)
    text = json.dumps(header).encode('utf-8', 'replace')
    size = draw.choice((len(text), len(text), len(text), len(text), 0, 2**40, len(text) - 1))
    return struct.pack('<Q', size) + text + content[8 + length:]


def _sealed(content: bytes, texts: dict[str, str]) -> bytes:
    "A safetensors file that says something else, with the checksum of what it says."
    from neuroseg3d.networks.tensors import tensors_digest
    from safetensors.torch import load, save
    tensors = load(content)
    texts = {k: v.encode('utf-8', 'replace').decode() for k, v in texts.items()}
    return save(tensors, {**texts, 'sha256': tensors_digest(sorted(tensors.items()), texts)})


def mutated_tar(draw: random.Random, files: dict[str, bytes]) -> bytes:
    "A tar archive with odd members."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=draw.choice(('w', 'w', 'w:gz', 'w:bz2', 'w:xz')), format=draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for _ in range(draw.choice((1, 2, 5))):
            info = tarfile.TarInfo(draw.choice(('Task/x', '../x', '/x', 'C:/x', 'Task', 'Task/a/../../..', 'Task/' + 'y' * 90, 'Other/x', 'Task/x\ny', '.', 'Task/imagesTr')))
            info.type = draw.choice((tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, b'?'))
            info.linkname = draw.choice(('', '/etc/passwd', '../..', 'Task/x'))
            size = draw.choice((0, 3, 1000))
            if info.type in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME):
                info.size = size
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    content = bytearray(out.getvalue())
    if draw.random() < 0.4:  # another size in a header, its checksum put right
        at = draw.choice([i for i in range(0, max(1, len(content) - 512), 512)])
        content[at + 124:at + 136] = draw.choice((b'77777777777\0', b'00000000010\0', b'\x80' + b'\xff' * 11, b'-1         \0', b'\x80\0\0\0\0\0\0\1\0\0\0\0'))
        if draw.random() < 0.5:
            content[at + 156] = draw.choice(b'0LKxgSD5')
        head = content[at:at + 148] + b' ' * 8 + content[at + 156:at + 512]
        content[at + 148:at + 156] = b'%06o\0 ' % sum(head)
    return mutated_bytes(draw, bytes(content)) if draw.random() < 0.2 else bytes(content)

"""Write configs/*.yaml: every default of the library, with the comment that stands beside it in the code.

    python tools/configs.py            # write
    python tools/configs.py --check    # exit 1 when a file is out of step
"""
from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from neuroseg3d.training.task import Config

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    'data_config.yaml': ('What is trained on: cases, model space, augmentation.', ('data', 'space', 'augment')),
    'model_config.yaml': ('What is trained, and how: network, loss, optimiser, trainer, inference, logger.',
                          ('model', 'loss', 'optim', 'trainer', 'infer', 'logger')),
}


def field_comments(cls: type) -> dict[str, str]:
    "The comment behind each field of a dataclass."
    found = re.findall(r'^    (\w+):[^#\n]*#\s*(.+?)\s*$', inspect.getsource(cls), flags=re.MULTILINE)
    return dict(found)


def yaml_value(value: Any) -> str:
    "A value on one line."
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix('...').strip()


def section_text(name: str, cls: type) -> str:
    "One section: its docstring, then a line a key."
    comments = field_comments(cls)
    lines = [f'# {inspect.getdoc(cls)}', f'{name}:']
    for f in fields(cls):
        key, value = f.name, f.default if f.default is not MISSING else f.default_factory()
        entry = f'  {key}: {yaml_value(value)}'
        lines.append(f'{entry:<44}  # {comments[key]}' if key in comments else entry)
    return '\n'.join(lines)


def render() -> dict[str, str]:
    "Every file's text."
    sections = get_type_hints(Config)
    assert {s for _, names in FILES.values() for s in names} == set(sections)
    texts = {}
    for file, (title, names) in FILES.items():
        head = (f'# {title}\n# These are the defaults. Change what you like, delete what you do not need; any value can also be\n'
                f'# given on the command line: neuroseg3d train --config_dir configs --{names[0]}.KEY VALUE')
        texts[file] = '\n\n'.join([head, *(section_text(n, sections[n]) for n in names)]) + '\n'
    return texts


def main() -> int:
    "Write the files, or say which differ."
    stale = []
    for name, text in render().items():
        path = ROOT / 'configs' / name
        if '--check' in sys.argv[1:]:
            stale += [] if path.is_file() and path.read_text(encoding='utf-8') == text else [name]
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding='utf-8')
    if stale:
        print(f'out of step with the code: {", ".join(stale)}; run python tools/configs.py')
    return bool(stale)


if __name__ == '__main__':
    sys.exit(main())

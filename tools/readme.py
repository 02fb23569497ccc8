"""Write README.md from nbs/index.ipynb.

Links to files beside the notebook get `nbs/` in front, so that they work on the project's front page; setup.py makes them
absolute for the package index. Hidden cells and the Colab badge are left out.
"""
from __future__ import annotations

import json
import re

from refresh import NBS, ROOT

SOURCE = NBS / 'index.ipynb'


def relocate(text: str) -> str:
    "Relative links of the notebook, as seen from the top of the project."
    text = re.sub(r'(\]\()(?!\w+:|#|/|\.\./)([^)\s]+)', r'\1nbs/\2', text)
    text = re.sub(r'(\]\()\.\./', r'\1', text)
    return re.sub(r'(<img [^>]*src=")(?!\w+:|/)', r'\1nbs/', text)


def outputs(cell: dict) -> str:
    "Text outputs of a cell; a picture belongs in nbs/images, where every reader can fetch it."
    out = []
    for output in cell['outputs']:
        data = output.get('data', {})
        if any(kind.startswith('image/') for kind in data):
            raise SystemExit(f'{SOURCE.name}: a cell has a picture as output; save it in nbs/images and show it in a text cell')
        text = ''.join(output.get('text', data.get('text/markdown', data.get('text/plain', ''))))
        out.append(text if 'text/markdown' in data else f'```\n{text.rstrip()}\n```')
    return '\n\n'.join(out)


def render() -> str:
    "The text of README.md."
    parts = []
    for cell in json.loads(SOURCE.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        marks = re.findall(r'^#\|\s*(.+)$', source, flags=re.MULTILINE)
        if cell['cell_type'] == 'markdown':
            parts.append(relocate(re.sub(r'^\[!\[Open in Colab\].*\n*', '', source, flags=re.MULTILINE)))
        elif cell['cell_type'] == 'code' and 'hide' not in marks:
            code = re.sub(r'^#\|.*\n', '', source, flags=re.MULTILINE)
            parts += [f'```python\n{code}\n```', outputs(cell)]
    body = '\n\n'.join(p.strip('\n') for p in parts if p.strip())
    return f'<!-- Written by tools/readme.py from nbs/index.ipynb: edit that. -->\n\n{body}\n'


if __name__ == '__main__':
    (ROOT / 'README.md').write_text(render(), encoding='utf-8')
    print('wrote README.md')

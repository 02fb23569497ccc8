"""Execute notebooks top to bottom and store their real outputs, cleaned.

    python tools/refresh.py            # every notebook
    python tools/refresh.py 40_networks.unet    # one

Cells marked `#| eval: false`, or with a flag of `tst_flags` in settings.ini (slow, gpu), are left as they are.
"""
from __future__ import annotations

import configparser
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'


def settings() -> configparser.SectionProxy:
    "The project's settings.ini."
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def is_skipped(source: str, flags: tuple[str, ...]) -> bool:
    "Whether a cell's directives forbid running it."
    directives = re.findall(r'^#\|\s*(.+?)\s*$', source, flags=re.MULTILINE)
    return any(re.fullmatch(r'eval:\s*false', d) or d in flags for d in directives)


class DirectiveClient(NotebookClient):
    "A notebook client that honours nbdev's directives."

    skip_flags: tuple[str, ...] = ()

    async def async_execute_cell(self, cell, cell_index, execution_count=None, store_history=True):
        if cell.cell_type == 'code' and is_skipped(cell.source, self.skip_flags):
            return cell
        return await super().async_execute_cell(cell, cell_index, execution_count, store_history)


def execute(path: Path, timeout_s: int = 900) -> None:
    "Run a notebook in a fresh kernel and keep its outputs."
    os.environ.setdefault('PYTHONPATH', str(ROOT))
    os.environ['JUPYTER_PLATFORM_DIRS'] = '1'
    notebook = nbformat.read(path, as_version=4)
    client = DirectiveClient(notebook, timeout=timeout_s, kernel_name='python3', coalesce_streams=True,
                             resources={'metadata': {'path': str(NBS)}})
    client.skip_flags = tuple(settings()['tst_flags'].split())
    client.execute()
    nbformat.write(notebook, path)


def clean(path: Path) -> None:
    "Strip what is not content (counts, kernel metadata, unstable ids) as nbdev does, and what execution adds."
    from nbdev.clean import clean_nb
    from execnb.nbio import read_nb, write_nb
    notebook = read_nb(path)
    clean_nb(notebook)
    notebook.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    write_nb(notebook, path)


def main(names: list[str]) -> None:
    "Refresh the notebooks named, or all of them in order."
    paths = [NBS / f'{Path(n).stem}.ipynb' for n in names] or sorted(NBS.glob('*.ipynb'))
    for path in paths:
        print('running', path.name, flush=True)
        execute(path)
        clean(path)


if __name__ == '__main__':
    main(sys.argv[1:])

"Commands of the program, run in this process on the folder of files: the exit code and what is said have to fit."
from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable
from pathlib import Path

#: A command line by name; what is in braces is below the folder.
COMMANDS: dict[str, str] = {
    'infer': 'infer --ckpt_path {model.safetensors} --input_image {cohort} --output_dir {out}',
    'ensemble': 'infer --ckpt_path {ensemble.json} --input_image {case} --output_dir {out} --config_dir {settings}',
    'evaluate': 'evaluate --pred {pred} --ref {cohort} --output_dir {out}',
    'convert': 'convert --input {cohort} --output_dir {out} --to brats',
    'explain': 'explain --ckpt_path {model.ckpt} --input_image {case} --output_dir {out} --method grad_cam --config_dir {settings}',
    'calibrate': 'calibrate --ckpt_path {model.ckpt} --data {case} --split {split.json}',
    'export': 'export --ckpt_path {model.ckpt} --output_path {out/model.safetensors}',
    'eda': 'eda --data {cohort} --output_dir {out}',
}
_ODD = re.compile('Traceback|internal error')


def run(name: str) -> Callable[[Path], None]:
    "The entry that runs a command; one that fails is an `InputError` with what it said."
    def entry(folder: Path) -> None:
        from neuroseg3d import cli
        from neuroseg3d.core import InputError
        words = re.sub(r'\{(.*?)\}', lambda m: f'{folder / m[1]}', COMMANDS[name]).split()
        logging.disable(logging.WARNING)
        said, errors, usual = io.StringIO(), [], cli._in_words
        cli._in_words = lambda error: (errors.append(error), usual(error))[1]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = cli.main(words)
        finally:
            cli._in_words = usual
        lines = [line for line in said.getvalue().splitlines() if not line.startswith('neuroseg3d: warning: ')]
        if errors and 'internal error' in lines[-1]:
            raise errors[0]
        assert not _ODD.search('\n'.join(lines)), f'exit code {code}: {lines[-1][:300]}'
        assert code in (0, 1, 2) and (code == 0 or lines), f'exit code {code}, said {lines[-3:]}'
        if code:
            raise InputError('\n'.join(lines))
    return entry

"""How long a slider of the dashboard takes to redraw: all three planes of a 240x240x155 case, every overlay on.

    python benchmarks/dashboard.py

Measures the time from the slider's new value to new bytes in all three picture widgets (drawing, JPEG, messages), in the kernel,
and writes it to benchmarks/results/dashboard.json. What the browser adds (decoding three pictures of about 30 kB) is not in it.
"""
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from neuroseg3d.review.dashboard import Cohort, Dashboard, Scene, entropy_bits
from neuroseg3d.phantom import write_cohort

RESULT = Path(__file__).resolve().parent / 'results' / 'dashboard.json'


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write_cohort(Path(folder) / 'cohort', n=1, seed=3, spacing_mm=1.0, workers=1, progress=False)
        board = Dashboard(Cohort(root))
        case = board.scene.case
        everywhere = np.where(case.label > 0, 0.45, 0.1) * case.brain  # a model that is nowhere sure: the whole brain is tinted
        doubt = entropy_bits(np.stack([everywhere] * 3))
        out = {'grid': list(case.geometry.shape), 'cores': os.cpu_count(), 'load': round(os.getloadavg()[0], 1)}
        for fill in ('reference', 'error', 'entropy'):
            began = time.perf_counter()
            board.show(Scene(case, np.roll(case.label, 3, axis=0), doubt))
            out['show_case_with_everything_ms'] = round((time.perf_counter() - began) * 1000)
            board.controls[fill].value = True
            slider, times = board.controls['axial'], []
            middle = slider.value
            for step in range(40):
                began = time.perf_counter()
                slider.value = middle + (step % 20) - 10
                times.append((time.perf_counter() - began) * 1000)
            out[fill] = {'median_ms': round(statistics.median(times), 1), 'p95_ms': round(sorted(times)[37], 1)}
        began = time.perf_counter()
        board.open(case.id)
        out['open_case_ms'] = round((time.perf_counter() - began) * 1000)
    text = json.dumps(out, indent=1)
    print(text)
    RESULT.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()

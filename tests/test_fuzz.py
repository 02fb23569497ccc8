"Damaged inputs end in success or in a clear error: so many of a seed (NEUROSEG3D_FUZZ, 200), and all that were ever found not to."
from __future__ import annotations

import os
from collections import Counter

import pytest
from fuzz.runner import Worker, a_worker, drawn, kept, run_all, undamaged


@pytest.fixture(scope='module')
def worker():
    "The process that takes the inputs."
    with a_worker() as one:
        yield one


def test_damaged_inputs_end_in_success_or_a_clear_error(worker: Worker):
    n, ends, finds = int(os.environ.get('NEUROSEG3D_FUZZ', 200)), Counter(), []
    for task, found in run_all(drawn(n), worker):
        ends[found['end']] += 1
        if found['end'] == 'find':
            finds.append(f'{task}: {found["kind"]}: {found["said"]}')
    assert not finds, '\n'.join(finds)
    assert ends['refused'] > n / 4 and ends['fine'] > n / 20  # else the inputs are all alike


def test_what_is_damaged_was_sound_before(worker: Worker):
    tasks = undamaged()
    ends = dict(zip(tasks, (found for _, found in run_all(tasks.values(), worker))))
    assert not [f'{kind}: {found["said"]}' for kind, found in ends.items() if found['end'] != 'fine']


def test_what_was_found_once_stays_mended(worker: Worker):
    corpus = kept()
    ends = dict(zip(corpus, (found for _, found in run_all(corpus.values(), worker))))
    assert not [f'{name}: {found["said"]}' for name, found in ends.items() if found['end'] == 'find']

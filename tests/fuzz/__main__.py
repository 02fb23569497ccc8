"""Run many damaged inputs:  python -m tests.fuzz --n 100000 [--seed 1] [--first 0] [--jobs 2] [--keep]

Prints each find, and how inputs of each kind have ended; with --keep a find becomes a file of the corpus, which the tests replay.
"""
from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from .inputs import Input
from .runner import CORPUS, Find, a_worker, drawn, run_all


def main() -> int:
    parser = argparse.ArgumentParser('python -m tests.fuzz', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--first', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--keep', action='store_true')
    args = parser.parse_args()
    tasks, ends, seconds, finds, began = drawn(args.n, args.seed, args.first), Counter(), Counter(), Counter(), time.monotonic()

    def run(part: list[dict]) -> None:
        with a_worker() as worker:
            for task, found in run_all(part, worker):
                ends[found['kind'], found['end']] += 1
                seconds[found['kind']] += found.get('took', 0)
                if found['end'] == 'find':
                    alike = re.sub(r'/\S+/|[0-9]+', '', f'{found["kind"]}: {found["said"]}')[:120]
                    finds[alike] += 1
                    print(f'{task}: {found["kind"]}: {found["said"]}', flush=True)
                    if args.keep and found['input'] and finds[alike] == 1:
                        one = Find(Input.from_json(found['input']), found['said'])
                        (CORPUS / one.file).write_text(found['input'], encoding='utf-8')

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, [tasks[k::args.jobs] for k in range(args.jobs)]))
    for kind in sorted({k for k, _ in ends}):
        print(f'{kind or "killed":18}' + ''.join(f'{end} {ends[kind, end]:6}  ' for end in ('fine', 'refused', 'find')) + f'{seconds[kind]:8.1f} s of the processor')
    print(f'{args.n} inputs, {sum(finds.values())} finds, {time.monotonic() - began:.0f} s')
    return 1 if finds else 0


if __name__ == '__main__':
    sys.exit(main())

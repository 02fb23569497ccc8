"Paths and helpers that every test shares."
from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

#: Which wing a file of tests belongs to; what holds for the whole project is `house`.
WINGS: dict[str, str] = {name: wing for wing, names in {
    'system': 'failures files surroundings waits',
    'studies': 'brain trim checks download geometry grids headers identity layouts names schemas',
    'phantom': 'phantom',
    'plots': 'viz',
    'networks': 'air checksums gpu models',
    'inference': 'inference real_cases',
    'evaluation': 'eda uncertainty xai',
    'training': 'crossval data devices resume small_shm tracking',
    'review': 'dashboard report',
    'delivery': 'convert',
    'house': 'contracts fuzz pipeline repo reprs site tutorial_msd',
}.items() for name in names.split()}


def pytest_addoption(parser) -> None:
    parser.addoption('--wing', action='store', default=None, choices=sorted(set(WINGS.values())), help='tests of one wing only')


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    "Files of other wings than the one that was asked for."
    name = collection_path.stem.removeprefix('test_')
    wing = config.getoption('--wing')
    return True if wing and collection_path.name.startswith('test_') and WINGS.get(name) != wing else None


@pytest.fixture(scope='session')
def root() -> Path:
    "The top of the project."
    return ROOT


def pytest_configure(config) -> None:
    config.addinivalue_line('markers', 'contract(kind, area, given, happens): a row of the page "What is refused, warned of, converted" (tools/contracts.py)')

"Paths and helpers that every test shares."
from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]


@pytest.fixture(scope='session')
def root() -> Path:
    "The top of the project."
    return ROOT


def pytest_configure(config) -> None:
    config.addinivalue_line('markers', 'contract(kind, area, given, happens): a row of the page "What is refused, warned of, converted" (tools/contracts.py)')

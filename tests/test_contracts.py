"The page of what is refused, warned of and converted says what the tests hold, and nothing else."
from __future__ import annotations

import json

import pytest
from contracts import AREAS, KINDS, PAGE, marks, render, rows, texts

ODD = '''
@pytest.mark.contract('refused', 'images', 'a bar | and <b>, `a|b`', 'costs $5, $6')
def test_one(): ...

@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.contract('works', 'names', 'one', 'two'))])
def test_two(x): ...
'''


def test_a_mark_becomes_a_row(tmp_path):
    (tmp_path / 'test_odd.py').write_text(ODD)
    found = marks(tmp_path / 'test_odd.py')
    assert [(r.kind, r.area, r.given, r.test) for r in found] == [
        ('refused', 'images', 'a bar | and <b>, `a|b`', 'test_odd.test_one'), ('works', 'names', 'one', 'test_odd.test_two')]
    page = '\n'.join(texts(found))
    assert r'| a bar \| and &lt;b>, `a\|b` | costs \$5, \$6 | `test_odd.test_one` |' in page
    assert [x for x in page.split('\n') if x.startswith('## ')] == ['## What is refused', '## What works all the same']


@pytest.mark.parametrize('wrong', ["'forbidden', 'images', 'a', 'b'", "'refused', 'clouds', 'a', 'b'", "'refused', 'images', 'a'",
                                   "'refused', 'images', name, 'b'"])
def test_a_mark_that_cannot_be_read_is_named(tmp_path, wrong):
    (tmp_path / 'test_odd.py').write_text(f'@pytest.mark.contract({wrong})\ndef test_one(): ...\n')
    with pytest.raises(SystemExit, match='test_odd.py, line 1: '):
        marks(tmp_path / 'test_odd.py')


def test_the_page_holds_every_row():
    page = '\n'.join(''.join(c['source']) for c in json.loads(PAGE.read_text(encoding='utf-8'))['cells'])
    held = {x.split('`')[-2] for x in page.split('\n') if x.startswith('| ') and x.endswith('` |')}
    assert held == {r.test for r in rows()}, 'run tools/contracts.py'


def test_the_page_is_in_step():
    assert PAGE.read_text(encoding='utf-8') == render(), 'run tools/contracts.py'
    assert {r.kind for r in rows()} <= set(KINDS) and {r.area for r in rows()} <= set(AREAS)

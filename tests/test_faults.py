"""The tables of faults and of cases name tests that exist, for every row."""

import ast
import functools

import pytest

from tests import cases, faults
from tests.tables import TESTS

ROWS = [*faults.TABLE.items(), *cases.TABLE.items()]


@functools.cache
def functions(file):
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=[str(key) for key, _ in ROWS])
def test_a_row_has_tests_that_exist(row):
    assert row.tests
    for test in row.tests:
        file, _, function = test.partition("::")
        assert function in functions(file), test

"""The fault table names tests that exist, for every row."""

import ast

import pytest

from tests.faults import TABLE, TESTS


@pytest.mark.parametrize("row", TABLE)
def test_a_fault_has_tests_that_exist(row):
    assert TABLE[row].tests
    for test in TABLE[row].tests:
        file, _, function = test.partition("::")
        tree = ast.parse((TESTS / file).read_text("utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test

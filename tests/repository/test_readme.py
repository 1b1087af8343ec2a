"""The tables of tests/README.md say what is so; every row of the contract has a test."""

import pytest

from tests import readme

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", readme.TABLES)
def test_the_tables_are_those_that_the_command_writes(name):
    (found,) = readme.place(name).findall(readme.FILE.read_text(encoding="utf-8"))
    assert found == readme.TABLES[name]() + "\n", "run `python -m tests.readme`"


def test_every_row_of_the_contract_has_a_test():
    assert {row for row, _, _ in readme.marked_tests()} == set(readme.ROWS)


def test_every_fault_has_its_text_once():
    for fault in readme.faults_module().FAULTS:
        text = (readme.HERE.parent / fault.path).read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, fault


def test_every_fault_names_tests_that_exist():
    faults = readme.faults_module()
    for fault in faults.FAULTS:
        path = readme.HERE.parent / faults.path_of(fault)
        assert path.exists(), fault
        # After "and": parameters of the test that the first word names.
        names = [choice.split(" and ")[0] for choice in fault.tests.split(":")[1].split(" or ")]
        source = path.read_text(encoding="utf-8")
        assert all(name in source for name in names), fault

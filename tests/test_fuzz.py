"""A few hundred damaged data sets; tests/fuzz.py has as many as you like."""

import sys

import pytest

import fuzz


@pytest.mark.skipif(sys.platform == "win32", reason="it stops hangs by SIGPROF, which Windows has not")
def test_damaged_sets_raise_data_errors_and_nothing_else(capsys):
    fuzz.main(["--count", "300", "--start", "1000000"])
    assert "300 cases" in capsys.readouterr().out

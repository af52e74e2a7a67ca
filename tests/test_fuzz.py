"""A few hundred damaged data sets and weight files; fuzz.py and fuzz_weights.py have as many as you like."""

import sys

import pytest

import fuzz
import fuzz_weights
import model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="hangs are stopped by signals of Unix")


def test_damaged_sets_raise_data_errors_and_nothing_else(capsys):
    fuzz.main(["--count", "300", "--start", "1000000"])
    assert "300 cases" in capsys.readouterr().out


def test_damaged_weights_raise_weights_errors_and_nothing_else(capsys, monkeypatch):
    monkeypatch.setattr(model, "MODELS", dict(model.MODELS))  # to which its small models are added
    fuzz_weights.main(["--count", "150", "--start", "1000000"])
    assert "150 cases" in capsys.readouterr().out

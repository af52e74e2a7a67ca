"""python -m tools.measure: the rarer measurements."""

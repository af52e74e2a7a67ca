"""python -m tools.bench: speed beside the peers, one table a task."""

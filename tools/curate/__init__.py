"""python -m tools.curate: check, filter, split, pack and unpack a data set."""

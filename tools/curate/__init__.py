"""python -m tools.curate: check, filter, pack and unpack a data set."""

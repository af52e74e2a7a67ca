"""Where pairs of pictures and captions come from."""

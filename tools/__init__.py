"""Commands on top of it all."""

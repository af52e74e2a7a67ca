"""Search your own photos in Chinese. See __main__.py."""

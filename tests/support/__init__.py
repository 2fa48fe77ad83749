"""Helpers that more than one test file needs; `tests/` is on sys.path, so: `from support.server import …`."""

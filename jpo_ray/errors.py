"""Errors that a user can cause and mend."""


class InputError(Exception):
    """Bad input: one line that names the file, row, key or flag and how to mend it. `jpo` exits with code 2."""

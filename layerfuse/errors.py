"""Errors that a user can cause and mend: a class of their own, so that a command line prints these and no others.

Each is also the built-in error that a caller expects there (``ValueError``, ``FileNotFoundError``, …). Its message says
what was given, what is allowed and what to do. Every other exception that leaves layerfuse is a fault of the program or
of its surroundings, and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "ExistingFileError",
    "FileAccessError",
    "InputError",
    "InvalidTypeError",
    "MissingFileError",
    "MissingPackageError",
    "TapError",
    "UnknownKeyError",
    "UserError",
]


class UserError(Exception):
    """Something that was given cannot be used; the message says what to give instead."""


class InputError(UserError, ValueError):
    """A value, a file's content, or a combination of arguments that is not possible."""


class TapError(InputError, RuntimeError):
    """A model that ran in a way in which what its layers put out cannot be told for certain."""


class InvalidTypeError(UserError, TypeError):
    """An argument of a type that is not taken."""


class UnknownKeyError(UserError, KeyError):
    """A key that is not there."""

    def __str__(self) -> str:
        """The message as it was written; KeyError shows its repr."""
        return str(self.args[0]) if self.args else ""


class FileAccessError(UserError, OSError):
    """A file or folder that cannot be read or written, or a disk without room."""


class MissingFileError(FileAccessError, FileNotFoundError):
    """A file or folder that does not exist."""


class ExistingFileError(FileAccessError, FileExistsError):
    """A file or folder that exists and is left alone."""


class MissingPackageError(UserError, ModuleNotFoundError):
    """A package that is needed here and not installed."""

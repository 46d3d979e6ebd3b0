"""Errors of the command line itself."""

from neounify.errors import NeounifyError


class CliError(NeounifyError):
    """Files or options that the user can put right."""


class UsageError(CliError):
    """Options that contradict each other or cannot be read; exit code 2."""


class WriteError(CliError):
    """A file that could not be written: a full disk, a folder without permission."""

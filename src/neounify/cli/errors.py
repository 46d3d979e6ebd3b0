"""Errors of the command line itself, and messages for errors of all kinds."""

from __future__ import annotations

from neounify.errors import NeounifyError


class CliError(NeounifyError):
    """Files or options that the user can correct."""


class UsageError(CliError):
    """Options that contradict each other or cannot be read; exit code 2."""


class WriteError(CliError):
    """A file that could not be written: a full disk, a folder without permission."""


def explain_os_error(error: OSError) -> str:
    """The file and the system's message for it."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def explain(error: Exception) -> str | None:
    """The message for the user; None for an unexpected error."""
    text = str(error)
    if isinstance(error, NeounifyError):
        return text
    if isinstance(error, OSError):
        return explain_os_error(error)
    if isinstance(error, MemoryError) or any(
        words in text.lower() for words in ("out of memory", "can't allocate memory")
    ):
        first = text.splitlines()[0] if text else "out of memory"
        return (
            f"{first}\nTo use less memory: --memory stream, --dtype bfloat16, "
            "a smaller --size, fewer images at once."
        )
    return None

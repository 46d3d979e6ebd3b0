"""The errors raised on purpose; each message says what is wrong and what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class NeounifyError(Exception):
    """Base of all errors raised on purpose; a command line prints it without a traceback."""


class ConfigError(NeounifyError, ValueError):
    """A model configuration is unknown, incomplete or inconsistent."""


class CheckpointError(NeounifyError, ValueError):
    """A checkpoint folder or weight file is missing, damaged or does not fit the model."""


class MemoryPlanError(NeounifyError):
    """A model does not fit in the memory that is free, by its plan."""


class TokenizerError(NeounifyError, ValueError):
    """Tokenizer files are missing, damaged or lack a token the model needs."""


class InputError(NeounifyError, ValueError):
    """Unusable input of a caller; `param` names the parameter at fault, if it is one."""

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@contextmanager
def naming_param(param: str) -> Iterator[None]:
    """Name the parameter of InputErrors raised inside the block that name none themselves."""
    try:
        yield
    except InputError as error:
        error.param = error.param or param
        raise


class ImageError(InputError):
    """An image cannot be read, is too large, or has a size that is not allowed."""


class VideoError(InputError):
    """A video cannot be read or written, or is beyond a limit."""


class DecoderStopped(VideoError):
    """A video was not decoded for a reason outside its file, and may be if it is tried again."""


class PromptError(InputError):
    """A prompt or a message list cannot be turned into model input."""


class ContextFullError(PromptError):
    """The next tokens of a sequence would stand beyond the model's context."""


class RequestError(InputError):
    """A parameter of a request is out of its range, or unknown."""


class Cancelled(NeounifyError):
    """The caller's cancel event was set while the work was running."""


def not_finite() -> CheckpointError:
    """The error for a model that computes NaN."""
    return CheckpointError(
        "the model computes NaN or infinite values: its weights are damaged, which "
        "load(..., verify=True) would locate, or they overflow in float16"
    )


class SizeWarning(UserWarning):
    """An image is asked for at a size that the model was not trained to generate."""


class ServiceError(NeounifyError):
    """A request that was fine could not be served."""


class EngineDied(ServiceError):
    """The process that worked on the request ended; it is being started again."""


class OutOfMemory(ServiceError):
    """There is no memory left for the request at the moment; others continue."""


class TensorsGone(ServiceError):
    """Tensors of the request were lost on their way between the engines."""


class Overloaded(ServiceError):
    """More requests than the limits allow; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(ServiceError):
    """The request ran out of the time it was given."""


class Draining(ServiceError):
    """The service is shutting down and takes no new requests."""


Extra = Literal["curate", "grammar", "parquet", "ray", "serve", "train", "video", "watermark"]


def install_command(extra: Extra) -> str:
    """The command that installs an extra, in the folder of a clone.

    The only place that spells it: the package is not published under any name.
    """
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def missing_extra(what: str, extra: Extra, error: ImportError) -> str:
    """A message for an extra that is not installed; `what` is what needs it, in the plural."""
    return f"{what} need the extra {extra!r}; in the repository: {install_command(extra)} ({error})"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the machine or of a device is used up, as Python or torch say it.

    torch has no class for the machine's, nor for that of matrix products on a GPU.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    signs = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)

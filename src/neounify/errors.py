"""The errors raised on purpose; each message says what is wrong and what would be right."""


class NeounifyError(Exception):
    """Base of all errors raised on purpose; a command line prints it without a traceback."""


class ConfigError(NeounifyError, ValueError):
    """A model configuration is unknown, incomplete or inconsistent."""


class CheckpointError(NeounifyError, ValueError):
    """A checkpoint folder or weight file is missing, damaged or does not fit the model."""


class TokenizerError(NeounifyError, ValueError):
    """Tokenizer files are missing, damaged or lack a token the model needs."""


class ImageError(NeounifyError, ValueError):
    """A picture cannot be read, is too large, or has a size that is not allowed."""


class PromptError(NeounifyError, ValueError):
    """A prompt or a message list cannot be turned into model input."""


class ContextFullError(PromptError):
    """The next tokens of a sequence would stand beyond the model's context."""


class RequestError(NeounifyError, ValueError):
    """A sampling parameter is out of its range."""


class Cancelled(NeounifyError):
    """The caller's cancel event was set while the work was running."""


def not_finite() -> CheckpointError:
    """What to raise when a model computes NaN."""
    return CheckpointError(
        "the model computes NaN or infinite values: its weights are damaged, which "
        "load(..., verify=True) would locate, or they overflow in float16"
    )


class SizeWarning(UserWarning):
    """An image is asked for at a size that the model was not trained to generate."""

"""Native unified multimodal models: one transformer that understands and generates text and images.

import neounify

pipe = neounify.load("path/to/checkpoint")
pipe.generate("a red boat on a calm lake").images[0].save("boat.png")
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # from the module: in a cycle, mypy takes `neounify.pipeline.load` for a module
    from neounify.errors import NeounifyError as NeounifyError
    from neounify.pipeline.loading import load as load
    from neounify.pipeline.pipeline import Pipeline as Pipeline

_LAZY = {
    "load": "neounify.pipeline",
    "Pipeline": "neounify.pipeline",
    "NeounifyError": "neounify.errors",
}
__all__ = ["NeounifyError", "Pipeline", "load"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `neounify --help` should not wait for it.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

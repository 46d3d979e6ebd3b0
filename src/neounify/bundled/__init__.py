"""The small model that comes with the package, so that everything can be tried at once.

It generates 64×64 images of synthetic scenes of flat shapes, answers questions about them and
edits them; docs/model-card.md says how it was trained and what it gets wrong.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def bundled_model() -> Path:
    """Its checkpoint folder, in the published layout, for `neounify.load`."""
    return Path(str(resources.files("neounify.bundled"))) / "scenes"

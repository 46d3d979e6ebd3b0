"""The benchmarks are no part of the package: pytest finds them from the repository's root."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

"""How settings that come from files are checked: no unknown field, no quiet conversion."""

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", str_strip_whitespace=False, arbitrary_types_allowed=True)
"""For `pydantic.dataclasses.dataclass(config=STRICT)`."""

"""Places as a manifest names them."""

from pathlib import Path


def absolute_place(name: str | Path) -> str:
    """The absolute path of what is on disk; what is not, such as a name on the Hub, as it is."""
    path = Path(name)
    return str(path.absolute()) if str(name) and path.exists() else str(name)

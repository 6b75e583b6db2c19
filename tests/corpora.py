"""Files of data sets, as tests write them."""

from pathlib import Path


def write(path: Path, content: str) -> None:
    """Exactly these characters, folders made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())

"""What can be wrong with a sample."""

from __future__ import annotations


class UnreadableImageError(ValueError):
    """A file that cannot be decoded as an image. Attributes: `path` and `reason`, both strings."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"

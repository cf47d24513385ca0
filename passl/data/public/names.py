"""Names from archives, before they become names of files."""

from __future__ import annotations

from pathlib import PurePosixPath

_MAX_LENGTH = 200  # bytes; most file systems take 255


def checked_name(name: str, where: str) -> str:
    """`name`, if it can be that of a file or folder inside another.

    Raises:
        ValueError: it leads elsewhere, is hidden, or no file can have it; the text starts with `where`.
    """
    bad = (
        not name
        or name.startswith(".")
        or "/" in name
        or "\\" in name
        or not name.isprintable()
        or len(name.encode("utf-8", "surrogatepass")) > _MAX_LENGTH
    )
    if bad:
        raise ValueError(f"{where}: {_shown(name)} cannot be the name of an image or a class: refused")
    return name


def last_part(member: str, where: str) -> str:
    """The file's name of an archive's member, whose path must stay inside the archive.

    Raises:
        ValueError: the path is absolute or has `..`; or see :func:`checked_name`.
    """
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where}: {_shown(member)} leads out of the folder it is unpacked to: refused")
    return checked_name(path.name, where)


def _shown(name: str) -> str:
    return repr(name[:80]) + ("..." if len(name) > 80 else "")

"""What can be said of the URL of a backend without asking that, and without what is needed to ask."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from swarmpull.errors import StartupError
from swarmpull.store.s3_location import parse_location

# The name of an entry point is a URL scheme; it loads ``async def open(url: str) -> Backend``.
ENTRY_POINT_GROUP: Final = "swarmpull.backends"
# The options of a directory's URL: whether a backend is begun where there is none.
CREATING: Final = {"": True, "create=true": True, "create=false": False}


def check_url(url: str) -> None:
    """Refuse a URL that no backend can be opened with.

    Raises:
        StartupError: says what is wrong, without what may be a secret.
    """
    scheme = urlsplit(url).scheme
    if scheme == "file":
        directory_of(url)
        may_create(url)
    elif scheme == "s3":
        parse_location(url)
    else:
        entry_point_of(scheme)


def directory_of(url: str) -> Path:
    """The directory of a ``file://`` URL.  Raises StartupError."""
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if parts.netloc or parts.fragment or not path.is_absolute():
        raise StartupError(f"backend url {url} is not a directory", "write file:///absolute/path")
    return path


def may_create(url: str) -> bool:
    """Whether a ``file://`` URL lets a backend be begun where there is none.  Raises StartupError."""
    query = urlsplit(url).query
    if query not in CREATING:
        remedy = "write file:///absolute/path, with ?create=false or without"
        raise StartupError(f"backend url {url} has an unknown option: {query}", remedy)
    return CREATING[query]


def entry_point_of(scheme: str) -> EntryPoint:
    """What an installed package has for the URLs of a scheme that is not ours.  Raises StartupError."""
    installed: Mapping[str, EntryPoint] = {
        point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)
    }
    if scheme not in installed:
        # Not the URL itself: it may hold a secret.
        allowed = ", ".join(sorted({"file", "s3", *installed}))
        raise StartupError(f"no backend for URLs of scheme {scheme!r}", f"installed are: {allowed}")
    return installed[scheme]

"""The URL of an S3 backend: ``s3://bucket/prefix?endpoint=host:port&option=value``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import attrs

from swarmpull.errors import StartupError
from swarmpull.units import parse_duration, parse_size

DEFAULT_ENDPOINT: Final = "s3.amazonaws.com"
# What MinIO, SeaweedFS and most others than Amazon call their only region.
DEFAULT_REGION: Final = "us-east-1"

# Amazon S3 user guide, "Amazon S3 multipart upload limits"; a part is held in memory, so no 5 GiB.
PART_BYTES_MIN: Final = 5 << 20
PART_BYTES_MAX: Final = 1 << 30

# Amazon S3 user guide, "General purpose bucket naming rules"; old buckets have capitals and underscores.
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]", re.ASCII)
_ENDPOINT: Final = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", re.ASCII)
_BOOLEANS: Final = {"true": True, "false": False}


@attrs.frozen(kw_only=True)
class S3Location:
    """Where an S3 backend is, and how it is used.  Credentials are not part of it.

    Attributes:
        prefix: what the names of all objects begin with; empty, or ends in ``/``.
        endpoint: host, or host:port.
        region: empty: the server is asked.
        profile: the section of the AWS credentials file; empty: the usual places in turn.
        credentials_file: of that form, to be looked into instead of all other places.
        credentials_env: the beginning of the names of the variables that are looked into instead.
        part_size: bytes of one part of an upload; longer files go up in parts.
        connections: requests at the same time.
        connect_timeout: seconds.
        read_timeout: seconds without a byte in either direction.
        attempts: how often a request is made when the server asks for patience or the network fails.
        ordered: whether the server lists names in the order of their bytes; None: all but SeaweedFS.
    """

    bucket: str
    prefix: str = ""
    endpoint: str = DEFAULT_ENDPOINT
    secure: bool = True
    region: str = ""
    profile: str = ""
    credentials_file: str = ""
    credentials_env: str = ""
    part_size: int = 16 << 20
    connections: int = 16
    connect_timeout: float = 5.0
    read_timeout: float = 30.0
    attempts: int = 5
    ordered: bool | None = None

    @property
    def name(self) -> str:
        """The URL with what says where the objects are, for messages."""
        query = "" if self.endpoint == DEFAULT_ENDPOINT else f"?endpoint={self.endpoint}"
        return f"s3://{self.bucket}/{self.prefix}{query}"


def parse_location(url: str) -> S3Location:
    """Read the URL of an S3 backend.

    Raises:
        StartupError: it is not one; says what is wrong, without what may be a secret.
    """
    parts = _split(url)
    options = _options(parts.query)
    endpoint = str(options.get("endpoint", DEFAULT_ENDPOINT))
    if "region" not in options:
        options["region"] = _default_region(endpoint)
    if "credentials_env" in options and {"profile", "credentials_file"} & options.keys():
        raise StartupError(
            "the S3 backend is told of two places for its credentials",
            "give either credentials_env, or credentials_file and profile",
        )
    prefix = unquote(parts.path).strip("/")
    return S3Location(bucket=parts.netloc, prefix=prefix + "/" if prefix else "", **options)


def _split(url: str) -> SplitResult:
    example = "write s3://bucket/prefix?endpoint=host:port"
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise StartupError("the url of the S3 backend cannot be read", example) from error
    if "@" in parts.netloc:
        raise StartupError(
            "the url of the S3 backend holds credentials",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile: &profile=NAME",
        )
    if not parts.netloc:
        raise StartupError("the url of the S3 backend names no bucket", example)
    if not _BUCKET.fullmatch(parts.netloc):
        raise StartupError(f"{parts.netloc!r} is not the name of a bucket", example)
    if parts.fragment:
        raise StartupError("the url of the S3 backend has a part after '#'", example)
    segments = unquote(parts.path).strip("/").split("/")
    if {".", ".."} & set(segments) or ("" in segments and segments != [""]):
        raise StartupError("the prefix of the S3 backend has a segment '', '.' or '..'", example)
    return parts


def _options(query: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in OPTIONS:
            # Not its value: it may be a secret.
            raise StartupError(
                f"the S3 backend has no option {name!r}", f"allowed are: {', '.join(OPTIONS)}"
            )
        if name in options:
            raise StartupError(f"option {name!r} of the S3 backend is given twice", "give it once")
        try:
            options[name] = OPTIONS[name](text)
        except ValueError as error:
            raise StartupError(f"option {name!r} of the S3 backend", str(error)) from error
    return options


def _default_region(endpoint: str) -> str:
    configured = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    is_amazon = endpoint.partition(":")[0].endswith((".amazonaws.com", ".amazonaws.com.cn"))
    return configured if configured or is_amazon else DEFAULT_REGION


def _boolean(text: str) -> bool:
    if text not in _BOOLEANS:
        raise ValueError(f"must be true or false: {text!r}")
    return _BOOLEANS[text]


def _endpoint(text: str) -> str:
    if not _ENDPOINT.fullmatch(text):
        raise ValueError(f"must be host or host:port, without a scheme or a path: {text!r}")
    return text


def _word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text, re.ASCII):
        raise ValueError(f"must be a name: {text!r}")
    return text


def _file(text: str) -> str:
    if not os.path.isabs(text):
        raise ValueError(f"must be an absolute path: {text!r}")
    return text


def _variables(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text, re.ASCII):
        raise ValueError(f"must be the beginning of the name of a variable: {text!r}")
    return text


def _part_size(text: str) -> int:
    size = parse_size(text)
    if not PART_BYTES_MIN <= size <= PART_BYTES_MAX:
        raise ValueError(f"must be from 5MiB to 1GiB: {text!r}")
    return size


def _timeout(text: str) -> float:
    seconds = parse_duration(text)
    if not seconds:
        raise ValueError(f"must be more than nothing: {text!r}")
    return seconds


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", text, re.ASCII) or int(text) < 1:
        raise ValueError(f"must be a whole number from 1 to 999: {text!r}")
    return int(text)


# The options of the URL; each name is an attribute of `S3Location`.
OPTIONS: Final[dict[str, Callable[[str], Any]]] = {
    "endpoint": _endpoint,
    "secure": _boolean,
    "region": _word,
    "profile": _word,
    "credentials_file": _file,
    "credentials_env": _variables,
    "part_size": _part_size,
    "connections": _count,
    "connect_timeout": _timeout,
    "read_timeout": _timeout,
    "attempts": _count,
    "ordered": _boolean,
}

"""RPC bodies: attrs classes to MessagePack and back.

Strict where cattrs would coerce: a field takes exactly its type, so ``"false"`` is not a bool and a
string is not a tuple of characters.  Unknown fields are ignored, so that a newer process may add some.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Final, TypeVar, get_args, get_origin

import cattrs
import msgpack  # type: ignore[import-untyped]
from cattrs.dispatch import StructureHook
from cattrs.v import transform_error

from swarmpull.digest import Digest
from swarmpull.errors import REMOTE_ERRORS, ProtocolError, SwarmpullError

T = TypeVar("T")

# A frame of 8 MiB could hold eight million empty maps, 64 bytes each once decoded.  The largest honest
# body, a page of referrers with annotations, has a few thousand.
CONTAINERS_MAX: Final = 1 << 16
# A body up to here is unpacked in one go: the arrays that it claims and does not have, at most one for each
# three bytes and each as long as the body, are 3 MB for a moment.  That is half the time for an announce.
UNCHECKED_BYTES_MAX: Final = 1024
PROBLEMS_MAX: Final = 5


def encode(body: object) -> bytes:
    """The MessagePack form of an attrs object, a map by field name."""
    packed: bytes = msgpack.packb(_converter.unstructure(body))
    return packed


def decode(data: bytes, body_type: type[T]) -> T:
    """Build a ``body_type`` from its MessagePack form.

    Raises:
        ProtocolError: not MessagePack, or not such a body; the reason names the fields.
    """
    value = _unpack(data)
    try:
        return _hasty_converter.structure(value, body_type)
    except (
        cattrs.BaseValidationError,
        SwarmpullError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
    ):
        return _structure_in_detail(value, body_type)


def _structure_in_detail(value: object, body_type: type[T]) -> T:
    """The same again, to say what is wrong and where: keeping account of it takes time for each field."""
    try:
        return _converter.structure(value, body_type)
    except (cattrs.BaseValidationError, SwarmpullError, TypeError, ValueError) as error:
        reason = "; ".join(_problems(error))
        raise ProtocolError(f"a malformed {body_type.__name__}: {reason}") from error


def encode_error(error: SwarmpullError) -> tuple[str, bytes]:
    """The class name and encoded attributes of an error that may cross RPC; empty for all others."""
    for base in type(error).__mro__:
        if REMOTE_ERRORS.get(base.__name__) is base:
            return base.__name__, msgpack.packb(_converter.unstructure(error, unstructure_as=base))
    return "", b""


def decode_error(name: str, attributes: bytes) -> SwarmpullError | None:
    """The error with that class name and those attributes, or None when it is not known here."""
    error_type = REMOTE_ERRORS.get(name)
    if error_type is None:
        return None
    try:
        return decode(attributes, error_type)
    except ProtocolError:
        # A newer version of the class: its message still says what happened.
        return None


# --- MessagePack ------------------------------------------------------------------------------


def _unpack(data: bytes) -> object:
    containers = 0

    def count(container: T) -> T:
        nonlocal containers
        containers += 1
        if containers > CONTAINERS_MAX:
            raise ProtocolError(f"a body with more than {CONTAINERS_MAX} maps and arrays")
        return container

    try:
        if len(data) <= UNCHECKED_BYTES_MAX:
            return msgpack.unpackb(data)
        _check_complete(data)
        return msgpack.unpackb(data, object_hook=count, list_hook=count)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(
            f"a body is not MessagePack: {error or type(error).__name__}"
        ) from error


def _check_complete(data: bytes) -> None:
    # Unpacking allocates an array when it reads its length, so five bytes could ask for gigabytes.
    # Skipping allocates nothing and fails when fewer elements follow than were claimed.
    size = max(len(data), 1)
    unpacker = msgpack.Unpacker(read_size=size, max_buffer_size=size)
    unpacker.feed(data)
    unpacker.skip()


# --- cattrs -----------------------------------------------------------------------------------


def _exactly(expected: type[T]) -> Callable[[object, object], T]:
    def structure(value: object, _: object) -> T:
        # bool is a subclass of int, hence type() and not isinstance().
        if type(value) is not expected:
            raise TypeError(f"expected {expected.__name__}, got {type(value).__name__}")
        return value

    return structure


def _structure_float(value: object, _: object) -> float:
    if type(value) is not float and type(value) is not int:
        raise TypeError(f"expected float, got {type(value).__name__}")
    return float(value)


def _structure_digest(value: object, _: object) -> Digest:
    if type(value) is not str:
        raise TypeError(f"expected a digest, got {type(value).__name__}")
    return Digest.parse(value)


def _is_enum(body_type: object) -> bool:
    return isinstance(body_type, type) and issubclass(body_type, enum.Enum)


def _enum_hook(enum_type: type[enum.Enum]) -> StructureHook:
    members = {member.value: member for member in enum_type}

    def structure(value: object, _: object) -> enum.Enum:
        if type(value) not in (str, int):
            raise TypeError(f"expected {enum_type.__name__}, got {type(value).__name__}")
        # A call of the enum takes five times as long, and says what is wrong.
        return members.get(value) or enum_type(value)

    return structure


def _is_tuple(body_type: object) -> bool:
    return get_origin(body_type) is tuple


def _tuple_hook(body_type: type[Any], converter: cattrs.Converter) -> StructureHook:
    element, *rest = get_args(body_type)
    if rest != [...]:
        raise NotImplementedError(f"{body_type}: only tuple[X, ...] travels")
    structure_element = converter.get_structure_hook(element)

    def structure(value: object, _: object) -> tuple[Any, ...]:
        if type(value) is not list:
            raise TypeError(f"expected an array, got {type(value).__name__}")
        return tuple(structure_element(item, element) for item in value)

    return structure


def _is_dict(body_type: object) -> bool:
    return get_origin(body_type) is dict


def _dict_hook(body_type: type[Any], converter: cattrs.Converter) -> StructureHook:
    key, value_type = get_args(body_type)
    structure_key = converter.get_structure_hook(key)
    structure_value = converter.get_structure_hook(value_type)

    def structure(value: object, _: object) -> dict[Any, Any]:
        if type(value) is not dict:
            raise TypeError(f"expected a map, got {type(value).__name__}")
        return {structure_key(k, key): structure_value(v, value_type) for k, v in value.items()}

    return structure


def _problems(error: BaseException) -> list[str]:
    if isinstance(error, cattrs.BaseValidationError):
        problems = transform_error(error, path="body", format_exception=_problem)
    else:
        problems = [_problem(error, None)]
    if len(problems) > PROBLEMS_MAX:
        problems[PROBLEMS_MAX:] = [f"and {len(problems) - PROBLEMS_MAX} more"]
    return [problem[:300] for problem in problems]


def _problem(error: BaseException, _: type | None) -> str:
    if isinstance(error, KeyError):
        return f"required field {error} missing"
    # cattrs' own formatter would say "invalid value" for any ValueError and drop its message.
    return str(error) or type(error).__name__


def _make_converter(*, detailed: bool) -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=detailed)
    for exact in (bool, int, str, bytes):
        converter.register_structure_hook(exact, _exactly(exact))
    converter.register_structure_hook(float, _structure_float)
    converter.register_structure_hook(Digest, _structure_digest)
    converter.register_unstructure_hook(Digest, str)
    converter.register_structure_hook_factory(_is_enum, _enum_hook)
    converter.register_structure_hook_factory(_is_tuple, _tuple_hook)
    converter.register_structure_hook_factory(_is_dict, _dict_hook)
    return converter


_converter: Final = _make_converter(detailed=True)
_hasty_converter: Final = _make_converter(detailed=False)

"""From layers to one `Config`: defaults < TOML file < environment < ``-o KEY=VALUE``.

Every key is a dotted path to a leaf of the attrs classes in `swarmpull.config`.  Each layer becomes
decoded values by dotted key; a later layer replaces the value and its place.  Nothing stops at the
first mistake: whatever is wrong in any layer becomes a `Problem`, and `load` raises them together.

A list of sections, such as ``[[upstreams]]``, is no leaf: its entries are counted from 0, and the number
is part of the key (``upstreams.0.url``), in every layer.

Decoding is by the declared type of the leaf and strict: TOML ``"8"`` is no integer and ``"false"``
no boolean, while the text of the environment and of ``-o`` is read by the type it is meant for.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from swarmpull.config import (
    AGENTS_MAX,
    NEVER,
    ROLES,
    UNLIMITED,
    Address,
    AgentConfig,
    Capacity,
    Config,
    Duration,
    Lifetime,
    Rate,
    Secret,
    Size,
)
from swarmpull.errors import ConfigError, Problem, StartupError
from swarmpull.patterns import some_name_matches
from swarmpull.units import (
    CAPACITY_FORMS,
    DURATION_FORMS,
    RATE_FORMS,
    SIZE_FORMS,
    format_duration,
    parse_capacity,
    parse_duration,
    parse_rate,
    parse_size,
)

DEFAULT: Final = "default"
ENVIRONMENT_PREFIX: Final = "SWARMPULL_"
CONFIG_VARIABLE: Final = "SWARMPULL_CONFIG"
# What is shown instead of a secret.
HIDDEN: Final = "(hidden)"

# Kubernetes puts the address of every Service into the environment of every pod: a Service that is
# named swarmpull-something must not keep the program from starting.
_SERVICE_VARIABLE: Final = re.compile(
    r"SWARMPULL(_[A-Z0-9_]+)?_(SERVICE_(HOST|PORT)(_\w+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)\w*)?)"
)


@attrs.frozen
class Setting:
    """One key of the configuration.

    Attributes:
        key: dotted path, for example ``agent.registry.listen``.
        type: the declared type of the leaf.
        attribute: the attrs field, for its validator and metadata.
        default: its value when no layer sets it.
    """

    key: str
    type: Any
    attribute: attrs.Attribute[Any]
    default: Any

    @property
    def help(self) -> str:
        """One line: what it means."""
        return str(self.attribute.metadata["help"])

    @property
    def shown_default(self) -> str:
        """The default as documentation shows it."""
        return str(self.attribute.metadata.get("default", plain(self.type, self.default)))


@attrs.frozen
class Sources:
    """Where a configuration comes from.

    Attributes:
        file: TOML file, if any.
        environ: the environment; variables that do not begin with ``SWARMPULL_`` are ignored.
        overrides: pairs of (option as typed by the user, ``KEY=VALUE``), later ones win.
    """

    file: Path | None = None
    environ: Mapping[str, str] = attrs.field(factory=dict)
    overrides: Sequence[tuple[str, str]] = ()


@attrs.frozen
class Loaded:
    """A configuration that can be used.

    Attributes:
        config: all of it.
        agents: the settings of each agent of this process, first to last; empty without that role.
        provenance: dotted key -> ``default``, ``file:line``, ``env NAME`` or the option.
    """

    config: Config
    agents: tuple[AgentConfig, ...]
    provenance: Mapping[str, str]


@attrs.frozen
class _Value:
    value: Any
    where: str


@attrs.define
class _Layers:
    """Decoded values by key while the layers are read, and all that is wrong with them."""

    values: dict[str, _Value] = attrs.field(factory=dict)
    problems: list[Problem] = attrs.field(factory=list)

    def complain(self, key: str, where: str, message: str) -> None:
        self.problems.append(Problem(key, where, message))

    def where(self, key: str) -> str:
        return self.values[key].where if key in self.values else DEFAULT

    def derive(self, key: str, value: Any, where: str = DEFAULT) -> None:  # noqa: ANN401 - any leaf
        """Set a key that no layer has set."""
        self.values.setdefault(key, _Value(value, where))


# --- the keys -------------------------------------------------------------------------------------


def _settings_under(prefix: str, instance: Any) -> Iterator[Setting]:  # noqa: ANN401 - any class
    hints = typing.get_type_hints(type(instance))
    for attribute in attrs.fields(type(instance)):
        key = f"{prefix}{attribute.name}"
        default = getattr(instance, attribute.name)
        if _is_table(default):
            yield from _settings_under(f"{key}.", default)
        elif _entry_class(hints[attribute.name]) is None:
            yield Setting(key, hints[attribute.name], attribute, default)


def _is_table(value: object) -> bool:
    return attrs.has(type(value)) and not isinstance(value, Address)


def _entry_class(hint: Any) -> Any:  # noqa: ANN401 - a type in, a class out
    """The class of the entries when a field is a list of sections, else None."""
    arguments = typing.get_args(hint)
    return arguments[0] if arguments and attrs.has(arguments[0]) else None


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Every key of the configuration outside lists of sections, in the order of the documentation."""
    return {setting.key: setting for setting in _settings_under("", Config())}


@attrs.frozen
class Listing:
    """A list of sections.

    Attributes:
        key: of the list, for example ``upstreams``.
        help: one line: what it means.
        entry: the class of an entry; its fields are all leaves.
        settings: of an entry by the name of the field; a default of `attrs.NOTHING` has to be set.
    """

    key: str
    help: str
    entry: Any
    settings: Mapping[str, Setting]


@functools.cache
def listings() -> Mapping[str, Listing]:
    """Every list of sections, in the order of the documentation."""
    return {listing.key: listing for listing in _listings_under("", Config())}


def _listings_under(prefix: str, instance: Any) -> Iterator[Listing]:  # noqa: ANN401 - any class
    hints = typing.get_type_hints(type(instance))
    for attribute in attrs.fields(type(instance)):
        key = f"{prefix}{attribute.name}"
        default = getattr(instance, attribute.name)
        entry = _entry_class(hints[attribute.name])
        if _is_table(default):
            yield from _listings_under(f"{key}.", default)
        elif entry is not None:
            yield Listing(key, str(attribute.metadata["help"]), entry, _entry_settings(key, entry))


def _entry_settings(key: str, entry: Any) -> Mapping[str, Setting]:  # noqa: ANN401 - any class
    hints = typing.get_type_hints(entry)
    return {
        field.name: Setting(f"{key}.N.{field.name}", hints[field.name], field, field.default)
        for field in attrs.fields(entry)
    }


def _listing_of(key: str) -> tuple[Listing, int, str] | None:
    """(list, number of the entry, name of the field) of a key of an entry; None for any other key."""
    head, _, name = key.rpartition(".")
    listed, _, number = head.rpartition(".")
    listing = listings().get(listed)
    if listing is None or re.fullmatch(r"0|[1-9][0-9]{0,3}", number, re.ASCII) is None:
        return None
    return listing, int(number), name


def setting_of(key: str) -> Setting | None:
    """The setting of a key, also of one of an entry; None when there is none."""
    entry = _listing_of(key)
    return settings().get(key) if entry is None else entry[0].settings.get(entry[2])


@functools.cache
def _tables() -> frozenset[str]:
    return frozenset(
        ".".join(parts[:depth])
        for parts in (key.split(".") for key in settings())
        for depth in range(1, len(parts))
    )


def _unknown(key: str) -> str:
    """The message for a key that does not exist."""
    entry = _listing_of(key)
    fields = () if entry is None else [f"{key.rpartition('.')[0]}.{n}" for n in entry[0].settings]
    names = (*settings(), *_tables(), *listings(), *fields)
    known = {name.replace("_", "."): name for name in names}
    wanted = key.lower().replace("_", ".").replace("-", ".")
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.7)
    if not close:
        return "unknown key"
    return f"unknown key, did you mean {known[close[0]]}?"


# --- decoding -------------------------------------------------------------------------------------


def _shown(value: object) -> str:
    """A value in a message, as TOML has it where Python would write it otherwise."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _plain_text(value: object) -> str:
    if type(value) is not str:
        raise ValueError(f"must be text in quotes: {_shown(value)}")
    return value


def _secret(value: object) -> str:
    if type(value) is not str:
        raise ValueError("must be text in quotes")
    return _text_secret(value)


def _text_secret(text: str) -> str:
    if text == HIDDEN:
        raise ValueError("must be the secret itself, not what is shown instead of it")
    return text


def _strict_bool(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(f"must be true or false, without quotes: {_shown(value)}")
    return value


def _strict_int(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"must be a whole number, without quotes: {_shown(value)}")
    return value


def _strict_list(value: object) -> tuple[str, ...]:
    if type(value) is not list or not all(type(entry) is str for entry in value):
        raise ValueError(f'must be a list of texts, such as ["host:7300"]: {_shown(value)}')
    return tuple(value)


def _strict_size(value: object) -> int:
    if type(value) is int and value >= 0:
        return value
    if type(value) is str:
        return parse_size(value)
    raise ValueError(f"must be {SIZE_FORMS}: {_shown(value)}")


def _strict_rate(value: object) -> float:
    if type(value) is int and value > 0:
        return float(value)
    if type(value) is str:
        return parse_rate(value)
    raise ValueError(f"must be {RATE_FORMS}: {_shown(value)}")


def _strict_duration(value: object) -> float:
    if type(value) is str:
        return parse_duration(value)
    raise ValueError(f"must be {DURATION_FORMS}, in quotes: {_shown(value)}")


def _strict_lifetime(value: object) -> float:
    return _text_lifetime(value) if type(value) is str else _strict_duration(value)


def _text_lifetime(text: str) -> float:
    if text == "never":
        return NEVER
    try:
        lifetime = parse_duration(text)
    except ValueError:
        raise ValueError(f"must be {DURATION_FORMS}, or never: {text!r}") from None
    if not lifetime:
        raise ValueError(f"must be above 0, or never: {text!r}")
    return lifetime


def _strict_capacity(value: object) -> str:
    if type(value) is int and value > 0:
        return str(value)
    if type(value) is str:
        return parse_capacity(value)
    raise ValueError(f"must be {CAPACITY_FORMS}: {_shown(value)}")


def _path(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise ValueError(f"must be a path: {text!r}")
    try:
        return Path(text).expanduser()
    except RuntimeError as exc:  # pathlib's way to say that ~user is unknown
        raise ValueError(f"must be a path of a known user: {text!r}") from exc


def _text_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"must be true or false: {text!r}")
    return text.lower() == "true"


def _text_int(text: str) -> int:
    if re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII) is None:
        raise ValueError(f"must be a whole number: {text!r}")
    return int(text)


def _text_list(text: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in text.split(",")) if text.strip() else ()


# type -> (what TOML gives, what a text gives)
_DECODERS: Final[dict[Any, tuple[Callable[[Any], Any], Callable[[str], Any]]]] = {
    str: (_plain_text, str),
    Secret: (_secret, _text_secret),
    bool: (_strict_bool, _text_bool),
    int: (_strict_int, _text_int),
    Size: (_strict_size, parse_size),
    Rate: (_strict_rate, parse_rate),
    Duration: (_strict_duration, parse_duration),
    Lifetime: (_strict_lifetime, _text_lifetime),
    Capacity: (_strict_capacity, parse_capacity),
    Path: (lambda value: _path(_plain_text(value)), _path),
    Address: (lambda value: Address.parse(_plain_text(value)), Address.parse),
    tuple[str, ...]: (_strict_list, _text_list),
}


def decode(setting: Setting, value: Any, *, text: bool) -> Any:  # noqa: ANN401 - TOML in, leaf out
    """The value of a leaf from what TOML gave, or from a ``text`` of the environment or ``-o``.

    Raises:
        ValueError: when it is not what the leaf takes; the message says what that is.
    """
    if typing.get_origin(setting.type) is Literal:
        choices = typing.get_args(setting.type)
        if type(value) is not str or value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}: {_shown(value)}")
        decoded = value
    else:
        from_toml, from_text = _DECODERS[setting.type]
        decoded = from_text(value) if text else from_toml(value)
    if setting.attribute.validator is not None:
        _validate(setting.attribute, decoded)
    return decoded


def _validate(attribute: attrs.Attribute[Any], value: object) -> None:
    """Run the validator of a field, without its class; the field's own name leaves the message."""
    try:
        typing.cast(Any, attribute.validator)(None, attribute, value)
    except ValueError as exc:
        raise ValueError(str(exc.args[0]).removeprefix(f"'{attribute.name}' ")) from exc


def plain(kind: Any, value: Any) -> str:  # noqa: ANN401 - any leaf
    """A leaf as TOML would write it, without the quotes of a text."""
    if kind is Duration:
        return format_duration(value)
    if kind is Lifetime:
        return "never" if value == NEVER else format_duration(value)
    if kind is Rate:
        return "unlimited" if value == UNLIMITED else str(int(value))
    if isinstance(value, bool):
        return str(value).lower()
    if kind is Secret:
        return HIDDEN if value else ""
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value)


# --- the layers -----------------------------------------------------------------------------------


def _set(layers: _Layers, key: str, value: Any, where: str, *, text: bool) -> None:  # noqa: ANN401
    if key in _tables():
        layers.complain(key, where, "is a section, not a value: set one of the keys in it")
        return
    if key in listings():
        layers.complain(
            key, where, f"is a list of sections: [[{key}]] in the file, {key}.0.KEY here"
        )
        return
    setting = setting_of(key)
    if setting is None:
        layers.complain(key, where, _unknown(key))
        return
    try:
        layers.values[key] = _Value(decode(setting, value, text=text), where)
    except ValueError as exc:
        layers.complain(key, where, str(exc))


def _read_file(layers: _Layers, path: Path) -> None:
    try:
        text = path.read_bytes().decode("utf-8")
        tree = tomllib.loads(text)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        layers.complain("--config", str(path), f"cannot read the configuration file: {reason}")
    except UnicodeDecodeError as exc:
        layers.complain("--config", str(path), f"is not UTF-8 text: byte {exc.start}")
    except tomllib.TOMLDecodeError as exc:
        line = re.search(r"at line (\d+)", str(exc))
        layers.complain("--config", f"{path}:{line[1]}" if line else str(path), f"bad TOML: {exc}")
    else:
        _read_tree(layers, tree, "", path, _key_lines(text))


def _read_tree(
    layers: _Layers, tree: dict[str, Any], prefix: str, path: Path, lines: Mapping[str, int]
) -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in _tables() and isinstance(value, dict):
            _read_tree(layers, value, f"{key}.", path, lines)
        elif key in listings() and _is_list_of_sections(value):
            for number, entry in enumerate(value):
                section = f"{key}.{number}"
                _read_tree(layers, entry, f"{section}.", path, lines)
                if not entry:
                    layers.complain(section, _place(path, section, lines), "is empty")
        else:
            _set(layers, key, value, _place(path, key, lines), text=False)


def _is_list_of_sections(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _place(path: Path, key: str, lines: Mapping[str, int]) -> str:
    """``file:line`` of a key, or of the nearest table around it that has a line."""
    while key:
        if key in lines:
            return f"{path}:{lines[key]}"
        key = key.rpartition(".")[0]
    return str(path)


def _key_lines(text: str) -> dict[str, int]:
    """Dotted key -> line, for the tables and keys that begin a line.

    tomllib gives no positions.  Only the usual forms are recognised; the rest (keys of inline
    tables) get the line of what encloses them.
    """
    lines: dict[str, int] = {}
    entries: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[\s*([\w.\-\"' ]+?)\s*\]\]", line, re.ASCII):
            name = _bare(header[1])
            entries[name] = entries.get(name, -1) + 1
            key = table = f"{name}.{entries[name]}"
        elif header := re.match(r"\s*\[\s*([\w.\-\"' ]+?)\s*\]", line, re.ASCII):
            key = table = _bare(header[1])
        elif assignment := re.match(r"\s*([\w.\-\"' ]+?)\s*=", line, re.ASCII):
            key = f"{table}.{_bare(assignment[1])}".lstrip(".")
        else:
            continue
        while key:
            lines.setdefault(key, number)
            key = key.rpartition(".")[0]
    return lines


def _bare(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


def _read_environment(layers: _Layers, environ: Mapping[str, str]) -> None:
    for name, value in sorted(environ.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or name == CONFIG_VARIABLE:
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        if setting_of(key) or _SERVICE_VARIABLE.fullmatch(name) is None:
            _set(layers, key, value, f"env {name}", text=True)


def _read_overrides(layers: _Layers, overrides: Sequence[tuple[str, str]]) -> None:
    for option, text in overrides:
        key, equals, value = text.partition("=")
        if equals:
            _set(layers, key.strip(), value.strip(), option, text=True)
        else:
            layers.complain(text, option, "must be KEY=VALUE, such as log.level=debug")


# --- what depends on other keys -------------------------------------------------------------------


def _derive_directories(layers: _Layers) -> None:
    """Directories are absolute from here on; what is not set lies under ``data_dir``."""
    base = layers.values.get("data_dir", _Value(settings()["data_dir"].default, DEFAULT)).value
    base = base.absolute()
    for role in ("agent", "origin", "index"):
        layers.derive(f"{role}.data_dir", base / role)
    for role in ("origin", "index"):
        layers.derive(f"{role}.backend.url", (base / "backend").as_uri())
    layers.derive("data_dir", base)
    for key in ("data_dir", "agent.data_dir", "origin.data_dir", "index.data_dir"):
        current = layers.values[key]
        layers.values[key] = _Value(current.value.absolute(), current.where)


# cluster key -> the listener that makes the local one a member
_MEMBERS: Final = {
    "cluster.trackers": "tracker.rpc.listen",
    "cluster.indexes": "index.rpc.listen",
    "cluster.origins": "origin.rpc.listen",
}
# Which lists a role cannot do without.  An index that knows no others keeps nothing of what it reads.
_NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "agent": ("cluster.trackers", "cluster.indexes", "cluster.origins"),
    "origin": ("cluster.trackers", "cluster.indexes", "cluster.origins"),
    "tracker": ("cluster.origins",),
    "index": (),
}


def _derive_single_node(layers: _Layers) -> None:
    """All roles in one process: they find one another, and the agents take pushes."""
    layers.derive("agent.registry.push", True, "default of --role all")
    # Who tries it out pushes and pulls at once.
    layers.derive("agent.tag_freshness", 0.0, "default of --role all")
    for key, listener in _MEMBERS.items():
        if key in layers.values:
            continue
        value = layers.values.get(listener)
        address: Address = value.value if value else settings()[listener].default
        if address.port == 0:
            layers.complain(
                listener,
                layers.where(listener),
                f"must be a fixed port, or {key} must be set: the other roles dial it",
            )
            continue
        layers.derive(key, (str(address.local()),), "default of --role all")


def _check_members(layers: _Layers, roles: frozenset[str]) -> None:
    """Every list that one of the roles needs, named once with all who need it."""
    broken = {problem.key for problem in layers.problems}
    if "--config" in broken:
        return  # the lists may well be in the file that could not be read
    for key, listener in _MEMBERS.items():
        needed_by = [role for role in ROLES if role in roles and key in _NEEDED[role]]
        value = layers.values.get(key)
        if needed_by and not broken & {key, listener} and not (value and value.value):
            port = settings()[listener].default.port
            layers.complain(
                key,
                layers.where(key),
                f'must name at least one, such as ["host:{port}"]: '
                f"{' and '.join(needed_by)} cannot work without it",
            )


def _check_watermarks(layers: _Layers, config: Config) -> None:
    """A low watermark above the high one, as far as that can be said without looking at a disk."""
    for role, store in (("agent", config.agent.store), ("origin", config.origin.store)):
        low, high = store.low_watermark, store.max_bytes
        if low == "unlimited" != high or (
            low.isdecimal() and high.isdecimal() and int(low) > int(high)
        ):
            key = f"{role}.store.low_watermark"
            message = f"must not be above {role}.store.max_bytes, which is {high}: {low}"
            layers.complain(key, layers.where(key), message)


def _check_tls(layers: _Layers, config: Config) -> None:
    """All three files, or none.  Whether they are any good is for those to say who may read them."""
    given = {key: getattr(config.tls, key) for key in ("ca", "cert", "key")}
    if not any(given.values()):
        useless = {"tls.trusted.0.cluster": config.tls.trusted, "tls.crl": config.tls.crl}
        for key in [key for key, value in useless.items() if value]:
            message = "means nothing without tls.ca, tls.cert and tls.key: plain connections trust everybody"
            layers.complain(key, layers.where(key), message)
    for key in [key for key, file in given.items() if not file and any(given.values())]:
        others = " and ".join(f"tls.{other}" for other, file in given.items() if file)
        layers.complain(
            f"tls.{key}", layers.where(f"tls.{key}"), f"must name a file too: {others} is set"
        )
    for key in settings():
        table, _, name = key.rpartition(".")
        other = f"{table}.{'tls_key' if name == 'tls_cert' else 'tls_cert'}"
        if name in ("tls_cert", "tls_key") and _leaf(config, other) and not _leaf(config, key):
            layers.complain(key, layers.where(key), f"must name a file too: {other} is set")


# --- lists of sections ----------------------------------------------------------------------------


def _entries(layers: _Layers, listing: Listing) -> Iterator[Any]:
    """The entries of a list of sections; one that cannot be made is complained of instead."""
    found: dict[int, dict[str, _Value]] = {}
    for key, value in layers.values.items():
        entry = _listing_of(key)
        if entry is not None and entry[0] is listing:
            found.setdefault(entry[1], {})[entry[2]] = value
    for position, number in enumerate(sorted(found)):
        fields = found[number]
        key, where = f"{listing.key}.{number}", next(iter(fields.values())).where
        if number != position:
            message = (
                f"there is no {listing.key}.{position}: entries are counted from 0 without a gap"
            )
            layers.complain(key, where, message)
            return
        if _is_whole(layers, listing, key, fields):
            yield listing.entry(**{name: value.value for name, value in fields.items()})


def _is_whole(layers: _Layers, listing: Listing, key: str, fields: Mapping[str, _Value]) -> bool:
    """Whether an entry has what it needs; says what is missing, unless that was wrong anyway."""
    broken = {problem.key for problem in layers.problems}
    missing = [
        f"{key}.{name}"
        for name, setting in listing.settings.items()
        if setting.default is attrs.NOTHING and name not in fields
    ]
    for name in missing:
        if name not in broken:
            layers.complain(name, next(iter(fields.values())).where, "must be set")
    return not missing


def _check_upstreams(layers: _Layers, config: Config) -> None:
    """Upstreams that cannot be told apart, and credentials that are given twice."""
    seen: dict[str, str] = {
        name.replace(":", "_"): "cluster.names" for name in config.cluster.names
    }
    for number, upstream in enumerate(config.upstreams):
        key = f"upstreams.{number}"
        name = upstream.name.replace(":", "_")
        if name in seen:
            message = f"must not be named in {seen[name]} too: {upstream.name}"
            layers.complain(f"{key}.name", layers.where(f"{key}.name"), message)
        seen.setdefault(name, key)
        given = [
            field
            for field in ("password", "password_file", "docker_config")
            if getattr(upstream, field)
        ]
        if len(given) > 1:
            message = f"must not be set together with {given[0]}"
            layers.complain(f"{key}.{given[1]}", layers.where(f"{key}.{given[1]}"), message)
        if bool(upstream.username) != bool(upstream.password or upstream.password_file):
            message = "needs a password or password_file, and they need it"
            layers.complain(f"{key}.username", layers.where(f"{key}.username"), message)
    mirrored, key = config.agent.mirror.registry, "agent.mirror.registry"
    if mirrored and mirrored.replace(":", "_") not in seen:
        message = f"must be the name of an entry of upstreams, or of cluster.names: {mirrored}"
        layers.complain(key, layers.where(key), message)


def _check_replications(layers: _Layers, config: Config, roles: frozenset[str]) -> None:
    """Rules that name no remote, or that match nothing, and what an index needs to follow them."""
    _check_once(layers, "remotes", "name", [remote.name for remote in config.remotes])
    _check_once(layers, "tls.trusted", "cluster", [each.cluster for each in config.tls.trusted])
    for number, trusted in enumerate(config.tls.trusted):
        for pattern in trusted.repositories:
            if reason := _matches_nothing(config, pattern):
                key = f"tls.trusted.{number}.repositories"
                layers.complain(key, layers.where(key), f"{reason}: {pattern}")
    known = {remote.name for remote in config.remotes}
    seen: set[tuple[str, str]] = set()
    for number, rule in enumerate(config.replications):
        key = f"replications.{number}"
        if rule.remote not in known:
            message = f"must be the name of one of the remotes: {rule.remote}"
            layers.complain(f"{key}.remote", layers.where(f"{key}.remote"), message)
        reason = _matches_nothing(config, rule.pattern)
        if (rule.pattern, rule.remote) in seen:
            reason = f"is there already for remote {rule.remote}"
        if reason:
            message = f"{reason}: {rule.pattern}"
            layers.complain(f"{key}.pattern", layers.where(f"{key}.pattern"), message)
        seen.add((rule.pattern, rule.remote))
    if config.replications and "index" in roles:
        for key in ("cluster.origins", "cluster.indexes"):
            if not _leaf(config, key):
                message = "must name at least one: an index with replications cannot work without"
                layers.complain(key, layers.where(key), message)


def _matches_nothing(config: Config, pattern: str) -> str:
    """Why no repository of this cluster can match a pattern; empty when one can."""
    if not some_name_matches(pattern):
        return "matches nothing that may be the name of a repository"
    first, _, rest = pattern.partition("/")
    if rest and first in {upstream.name.replace(":", "_") for upstream in config.upstreams}:
        return f"matches nothing but repositories of upstream {first}, which are not replicated"
    patterns = [entry.pattern for entry in config.origin.namespaces]
    if patterns and not any(some_name_matches(pattern, other) for other in patterns):
        return f"matches nothing that origin.namespaces lets be pushed ({', '.join(patterns)})"
    return ""


def _check_once(layers: _Layers, listing: str, field: str, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            key = f"{listing}.{number}.{field}"
            message = f"must not be that of {listing}.{names.index(name)} too: {name}"
            layers.complain(key, layers.where(key), message)


# Which URLs a role opens when it starts.
_BACKENDS: Final[dict[str, tuple[str, ...]]] = {
    "origin": ("origin.backend", "origin.namespaces"),
    "index": ("index.backend",),
}


def _check_backends(
    layers: _Layers, roles: frozenset[str], check: Callable[[str], None] | None
) -> None:
    """The URLs of the backends that the roles open; of all, when no role is named."""
    if check is None:
        return
    sections = tuple(
        section
        for role, sections in _BACKENDS.items()
        if not roles or role in roles
        for section in sections
    )
    for key, value in layers.values.items():
        if key.startswith(sections) and key.endswith(".url"):
            try:
                check(value.value)
            except StartupError as error:
                layers.complain(key, value.where, str(error))


# --- several agents, and listeners that collide ---------------------------------------------------


def _agents(config: Config, count: int | None) -> tuple[AgentConfig, ...]:
    """The settings of each agent; with ``--agents`` they are numbered from 1."""
    if count is None:
        return (config.agent,)
    return tuple(_numbered(config.agent, number) for number in range(1, count + 1))


def _numbered(agent: AgentConfig, number: int) -> AgentConfig:
    shift = number - 1
    registry, mirror, peer, admin = agent.registry, agent.mirror, agent.peer, agent.admin
    return attrs.evolve(
        agent,
        registry=attrs.evolve(registry, listen=registry.listen.shifted(shift)),
        mirror=attrs.evolve(mirror, listen=mirror.listen.shifted(shift)),
        peer=attrs.evolve(peer, listen=peer.listen.shifted(shift)),
        admin=attrs.evolve(admin, listen=admin.listen.shifted(shift)),
        data_dir=agent.data_dir.with_name(f"{agent.data_dir.name}-{number}"),
    )


@attrs.frozen
class _Listener:
    key: str
    agent: int | None
    address: Address

    def __str__(self) -> str:
        return f"{self.address}{f' (agent {self.agent})' if self.agent else ''}"


def _listeners(
    config: Config, roles: frozenset[str], agents: Sequence[AgentConfig]
) -> Iterator[_Listener]:
    """Every listener of this process; those of several agents have the number of theirs."""
    for role in ROLES:
        if role not in roles:
            continue
        instances = agents if role == "agent" else (getattr(config, role),)
        for number, instance in enumerate(instances, 1):
            agent = number if len(instances) > 1 else None
            for attribute in attrs.fields(type(instance)):
                section = getattr(instance, attribute.name)
                listen = getattr(section, "listen", None)
                if listen is not None and getattr(section, "is_on", True):
                    key = f"{role}.{attribute.name}.listen"
                    yield _Listener(key, agent, listen)


def _check_listeners(layers: _Layers, listeners: Iterator[_Listener]) -> None:
    """Ports that do not exist, and pairs of keys whose listeners cannot be bound together."""
    taken: dict[int, list[_Listener]] = {}
    reported: set[tuple[str, str]] = set()
    for listener in listeners:
        port = listener.address.port
        clashes = [other for other in taken.get(port, ()) if _clash(listener, other)]
        if port > 65535 and (listener.key, "") not in reported:
            reported.add((listener.key, ""))
            layers.complain(
                listener.key,
                layers.where(listener.key),
                f"{listener} is beyond the highest port, 65535: start lower",
            )
        for other in clashes:
            if (listener.key, other.key) not in reported:
                reported.add((listener.key, other.key))
                _complain_of_clash(layers, listener, other)
        if 0 < port <= 65535:
            taken.setdefault(port, []).append(listener)


def _clash(one: _Listener, other: _Listener) -> bool:
    hosts_differ = one.address.host != other.address.host
    return not hosts_differ or one.address.is_wildcard or other.address.is_wildcard


def _complain_of_clash(layers: _Layers, one: _Listener, other: _Listener) -> None:
    """Blame the listener that somebody configured, if only one of the two was."""
    if layers.where(one.key) == DEFAULT and layers.where(other.key) != DEFAULT:
        one, other = other, one
    layers.complain(
        one.key,
        layers.where(one.key),
        f"{one} collides with {other.key} {other}: choose another port for one of them",
    )


# --- the result -----------------------------------------------------------------------------------


def _build(layers: _Layers, instance: Any, prefix: str = "") -> Any:  # noqa: ANN401 - any class
    """A copy of a default instance with the values of all layers in place."""
    changes: dict[str, Any] = {}
    for attribute in attrs.fields(type(instance)):
        key = f"{prefix}{attribute.name}"
        current = getattr(instance, attribute.name)
        if _is_table(current):
            changes[attribute.name] = _build(layers, current, f"{key}.")
        elif key in listings():
            changes[attribute.name] = tuple(_entries(layers, listings()[key]))
        elif key in layers.values:
            changes[attribute.name] = layers.values[key].value
    return attrs.evolve(instance, **changes)


def load(
    sources: Sources,
    *,
    roles: frozenset[str] = frozenset(),
    agents: int | None = None,
    check_backend: Callable[[str], None] | None = None,
) -> Loaded:
    """Merge the layers for a process that runs ``roles``; ``agents`` is the value of --agents.

    All four roles together are the single-node mode, in which they find one another.
    ``check_backend`` raises StartupError for a URL that cannot be one of a backend: the backends know.

    Raises:
        ConfigError: with every problem of every layer.
    """
    layers = _Layers()
    if sources.file is not None:
        _read_file(layers, sources.file)
    _read_environment(layers, sources.environ)
    _read_overrides(layers, sources.overrides)
    _check_agents(layers, roles, agents)
    if roles == frozenset(ROLES):
        _derive_single_node(layers)
    _derive_directories(layers)
    _check_members(layers, roles)
    config: Config = _build(layers, Config())
    if agents is not None and not 1 <= agents <= AGENTS_MAX:
        agents = None
    agent_settings = _agents(config, agents) if "agent" in roles else ()
    _check_listeners(layers, _listeners(config, roles, agent_settings))
    _check_watermarks(layers, config)
    _check_upstreams(layers, config)
    _check_tls(layers, config)
    _check_replications(layers, config, roles)
    _check_backends(layers, roles, check_backend)
    if layers.problems:
        raise ConfigError(tuple(layers.problems))
    return Loaded(config, agent_settings, {key: layers.where(key) for key in toml_values(config)})


def toml_values(config: Config) -> dict[str, Any]:
    """Every key with its value as TOML (and JSON) has it: texts, numbers, booleans, lists.

    Keys of entries have their number: ``upstreams.0.url``.  Secrets are hidden.
    """
    values = {key: _toml_value(setting, _leaf(config, key)) for key, setting in settings().items()}
    for key, listing in listings().items():
        entries: Any = _leaf(config, key)
        for number, entry in enumerate(entries):
            for name, setting in listing.settings.items():
                values[f"{key}.{number}.{name}"] = _toml_value(setting, getattr(entry, name))
    return values


def _leaf(config: Config, key: str) -> object:
    return functools.reduce(getattr, key.split("."), config)


def _toml_value(setting: Setting, value: Any) -> Any:  # noqa: ANN401 - any leaf
    if isinstance(value, tuple):
        return list(value)
    if setting.type in (int, bool, Size):
        return value
    return plain(setting.type, value)


def _check_agents(layers: _Layers, roles: frozenset[str], agents: int | None) -> None:
    if agents is None:
        return
    if not 1 <= agents <= AGENTS_MAX:
        layers.complain("--agents", "", f"must be from 1 to {AGENTS_MAX}: {agents}")
    if "agent" not in roles:
        layers.complain("--agents", "", "needs --role agent or --role all")

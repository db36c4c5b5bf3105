"""podman, buildah, skopeo and CRI-O: mirrors in a file of ``registries.conf.d``.  Pure.

An entry of a later file replaces that of an earlier one for the same registry, it is not merged with it.  So
ours begins as a copy of what holds so far.
"""

from __future__ import annotations

import json
import tomllib
from typing import Any, Final

from swarmpull.setup.plan import Files, Plan, Runtime, SetupRefused, Wanted, marked, without_marked

MAIN: Final = "/etc/containers/registries.conf"
FOLDER: Final = "/etc/containers/registries.conf.d"
# Files are read in the order of their names.
NAME: Final = "zz-swarmpull.conf"
OURS: Final = f"{FOLDER}/{NAME}"


def plan(files: Files, wanted: Wanted) -> Plan:
    """Raises SetupRefused."""
    if not wanted.registries:
        raise SetupRefused(OURS, "mirrors are for named registries: name them with --upstream")
    notes = []
    entries = _entries(files)
    lines: list[str] = []
    for registry in wanted.registries:
        former = entries.get(registry, {"location": registry})
        if former.get("blocked") is True:
            notes.append(f"{registry} is blocked, and stays so")
        mirror = _mirror(registry, wanted)
        mirrors = [
            each for each in former.get("mirror", []) if each.get("location") != mirror["location"]
        ]
        lines += _section("registry", {key: former[key] for key in former if key != "mirror"})
        for each in (mirror, *mirrors):
            lines += _section("registry.mirror", each)
    later = [name for name in files.names(FOLDER) if name > NAME and name.endswith(".conf")]
    if later:
        notes.append(
            f"{', '.join(later)} in {FOLDER} comes after {NAME}, and wins for the same registry"
        )
    notes.append(
        "podman, buildah and skopeo read it for each pull; for CRI-O: systemctl reload crio"
    )
    return Plan({OURS: marked(lines)}, tuple(notes))


def _without(path: str, text: str, _agent: str) -> str | None:
    return without_marked(path, text).strip() or None


RUNTIME: Final = Runtime("registries", plan, _without)


def _mirror(registry: str, wanted: Wanted) -> dict[str, Any]:
    """The agent as a mirror: what it stands for is the first part of the path, where a colon cannot be."""
    prefix = "" if registry in wanted.own else f"/{registry.replace(':', '_')}"
    mirror: dict[str, Any] = {"location": f"{wanted.agent.address}{prefix}"}
    if wanted.agent.is_plain:
        mirror["insecure"] = True
    return mirror


def _entries(files: Files) -> dict[str, dict[str, Any]]:
    """What holds for each registry before our file is read."""
    entries = {}
    folder = [
        f"{FOLDER}/{name}" for name in files.names(FOLDER) if name.endswith(".conf") and name < NAME
    ]
    for path in (MAIN, *folder):
        text = files.read(path)
        if text is None:
            continue
        for entry in _registries(path, text):
            key = entry.get("prefix") or entry.get("location")
            if isinstance(key, str):
                entries[key] = entry
    return entries


def _registries(path: str, text: str) -> list[dict[str, Any]]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SetupRefused(path, f"it is not valid TOML: {error}") from error
    found: list[dict[str, Any]] = document.get("registry", [])
    if not _is_tables(found):
        raise SetupRefused(
            path, "its registry is no list of tables: version 1 of its form has no mirrors"
        )
    for entry in found:
        mirrors = entry.get("mirror", [])
        if not _is_tables(mirrors):
            raise SetupRefused(path, "the mirror of a registry is no list of tables")
        for each in (entry, *mirrors):
            for key, value in each.items():
                if key != "mirror" and type(value) not in (str, bool):
                    raise SetupRefused(path, f"its {key} is neither text nor true or false")
    return found


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _section(name: str, values: dict[str, Any]) -> list[str]:
    return [
        f"[[{name}]]",
        *(f"{key} = {json.dumps(values[key], ensure_ascii=False)}" for key in values),
    ]

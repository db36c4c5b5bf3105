"""containerd: a ``hosts.toml`` for each registry, or one for all that have none.  Pure."""

from __future__ import annotations

import copy
import fnmatch
import json
import posixpath
import tomllib
from collections.abc import Iterator
from typing import Any, Final

from swarmpull.setup.plan import Files, Plan, Runtime, SetupRefused, Wanted, marked, without_marked

CONFIG: Final = "/etc/containerd/config.toml"
CERTS: Final = "/etc/containerd/certs.d"
DEFAULT: Final = "_default"
# Where the registries of the CRI plugin are configured, by the version of the configuration.
_PLUGINS: Final = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.images"}
_CERTIFICATES: Final = (".crt", ".cert", ".key")


def plan(files: Files, wanted: Wanted) -> Plan:
    """Raises SetupRefused."""
    certs, notes = _certs_directory(files)
    texts = {}
    for registry in wanted.registries or (DEFAULT,):
        folder = _folder(files, certs, registry)
        path = f"{certs}/{folder}/hosts.toml"
        before = files.read(path)
        if before is None:
            _refuse_hidden_certificates(files, path)
        after = _with_host(path, before or "", wanted)
        if after is None:
            notes.append(f"{path} names {wanted.agent} already, and is left as it is")
        else:
            texts[path] = after
    if not wanted.registries:
        others = [name for name in files.names(certs) if name != DEFAULT]
        if others:
            notes.append(
                f"{certs} has directories for {', '.join(others)}: {DEFAULT} does not count for those; "
                "name them with --upstream to pull them through the agent, too"
            )
    notes.append(f"containerd reads {certs} for each pull: no restart is needed for hosts.toml")
    notes.append(f"ctr looks there only with --hosts-dir {certs}")
    return Plan(texts, tuple(notes))


def _without(path: str, text: str, _agent: str) -> str | None:
    return without_marked(path, text) or None


RUNTIME: Final = Runtime("containerd", plan, _without)


# --- hosts.toml -----------------------------------------------------------------------------------


def _folder(files: Files, certs: str, registry: str) -> str:
    """The directory of a registry: the first one that is there in the order in which containerd looks."""
    host, colon, port = registry.partition(":")
    escaped = f"{host}_{port}_" if colon else host
    return escaped if escaped in files.names(certs) else registry


def _refuse_hidden_certificates(files: Files, path: str) -> None:
    folder = posixpath.dirname(path)
    certificates = [name for name in files.names(folder) if name.endswith(_CERTIFICATES)]
    if certificates:
        raise SetupRefused(
            path,
            f"{folder} has certificates ({', '.join(certificates)}) that containerd would not look at any "
            "more: make a hosts.toml that names them (ca, client) first",
        )


def _with_host(path: str, text: str, wanted: Wanted) -> str | None:
    """The text with the agent as the first host; None when it is a host already."""
    before = _parsed(path, text)
    hosts = before.get("host", {})
    if not isinstance(hosts, dict):
        raise SetupRefused(path, "its host is no table")
    agent = str(wanted.agent)
    if agent in hosts:
        return None
    lines = [f"[host.{json.dumps(agent)}]", '  capabilities = ["pull", "resolve"]']
    if not wanted.agent.is_loopback:
        # Else an agent that is switched off holds up every pull for 30 s; on loopback it is refused at once.
        lines.append('  dial_timeout = "1s"')
    position = _first_table(text)
    head, tail = text[:position], text[position:]
    if head and not head.endswith("\n"):
        head += "\n"
    after = head + marked(lines) + ("\n" if tail else "") + tail
    expected = copy.deepcopy(before)
    added = tomllib.loads("\n".join(lines))["host"][agent]
    expected.setdefault("host", {})[agent] = added
    try:
        is_right = tomllib.loads(after) == expected
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise SetupRefused(
            path, "there is no safe place in it: add this by hand\n" + "\n".join(lines)
        )
    return after


def _first_table(text: str) -> int:
    """Where the first table begins: hosts are tried in the order in which they stand there."""
    position = 0
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("["):
            try:
                tomllib.loads(text[:position])
            except tomllib.TOMLDecodeError:
                # inside a list or a text of several lines
                pass
            else:
                return position
        position += len(line)
    return position


def _parsed(path: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SetupRefused(path, f"it is not valid TOML: {error}") from error


# --- config.toml ----------------------------------------------------------------------------------


def _certs_directory(files: Files) -> tuple[str, list[str]]:
    """Where hosts.toml files go, and what is to be said about containerd's own configuration."""
    text = files.read(CONFIG)
    if text is None:
        return CERTS, [
            f"there is no {CONFIG}: containerd before 2.2 looks for hosts.toml only if told to, see "
            "docs/setup.md; then restart it",
        ]
    notes: list[str] = []
    version = _parsed(CONFIG, text).get("version", 1)
    for _, document in _documents(files, text):
        for plugin in _PLUGINS.values():
            registry = _table(document, "plugins", plugin, "registry")
            found = registry.get("config_path")
            if isinstance(found, str) and found:
                return _first_directory(found), notes
            if registry.get("mirrors"):
                notes.append(
                    f"{CONFIG} has registry.mirrors, which containerd refuses beside config_path: move them "
                    "into hosts.toml files first"
                )
    if version not in _PLUGINS:
        return CERTS, [
            f"{CONFIG} is of version {version}: hosts.toml files need version = 2 or 3 there"
        ]
    # 2.2 and newer have a default, which is used when nothing is said.
    exempt = f"; containerd 2.2 and newer look in {CERTS} by themselves" if version == 3 else ""
    notes.append(
        f"add to {CONFIG}, and restart containerd (systemctl restart containerd){exempt}:\n"
        f'[plugins."{_PLUGINS[version]}".registry]\n  config_path = "{CERTS}"'
    )
    return CERTS, notes


def _first_directory(config_path: str) -> str:
    first = config_path.split(":")[0].rstrip("/")
    if not first.startswith("/"):
        raise SetupRefused(CONFIG, f"its config_path is not absolute: {config_path!r}")
    return first


def _documents(files: Files, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configuration, and what it imports; what is imported counts for more."""
    main = _parsed(CONFIG, text)
    imports = main.get("imports", [])
    for pattern in reversed(imports if isinstance(imports, list) else []):
        path = posixpath.join(posixpath.dirname(CONFIG), str(pattern))
        folder, name = posixpath.split(path)
        for found in reversed(fnmatch.filter(files.names(folder), name)):
            imported = files.read(f"{folder}/{found}")
            if imported is not None:
                yield f"{folder}/{found}", _parsed(f"{folder}/{found}", imported)
    yield CONFIG, main


def _table(document: Any, *keys: str) -> dict[str, Any]:  # noqa: ANN401 - of TOML
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document if isinstance(document, dict) else {}

"""Docker: ``registry-mirrors`` in ``daemon.json``, which count for docker.io alone.  Pure."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from swarmpull.setup.plan import Files, Plan, Runtime, SetupRefused, Wanted

CONFIG: Final = "/etc/docker/daemon.json"
_MIRRORS: Final = "registry-mirrors"
_INSECURE: Final = "insecure-registries"
HUB: Final = "docker.io"


def plan(files: Files, wanted: Wanted) -> Plan:
    """Raises SetupRefused."""
    notes = []
    others = [registry for registry in wanted.registries if registry != HUB]
    if others:
        notes.append(
            f"Docker has mirrors for {HUB} only, not for {', '.join(others)}: pull those by the address of "
            f"the agent's registry, not of its mirror, such as 127.0.0.1:5000/{others[0]}/NAME"
        )
    text = files.read(CONFIG)
    document = _parsed(text or "{}")
    added = {_MIRRORS: str(wanted.agent)}
    if wanted.agent.is_plain and not wanted.agent.is_loopback:
        added[_INSECURE] = wanted.agent.address
    for key, value in added.items():
        values = _list(document, key)
        # The first mirror is asked first.
        document[key] = values if value in values else [value, *values]
    texts = {}
    if document != _parsed(text or "{}"):
        texts[CONFIG] = _dumped(document, text)
    notes.append(
        "the agent stands for docker.io at this address when its configuration says so: "
        'agent.mirror.registry = "docker.io", see docs/setup.md'
    )
    notes.append("tell Docker, which keeps its containers: systemctl reload docker")
    return Plan(texts, tuple(notes))


def _without(path: str, text: str, agent: str) -> str | None:
    document = _parsed(text, path)
    address = agent.partition("://")[2]
    for key, value in ((_MIRRORS, agent), (_INSECURE, address)):
        values = _list(document, key)
        if value in values:
            values.remove(value)
            document[key] = values
            if not values:
                del document[key]
    return _dumped(document, text) if document else None


# What dockerd does not find in its file any more is left as it was by a reload (20.10).
_UNDONE: Final = (
    "a Docker daemon that runs keeps mirrors that its file does not name any more, also when it is told "
    "to reload: systemctl restart docker",
)

RUNTIME: Final = Runtime("docker", plan, _without, _UNDONE)


def _parsed(text: str, path: str = CONFIG) -> dict[str, Any]:
    try:
        # dockerd takes an empty file for an empty object
        document = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise SetupRefused(path, f"it is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise SetupRefused(path, "it is no JSON object")
    return document


def _list(document: dict[str, Any], key: str) -> list[str]:
    values = document.get(key, [])
    if not isinstance(values, list) or any(type(value) is not str for value in values):
        raise SetupRefused(CONFIG, f"its {key} is no list of texts")
    return list(values)


def _dumped(document: dict[str, Any], like: str | None) -> str:
    """JSON that is indented as the former text was."""
    found = re.search(r"\n([ \t]+)\"", like or "")
    return json.dumps(document, indent=found[1] if found else 2, ensure_ascii=False) + "\n"

"""docs/configuration.md lists every key as the attrs classes have it.

``python tests/config/test_config_reference.py`` writes the list anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from swarmpull.config import Address, Config
from swarmpull.layers import Setting, Sources, listings, load, settings

EXAMPLES = Path(__file__).parents[2] / "examples"
DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"
BEGIN = "<!-- keys: begin -->\n"
END = "<!-- keys: end -->\n"


def sections(instance: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(section, its meaning), parents first."""
    for attribute in attrs.fields(type(instance)):
        value = getattr(instance, attribute.name)
        if attrs.has(type(value)) and not isinstance(value, Address):
            key = f"{prefix}{attribute.name}"
            yield key, attribute.metadata["help"]
            yield from sections(value, f"{key}.")


def reference() -> str:
    lines = table("")
    for section, meaning in sections(Config()):
        lines += ["", f"### {section}", "", meaning, *table(section)]
    for listing in listings().values():
        rows = [row(name, setting) for name, setting in listing.settings.items()]
        lines += ["", f"### [[{listing.key}]]", "", listing.help, *with_head(rows)]
    return "\n".join(lines) + "\n\n"


def table(section: str) -> list[str]:
    rows = [
        row(setting.key, setting)
        for setting in settings().values()
        if setting.key.rpartition(".")[0] == section
    ]
    return with_head(rows)


def row(name: str, setting: Setting) -> str:
    return f"| `{name}` | {shown(setting.shown_default)} | {setting.help} |"


def with_head(rows: list[str]) -> list[str]:
    return ["", "| key | default | meaning |", "|---|---|---|", *rows] if rows else []


def shown(default: str) -> str:
    if not default:
        return "empty"
    return default if " " in default else f"`{default}`"


def test_the_document_lists_every_key_with_its_default_and_meaning() -> None:
    _, _, rest = DOCUMENT.read_text().partition(BEGIN)
    listed, end, _ = rest.partition(END)
    assert end == END
    assert listed == reference(), "run: python tests/config/test_config_reference.py"


@pytest.mark.parametrize(
    "name",
    [
        "cluster.toml",
        "mirror.toml",
        "replication-east.toml",
        "replication-west.toml",
        "tls-cluster.toml",
    ],
)
def test_the_examples_are_valid(name: str, tmp_path: Path) -> None:
    example = EXAMPLES / name
    if not EXAMPLES.is_dir():
        pytest.skip("the examples are in the source tree only")
    load(Sources(file=example), roles=frozenset({"origin", "agent", "index"}))
    # What is only shown must be right too: the lines of its own comments that are TOML.
    shown = re.sub(r"(?m)^#   (?=[a-z_.]+ = )", "", example.read_text())
    (tmp_path / name).write_text(shown)
    load(Sources(file=tmp_path / name), roles=frozenset({"origin", "agent", "index"}))


def test_every_key_has_a_help_line() -> None:
    entries = [setting for listing in listings().values() for setting in listing.settings.values()]
    for setting in (*settings().values(), *entries):
        assert setting.help.endswith("."), setting.key
        assert "\n" not in setting.help


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + reference() + END + rest.partition(END)[2])

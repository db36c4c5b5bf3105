"""``swarmpull config``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from swarmpull.cli.options import check_files, configured, load_config, role_option


@click.group()
def config() -> None:
    """Check or show the configuration."""


@config.command()
@role_option(required=False)
@configured
def check(
    roles: tuple[str, ...],
    file: Path | None,
    data_dir: str | None,
    agents: int | None,
    overrides: tuple[str, ...],
) -> None:
    """Report everything that is wrong with the configuration.

    With --role also what those roles need.
    """
    check_files(load_config(roles, file, data_dir, agents, overrides), roles)
    click.echo("The configuration is valid.")


@config.command()
@role_option(required=False)
@configured
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(
    roles: tuple[str, ...],
    file: Path | None,
    data_dir: str | None,
    agents: int | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print every key with its value and where that comes from."""
    loaded = load_config(roles, file, data_dir, agents, overrides)
    from swarmpull.layers import toml_values

    values = toml_values(loaded.config)
    if as_json:
        document = {
            key: {"value": value, "from": loaded.provenance[key]} for key, value in values.items()
        }
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo("\n".join(_toml(values, loaded.provenance)))


def _toml(values: Mapping[str, Any], provenance: Mapping[str, str]) -> Iterator[str]:
    """The configuration as a TOML file, with the place of each value behind it."""
    table = ""
    sections = [key.partition(".")[0] if "." in key else "" for key in values]
    order = {
        key: (sections.index(top), key.count("."))
        for key, top in zip(values, sections, strict=True)
    }
    # TOML needs the keys of a table before its subtables, and those outside any table first
    for key in sorted(values, key=order.__getitem__):
        section, _, name = key.rpartition(".")
        if section != table:
            table = section
            head, _, number = section.rpartition(".")
            yield f"\n[[{head}]]" if number.isdecimal() else f"\n[{section}]"
        # JSON texts, numbers, booleans and lists of texts are TOML too
        assignment = f"{name} = {json.dumps(values[key], ensure_ascii=False)}"
        yield f"{assignment:<50}  # {provenance[key]}"

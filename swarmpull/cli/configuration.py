"""``swarmpull config``."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from swarmpull.cli.options import check_files, configured, load_config, role_option

if TYPE_CHECKING:
    from swarmpull.config import Config
    from swarmpull.layers import Loaded

_T = TypeVar("_T")

# For the index backend to list all repositories, in seconds.
BACKEND_PATIENCE: Final = 10.0


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

    With --role also what those roles need. Rules of replication are held against the repositories that
    there are, if the index backend can be asked.
    """
    loaded = load_config(roles, file, data_dir, agents, overrides)
    check_files(loaded, roles)
    click.echo("The configuration is valid.")
    if loaded.config.replications and (not roles or {"index", "all"} & set(roles)):
        _check_rules(loaded)


def _check_rules(loaded: Loaded) -> None:
    """Say which rules match no repository; that is no error: the first one may be pushed tomorrow."""
    from swarmpull.errors import SwarmpullError
    from swarmpull.roles.remotes import rules_without_repositories
    from swarmpull.runtime import run_command

    try:
        patterns, count = run_command(partial(_in_time, rules_without_repositories, loaded.config))
    except SwarmpullError as error:
        click.echo(
            f"The rules of replication were not held against repositories: {error}", err=True
        )
        return
    for pattern in patterns if count else ():
        click.echo(
            f"Replication of {pattern} matches none of the {count} repositories that there are."
        )


async def _in_time(ask: Callable[[Config], Awaitable[_T]], config: Config) -> _T:
    """Raises BackendUnavailable when it takes too long."""
    import trio

    from swarmpull.errors import BackendUnavailable

    with trio.move_on_after(BACKEND_PATIENCE):
        return await ask(config)
    url = config.index.backend.url.partition("?")[0]
    raise BackendUnavailable(url, "catalog/", f"no answer within {BACKEND_PATIENCE:g} s")


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

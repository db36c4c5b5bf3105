"""``swarmpull setup``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from swarmpull.cli.options import bad_parameter, load_config

if TYPE_CHECKING:
    from swarmpull.setup.apply import Work
    from swarmpull.setup.plan import Agent, Runtime

_REGISTRY: Final = "http://127.0.0.1:5000"
_MIRROR: Final = "http://127.0.0.1:5050"


@click.group()
def setup() -> None:
    """Have a container runtime of this host pull through the agent, see docs/setup.md."""


def _agent(_context: click.Context, _option: click.Parameter, text: str) -> Agent:
    from swarmpull.setup.plan import Agent

    with bad_parameter():
        return Agent.parse(text)


def _registries(
    _context: click.Context, _option: click.Parameter, texts: tuple[str, ...]
) -> tuple[str, ...]:
    from swarmpull.setup.plan import check_registry

    with bad_parameter():
        return tuple(dict.fromkeys(check_registry(text) for text in texts))


def _options(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--dry-run", is_flag=True, help="Only print what would change."),
            click.option("--undo", is_flag=True, help="Have every file as it was before."),
            click.option(
                "--agent",
                metavar="URL",
                default=default,
                show_default=True,
                callback=_agent,
                help="The agent, as the runtime reaches it.",
            ),
            click.option(
                "--upstream",
                "upstreams",
                metavar="NAME",
                multiple=True,
                callback=_registries,
                help="A registry whose images come through the agent; may be repeated.",
            ),
            click.option(
                "--config",
                "file",
                envvar="SWARMPULL_CONFIG",
                type=click.Path(path_type=Path),
                help="TOML file of the agent, whose upstreams and cluster.names are meant where a runtime "
                "needs names.",
            ),
            click.option(
                "--root",
                metavar="DIR",
                default="/",
                type=click.Path(exists=True, file_okay=False, path_type=Path),
                help="Change the files of a system that lies below this directory.",
            ),
        ):
            command = option(command)
        return command

    return decorate


@setup.command()
@_options(_REGISTRY)
def containerd(**given: Any) -> None:  # noqa: ANN401 - one for each option
    """hosts.toml files; without --upstream one for all registries that have none of their own."""
    from swarmpull.setup.containerd import RUNTIME

    _set_up(RUNTIME, **given)


@setup.command()
@_options(_MIRROR)
def docker(**given: Any) -> None:  # noqa: ANN401
    """registry-mirrors in daemon.json, which count for docker.io only."""
    from swarmpull.setup.docker import RUNTIME

    _set_up(RUNTIME, **given)


@setup.command()
@_options(_REGISTRY)
def podman(**given: Any) -> None:  # noqa: ANN401
    """A file in registries.conf.d; for buildah, skopeo and CRI-O as well."""
    from swarmpull.setup.registries import RUNTIME

    _set_up(RUNTIME, names=True, **given)


@setup.command()
@_options(_REGISTRY)
def crio(**given: Any) -> None:  # noqa: ANN401
    """The same as podman: they share the file."""
    from swarmpull.setup.registries import RUNTIME

    _set_up(RUNTIME, names=True, **given)


def _set_up(
    runtime: Runtime,
    *,
    agent: Agent,
    upstreams: Sequence[str],
    file: Path | None,
    root: Path,
    dry_run: bool,
    undo: bool,
    names: bool = False,
) -> None:
    from swarmpull.setup import apply
    from swarmpull.setup.plan import Wanted

    cluster = None
    if not undo and (file or names):
        cluster = load_config((), file, None, None, ()).config
    own = cluster.cluster.names if cluster else ()
    if cluster and not upstreams and names:
        upstreams = [*(each.name for each in cluster.upstreams), *own]
    wanted = Wanted(agent, tuple(upstreams), frozenset(own))
    # From the look at the files until they are changed; nothing is changed by a look alone.
    with contextlib.nullcontext() if dry_run else apply.only_one(root):
        work = apply.undo(root, runtime) if undo else apply.set_up(root, runtime, wanted)
        if not dry_run:
            work.do()
    _tell(work, dry_run=dry_run)


def _tell(work: Work, *, dry_run: bool) -> None:
    if not work.changes:
        click.echo("Nothing is to be changed.")
    elif dry_run:
        click.echo("\n".join(work.diff()))
    else:
        paths = ", ".join(str(work.disk.place(change.path)) for change in work.changes)
        click.echo(f"Changed: {paths}")
    for note in work.notes:
        click.echo(f"note: {note}", err=True)

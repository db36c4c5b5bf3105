"""``swarmpull run``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from swarmpull.cli.options import ROLES, check_files, configured, load_config, role_option, role_set

if TYPE_CHECKING:
    from swarmpull.roles.addresses import RoleAddresses


@click.command()
@role_option(required=True)
@configured
def run(
    roles: tuple[str, ...],
    file: Path | None,
    data_dir: str | None,
    agents: int | None,
    overrides: tuple[str, ...],
) -> int:
    """Run one or more roles until SIGTERM or SIGINT.

    The first signal lets requests under way end (drain_timeout), the second cancels it. SIGHUP reads the
    lists of the cluster's members again.
    """
    load = partial(load_config, roles, file, data_dir, agents, overrides)
    loaded = load()
    check_files(loaded, roles)
    from swarmpull import runtime

    return runtime.run(loaded, role_set(roles), _announce, load)


def _announce(running: Sequence[RoleAddresses]) -> None:
    try:
        click.echo("\n".join(_announcement(running)))
    except OSError as exc:
        # A closed standard output is no reason to stop serving.
        click.echo(f"swarmpull: cannot write to standard output: {exc}", err=True)


def _announcement(running: Sequence[RoleAddresses]) -> Iterator[str]:
    """What listens where, and for a whole cluster in one process what to type next."""
    agents = [each for each in running if each.role == "agent"]
    for each in running:
        listeners = "  ".join(f"{name} {address}" for name, address in each.listeners.items())
        number = f" {agents.index(each) + 1}" if each in agents and len(agents) > 1 else ""
        yield f"{each.role + number:<10} {listeners}"
    if {each.role for each in running} == set(ROLES):
        yield from _next_steps(agents)


def _next_steps(agents: Sequence[RoleAddresses]) -> Iterator[str]:
    first = agents[0].listeners["registry"]
    last = agents[-1].listeners["registry"]
    yield ""
    yield "Push an image, and pull it through an agent:"
    yield (
        f"  skopeo copy --dest-tls-verify=false docker-daemon:IMAGE:TAG docker://{first}/IMAGE:TAG"
    )
    yield f"  docker pull {last}/IMAGE:TAG"
    yield "Push any file, and pull it by the digest that is printed:"
    yield f"  swarmpull push --registry http://{first} FILE"
    yield f"  swarmpull pull --registry http://{last} DIGEST -o FILE"
    yield "See what the agents hold and where it came from:"
    yield f"  swarmpull status {' '.join(agent.listeners['admin'] for agent in agents[:3])}"
    yield "Stop with Ctrl-C."

"""``swarmpull simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from swarmpull.cli.options import EXIT_FAILED, read_duration, read_size


@click.command()
@click.option("--hosts", type=int, default=2600, show_default=True, help="Agents that download.")
@click.option("--origins", type=int, default=5, show_default=True, help="Seeders from the start.")
@click.option("--size", callback=read_size, default="3GB", show_default=True, help="Of one image.")
@click.option(
    "--layers", type=int, default=2, show_default=True, help="Of an image, equally large."
)
@click.option("--images", type=int, default=0, help="Pull so many unique images instead of one.")
@click.option("--pullers", type=int, default=3, show_default=True, help="Hosts per unique image.")
@click.option(
    "--rate", callback=read_size, default="300MB/s", show_default=True, help="Agents, up and down."
)
@click.option(
    "--origin-rate", callback=read_size, default="1.25GB/s", show_default=True, help="Origins."
)
@click.option(
    "--rtt", callback=read_duration, default="0.5ms", show_default=True, help="Round trip."
)
@click.option(
    "--jitter", callback=read_duration, default="0s", help="A message takes up to this longer."
)
@click.option(
    "--arrival", callback=read_duration, default="0.5s", show_default=True, help="All begin within."
)
@click.option(
    "--piece", callback=read_size, help="Length of a piece; else what the size of a layer says."
)
@click.option(
    "--buffer",
    callback=read_size,
    default="1MiB",
    show_default=True,
    help="Of a piece, what a sender is rid of though the receiver's link is busy.",
)
@click.option("--readers", is_flag=True, help="Every host reads in order while it downloads.")
@click.option("--reader-rate", callback=read_size, help="Of a reader; else as fast as it comes.")
@click.option("--faults", default="", metavar="LIST", help="Such as slow=5%x10,origin-killed=1@3s.")
@click.option(
    "--policy",
    type=click.Choice(["offers", "pipeline", "both"]),
    default="offers",
    show_default=True,
    help="How pieces are exchanged; pipeline is the classic request queue.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of all random choices.")
@click.option(
    "--until", callback=read_duration, default="600s", show_default=True, help="Give up then."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw an SVG picture."
)
@click.option("--table", is_flag=True, help="Run all cases of docs/performance.md.")
@click.option("--case", "names", multiple=True, help="With --table: only this case; repeatable.")
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    metavar="NAME",
    help="One of docs/reliability.md, repeatable; all for all of them.",
)
@click.option("--jobs", type=int, default=1, show_default=True, help="Of a table: processes.")
def simulate(**given: Any) -> int:  # noqa: ANN401 - one for each option
    """Simulate a swarm: the code that decides is that of the roles, the network is a model.

    docs/performance.md says what is modelled and what the numbers mean.
    """
    from swarmpull.sim import command

    context = click.get_current_context()
    explicit = {
        name
        for name in given
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    try:
        return 0 if command.run(given, explicit) else EXIT_FAILED
    except ValueError as error:
        raise click.UsageError(str(error)) from None

"""What commands share: options and the values they read, exit statuses, how errors and tables look."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from swarmpull.errors import ConfigError, SwarmpullError

if TYPE_CHECKING:
    from rich.table import Table

    from swarmpull.digest import Digest
    from swarmpull.layers import Loaded
    from swarmpull.registry.client import AdminAnswer, Progress
    from swarmpull.registry.http import Login
    from swarmpull.registry.layouts import ImageName, ProgressOf

ROLES: Final = ("tracker", "index", "origin", "agent")
DEFAULT_REGISTRY: Final = "http://127.0.0.1:5000"
# Where agents and the other roles put their admin listeners by default, see docs/configuration.md.
ADMIN_PORTS: Final = range(7500, 7600)

EXIT_FAILED: Final = 1
EXIT_UNAVAILABLE: Final = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_CONFIG: Final = 78  # EX_CONFIG
EXIT_INTERRUPTED: Final = 130

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def fail(status: int, *reasons: object) -> int:
    """Say on standard error what failed; returns the exit status."""
    for reason in reasons:
        for line in str(reason).splitlines():
            click.echo(f"swarmpull: {line}", err=True)
    return status


def configured(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command takes which reads the configuration."""
    for option in (
        click.option(
            "-o",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set one key, for example -o log.level=debug. Wins over everything else.",
        ),
        click.option("--agents", type=int, metavar="N", help="Number of agents, 1 to 100."),
        click.option("--data-dir", metavar="DIR", help="Where the roles keep their data."),
        click.option(
            "--config",
            "file",
            envvar="SWARMPULL_CONFIG",
            type=click.Path(path_type=Path),
            help="TOML file; else the one that SWARMPULL_CONFIG names, else none.",
        ),
    ):
        command = option(command)
    return command


def role_option(*, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--role``."""
    return click.option(
        "--role",
        "roles",
        multiple=True,
        required=required,
        type=click.Choice([*ROLES, "all"]),
        help="What to run; may be repeated. 'all' runs a whole cluster on one machine.",
    )


def load_config(
    roles: Sequence[str],
    file: Path | None,
    data_dir: str | None,
    agents: int | None,
    overrides: Sequence[str],
) -> Loaded:
    """The configuration from all its layers.  Raises ConfigError."""
    from swarmpull.layers import Sources, load
    from swarmpull.store.backend_urls import check_url

    options = [("-o", text) for text in overrides]
    if data_dir is not None:
        # before the others, so that -o wins
        options.insert(0, ("--data-dir", f"data_dir={data_dir}"))
    return load(
        Sources(file, os.environ, options),
        roles=role_set(roles),
        agents=agents,
        check_backend=check_url,
    )


def role_set(roles: Sequence[str]) -> frozenset[str]:
    """The roles that ``--role`` means."""
    return frozenset(ROLES if "all" in roles else roles)


def check_files(loaded: Loaded, roles: Sequence[str]) -> None:
    """Raise ConfigError if certificates and the like cannot be used."""
    if not loaded.config.names_security_files:
        return
    from swarmpull.roles.security import problems_with_files

    problems = tuple(problems_with_files(loaded.config, role_set(roles), loaded.provenance))
    if problems:
        raise ConfigError(problems)


@contextmanager
def bad_parameter() -> Iterator[None]:
    """In a callback: what the block says of a value becomes click's error about that parameter."""
    try:
        yield
    except (ValueError, SwarmpullError) as error:
        raise click.BadParameter(str(error)) from None


def read_digest(_context: click.Context, _parameter: click.Parameter, text: str) -> Digest:
    """A digest."""
    from swarmpull.digest import Digest

    with bad_parameter():
        return Digest.parse(text)


def read_image(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> ImageName | None:
    """An image."""
    from swarmpull.registry.client import registry_url
    from swarmpull.registry.layouts import ImageName

    if text is None:
        return None
    with bad_parameter():
        image = ImageName.parse(text)
        if image.registry is not None:
            registry_url(image.registry)
    return image


def read_repository(
    context: click.Context, parameter: click.Parameter, text: str
) -> ImageName | None:
    """An image of which only the repository is meant, as with skopeo and crane without tag or digest."""
    image = read_image(context, parameter, text)
    if image is not None:
        name = f"{image.registry}/{image.repository}" if image.registry else image.repository
        if text != name:
            raise click.BadParameter(f"is a repository, without {text.removeprefix(name)}: {name}")
    return image


def read_digest_or_image(
    context: click.Context, parameter: click.Parameter, text: str
) -> Digest | ImageName | None:
    """A digest or an image."""
    read = read_digest if text.startswith(("sha256:", "sha512:")) else read_image
    return read(context, parameter, text)


def read_registry(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> str | None:
    """The URL of a registry."""
    from swarmpull.registry.client import registry_url

    with bad_parameter():
        return None if text is None else registry_url(text)


def read_admin_addresses(
    _context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]
) -> tuple[str, ...]:
    """As they were given, which is how they are named in what is printed."""
    if texts:
        from swarmpull.registry.client import server_url

        for text in texts:
            try:
                server_url(text)
            except ValueError as error:
                raise click.BadParameter(f"{text}: is not an address to ask: {error}") from None
    return texts


def read_size(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    """Bytes."""
    from swarmpull.units import parse_size

    with bad_parameter():
        return None if text is None else parse_size(text.removesuffix("/s"))


def read_duration(_context: click.Context, _option: click.Parameter, text: str) -> float:
    """Seconds."""
    from swarmpull.units import parse_duration

    with bad_parameter():
        return parse_duration(text)


def read_rate(_context: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    """Bytes per second."""
    from swarmpull.units import parse_rate

    with bad_parameter():
        return None if text is None else parse_rate(text)


def local_admins() -> tuple[str, ...]:
    """Where roles are looked for when nobody says where they are."""
    return tuple(f"127.0.0.1:{port}" for port in ADMIN_PORTS)


def admin_outcome(answers: Sequence[AdminAnswer], addresses: Sequence[str], who: str) -> int:
    """The exit status, with a line for each listener that should have answered and did not.

    Those are all that were named, else those where somebody is; of these, one that takes HTTPS only was found
    and is named, and the command has succeeded with the others.

    Args:
        answers: of the listeners that were asked.
        addresses: those that were named.
        who: is looked for.
    """
    failed = [each for each in answers if each.document is None and (addresses or each.is_unheard)]
    lines = [f"{each.address}: {each.failure}" for each in failed]
    is_found = any(each.document is not None for each in answers)
    if not (lines or is_found):
        lines = [
            f"no {who} answers on 127.0.0.1, ports {ADMIN_PORTS[0]} to {ADMIN_PORTS[-1]}: "
            "name its admin listener"
        ]
    is_well = is_found and all(each.is_https and not addresses for each in failed)
    return fail(0 if is_well else EXIT_UNAVAILABLE, *lines)


registry_option = click.option(
    "--registry",
    metavar="URL",
    callback=read_registry,
    help=f"Registry of an agent or origin.  [default: {DEFAULT_REGISTRY}]",
)
user_option = click.option(
    "--user", metavar="NAME", help="For a registry that asks for a password."
)
password_option = click.option(
    "--password-file",
    metavar="FILE",
    type=click.File(encoding="utf-8"),
    help="Its first line is the password of that name; - is standard input.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")


def login_of(user: str | None, password_file: IO[str] | None) -> Login | None:
    """What ``--user`` and ``--password-file`` say."""
    from swarmpull.registry.http import Login

    if user is None and password_file is None:
        return None
    if user is None or password_file is None:
        raise click.UsageError("--user and --password-file need each other.")
    return Login(user, password_file.readline().rstrip("\r\n"))


def registry_of(image: ImageName, registry: str | None) -> str | None:
    """The registry that is part of the name, if any; it must not contradict the option."""
    if image.registry is None:
        return registry
    if registry is not None:
        raise click.UsageError(f"{image.registry} is part of the name: leave out --registry.")
    return image.registry


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[ProgressOf]:
    """Progress bars on standard error, for as long as the block lasts."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn
    from rich.progress import Progress as ProgressBars

    console = Console(stderr=True)
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    disabled = quiet or not console.is_terminal
    with ProgressBars(*columns, console=console, disable=disabled) as bars:

        def progress_of(name: str) -> Progress:
            task = bars.add_task(name if len(name) <= 20 else f"{name[:19]}…", total=None)

            def show(done: int, total: int | None) -> None:
                bars.update(task, completed=done, total=total)

            return show

        yield progress_of


def print_documents(answers: Sequence[AdminAnswer]) -> None:
    """Print what admin listeners answered as JSON, each with its address."""
    documents = [{"address": each.address, **(each.document or {})} for each in answers]
    click.echo(json.dumps(documents, indent=2))


def print_table(table: Table) -> None:
    """Print a table on standard output."""
    from rich.console import Console

    # In a pipe a digest must stay in one piece.
    console = Console()
    (console if console.is_terminal else Console(width=250)).print(table)

"""The command line.  Modules that take long to import are imported by the command that needs them."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

import click

from swarmpull import __version__
from swarmpull.errors import ConfigError, SwarmpullError

if TYPE_CHECKING:
    from rich.table import Table

    from swarmpull.digest import Digest
    from swarmpull.layers import Loaded
    from swarmpull.registry.client import AdminAnswer, Progress, RegistryClient
    from swarmpull.registry.http import Login
    from swarmpull.registry.layouts import ImageName, ProgressOf
    from swarmpull.roles.addresses import RoleAddresses

_ROLES: Final = ("tracker", "index", "origin", "agent")
_DEFAULT_REGISTRY: Final = "http://127.0.0.1:5000"
# Where agents and the other roles put their admin listeners by default, see docs/configuration.md.
_ADMIN_PORTS: Final = range(7500, 7600)

EXIT_FAILED: Final = 1
EXIT_UNAVAILABLE: Final = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_CONFIG: Final = 78  # EX_CONFIG
EXIT_INTERRUPTED: Final = 130

_T = TypeVar("_T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.  Errors are one line each on standard error."""
    try:
        status = cli.main(arguments, prog_name="swarmpull", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as exc:
        return _usage(exc)
    except click.Abort:
        return EXIT_INTERRUPTED
    except ConfigError as exc:
        return _fail(EXIT_CONFIG, *exc.problems)
    except BrokenPipeError:
        # Whoever read our output went away, so there is nobody to tell.  The interpreter flushes
        # once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as exc:
        name = f"{exc.filename}: " if exc.filename else ""
        return _fail(EXIT_FAILED, f"{name}{exc.strerror or exc}")
    except SwarmpullError as exc:
        return _fail(_status_of(exc), exc)
    return status if isinstance(status, int) else 0


def _usage(exc: click.ClickException) -> int:
    if type(exc).__name__ == "NoArgsIsHelpError":  # click has it since 8.2
        exc.show()
        return exc.exit_code
    context = getattr(exc, "ctx", None)
    command = context.command_path if context is not None else "swarmpull"
    # click spreads lists of choices over several lines
    message = " ".join(exc.format_message().split()).rstrip(".")
    return _fail(exc.exit_code, f"{message}. See: {command} --help")


def _status_of(error: SwarmpullError) -> int:
    from swarmpull.registry.client import ServerUnavailable
    from swarmpull.runtime import Interrupted

    if isinstance(error, Interrupted):
        return 128 + error.signal_number
    return EXIT_UNAVAILABLE if isinstance(error, ServerUnavailable) else EXIT_FAILED


def _fail(status: int, *reasons: object) -> int:
    for reason in reasons:
        for line in str(reason).splitlines():
            click.echo(f"swarmpull: {line}", err=True)
    return status


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="swarmpull %(version)s")
def cli() -> None:
    """Peer-to-peer distribution of container images and other content-addressed blobs."""


# --- configuration options ------------------------------------------------------------------------


def _configured(command: Callable[..., Any]) -> Callable[..., Any]:
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


def _role_option(*, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--role",
        "roles",
        multiple=True,
        required=required,
        type=click.Choice([*_ROLES, "all"]),
        help="What to run; may be repeated. 'all' runs a whole cluster on one machine.",
    )


def _load(
    roles: Sequence[str],
    file: Path | None,
    data_dir: str | None,
    agents: int | None,
    overrides: Sequence[str],
) -> Loaded:
    from swarmpull.layers import Sources, load
    from swarmpull.store.backend_urls import check_url

    options = [("-o", text) for text in overrides]
    if data_dir is not None:
        # before the others, so that -o wins
        options.insert(0, ("--data-dir", f"data_dir={data_dir}"))
    return load(
        Sources(file, os.environ, options),
        roles=_role_set(roles),
        agents=agents,
        check_backend=check_url,
    )


def _role_set(roles: Sequence[str]) -> frozenset[str]:
    return frozenset(_ROLES if "all" in roles else roles)


def _check_files(loaded: Loaded, roles: Sequence[str]) -> None:
    """Raise ConfigError if certificates and the like cannot be used."""
    if not loaded.config.names_security_files:
        return
    from swarmpull.roles.security import problems_with_files

    problems = tuple(problems_with_files(loaded.config, _role_set(roles), loaded.provenance))
    if problems:
        raise ConfigError(problems)


# --- run ------------------------------------------------------------------------------------------


@cli.command()
@_role_option(required=True)
@_configured
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
    load = partial(_load, roles, file, data_dir, agents, overrides)
    loaded = load()
    _check_files(loaded, roles)
    from swarmpull import runtime

    return runtime.run(loaded, _role_set(roles), _announce, load)


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
    if {each.role for each in running} == set(_ROLES):
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


# --- config ---------------------------------------------------------------------------------------


@cli.group()
def config() -> None:
    """Check or show the configuration."""


@config.command()
@_role_option(required=False)
@_configured
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
    _check_files(_load(roles, file, data_dir, agents, overrides), roles)
    click.echo("The configuration is valid.")


@config.command()
@_role_option(required=False)
@_configured
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
    loaded = _load(roles, file, data_dir, agents, overrides)
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


# --- values on the command line -------------------------------------------------------------------


@contextmanager
def _bad_parameter() -> Iterator[None]:
    """In a callback: what the block says of a value becomes click's error about that parameter."""
    try:
        yield
    except (ValueError, SwarmpullError) as error:
        raise click.BadParameter(str(error)) from None


def _digest(_context: click.Context, _parameter: click.Parameter, text: str) -> Digest:
    from swarmpull.digest import Digest

    with _bad_parameter():
        return Digest.parse(text)


def _image(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> ImageName | None:
    from swarmpull.registry.client import registry_url
    from swarmpull.registry.layouts import ImageName

    if text is None:
        return None
    with _bad_parameter():
        image = ImageName.parse(text)
        if image.registry is not None:
            registry_url(image.registry)
    return image


def _digest_or_image(
    context: click.Context, parameter: click.Parameter, text: str
) -> Digest | ImageName | None:
    read = _digest if text.startswith(("sha256:", "sha512:")) else _image
    return read(context, parameter, text)


def _registry(_context: click.Context, _parameter: click.Parameter, text: str | None) -> str | None:
    from swarmpull.registry.client import registry_url

    with _bad_parameter():
        return None if text is None else registry_url(text)


def _admin_addresses(
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


def _size(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    from swarmpull.units import parse_size

    with _bad_parameter():
        return None if text is None else parse_size(text.removesuffix("/s"))


def _duration(_context: click.Context, _option: click.Parameter, text: str) -> float:
    from swarmpull.units import parse_duration

    with _bad_parameter():
        return parse_duration(text)


def _rate(_context: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    from swarmpull.units import parse_rate

    with _bad_parameter():
        return None if text is None else parse_rate(text)


# --- push and pull --------------------------------------------------------------------------------

_registry_option = click.option(
    "--registry",
    metavar="URL",
    callback=_registry,
    help=f"Registry of an agent or origin.  [default: {_DEFAULT_REGISTRY}]",
)
_user_option = click.option(
    "--user", metavar="NAME", help="For a registry that asks for a password."
)
_password_option = click.option(
    "--password-file",
    metavar="FILE",
    type=click.File(encoding="utf-8"),
    help="Its first line is the password of that name; - is standard input.",
)
_quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")


@cli.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("image", required=False, callback=_image)
@_registry_option
@_user_option
@_password_option
@_quiet_option
def push(
    source: Path,
    image: ImageName | None,
    registry: str | None,
    quiet: bool,
    user: str | None,
    password_file: IO[str] | None,
) -> None:
    """Push a file, or the image of an OCI layout directory as IMAGE (NAME:TAG).

    Prints the digest under which it can be pulled.
    """
    login = _login(user, password_file)
    if source.is_dir() and image is None:
        raise click.UsageError("A directory is pushed as an image: name it, NAME:TAG.")
    if not source.is_dir() and image is not None:
        raise click.UsageError("An image is pushed from an OCI layout directory, not from a file.")
    if image is None:
        work = partial(_push_file, source)
    else:
        registry = _registry_of(image, registry)
        work = partial(_push_image, source, image)
    click.echo(_transfer(work, registry, login, quiet=quiet))


async def _push_file(file: Path, client: RegistryClient, progress: ProgressOf) -> str:
    from swarmpull.registry.client import ServerUnavailable, hash_file

    digest = await hash_file(file, progress=progress("hashing"))
    try:
        is_there = await client.exists(f"/blobs/{digest}")
    except ServerUnavailable:
        # Its backend may be down, which is no reason not to take a push; or the push says what is wrong.
        is_there = False
    if not is_there:
        await client.put_blob(f"/blobs/{digest}", file, progress=progress("pushing"))
    return str(digest)


async def _push_image(
    directory: Path, image: ImageName, client: RegistryClient, progress: ProgressOf
) -> str:
    from swarmpull.registry.layouts import push_image

    return str((await push_image(client, directory, image, progress)).digest)


@cli.command()
@click.argument("name", metavar="DIGEST|IMAGE", callback=_digest_or_image)
@click.option(
    "-o",
    "output",
    metavar="PATH",
    required=True,
    help="File for a blob (- is standard output), directory for an image.",
)
@_registry_option
@_user_option
@_password_option
@_quiet_option
def pull(
    name: Digest | ImageName,
    output: str,
    registry: str | None,
    quiet: bool,
    user: str | None,
    password_file: IO[str] | None,
) -> None:
    """Pull a blob by its digest, or an image (NAME[:TAG|@DIGEST]) as an OCI layout directory.

    Everything is verified; a blob appears under its name only when it is complete.
    """
    from swarmpull.digest import Digest

    login = _login(user, password_file)
    if isinstance(name, Digest):
        _transfer(partial(_pull_blob, name, output), registry, login, quiet=quiet)
        return
    if output == "-":
        raise click.UsageError("An image is written to a directory: name one with -o.")
    registry = _registry_of(name, registry)
    work = partial(_pull_image, name, Path(output))
    click.echo(_transfer(work, registry, login, quiet=quiet))


async def _pull_blob(
    digest: Digest, output: str, client: RegistryClient, progress: ProgressOf
) -> None:
    from swarmpull.registry.client import file_at, standard_output

    target = standard_output(digest) if output == "-" else file_at(Path(output), digest)
    with target as sink:
        await client.get_blob(f"/blobs/{digest}", sink, progress=progress("pulling"))


async def _pull_image(
    image: ImageName, directory: Path, client: RegistryClient, progress: ProgressOf
) -> str:
    from swarmpull.registry.layouts import pull_image

    return str((await pull_image(client, image, directory, progress)).digest)


def _registry_of(image: ImageName, registry: str | None) -> str | None:
    """The registry that is part of the name, if any; it must not contradict the option."""
    if image.registry is None:
        return registry
    if registry is not None:
        raise click.UsageError(f"{image.registry} is part of the name: leave out --registry.")
    return image.registry


def _login(user: str | None, password_file: IO[str] | None) -> Login | None:
    from swarmpull.registry.http import Login

    if user is None and password_file is None:
        return None
    if user is None or password_file is None:
        raise click.UsageError("--user and --password-file need each other.")
    return Login(user, password_file.readline().rstrip("\r\n"))


def _transfer(
    work: Callable[[RegistryClient, ProgressOf], Awaitable[_T]],
    registry: str | None,
    login: Login | None,
    *,
    quiet: bool,
) -> _T:
    """Run a transfer with its progress bars on standard error."""
    from swarmpull.registry.client import open_client
    from swarmpull.runtime import run_command

    async def command() -> _T:
        async with open_client(registry or _DEFAULT_REGISTRY, login=login) as client:
            return await work(client, progress)

    with _progress_bars(quiet=quiet) as progress:
        return run_command(command)


@contextmanager
def _progress_bars(*, quiet: bool) -> Iterator[ProgressOf]:
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


# --- status ---------------------------------------------------------------------------------------


@cli.command()
@click.argument("addresses", nargs=-1, metavar="[HOST:PORT]...", callback=_admin_addresses)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(addresses: tuple[str, ...], as_json: bool) -> int:
    """Show roles by their admin listeners: readiness, torrents, bytes by source.

    Without addresses, all that answer on 127.0.0.1, ports 7500 to 7599.
    """
    from swarmpull.registry.client import get_statuses
    from swarmpull.runtime import run_command

    asked = addresses or tuple(f"127.0.0.1:{port}" for port in _ADMIN_PORTS)
    answers = run_command(partial(get_statuses, asked))
    found = [answer for answer in answers if answer.document is not None]
    if as_json:
        documents = [{"address": answer.address, **(answer.document or {})} for answer in found]
        click.echo(json.dumps(documents, indent=2))
    elif found:
        _print_statuses(found)
    failed = _failed(answers, addresses)
    if failed:
        return _fail(EXIT_UNAVAILABLE, *(f"{each.address}: {each.failure}" for each in failed))
    return 0 if found else _nobody_answers("role")


def _failed(answers: Sequence[AdminAnswer], addresses: Sequence[str]) -> list[AdminAnswer]:
    """Those that should have answered: all that were named, else those where somebody is."""
    return [each for each in answers if each.document is None and (addresses or each.is_silent)]


def _nobody_answers(who: str) -> int:
    ports = f"{_ADMIN_PORTS[0]} to {_ADMIN_PORTS[-1]}"
    nobody = f"no {who} answers on 127.0.0.1, ports {ports}: name its admin listener"
    return _fail(EXIT_UNAVAILABLE, nobody)


def _print_statuses(answers: Sequence[AdminAnswer]) -> None:
    from rich.console import Console

    from swarmpull.status import role_table, torrent_table

    console = Console()
    console.print(role_table(answers))
    torrents = torrent_table(answers)
    if torrents.row_count:
        console.print(torrents)


# --- rates ----------------------------------------------------------------------------------------


@cli.command()
@click.option("--upload", callback=_rate, metavar="RATE", help="Send no faster than that to peers.")
@click.option("--download", callback=_rate, metavar="RATE", help="Take no faster than that.")
@click.option(
    "--admin",
    "addresses",
    multiple=True,
    metavar="URL",
    callback=_admin_addresses,
    help="Admin listener of an agent or origin; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def rates(
    upload: float | None, download: float | None, addresses: tuple[str, ...], as_json: bool
) -> int:
    """Show or change the rates of agents and origins until they are started again.

    RATE is like 100MB/s, or unlimited. Without --admin, of all that answer on 127.0.0.1, ports 7500 to
    7599.
    """
    from swarmpull.registry.client import get_rates, put_rates
    from swarmpull.runtime import run_command

    asked = addresses or tuple(f"127.0.0.1:{port}" for port in _ADMIN_PORTS)
    answers = run_command(partial(get_rates, asked))
    found = [answer for answer in answers if answer.document is not None]
    failed = _failed(answers, addresses)
    given = {"upload_rate": upload, "download_rate": download}
    change = {
        key: None if rate == math.inf else rate for key, rate in given.items() if rate is not None
    }
    if change and found:
        answers = run_command(partial(put_rates, [answer.address for answer in found], change))
        found = [answer for answer in answers if answer.document is not None]
        failed += [answer for answer in answers if answer.document is None]
    _print_rates(found, as_json=as_json)
    if failed:
        return _fail(EXIT_UNAVAILABLE, *(f"{each.address}: {each.failure}" for each in failed))
    return 0 if found else _nobody_answers("agent or origin")


def _print_rates(answers: Sequence[AdminAnswer], *, as_json: bool) -> None:
    if as_json:
        documents = [{"address": each.address, **(each.document or {})} for each in answers]
        click.echo(json.dumps(documents, indent=2))
    elif answers:
        from rich.console import Console

        from swarmpull.status import rate_table

        Console().print(rate_table(answers))


# --- store ----------------------------------------------------------------------------------------


@cli.group()
def store() -> None:
    """Look into the data directory of an agent or origin, clean it, check it."""


_store_option = click.option(
    "--data-dir",
    "directory",
    metavar="DIR",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Of one agent or origin, such as swarmpull-data/agent.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@store.command("ls")
@_store_option
@_json_option
def store_ls(directory: Path, as_json: bool) -> None:
    """List blobs, and partials with the pieces that they have."""
    from swarmpull.storage import stored_document, stored_table
    from swarmpull.store.offline import find_store, list_store

    found = list_store(find_store(directory))
    if as_json:
        click.echo(json.dumps([stored_document(stored) for stored in found], indent=2))
    else:
        _print_table(stored_table(found))


@store.command("rm")
@click.argument("digest", metavar="DIGEST", callback=_digest)
@_store_option
@_json_option
def store_rm(digest: Digest, directory: Path, as_json: bool) -> None:
    """Remove a blob and what there is of a download of it; not while a process has the directory."""
    from swarmpull.storage import stored_document, stored_table
    from swarmpull.store.offline import delete, find_store

    removed = delete(find_store(directory), digest)
    if as_json:
        click.echo(json.dumps([stored_document(stored) for stored in removed], indent=2))
    else:
        _print_table(stored_table(removed))


@store.command("gc")
@_store_option
@click.option(
    "--role",
    type=click.Choice(["agent", "origin"]),
    help="Whose limits, the keys under agent.store or origin.store; must be whose directory it is.  "
    "[default: as the directory says]",
)
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
@click.option(
    "--config",
    "file",
    envvar="SWARMPULL_CONFIG",
    type=click.Path(path_type=Path),
    help="TOML file; else the one that SWARMPULL_CONFIG names, else none.",
)
@click.option("-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Set one key.")
@_json_option
def store_gc(
    directory: Path,
    role: str | None,
    dry_run: bool,
    file: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Remove what the limits say, as a running process does once a minute.

    Not while a process has the directory; --dry-run is possible even then.
    """
    loaded = _load((), file, None, None, overrides)
    from swarmpull.roles.role_store import limits_of
    from swarmpull.storage import removal_document, removal_table
    from swarmpull.store.offline import collect, find_store, plan_removals, role_of

    root = find_store(directory)
    owner = role_of(root)
    if role not in (None, owner):
        raise click.UsageError(
            f"{root} is the data directory of an {owner}, not of an {role}: leave out --role."
        )
    limits = limits_of(owner, root, getattr(loaded.config, owner).store)
    removals = plan_removals(root, limits) if dry_run else collect(root, limits)
    if as_json:
        click.echo(json.dumps([removal_document(removal) for removal in removals], indent=2))
    elif removals:
        _print_table(removal_table(removals))
    else:
        click.echo("Nothing is to be removed.")


@store.command("verify")
@_store_option
@click.option(
    "--delete", is_flag=True, help="Remove what is wrong; not while a process runs there."
)
@_json_option
def store_verify(directory: Path, delete: bool, as_json: bool) -> int:
    """Hash every blob and every stored piece; the exit status is 1 if one is wrong."""
    from swarmpull.storage import checked_document, checked_line, checked_summary
    from swarmpull.store.offline import find_store, verify, verify_and_repair

    root = find_store(directory)
    found = []
    for checked in verify_and_repair(root) if delete else verify(root):
        found.append(checked)
        if checked.problem and not as_json:
            click.echo(checked_line(checked))
    wrong = any(checked.problem for checked in found)
    if as_json:
        click.echo(json.dumps([checked_document(checked) for checked in found], indent=2))
    else:
        click.echo(checked_summary(found, removing=delete))
    return EXIT_FAILED if wrong else 0


def _print_table(table: Table) -> None:
    from rich.console import Console

    # In a pipe a digest must stay in one piece.
    console = Console()
    (console if console.is_terminal else Console(width=250)).print(table)


# --- certs ----------------------------------------------------------------------------------------


@cli.group()
def certs() -> None:
    """Make the certificates with which roles trust each other, see docs/security.md."""


_certs_option = click.option(
    "--dir",
    "directory",
    metavar="DIR",
    default="swarmpull-certs",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the authority is, and what it issues.",
)
_force_option = click.option("--force", is_flag=True, help="Replace files that are there.")


@certs.command("init")
@_certs_option
@click.option("--cluster", default="swarmpull", show_default=True, help="Name of the cluster.")
@click.option("--days", type=int, default=3650, show_default=True, help="How long it counts.")
@_force_option
def certs_init(directory: Path, cluster: str, days: int, force: bool) -> None:
    """Make the authority of a cluster: ca.crt for all hosts, ca.key to be kept where you issue."""
    from swarmpull.certificates import create_authority

    written = create_authority(directory, cluster, days=days, force=force)
    click.echo(f"{written.certificate}  {written.key}")


@certs.command("issue")
@click.argument("name")
@_certs_option
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice([*_ROLES, "client", "all"]),
    help="What the holder may be; may be repeated. 'all' are the four roles.",
)
@click.option("--dns", multiple=True, metavar="HOST", help="Name of an HTTPS listener.")
@click.option("--ip", "ips", multiple=True, metavar="ADDRESS", help="Address of one.")
@click.option("--days", type=int, default=365, show_default=True, help="How long it counts.")
@_force_option
def certs_issue(
    name: str,
    directory: Path,
    roles: tuple[str, ...],
    dns: tuple[str, ...],
    ips: tuple[str, ...],
    days: int,
    force: bool,
) -> None:
    """Make NAME.crt and NAME.key for one host."""
    from swarmpull.certificates import issue

    meant = frozenset(roles) - {"all"} | (_role_set(roles) if "all" in roles else frozenset())
    written = issue(directory, name, meant, dns=dns, ips=ips, days=days, force=force)
    click.echo(f"{written.certificate}  {written.key}")


# --- simulate -------------------------------------------------------------------------------------


@cli.command()
@click.option("--hosts", type=int, default=2600, show_default=True, help="Agents that download.")
@click.option("--origins", type=int, default=5, show_default=True, help="Seeders from the start.")
@click.option("--size", callback=_size, default="3GB", show_default=True, help="Of one image.")
@click.option(
    "--layers", type=int, default=2, show_default=True, help="Of an image, equally large."
)
@click.option("--images", type=int, default=0, help="Pull so many unique images instead of one.")
@click.option("--pullers", type=int, default=3, show_default=True, help="Hosts per unique image.")
@click.option(
    "--rate", callback=_size, default="300MB/s", show_default=True, help="Agents, up and down."
)
@click.option(
    "--origin-rate", callback=_size, default="1.25GB/s", show_default=True, help="Origins."
)
@click.option("--rtt", callback=_duration, default="0.5ms", show_default=True, help="Round trip.")
@click.option(
    "--jitter", callback=_duration, default="0s", help="A message takes up to this longer."
)
@click.option(
    "--arrival", callback=_duration, default="0.5s", show_default=True, help="All begin within."
)
@click.option(
    "--piece", callback=_size, help="Length of a piece; else what the size of a layer says."
)
@click.option(
    "--buffer",
    callback=_size,
    default="1MiB",
    show_default=True,
    help="Of a piece, what a sender is rid of though the receiver's link is busy.",
)
@click.option("--readers", is_flag=True, help="Every host reads in order while it downloads.")
@click.option("--reader-rate", callback=_size, help="Of a reader; else as fast as it comes.")
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
    "--until", callback=_duration, default="600s", show_default=True, help="Give up then."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw an SVG picture."
)
@click.option("--table", is_flag=True, help="Run all cases of docs/performance.md.")
@click.option("--case", "names", multiple=True, help="With --table: only this case; repeatable.")
@click.option("--jobs", type=int, default=1, show_default=True, help="With --table: processes.")
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

"""``swarmpull push`` and ``swarmpull pull``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import click

from swarmpull.cli.options import (
    DEFAULT_REGISTRY,
    login_of,
    password_option,
    progress_bars,
    quiet_option,
    read_digest_or_image,
    read_image,
    registry_of,
    registry_option,
    user_option,
)

if TYPE_CHECKING:
    from swarmpull.digest import Digest
    from swarmpull.registry.client import RegistryClient
    from swarmpull.registry.http import Login
    from swarmpull.registry.layouts import ImageName, ProgressOf

_T = TypeVar("_T")


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("image", required=False, callback=read_image)
@registry_option
@user_option
@password_option
@quiet_option
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
    login = login_of(user, password_file)
    if source.is_dir() and image is None:
        raise click.UsageError("A directory is pushed as an image: name it, NAME:TAG.")
    if not source.is_dir() and image is not None:
        raise click.UsageError("An image is pushed from an OCI layout directory, not from a file.")
    if image is None:
        work = partial(_push_file, source)
    else:
        registry = registry_of(image, registry)
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


@click.command()
@click.argument("name", metavar="DIGEST|IMAGE", callback=read_digest_or_image)
@click.option(
    "-o",
    "output",
    metavar="PATH",
    required=True,
    help="File for a blob (- is standard output), directory for an image.",
)
@registry_option
@user_option
@password_option
@quiet_option
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

    login = login_of(user, password_file)
    if isinstance(name, Digest):
        _transfer(partial(_pull_blob, name, output), registry, login, quiet=quiet)
        return
    if output == "-":
        raise click.UsageError("An image is written to a directory: name one with -o.")
    registry = registry_of(name, registry)
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
        async with open_client(registry or DEFAULT_REGISTRY, login=login) as client:
            return await work(client, progress)

    with progress_bars(quiet=quiet) as progress:
        return run_command(command)

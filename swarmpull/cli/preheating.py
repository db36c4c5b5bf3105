"""``swarmpull preheat``."""

from __future__ import annotations

import json
from typing import IO, TYPE_CHECKING, Any, Final

import click

from swarmpull.cli.options import (
    EXIT_FAILED,
    bad_parameter,
    json_option,
    login_of,
    password_option,
    progress_bars,
    quiet_option,
    read_registry,
    user_option,
)

if TYPE_CHECKING:
    from swarmpull.registry.http import HttpClient, Login
    from swarmpull.registry.layouts import ProgressOf

_API: Final = "http://127.0.0.1:7450"
# Between two looks at a job, in seconds.
_INTERVAL: Final = 0.5


def _share(_context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
    from swarmpull.roles.preheat_share import Share

    with bad_parameter():
        return None if text is None else Share.parse(text).text


@click.command()
@click.argument("image", required=False)
@click.option("--origins", is_flag=True, help="Onto the origins that own its blobs.")
@click.option(
    "--agents",
    metavar="SHARE",
    callback=_share,
    help="Onto agents: all, a number such as 10, a share such as 5%, or names with commas between.",
)
@click.option("--platform", default="", metavar="OS/ARCH", help="Only this one of several.")
@click.option("--seed", type=int, help="Of the choice of agents, to have the same ones again.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until it is done.")
@click.option("--job", "number", metavar="ID", help="Look at a job instead; with --cancel end it.")
@click.option("--cancel", is_flag=True, help="End the job of --job.")
@click.option("--list", "listed", is_flag=True, help="List the jobs of the index.")
@click.option(
    "--api",
    default=_API,
    show_default=True,
    metavar="URL",
    callback=read_registry,
    help="index.api.listen of an index.",
)
@user_option
@password_option
@quiet_option
@json_option
def preheat(
    image: str | None,
    number: str | None,
    api: str,
    user: str | None,
    password_file: IO[str] | None,
    **given: Any,  # noqa: ANN401 - one for each option
) -> int:
    """Bring IMAGE onto origins or agents before anybody pulls it.

    The exit status is 1 when some of them do not have it in the end.
    """
    method, path, body = _request(image, number, given)
    from swarmpull.runtime import run_command

    login = login_of(user, password_file)
    is_followed = given["wait"] and not given["listed"] and not given["cancel"]
    with progress_bars(quiet=given["quiet"] or not is_followed) as progress:

        async def command() -> dict[str, Any]:
            return await _ask(api, login, method, path, body, progress if is_followed else None)

        document = run_command(command)
    return _show(document, as_json=given["as_json"])


def _request(
    image: str | None, number: str | None, given: dict[str, Any]
) -> tuple[str, str, dict[str, Any] | None]:
    """Method, path and body of what is asked for.  Raises UsageError for what contradicts itself."""
    if sum((image is not None, number is not None, given["listed"])) != 1:
        raise click.UsageError("Name an image, or a job with --job, or use --list.")
    if given["cancel"] and number is None:
        raise click.UsageError("--cancel needs --job.")
    if number is not None:
        return ("DELETE" if given["cancel"] else "GET"), f"/preheat/{number}", None
    if given["listed"]:
        return "GET", "/preheat", None
    if given["origins"] == (given["agents"] is not None):
        raise click.UsageError("Either --origins or --agents is needed.")
    body = {"image": image, "platform": given["platform"]}
    body |= {"origins": True} if given["origins"] else {"agents": given["agents"]}
    if given["seed"] is not None:
        body["seed"] = given["seed"]
    return "POST", "/preheat", body


async def _ask(
    api: str,
    login: Login | None,
    method: str,
    path: str,
    body: dict[str, Any] | None,
    progress: ProgressOf | None,
) -> dict[str, Any]:
    from swarmpull.registry.http import open_http
    from swarmpull.registry.preheat_client import call_api

    async with open_http(api, None, login) as http:
        document = await call_api(http, method, path, body)
        return document if progress is None else await _follow(http, document, progress)


async def _follow(http: HttpClient, job: dict[str, Any], progress: ProgressOf) -> dict[str, Any]:
    """Show how far a job is until it has ended."""
    import trio

    from swarmpull.registry.preheat_client import call_api

    show = progress("preheating")
    while True:
        show(job.get("bytes_done", 0), job.get("bytes_total") or None)
        if job.get("ended_at"):
            return job
        await trio.sleep(_INTERVAL)
        job = await call_api(http, "GET", f"/preheat/{job.get('id')}")


def _show(document: dict[str, Any], *, as_json: bool) -> int:
    is_list = "jobs" in document
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        for job in document.get("jobs", [document]):
            click.echo(_line(job))
    if is_list:
        return 0
    for failure in document.get("failures", []):
        name = f" ({failure['name']})" if failure.get("name") else ""
        click.echo(f"{failure['host']}{name}: {failure['state']}: {failure['reason']}", err=True)
    for name in document.get("unknown_names", []):
        click.echo(f"{name}: no agent of that name is known at this index", err=True)
    is_short = document.get("state") == "failed" or document.get("unknown_names")
    return EXIT_FAILED if is_short else 0


def _line(job: dict[str, Any]) -> str:
    from swarmpull.units import format_size

    hosts = job.get("hosts", {})
    what = "blobs" if str(job.get("target", "")).startswith("origins") else "agents"
    total = hosts.get("total", 0)
    short = f", {hosts['wanted']} were wanted" if hosts.get("wanted") not in (None, total) else ""
    reason = f": {job['reason']}" if job.get("reason") else ""
    return (
        f"{job.get('id')}  {job.get('image')}  {job.get('target')}  {job.get('state')}{reason}  "
        f"{hosts.get('done', 0)}/{total} {what}{short}  "
        f"{format_size(job.get('bytes_done', 0))} of {format_size(job.get('bytes_total', 0))}"
    )

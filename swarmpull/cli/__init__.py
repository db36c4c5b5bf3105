"""The command line: one module for each group of commands, and ``options`` with what they share.

Modules that take long to import are imported by the command that needs them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from swarmpull import __version__
from swarmpull.cli.certificates import certs
from swarmpull.cli.configuration import config
from swarmpull.cli.host_setup import setup
from swarmpull.cli.journal import journal
from swarmpull.cli.options import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNAVAILABLE,
    fail,
)
from swarmpull.cli.preheating import preheat
from swarmpull.cli.replication import replication
from swarmpull.cli.roles import rates, status
from swarmpull.cli.running import run
from swarmpull.cli.simulation import simulate
from swarmpull.cli.storage import store
from swarmpull.cli.tags import tags
from swarmpull.cli.transfers import pull, push
from swarmpull.errors import ConfigError, SwarmpullError


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
        return fail(EXIT_CONFIG, *exc.problems)
    except BrokenPipeError:
        # Whoever read our output went away, so there is nobody to tell.  The interpreter flushes
        # once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as exc:
        name = f"{exc.filename}: " if exc.filename else ""
        return fail(EXIT_FAILED, f"{name}{exc.strerror or exc}")
    except SwarmpullError as exc:
        return fail(_status_of(exc), exc)
    return status if isinstance(status, int) else 0


def _usage(exc: click.ClickException) -> int:
    if type(exc).__name__ == "NoArgsIsHelpError":  # click has it since 8.2
        exc.show()
        return exc.exit_code
    context = getattr(exc, "ctx", None)
    command = context.command_path if context is not None else "swarmpull"
    # click spreads lists of choices over several lines
    message = " ".join(exc.format_message().split()).rstrip(".")
    return fail(exc.exit_code, f"{message}. See: {command} --help")


def _status_of(error: SwarmpullError) -> int:
    from swarmpull.registry.client import ServerUnavailable
    from swarmpull.runtime import Interrupted

    if isinstance(error, Interrupted):
        return 128 + error.signal_number
    return EXIT_UNAVAILABLE if isinstance(error, ServerUnavailable) else EXIT_FAILED


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="swarmpull %(version)s")
def cli() -> None:
    """Peer-to-peer distribution of container images and other content-addressed blobs."""


for _command in (
    run,
    config,
    push,
    pull,
    tags,
    preheat,
    status,
    rates,
    replication,
    journal,
    store,
    certs,
    setup,
    simulate,
):
    cli.add_command(_command)

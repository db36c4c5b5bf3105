"""A burst of pulls in network namespaces, beside its bound, its simulation, and libtorrent.

    python -m benchmarks.lab [--agents 16] [--origins 1] [--rate 200mbit] [--size 256MiB]
                             [--compare libtorrent] [--only swarm|pair] [--json FILE]

Two experiments, each as often as ``--rounds`` says, with fresh processes and empty directories:

- swarm: every agent, every origin, the tracker and the index is a process in a network namespace of its
  own; a bridge joins them; each link has ``--rate`` in each direction.  All agents pull one random blob
  at the same time.  A pull ends when curl has the last byte, which an agent holds back until the whole
  blob has matched its digest.
- pair: one seeder and one leecher over loopback, unshaped, beside curl from nginx into a file.

``--compare libtorrent`` lets libtorrent (the package of that name, if it is installed) move the same
blob between the same hosts.  The bound and the rate of the simulation count what TCP carries in links of
that rate.  CPU seconds and peak memory are from ``/proc``, as in ``benchmarks.pull``.

It needs root, ip and tc for the namespaces, curl, and nginx for the pair; without them it is skipped.
Nothing leaves the machine: all that is started runs in those namespaces.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.content import write_random
from benchmarks.lab_cluster import Blob, Hosts, make_torrent
from benchmarks.lab_network import Namespace, open_network, parse_rate
from benchmarks.lab_pair import Transfer, transfer
from benchmarks.lab_report import PairReport, SwarmReport, document, pair_lines, swarm_lines
from benchmarks.lab_swarm import (
    Burst,
    SwarmOptions,
    bound_of,
    build,
    burst_of_libtorrent,
    burst_of_swarmpull,
    predict,
)
from benchmarks.machine import machine, touch_memory
from swarmpull.units import parse_duration, parse_size

AGENTS_MAX: Final = 200
ORIGINS_MAX: Final = 20
ENDING: Final = (signal.SIGINT, signal.SIGTERM)
# A pull that takes so many times what its bytes need is given up, and none sooner than that.
PATIENCE: Final = 10
SECONDS_MIN: Final = 60
# Nothing over loopback is slower than this, in bytes per second.
LOOPBACK_RATE: Final = 50e6


def some_bytes(text: str) -> int:
    """A size that is not zero."""
    size = parse_size(text)
    if not size:
        raise argparse.ArgumentTypeError("must not be zero")
    return size


def number_up_to(limit: int) -> Callable[[str], int]:
    """A reader of whole numbers from 1 to ``limit``."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= limit:
            raise argparse.ArgumentTypeError(f"must be a number from 1 to {limit}: {text!r}")
        return int(text)

    return read


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the experiments --------------------------------------------------------------------------


def swarm_experiment(
    options: SwarmOptions, contenders: Sequence[str], rounds: int, directory: Path
) -> SwarmReport:
    bursts: dict[str, list[Burst]] = {name: [] for name in contenders}
    with open_network() as network:
        hosts = build(network, options)
        blob = new_blob(directory, options.size, bound_of(options))
        if "libtorrent" in contenders:
            make_torrent(hosts.origins[0], blob)
        for number in range(rounds):
            for contender in in_turn(contenders, number):
                with scratch(directory) as own:
                    burst = one_burst(contender, hosts, blob, own, options)
                say(
                    f"swarm, round {number + 1}: {contender} median {burst.median:.2f} s, "
                    f"slowest {burst.slowest:.2f} s, load average {burst.load:.1f}"
                )
                bursts[contender].append(burst)
    arrival = max(burst.spread for burst in bursts["swarmpull"])
    return SwarmReport(options, predict(options, arrival), bursts)


def one_burst(
    contender: str, hosts: Hosts, blob: Blob, directory: Path, options: SwarmOptions
) -> Burst:
    # What the round before left to be written must not be written during this one.
    os.sync()
    if contender == "libtorrent":
        return burst_of_libtorrent(hosts, blob, directory)
    return burst_of_swarmpull(hosts, blob, directory, read_all=options.read_all)


def pair_experiment(
    size: int, contenders: Sequence[str], rounds: int, directory: Path
) -> PairReport:
    transfers: dict[str, list[Transfer]] = {name: [] for name in contenders}
    with open_network() as network:
        host = network.add_alone("pair")
        blob = new_blob(directory, size, size / LOOPBACK_RATE)
        if "libtorrent" in contenders:
            make_torrent(host, blob)
        for number in range(rounds):
            for contender in in_turn(contenders, number):
                transfers[contender].append(one_transfer(contender, host, blob, directory))
                rate = size / 1e6 / transfers[contender][-1].seconds
                load = transfers[contender][-1].load
                say(
                    f"pair, round {number + 1}: {contender} {rate:.0f} MB/s, load average {load:.1f}"
                )
    return PairReport(size, transfers)


def one_transfer(contender: str, host: Namespace, blob: Blob, directory: Path) -> Transfer:
    with scratch(directory) as own:
        return transfer(contender, host, blob, own)


def new_blob(directory: Path, size: int, seconds: float) -> Blob:
    """A random blob that takes ``seconds`` at best."""
    content = directory / "content"
    content.mkdir()
    digest = write_random(content / "blob", size)
    patience = max(SECONDS_MIN, math.ceil(PATIENCE * seconds))
    return Blob(content / "blob", digest, size, directory / "blob.torrent", patience)


def in_turn(contenders: Sequence[str], number: int) -> Sequence[str]:
    """Who is first changes from round to round, so that what drifts on the machine meets all."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="lab-", dir=parent) as name:
        yield Path(name)


# --- the command line -------------------------------------------------------------------------


def obstacle(arguments: argparse.Namespace) -> str:
    """Why nothing can be measured here; empty if something can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    needed = ["ip", "tc", "curl"]
    if arguments.only != "swarm":
        needed.append("nginx")
    missing = [name for name in needed if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def compared(arguments: argparse.Namespace) -> list[str]:
    """What of ``--compare`` is there to compare with."""
    if arguments.compare is None:
        return []
    if importlib.util.find_spec("libtorrent") is None:
        say("comparison skipped: the Python package libtorrent is not installed")
        return []
    return [arguments.compare]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.lab", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    add = options.add_argument
    add("--agents", type=number_up_to(AGENTS_MAX), default=16, metavar="N")
    add("--origins", type=number_up_to(ORIGINS_MAX), default=1, metavar="N")
    add("--rate", type=parse_rate, default=parse_rate("200mbit"), metavar="RATE")
    add("--origin-rate", type=parse_rate, metavar="RATE", help="of the origins; default: --rate")
    add("--size", type=some_bytes, default=some_bytes("256MiB"), metavar="SIZE")
    add("--pair-size", type=some_bytes, default=some_bytes("1GiB"), metavar="SIZE")
    add("--rounds", type=number_up_to(100), default=3, metavar="N")
    add("--rtt", type=parse_duration, default=0.0005, help="for the simulation; default: 0.5ms")
    add(
        "--read", choices=("all", "last-byte"), default="all", help="what readers want in the swarm"
    )
    add("--compare", choices=("libtorrent",))
    add("--only", choices=("swarm", "pair"), help="one of the two experiments")
    add("--json", type=Path, metavar="FILE", help="write all that was measured there; - for stdout")
    add("--directory", type=Path, help="where to work, with room for 2 x SIZE per agent")
    return options


def measure(arguments: argparse.Namespace) -> tuple[SwarmReport | None, PairReport | None]:
    others = compared(arguments)
    swarm, pair = None, None
    if arguments.only != "pair":
        options = SwarmOptions(
            agents=arguments.agents,
            origins=arguments.origins,
            rate=arguments.rate,
            origin_rate=arguments.origin_rate or arguments.rate,
            size=arguments.size,
            rtt=arguments.rtt,
            read_all=arguments.read == "all",
        )
        touch_memory(2 * arguments.agents * arguments.size)
        with scratch(arguments.directory) as directory:
            contenders = ["swarmpull", *others]
            swarm = swarm_experiment(options, contenders, arguments.rounds, directory)
    if arguments.only != "swarm":
        touch_memory(4 * arguments.pair_size)
        with scratch(arguments.directory) as directory:
            contenders = ["nginx", "swarmpull", *others]
            pair = pair_experiment(arguments.pair_size, contenders, arguments.rounds, directory)
    return swarm, pair


def interrupt(number: int, frame: object) -> None:  # noqa: ARG001
    """A request to end is an exception: everything that was started is ended on its way out.

    A second request must not get in the way of that.
    """
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    arguments = parser().parse_args()
    if reason := obstacle(arguments):
        say(f"skipped: {reason}")
        return 0
    for each in ENDING:
        signal.signal(each, interrupt)
    try:
        swarm, pair = measure(arguments)
    except RuntimeError as error:
        say(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; everything that was started has been ended and removed")
        return 130
    result: dict[str, Any] = {"machine": machine(), **document(swarm, pair)}
    if arguments.json == Path("-"):
        print(json.dumps(result, indent=2))
        return 0
    if arguments.json is not None:
        arguments.json.write_text(f"{json.dumps(result, indent=2)}\n")
    print(f"{machine()}\n")
    if swarm is not None:
        print("\n".join([*swarm_lines(swarm), ""]))
    if pair is not None:
        print("\n".join(pair_lines(pair)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

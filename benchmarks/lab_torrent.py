"""libtorrent as a program: makes a torrent, seeds, and leeches from peers that it is told.

    python -m benchmarks.lab_torrent make FILE TORRENT
    python -m benchmarks.lab_torrent seed TORRENT DIRECTORY --listen HOST:PORT
    python -m benchmarks.lab_torrent leech TORRENT DIRECTORY --listen HOST:PORT --peers HOST:PORT,...

There is no tracker, no DHT and no local discovery: each leecher dials the peers it is told.  Connections
are TCP and not encrypted, as those of swarmpull are; everything else is libtorrent's default.

A leecher prints ``ready``, waits for a line on its standard input, downloads, and prints how long that
took; from then on it seeds.  Both answer each further line with what they have sent and received, and end
with their standard input, or when ``--seconds`` are over.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

ALERT_WAIT_MILLISECONDS: Final = 500


def settings(lt: Any, listen: str) -> dict[str, Any]:  # noqa: ANN401 - libtorrent has no types
    """What differs from the defaults."""
    off = ("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp")
    utp = ("enable_outgoing_utp", "enable_incoming_utp")
    return {
        "listen_interfaces": listen,
        **dict.fromkeys((*off, *utp), False),
        "in_enc_policy": int(lt.enc_policy.disabled),
        "out_enc_policy": int(lt.enc_policy.disabled),
        # On loopback all peers have one address.
        "allow_multiple_connections_per_ip": True,
        "alert_mask": int(
            lt.alert.category_t.status_notification | lt.alert.category_t.error_notification
        ),
    }


def make(lt: Any, file: Path, torrent: Path) -> None:  # noqa: ANN401
    """Hash ``file`` into ``torrent``, with the length of pieces that libtorrent chooses.

    A torrent of version 1: by default there are the hashes of both versions, and a leecher computes both.
    """
    created = lt.create_torrent(lt.list_files(str(file)), 0, lt.create_torrent.v1_only)
    lt.set_piece_hashes(created, str(file.parent))
    torrent.write_bytes(lt.bencode(created.generate()))


def add(lt: Any, session: Any, torrent: Path, directory: Path, *, seed: bool) -> Any:  # noqa: ANN401
    """Start with a torrent at once, without the queue that libtorrent has for many."""
    parameters = lt.add_torrent_params()
    parameters.ti = lt.torrent_info(str(torrent))
    parameters.save_path = str(directory)
    parameters.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    if seed:
        parameters.flags |= lt.torrent_flags.seed_mode
    return session.add_torrent(parameters)


def wait_finished(lt: Any, session: Any) -> None:  # noqa: ANN401
    """Return when the torrent has all pieces, each of which has matched its hash."""
    while True:
        session.wait_for_alert(ALERT_WAIT_MILLISECONDS)
        for alert in session.pop_alerts():
            if isinstance(alert, lt.torrent_finished_alert):
                return
            if isinstance(alert, lt.torrent_error_alert | lt.file_error_alert):
                raise RuntimeError(alert.message())


def leech(lt: Any, session: Any, torrent: Path, directory: Path, peers: list[str]) -> Any:  # noqa: ANN401
    say("ready")
    sys.stdin.readline()
    started = time.perf_counter()
    handle = add(lt, session, torrent, directory, seed=False)
    for peer in peers:
        host, _, port = peer.rpartition(":")
        handle.connect_peer((host, int(port)))
    wait_finished(lt, session)
    say(json.dumps({"seconds": time.perf_counter() - started}))
    return handle


def serve(handle: Any) -> None:  # noqa: ANN401
    """Go on until standard input ends."""
    for _ in sys.stdin:
        status = handle.status()
        say(
            json.dumps(
                {"sent": status.total_payload_upload, "received": status.total_payload_download}
            )
        )


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab_torrent", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("make", "seed", "leech"))
    parser.add_argument("first", type=Path, metavar="FILE|TORRENT")
    parser.add_argument("second", type=Path, metavar="TORRENT|DIRECTORY")
    parser.add_argument("--listen", default="127.0.0.1:6881")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=[])
    parser.add_argument("--seconds", type=int, default=600)
    arguments = parser.parse_args()
    lt = importlib.import_module("libtorrent")
    # Its default action ends the process: nobody waits for longer than that.
    signal.alarm(arguments.seconds)
    if arguments.what == "make":
        make(lt, arguments.first, arguments.second)
        return 0
    session = lt.session(settings(lt, arguments.listen))
    if arguments.what == "seed":
        handle = add(lt, session, arguments.first, arguments.second, seed=True)
        say("ready")
    else:
        handle = leech(lt, session, arguments.first, arguments.second, arguments.peers)
    serve(handle)
    return 0


if __name__ == "__main__":
    sys.exit(main())

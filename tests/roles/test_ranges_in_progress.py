"""What real clients send for parts of a blob, byte for byte as captured, while the agent downloads it.

Every test begins with an origin whose uplink stands still: the blob is in progress, and all that is answered
at once comes without it.  Then the origin is let go, slowly enough that readers overtake the download.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import h11
import pytest
import trio

from swarmpull.config import SwarmConfig
from swarmpull.registry.client import put_rates
from swarmpull.roles import swarm_host
from swarmpull.swarm.metainfo import PIECE_LENGTH_MIN
from swarmpull.swarm.peers import PeerKind
from swarmpull.swarm.scheduler import SwarmLimits

from .peers import Content, make_content
from .roles import Cluster, whole_cluster

MIB: Final = 1 << 20
REPOSITORY: Final = "team/app"
# Nothing passes after the first burst, for hours.
AT_A_STANDSTILL: Final = 1
# A piece takes a fifth of a second.
IN_PROGRESS: Final = 20 * MIB
OCTETS: Final = "application/octet-stream"
Line = tuple[str, str]

# As captured from each client; the values that tell who it is, and what it takes.
CONTAINERD_2: Final = (
    ("User-Agent", "containerd/2.1.9"),
    ("Accept", "application/vnd.oci.image.layer.v1.tar+gzip, */*"),
    ("Accept-Encoding", "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5"),
)
CONTAINERD_1: Final = (
    ("User-Agent", "containerd/1.7.24"),
    ("Accept", "application/vnd.oci.image.layer.v1.tar+gzip, */*"),
    ("Accept-Encoding", "gzip"),
)
DOCKER: Final = (
    ("User-Agent", "docker/20.10.24 go/go1.19.8 os/linux arch/amd64"),
    ("Connection", "close"),
)
# skopeo, podman and buildah alike.
CONTAINERS: Final = (
    ("User-Agent", "containers/5.39.2 (github.com/containers/image)"),
    ("Docker-Distribution-Api-Version", "registry/2.0"),
)
STARGZ: Final = (("User-Agent", "Go-http-client/1.1"), ("Accept-Encoding", "identity"))
SOCI: Final = (("User-Agent", "soci-snapshotter/0.8.0"), ("Accept-Encoding", "identity"))


@pytest.fixture(scope="module")
def blob() -> Content:
    """Ten pieces and a bit."""
    return make_content(10 * PIECE_LENGTH_MIN + 4321)


class Exchange:
    """One request over a socket of its own, and its response as it comes.

    Attributes:
        status: of the response.
        headers: by lower-case name.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT)

    async def begin(self, method: str, target: str, lines: Iterable[Line]) -> None:
        """Send the request and wait for the head of the response."""
        head = [("Host", "127.0.0.1"), *lines]
        request = h11.Request(method=method, target=target, headers=head)
        for event in (request, h11.EndOfMessage()):
            await self._stream.send_all(self._http.send(event) or b"")
        response = await self._next()
        assert isinstance(response, h11.Response)
        self.status = response.status_code
        self.headers = {name.decode(): value.decode() for name, value in response.headers}

    async def read(self, size: int | None = None) -> bytes:
        """The next bytes of the body: ``size`` or a few more, or all that come."""
        body = bytearray()
        while size is None or len(body) < size:
            event = await self._next()
            if isinstance(event, h11.EndOfMessage):
                break
            body += event.data
        return bytes(body)

    async def _next(self) -> h11.Event:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._stream.receive_some(1 << 18))
        return event


@attrs.frozen
class Pull:
    """An agent that downloads one blob from an origin, which only the test lets go."""

    cluster: Cluster
    blob: Content

    @property
    def total(self) -> int:
        return len(self.blob.data)

    @asynccontextmanager
    async def request(self, *lines: Line, method: str = "GET") -> AsyncIterator[Exchange]:
        """A request for the blob; the block begins with the head of its answer and ends by hanging up."""
        host, _, port = self.cluster.roles["agent"].address("registry").rpartition(":")
        target = f"/v2/{REPOSITORY}/blobs/{self.blob.digest}"
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            exchange = Exchange(stream)
            await exchange.begin(method, target, lines)
            yield exchange

    async def let_go(self, rate: int | None = IN_PROGRESS) -> None:
        [answer] = await put_rates(
            [self.cluster.roles["origin"].address("admin")], {"upload_rate": rate}
        )
        assert answer.document is not None, answer.failure

    async def have(self) -> int:
        """Pieces that the agent has."""
        torrents = (await self.cluster.status("agent"))["torrents"]
        return sum(t["have"] for t in torrents if t["digest"] == str(self.blob.digest))

    async def finished(self) -> None:
        """Wait for the download that somebody began: one, of every byte once, whoever has left."""
        complete = 'downloads_total{outcome="complete"}'
        while not await self.cluster.metric("agent", complete):  # noqa: ASYNC110 - no event of ours
            await trio.sleep(0.02)
        assert await self.cluster.metric("agent", 'downloads_total{outcome="failed"}') == 0
        received = (await self.cluster.status("agent"))["bytes_received"]
        assert received == {"origin": self.total, "agent": 0}

    def part(self, start: int, stop: int | None = None) -> bytes:
        return self.blob.data[start:stop]

    def check(self, exchange: Exchange, start: int, stop: int) -> None:
        """The head of an answer that holds the bytes from ``start`` to ``stop``."""
        assert exchange.status == 206
        assert exchange.headers["content-range"] == f"bytes {start}-{stop - 1}/{self.total}"
        assert exchange.headers["content-length"] == str(stop - start)
        assert exchange.headers["content-type"] == OCTETS
        self.check_common(exchange)

    def check_common(self, exchange: Exchange) -> None:
        assert exchange.headers["accept-ranges"] == "bytes"
        assert exchange.headers["docker-content-digest"] == str(self.blob.digest)
        assert exchange.headers["etag"] == f'"{self.blob.digest}"'
        assert "content-encoding" not in exchange.headers
        assert "transfer-encoding" not in exchange.headers


@pytest.fixture
async def pull(tmp_path: Path, blob: Content) -> AsyncIterator[Pull]:
    async with whole_cluster(tmp_path) as cluster:
        reply = await cluster.push_blob("origin", REPOSITORY, blob.data)
        assert reply.status_code == 201
        await cluster.start_agent()
        pull = Pull(cluster, blob)
        await pull.let_go(AT_A_STANDSTILL)
        yield pull


def byte_range(start: int, stop: int | None = None) -> Line:
    """A ``Range`` header for the bytes from ``start`` to ``stop``, or to the end."""
    return ("Range", f"bytes={start}-{'' if stop is None else stop - 1}")


async def test_containerd_2_reads_a_chunk_from_each_of_many_open_ended_ranges(pull: Pull) -> None:
    """``concurrent_layer_fetch_buffer = 8388608``: 6 requests at a time, each reset after its chunk."""
    chunk = 8 * MIB
    places = trio.CapacityLimiter(6)
    chunks: dict[int, bytes] = {}

    async def fetch(start: int, *, task_status=trio.TASK_STATUS_IGNORED) -> None:
        async with places, pull.request(*CONTAINERD_2, byte_range(start)) as exchange:
            task_status.started()
            pull.check(exchange, start, pull.total)
            chunks[start] = (await exchange.read(chunk))[:chunk]

    async with trio.open_nursery() as nursery:
        for start in range(0, pull.total, chunk):
            # All heads come while nothing else does.
            await nursery.start(fetch, start)
        assert await pull.have() <= 1
        await pull.let_go()

    assert b"".join(chunks[start] for start in sorted(chunks)) == pull.blob.data
    await pull.finished()


async def test_containerd_2_hangs_up_before_the_last_chunk_and_the_blob_is_finished_all_the_same(
    pull: Pull,
) -> None:
    async with pull.request(*CONTAINERD_2, byte_range(8 * MIB)) as exchange:
        await pull.let_go()
        first = await exchange.read(MIB)
        assert first == pull.part(8 * MIB)[: len(first)]
        assert await pull.have() < pull.blob.metainfo.piece_count

    await pull.finished()


async def test_stargz_probes_two_bytes_and_then_asks_for_many_ranges(pull: Pull) -> None:
    """The probe tells the size, the footer is the end of the blob, then come chunks from anywhere."""
    async with pull.request(*STARGZ, ("Range", "bytes=0-1")) as probe:
        pull.check(probe, 0, 2)
        await pull.let_go()
        assert await probe.read() == pull.part(0, 2)
    footer = pull.total - 51
    async with pull.request(*STARGZ, byte_range(footer, pull.total)) as exchange:
        pull.check(exchange, footer, pull.total)
        assert await exchange.read() == pull.part(footer)
    starts = [pull.total // 20 * number for number in range(19, 0, -1)]
    header = ",".join(f"{start}-{start + 49_999}" for start in starts)
    async with pull.request(*STARGZ, ("Range", f"bytes={header}")) as exchange:
        parts = multipart_of(pull, exchange, await exchange.read())

    assert parts == [(start, pull.part(start, start + 50_000)) for start in starts]
    await pull.finished()


async def test_the_footer_of_a_blob_does_not_wait_for_what_is_before_it(pull: Pull) -> None:
    """Lazy pulls read the end first: it must not come last."""
    footer = pull.total - 51
    async with pull.request(*STARGZ, byte_range(footer, pull.total)) as exchange:
        await pull.let_go()
        assert await exchange.read() == pull.part(footer)

        assert await pull.have() < pull.blob.metainfo.piece_count
    await pull.finished()


@pytest.mark.parametrize("span", [8 * MIB, 16 * MIB])
async def test_soci_fetches_spans_in_parallel(pull: Pull, span: int) -> None:
    spans: dict[int, bytes] = {}

    async def fetch(start: int, *, task_status=trio.TASK_STATUS_IGNORED) -> None:
        stop = min(start + span, pull.total)
        async with pull.request(*SOCI, byte_range(start, stop)) as exchange:
            task_status.started()
            pull.check(exchange, start, stop)
            spans[start] = await exchange.read()

    async with trio.open_nursery() as nursery:
        for start in range(0, pull.total, span):
            await nursery.start(fetch, start)
        assert await pull.have() <= 1
        await pull.let_go()

    assert b"".join(spans[start] for start in sorted(spans)) == pull.blob.data
    await pull.finished()


async def test_podman_reads_the_table_of_contents_and_then_the_chunks_that_it_lacks(
    pull: Pull,
) -> None:
    """zstd:chunked: one closed range near the end, then one GET with 8 ranges that may touch."""
    toc = pull.total - 40_000, pull.total - 72
    async with pull.request(*CONTAINERS, byte_range(*toc)) as exchange:
        pull.check(exchange, *toc)
        await pull.let_go()
        assert await exchange.read() == pull.part(*toc)
    wanted = [(5 * MIB * k + 7, 5 * MIB * k + 1_000_007) for k in range(6)]
    wanted += [(31 * MIB, 32 * MIB), (32 * MIB, 33 * MIB)]
    header = ",".join(f"{start}-{stop - 1}" for start, stop in wanted)
    async with pull.request(*CONTAINERS, ("Range", f"bytes={header}")) as exchange:
        parts = multipart_of(pull, exchange, await exchange.read())

    assert parts == [(start, pull.part(start, stop)) for start, stop in wanted]
    await pull.finished()


@pytest.mark.parametrize(
    "client", [DOCKER, CONTAINERD_1, CONTAINERS], ids=["docker", "containerd", "skopeo"]
)
async def test_a_pull_that_was_cut_resumes_where_it_was(
    pull: Pull, client: tuple[Line, ...]
) -> None:
    """docker comes back after 5 s, skopeo after 1 s, containerd at once; the agent cannot tell."""
    async with pull.request(*client) as exchange:
        assert exchange.status == 200
        assert exchange.headers["content-length"] == str(pull.total)
        pull.check_common(exchange)
        await pull.let_go()
        begun = await exchange.read(6 * MIB)
    assert await pull.have() < pull.blob.metainfo.piece_count

    async with pull.request(*client, byte_range(len(begun))) as exchange:
        pull.check(exchange, len(begun), pull.total)
        rest = await exchange.read()

    assert begun + rest == pull.blob.data
    await pull.finished()


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=-5", -5, None),
        ("bytes=4194300-4194310", 4194300, 4194311),
        ("bytes=41000000-99999999999", 41_000_000, None),
        ("bytes=0-1,99999999999-", 0, 2),
    ],
)
async def test_any_range_of_a_blob_in_progress_is_exact(
    pull: Pull, header: str, start: int, stop: int | None
) -> None:
    expected = pull.part(start, stop)
    first = start % pull.total

    async with pull.request(("Range", header)) as exchange:
        pull.check(exchange, first, first + len(expected))
        await pull.let_go()
        assert await exchange.read() == expected
    await pull.finished()


@pytest.mark.parametrize(
    "header",
    [
        "bytes=99999999999-",
        "bytes=-0",
        "bytes=5-4",
        "bytes=0-,0-",
        "bytes=" + ",".join(["0-0"] * 5000),
    ],
)
async def test_a_range_that_cannot_be_answered_is_a_416_at_once(pull: Pull, header: str) -> None:
    async with pull.request(("Range", header)) as exchange:
        assert exchange.status == 416
        assert exchange.headers["content-range"] == f"bytes */{pull.total}"
        assert b"SIZE_INVALID" in await exchange.read()


async def test_if_range_of_another_version_gets_the_whole_and_of_this_one_the_part(
    pull: Pull,
) -> None:
    part = byte_range(5, 10)
    async with pull.request(part, ("If-Range", f'"{pull.blob.digest}"')) as exchange:
        pull.check(exchange, 5, 10)
    async with pull.request(part, ("If-Range", '"sha256:0"')) as exchange:
        assert (exchange.status, exchange.headers["content-length"]) == (200, str(pull.total))


async def test_head_tells_the_length_and_begins_nothing(pull: Pull) -> None:
    async with pull.request(*CONTAINERD_1, byte_range(0), method="HEAD") as exchange:
        assert (exchange.status, exchange.headers["content-length"]) == (200, str(pull.total))
        pull.check_common(exchange)

    assert (await pull.cluster.status("agent"))["torrents"] == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that gets nothing for a second fails."""

    def limits(_config: SwarmConfig, _kind: PeerKind) -> SwarmLimits:
        return SwarmLimits(stall_timeout=1.0)

    monkeypatch.setattr(swarm_host, "limits_of", limits)


async def test_a_download_that_fails_cuts_every_reader_short(impatient: None, pull: Pull) -> None:
    async with (
        pull.request(*DOCKER) as whole,
        pull.request(*SOCI, byte_range(20 * MIB, 30 * MIB)) as part,
    ):
        pull.check(part, 20 * MIB, 30 * MIB)
        for exchange in (whole, part):
            with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
                await exchange.read()

    assert await pull.cluster.metric("agent", 'downloads_total{outcome="failed"}') == 1


def multipart_of(pull: Pull, exchange: Exchange, body: bytes) -> list[tuple[int, bytes]]:
    """The parts of a multipart/byteranges answer as (offset, content); checks all that frames them."""
    assert exchange.status == 206
    assert exchange.headers["content-length"] == str(len(body))
    kind, _, boundary = exchange.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    pull.check_common(exchange)
    return list(split(pull, body, boundary.encode()))


def split(pull: Pull, body: bytes, boundary: bytes) -> Iterator[tuple[int, bytes]]:
    first, *parts, last = body.split(b"--" + boundary)
    assert (first, last) == (b"", b"--\r\n")
    for part in parts:
        head, _, content = part.partition(b"\r\n\r\n")
        lines = dict(line.decode().split(": ", 1) for line in head.split(b"\r\n") if line)
        assert lines["Content-Type"] == OCTETS
        start, _, stop = lines["Content-Range"].removeprefix("bytes ").partition("-")
        content = content[:-2]
        assert stop == f"{int(start) + len(content) - 1}/{pull.total}"
        yield int(start), content

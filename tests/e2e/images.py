"""Images made of real files of this machine: OCI layouts written with the standard library alone.

The content is deterministic for one machine (sorted files, no times, no owners), large enough for many
pieces, and varied the way images are: many small texts, some large binaries, compressed and plain layers.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import stat
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs

from . import web

MIB: Final = 1 << 20
GZIP_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
TAR_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
REF_NAME: Final = "org.opencontainers.image.ref.name"
# Where the files come from, for each kind of image in another order, so that the content of one does
# not depend on which others were made before.
STDLIB: Final = sysconfig.get_path("stdlib")
SMALL_SOURCES: Final = (STDLIB, "/usr/share")
LARGE_SOURCES: Final = ("/usr/share", sys.base_prefix, "/usr/lib")
FRESH_SOURCES: Final = ("/usr/lib", sys.base_prefix, "/usr/share")
# Tens of thousands of tiny files would only try how fast a client unpacks.
FILE_BYTES: Final = range(8 << 10, 32 * MIB)


@attrs.frozen
class Part:
    """A blob in the content directory.  ``diff_id`` is the digest of a layer before compression."""

    media_type: str
    digest: str
    length: int
    diff_id: str = ""

    @property
    def hex(self) -> str:
        return self.digest.partition(":")[2]

    def descriptor(self, **more: Any) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.length, **more}


@attrs.frozen
class Image:
    """An image, or an index of images, in an OCI layout.

    Attributes:
        layout: directory.
        tag: the name within the layout.
        manifest: the manifest or index that the tag names.
        parts: configs, layers and child manifests.
    """

    layout: Path
    tag: str
    manifest: Part
    parts: tuple[Part, ...]

    @property
    def reference(self) -> str:
        """What skopeo calls it."""
        return f"oci:{self.layout}:{self.tag}"

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)

    def content(self, part: Part) -> Path:
        return self.layout / "blobs" / "sha256" / part.hex


class ImageFactory:
    """Makes images that share large layers; each image has at least one layer of its own."""

    def __init__(self, directory: Path) -> None:
        self._content = directory / "content"
        self._layouts = directory / "layouts"
        self._content.mkdir(parents=True)
        self._fresh_files = real_files(FRESH_SOURCES)

    @functools.cached_property
    def large_layers(self) -> tuple[Part, ...]:
        """About 200 MB in three layers."""
        files = real_files(LARGE_SOURCES)
        return (
            self._write_layer(take(files, 160 * MIB), compressed=True),
            self._write_layer(take(files, 160 * MIB), compressed=True),
            self._write_layer(take(files, 96 * MIB), compressed=False),
        )

    @functools.cached_property
    def small_layers(self) -> tuple[Part, ...]:
        """About 20 MB in two layers."""
        files = real_files(SMALL_SOURCES)
        return (
            self._write_layer(take(files, 24 * MIB), compressed=True),
            self._write_layer(take(files, 12 * MIB), compressed=False),
        )

    def large(self, name: str) -> Image:
        return self._image(name, (*self.large_layers, self._note(name)))

    def small(self, name: str) -> Image:
        return self._image(name, (*self.small_layers, self._note(name)))

    def fresh(self, name: str) -> Image:
        """An image of about 20 MB of which nobody has any layer yet."""
        layer = self._write_layer(take(self._fresh_files, 40 * MIB), compressed=True)
        return self._image(name, (layer, self._note(name)))

    def text(self, name: str) -> Image:
        """An image of about 5 MB of source text."""
        files = (entry for entry in real_files(SMALL_SOURCES) if entry[0].endswith(".py"))
        return self._image(name, (self._write_layer(take(files, 20 * MIB), compressed=True),))

    def multi_architecture(self, name: str) -> Image:
        """An index of two images that share layers."""
        children = []
        for architecture in ("amd64", "arm64"):
            note = self._note(f"{name} for {architecture}")
            children.append(self._manifest((*self.small_layers, note), architecture))
        descriptors = [
            manifest.descriptor(platform={"architecture": architecture, "os": "linux"})
            for (manifest, _), architecture in zip(children, ("amd64", "arm64"), strict=True)
        ]
        body = {"schemaVersion": 2, "mediaType": web.OCI_INDEX, "manifests": descriptors}
        index = self._json(web.OCI_INDEX, body)
        parts = [part for manifest, parts in children for part in (manifest, *parts)]
        return self._layout(name, index, tuple(dict.fromkeys(parts)))

    def _image(self, name: str, layers: tuple[Part, ...]) -> Image:
        manifest, parts = self._manifest(layers, "amd64")
        return self._layout(name, manifest, parts)

    def _manifest(
        self, layers: tuple[Part, ...], architecture: str
    ) -> tuple[Part, tuple[Part, ...]]:
        rootfs = {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}
        history = [{"created_by": f"layer {number}"} for number, _ in enumerate(layers)]
        settings = {"Cmd": ["/bin/true"], "Env": ["PATH=/usr/bin"]}
        body = {"architecture": architecture, "os": "linux", "config": settings}
        config = self._json(web.OCI_CONFIG, {**body, "rootfs": rootfs, "history": history})
        manifest = {
            "schemaVersion": 2,
            "mediaType": web.OCI_MANIFEST,
            "config": config.descriptor(),
            "layers": [layer.descriptor() for layer in layers],
        }
        return self._json(web.OCI_MANIFEST, manifest), (config, *layers)

    def _layout(self, name: str, manifest: Part, parts: tuple[Part, ...]) -> Image:
        layout = self._layouts / name
        blobs = layout / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        for part in (manifest, *parts):
            os.link(self._content / part.hex, blobs / part.hex)
        tagged = manifest.descriptor(annotations={REF_NAME: name})
        index = {"schemaVersion": 2, "mediaType": web.OCI_INDEX, "manifests": [tagged]}
        (layout / "index.json").write_text(json.dumps(index))
        (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        return Image(layout, name, manifest, parts)

    def _json(self, media_type: str, body: dict[str, Any]) -> Part:
        content = json.dumps(body, indent=2).encode()
        digest = web.digest_of(content)
        (self._content / digest.partition(":")[2]).write_bytes(content)
        return Part(media_type, digest, len(content))

    def _note(self, text: str) -> Part:
        """A layer of one small file."""
        return self._write_layer([("etc/image-name", text.encode(), 0o644)], compressed=True)

    def _write_layer(self, entries: Any, *, compressed: bool) -> Part:
        draft = self._content / "draft"
        with draft.open("wb") as raw:
            outer = Hashing(raw)
            packed = (
                gzip.GzipFile("", "wb", compresslevel=1, fileobj=outer, mtime=0)
                if compressed
                else outer
            )
            inner = Hashing(packed)
            with tarfile.open(fileobj=inner, mode="w|", format=tarfile.GNU_FORMAT) as archive:
                write_entries(archive, entries)
            if compressed:
                packed.close()
        media_type = GZIP_LAYER if compressed else TAR_LAYER
        part = Part(media_type, outer.digest, outer.length, inner.digest)
        draft.rename(self._content / part.hex)
        return part


class Hashing:
    """A file for writing that knows the digest of what went through."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._hasher = hashlib.sha256()
        self.length = 0

    def write(self, data: bytes) -> int:
        self._hasher.update(data)
        self.length += len(data)
        self._target.write(data)
        return len(data)

    def flush(self) -> None:
        self._target.flush()

    @property
    def digest(self) -> str:
        return f"sha256:{self._hasher.hexdigest()}"


def write_entries(archive: tarfile.TarFile, entries: Iterator[tuple[str, bytes, int]]) -> None:
    directories = {""}
    for name, content, mode in entries:
        for folder in missing_parents(name, directories):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), mode
        archive.addfile(entry, io.BytesIO(content))


def missing_parents(name: str, directories: set[str]) -> list[str]:
    """The folders above a file that are not among ``directories`` yet, outermost first; adds them."""
    missing = []
    while (name := os.path.dirname(name)) not in directories:
        directories.add(name)
        missing.insert(0, name)
    return missing


def take(files: Iterator[tuple[str, bytes, int]], budget: int) -> Iterator[tuple[str, bytes, int]]:
    """The next files, until they have ``budget`` bytes together or there are no more."""
    taken = 0
    while taken < budget and (entry := next(files, None)) is not None:
        taken += len(entry[1])
        yield entry


def real_files(sources: Iterable[str]) -> Iterator[tuple[str, bytes, int]]:
    """Regular files of this machine as (name within the image, content, mode), each once."""
    seen: set[tuple[int, int]] = set()
    for path in itertools.chain.from_iterable(walk(source) for source in sources):
        try:
            status = path.lstat()
            key = (status.st_dev, status.st_ino)
            wanted = stat.S_ISREG(status.st_mode) and status.st_size in FILE_BYTES
            if not wanted or key in seen:
                continue
            content = path.read_bytes()
        except OSError:
            continue  # a file that went away or that we may not read is not needed
        seen.add(key)
        yield str(path).lstrip("/"), content, 0o755 if status.st_mode & 0o111 else 0o644


def walk(source: str) -> Iterator[Path]:
    for folder, folders, names in os.walk(source):
        folders.sort()
        for name in sorted(names):
            if name.isascii() and not name.endswith(".pyc"):
                yield Path(folder, name)

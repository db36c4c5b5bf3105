"""Reading and writing what was planned, and the record with which it is undone.

The record holds each file as it was and as we wrote it.  It is on the disk before any of them is changed, so
that what was interrupted can be undone, if by a crash of the host, and is gone when everything is.  Blocking.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from swarmpull.setup.plan import Files, Plan, Runtime, SetupRefused, Wanted

RECORDS: Final = "/etc/swarmpull/setup"
# In the directory run of the host; where there is none, as in a system that is being built, beside it.
LOCK: Final = ".swarmpull-setup.lock"
# Of directories that we make, whatever the umask is: runtimes need not run as root.
FOLDER_MODE: Final = 0o755


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[None]:
    """For the block nobody else changes the files below ``root``.

    A lock file says so, which nobody else can open, and which is gone afterwards.  One that a crash has left
    is locked by nobody.

    Raises SetupRefused when somebody does, or the lock file cannot be made.
    """
    run = root / "run"
    place = (run if run.is_dir() and not run.is_symlink() else root) / LOCK
    descriptor = _locked(root, place)
    try:
        yield
    finally:
        # Before the lock is given up: whoever gets it then sees that it is of a file that is gone.
        place.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(root: Path, place: Path) -> int:
    """A lock file of this name; its lock is held until the descriptor is closed."""
    while True:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(place, flags, 0o600)
        except OSError as error:
            reason = f"the lock of swarmpull setup cannot be taken: {error.strerror}"
            raise SetupRefused(str(place), reason) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), place.stat(follow_symlinks=False)):
                    return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise SetupRefused(
                str(root), "another swarmpull setup is at work there: try again when it has ended"
            ) from error
        # Somebody who has ended since has taken it away.
        os.close(descriptor)


class Disk:
    """The files below a directory, which is ``/`` for the host itself."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def place(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    def read(self, path: str) -> str | None:
        place = self.place(path)
        try:
            if place.is_symlink():
                raise SetupRefused(
                    str(place), f"it is a link to {place.readlink()}, which is not followed"
                )
            # Without translation of line ends: what is put back has to be the same.
            return place.read_bytes().decode()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise SetupRefused(str(place), f"it is no text in UTF-8: {error}") from error

    def names(self, directory: str) -> Sequence[str]:
        try:
            return sorted(os.listdir(self.place(directory)))
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Replace a file at once; one that is there keeps its owner and mode."""
        place = self.place(path)
        _make_folder(place.parent)
        temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                with contextlib.suppress(FileNotFoundError):
                    former = place.stat()
                    mode = stat.S_IMODE(former.st_mode)
                    os.fchown(file.fileno(), former.st_uid, former.st_gid)
                os.fchmod(file.fileno(), mode)
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(place)
            _sync_folder(place.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self, path: str) -> None:
        place = self.place(path)
        with contextlib.suppress(FileNotFoundError):
            place.unlink()
            _sync_folder(place.parent)

    def missing_folders(self, path: str) -> Iterator[str]:
        """The directories above a file that are not there, the innermost first."""
        folder = path.rpartition("/")[0]
        while folder and not self.place(folder).exists():
            yield folder
            folder = folder.rpartition("/")[0]

    def remove_folder(self, path: str) -> None:
        """Remove a directory, if nothing is in it."""
        place = self.place(path)
        try:
            place.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EEXIST):
                raise
        else:
            _sync_folder(place.parent)


def _make_folder(place: Path) -> None:
    """Make a directory and those above it that are missing; each is on the disk then."""
    if place.is_dir():
        return
    _make_folder(place.parent)
    try:
        place.mkdir(FOLDER_MODE)
    except FileExistsError:
        if not place.is_dir():
            raise
        return
    place.chmod(FOLDER_MODE)
    _sync_folder(place.parent)


def _sync_folder(place: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@attrs.frozen
class Written:
    """A file that we have written: what it was, None for no file, and what it has become."""

    before: str | None
    after: str


@attrs.frozen
class Record:
    """What was done for one runtime.

    Attributes:
        agent: its URL.
        files: by path.
        folders: directories that we made, the innermost first.
    """

    agent: str = ""
    files: Mapping[str, Written] = attrs.field(factory=dict)
    folders: tuple[str, ...] = ()

    @classmethod
    def read(cls, disk: Disk, path: str) -> Record:
        text = disk.read(path)
        if text is None:
            return cls()
        try:
            document = json.loads(text)
            files = {path: Written(**each) for path, each in document["files"].items()}
            return cls(document["agent"], files, tuple(document["folders"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SetupRefused(
                str(disk.place(path)), f"it is no record of a setup: {error!r}"
            ) from error

    def text(self) -> str:
        return json.dumps(attrs.asdict(self), indent=2) + "\n"


@attrs.frozen
class _Former(Files):
    """The files as they would be without us."""

    disk: Disk
    record: Record
    runtime: Runtime

    def read(self, path: str) -> str | None:
        text = self.disk.read(path)
        written = self.record.files.get(path)
        if written is None or text in (None, written.before):
            return text
        if text == written.after:
            return written.before
        # Somebody has changed it since: what they did stays.
        return self.runtime.without(path, text or "", self.record.agent)

    def names(self, directory: str) -> Sequence[str]:
        folder = directory.rstrip("/")
        ours = {path for path in self.record.files if self.read(path) is None}
        return [
            name
            for name in self.disk.names(directory)
            if f"{folder}/{name}" not in ours and f"{folder}/{name}" not in self.record.folders
        ]


@attrs.frozen
class Change:
    """A file, as it is and as it is to be; None for no file."""

    path: str
    now: str | None
    then: str | None


@attrs.frozen
class Work:
    """What is to be done on this host, and what is to be said with it."""

    disk: Disk
    record_path: str
    changes: tuple[Change, ...]
    before: Record
    after: Record
    notes: tuple[str, ...]

    def diff(self) -> Iterator[str]:
        """What would change, line by line."""
        for change in self.changes:
            place = str(self.disk.place(change.path))
            yield from difflib.unified_diff(
                (change.now or "").splitlines(),
                (change.then or "").splitlines(),
                "/dev/null" if change.now is None else place,
                "/dev/null" if change.then is None else place,
                lineterm="",
            )

    def do(self) -> None:
        """Raises OSError; what is done then is in the record."""
        if self.after.files:
            # May hold what only root may read.
            self.disk.write(self.record_path, self.after.text(), 0o600)
        for change in self.changes:
            if change.then is None:
                self.disk.remove(change.path)
            else:
                self.disk.write(change.path, change.then)
        if not self.after.files:
            self._hand_on_folders()
            self.disk.remove(self.record_path)
        for folder in self.before.folders:
            if folder not in self.after.folders:
                self.disk.remove_folder(folder)

    def _hand_on_folders(self) -> None:
        """Directories that hold the record of another runtime, too, are for that one to remove."""
        shared = {each for each in self.before.folders if f"{RECORDS}/".startswith(f"{each}/")}
        for name in self.disk.names(RECORDS) if shared else ():
            path = f"{RECORDS}/{name}"
            if path == self.record_path or not name.endswith(".json"):
                continue
            # One that is none keeps its directory there: what it was of has to be looked at anyway.
            with contextlib.suppress(SetupRefused):
                other = Record.read(self.disk, path)
                heir = attrs.evolve(other, folders=_innermost_first({*other.folders, *shared}))
                self.disk.write(path, heir.text(), 0o600)
                return


def set_up(root: Path, runtime: Runtime, wanted: Wanted) -> Work:
    """What is to be done for a runtime of the host below ``root``.  Raises SetupRefused."""
    disk, path, record, former = _begun(root, runtime)
    return _work(disk, path, record, former, runtime.plan(former, wanted), str(wanted.agent))


def undo(root: Path, runtime: Runtime) -> Work:
    """What is to be done to have everything as it was.  Raises SetupRefused."""
    disk, path, record, former = _begun(root, runtime)
    notes = runtime.undone if record.files else ()
    return _work(disk, path, record, former, Plan({}, notes), "")


def _innermost_first(folders: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(folders, key=lambda folder: (-folder.count("/"), folder)))


def _begun(root: Path, runtime: Runtime) -> tuple[Disk, str, Record, _Former]:
    disk = Disk(root)
    path = f"{RECORDS}/{runtime.name}.json"
    record = Record.read(disk, path)
    return disk, path, record, _Former(disk, record, runtime)


def _work(disk: Disk, path: str, record: Record, former: _Former, plan: Plan, agent: str) -> Work:
    files = {name: Written(former.read(name), text) for name, text in plan.texts.items()}
    meant = {name: former.read(name) for name in record.files} | plan.texts
    changes = [Change(name, disk.read(name), text) for name, text in sorted(meant.items())]
    needed = [*plan.texts, path] if plan.texts else []
    made = [folder for name in needed for folder in disk.missing_folders(name)]
    kept = [
        folder for folder in record.folders if any(name.startswith(f"{folder}/") for name in needed)
    ]
    folders = _innermost_first({*made, *kept})
    return Work(
        disk,
        path,
        tuple(change for change in changes if change.now != change.then),
        record,
        Record(agent, files, folders),
        plan.notes,
    )

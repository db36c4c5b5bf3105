"""`swarmpull setup` on the files of a host: written, merged, done again, undone."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from swarmpull.cli import main
from swarmpull.errors import SwarmpullError
from swarmpull.setup import apply, docker
from swarmpull.setup.plan import Agent, SetupRefused, Wanted

RECORD = "/etc/swarmpull/setup"
HOSTS = "etc/containerd/certs.d/docker.io/hosts.toml"
BEFORE = 'server = "https://hub.example"\r\n\n[host."https://m.example"]\n'


def setup(root: Path, runtime: str, *arguments: str) -> int:
    return main(["setup", runtime, "--root", str(root), *arguments])


def tree(root: Path) -> dict[str, tuple[bytes, int]]:
    """Every file and directory below a directory, with its content and mode."""
    return {
        str(path.relative_to(root)): (
            path.read_bytes() if path.is_file() else b"",
            stat.S_IMODE(path.stat().st_mode),
        )
        for path in root.rglob("*")
    }


def write(root: Path, name: str, text: str, mode: int = 0o644) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("runtime", "arguments", "name", "text"),
    [
        ("containerd", ["--upstream", "docker.io"], HOSTS, BEFORE),
        ("containerd", [], "etc/hostname", "h\n"),
        ("docker", [], "etc/docker/daemon.json", '{ "debug" :true}'),
        ("docker", [], "etc/hostname", "h\n"),
        ("podman", ["--upstream", "docker.io"], "etc/containers/registries.conf", "# none\n"),
        ("crio", ["--upstream", "docker.io"], "etc/hostname", "h\n"),
    ],
)
def test_undo_leaves_everything_as_it_was(
    tmp_path: Path, runtime: str, arguments: list[str], name: str, text: str, capsys
) -> None:
    write(tmp_path, name, text, 0o640)
    before = tree(tmp_path)

    assert setup(tmp_path, runtime, "--dry-run", *arguments) == 0
    assert capsys.readouterr().out.startswith("--- ")
    assert tree(tmp_path) == before
    assert setup(tmp_path, runtime, *arguments) == 0
    after = tree(tmp_path)
    assert after != before
    assert after[name][1] == 0o640
    capsys.readouterr()

    assert setup(tmp_path, runtime, *arguments) == 0
    assert capsys.readouterr().out == "Nothing is to be changed.\n"
    assert tree(tmp_path) == after

    assert setup(tmp_path, runtime, "--undo") == 0
    assert tree(tmp_path) == before
    assert setup(tmp_path, runtime, "--undo") == 0


@pytest.mark.parametrize("first", ["docker", "containerd"])
def test_undo_of_several_runtimes_leaves_nothing_in_whatever_order(
    tmp_path: Path, first: str
) -> None:
    before = tree(tmp_path)
    for runtime in ("docker", "containerd"):
        assert setup(tmp_path, runtime) == 0

    assert setup(tmp_path, first, "--undo") == 0
    assert len(list((tmp_path / RECORD.lstrip("/")).iterdir())) == 1
    assert setup(tmp_path, "containerd" if first == "docker" else "docker", "--undo") == 0
    assert tree(tmp_path) == before


def test_undo_says_that_docker_forgets_mirrors_at_a_restart_only(tmp_path: Path, capsys) -> None:
    assert setup(tmp_path, "docker") == 0
    capsys.readouterr()

    assert setup(tmp_path, "docker", "--undo") == 0
    assert "systemctl restart docker" in capsys.readouterr().err
    assert setup(tmp_path, "docker", "--undo") == 0
    assert capsys.readouterr().err == ""


def test_another_agent_takes_the_place_of_the_former(tmp_path: Path) -> None:
    path = write(tmp_path, "etc/docker/daemon.json", "{}")
    setup(tmp_path, "docker")

    assert setup(tmp_path, "docker", "--agent", "http://10.0.0.1:5050") == 0

    assert json.loads(path.read_text()) == {
        "registry-mirrors": ["http://10.0.0.1:5050"],
        "insecure-registries": ["10.0.0.1:5050"],
    }
    assert setup(tmp_path, "docker", "--undo") == 0
    assert path.read_text() == "{}"


def test_a_registry_that_is_left_out_the_next_time_is_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path, HOSTS, BEFORE)
    setup(tmp_path, "containerd", "--upstream", "docker.io", "--upstream", "quay.io")

    assert setup(tmp_path, "containerd", "--upstream", "quay.io") == 0

    assert path.read_bytes() == BEFORE.encode()
    assert setup(tmp_path, "containerd", "--undo") == 0
    assert not (tmp_path / "etc/containerd/certs.d/quay.io").exists()


@pytest.mark.parametrize(
    ("runtime", "name", "changed", "left"),
    [
        (
            "docker",
            "etc/docker/daemon.json",
            '{"registry-mirrors": ["http://m", "http://127.0.0.1:5050"], "debug": true}',
            '{\n  "registry-mirrors": [\n    "http://m"\n  ],\n  "debug": true\n}\n',
        ),
        (
            "docker",
            "etc/docker/daemon.json",
            '{"registry-mirrors": ["http://127.0.0.1:5050"]}',
            None,
        ),
    ],
)
def test_undo_keeps_what_others_have_changed_since(
    tmp_path: Path, runtime: str, name: str, changed: str, left: str | None
) -> None:
    setup(tmp_path, runtime)
    (tmp_path / name).write_text(changed)

    assert setup(tmp_path, runtime, "--undo") == 0

    path = tmp_path / name
    assert (path.read_text() if path.exists() else None) == left


def test_undo_takes_our_part_out_of_a_hosts_file_that_has_changed(tmp_path: Path) -> None:
    path = write(tmp_path, HOSTS, BEFORE)
    setup(tmp_path, "containerd", "--upstream", "docker.io")
    path.write_bytes(path.read_bytes() + b'[host."https://later.example"]\n')

    assert setup(tmp_path, "containerd", "--undo") == 0

    assert path.read_bytes() == f'{BEFORE}[host."https://later.example"]\n'.encode()


def test_nothing_is_written_when_one_of_the_files_is_not_valid(tmp_path: Path, capsys) -> None:
    write(tmp_path, HOSTS, "server =")
    before = tree(tmp_path)

    status = setup(tmp_path, "containerd", "--upstream", "quay.io", "--upstream", "docker.io")

    assert status == 1
    assert "not valid TOML" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_file_that_is_a_link_or_no_text_is_refused(tmp_path: Path, capsys) -> None:
    path = tmp_path / "etc/docker/daemon.json"
    path.parent.mkdir(parents=True)
    path.symlink_to("/nowhere")
    assert setup(tmp_path, "docker") == 1
    path.unlink()
    path.write_bytes(b"\xff")
    assert setup(tmp_path, "docker") == 1
    errors = capsys.readouterr().err
    assert "is a link to /nowhere" in errors
    assert "no text in UTF-8" in errors


def test_the_record_may_hold_secrets_and_is_for_its_owner_only(tmp_path: Path) -> None:
    setup(tmp_path, "docker")

    assert stat.S_IMODE((tmp_path / f"{RECORD[1:]}/docker.json").stat().st_mode) == 0o600


def test_what_was_interrupted_can_be_undone(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, "etc/docker/daemon.json", '{"debug": true}')
    before = (tmp_path / "etc/docker/daemon.json").read_bytes()
    wanted = Wanted(Agent.parse("http://127.0.0.1:5050"))
    work = apply.set_up(tmp_path, docker.RUNTIME, wanted)
    written: list[str] = []
    write_file = apply.Disk.write

    def fail_later(disk: apply.Disk, path: str, *rest: object) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write_file(disk, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(apply.Disk, "write", fail_later)
    with pytest.raises(OSError, match="No space"):
        work.do()
    monkeypatch.setattr(apply.Disk, "write", write_file)

    assert written == [f"{RECORD}/docker.json"]
    assert setup(tmp_path, "docker", "--undo") == 0
    assert (tmp_path / "etc/docker/daemon.json").read_bytes() == before
    assert not (tmp_path / f"{RECORD[1:]}/docker.json").exists()


def test_the_upstreams_of_a_configuration_are_the_default_where_names_are_needed(
    tmp_path: Path,
) -> None:
    config = write(
        tmp_path,
        "swarmpull.toml",
        '[cluster]\nnames = ["swarm.example"]\n[[upstreams]]\nname = "docker.io"\n'
        'url = "registry+https://registry-1.docker.io"\n',
    )

    assert setup(tmp_path, "podman", "--config", str(config)) == 0

    text = (tmp_path / "etc/containers/registries.conf.d/zz-swarmpull.conf").read_text()
    assert 'location = "127.0.0.1:5000/docker.io"' in text
    assert 'location = "127.0.0.1:5000"\n' in text


def test_a_record_that_is_none_is_said_so(tmp_path: Path, capsys) -> None:
    write(tmp_path, f"{RECORD[1:]}/docker.json", "{}")

    assert setup(tmp_path, "docker") == 1
    assert "no record of a setup" in capsys.readouterr().err


def test_what_is_wrong_on_the_command_line_is_told(tmp_path: Path, capsys) -> None:
    assert setup(tmp_path, "docker", "--agent", "127.0.0.1") == 2
    assert setup(tmp_path, "docker", "--upstream", "a/b") == 2
    assert setup(tmp_path, "podman") == 1
    assert "name them with --upstream" in capsys.readouterr().err
    assert issubclass(apply.SetupRefused, SwarmpullError)


def test_directories_are_for_everybody_to_read_whatever_the_umask_is(tmp_path: Path) -> None:
    write(tmp_path, "etc/hostname", "h\n")
    former = os.umask(0o077)
    try:
        assert setup(tmp_path, "containerd") == 0
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(former)

    modes = {name: mode for name, (_, mode) in tree(tmp_path).items()}
    made = [name for name in modes if (tmp_path / name).is_dir() and name != "etc"]
    assert {"etc/containerd", "etc/containerd/certs.d", "etc/swarmpull/setup"} <= set(made)
    assert {modes[name] for name in made} == {0o755}
    assert modes["etc/containerd/certs.d/_default/hosts.toml"] == 0o644


def test_names_are_on_the_disk_before_what_depends_on_them(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, "etc/hostname", "h\n")
    # What each directory held when it was last flushed.
    flushed: dict[str, set[str]] = {}
    fsync, is_undone = os.fsync, False

    def record(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            flushed[str(path.relative_to(tmp_path))] = set(os.listdir(path))
            if not is_undone and "containerd/certs.d" in str(path):
                # The record that it is undone with was there before.
                assert flushed["etc/swarmpull/setup"] == {"containerd.json"}

    monkeypatch.setattr(os, "fsync", record)
    assert setup(tmp_path, "containerd") == 0
    folders = {name: path for name, path in folders_of(tmp_path).items() if name in flushed}
    assert "etc/containerd/certs.d/_default" in folders
    assert {name: set(os.listdir(path)) for name, path in folders.items()} == flushed

    is_undone = True
    assert setup(tmp_path, "containerd", "--undo") == 0
    assert flushed["etc"] == {"hostname"}


def folders_of(root: Path) -> dict[str, Path]:
    return {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_dir()}


@pytest.mark.parametrize("folder", ["", "run"])
def test_two_runs_at_once_are_one_too_many(tmp_path: Path, capsys, folder: str) -> None:
    write(tmp_path, "etc/hostname", "h\n")
    (tmp_path / folder).mkdir(exist_ok=True)
    before = tree(tmp_path)
    with apply.only_one(tmp_path):
        assert setup(tmp_path, "docker") != 0
        assert "another swarmpull setup is at work there" in capsys.readouterr().err
        assert setup(tmp_path, "docker", "--undo") != 0
        assert setup(tmp_path, "docker", "--dry-run") == 0
        lock = tmp_path / folder / apply.LOCK
        # Whoever could open it could keep everybody out.
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
        lock_out = os.open(tmp_path, os.O_RDONLY)
    assert tree(tmp_path) == before
    # What any user can do.
    fcntl.flock(lock_out, fcntl.LOCK_EX)
    assert setup(tmp_path, "docker") == 0
    os.close(lock_out)
    assert not lock.exists()


def test_a_run_that_was_killed_locks_nobody_out(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    code = (
        "import os, pathlib, signal, sys\n"
        "from swarmpull.setup import apply\n"
        "with apply.only_one(pathlib.Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / apply.LOCK).exists()

    assert setup(tmp_path, "docker") == 0
    assert not (tmp_path / "run" / apply.LOCK).exists()


def test_a_lock_that_is_taken_away_is_taken_anew(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / apply.LOCK
    flock, taken = fcntl.flock, 0

    def after_another_has_ended(descriptor: int, how: int) -> None:
        nonlocal taken
        taken += 1
        if taken == 1:
            place.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", after_another_has_ended)
    with apply.only_one(tmp_path):
        assert taken == 2
        with pytest.raises(SetupRefused, match="another swarmpull setup"), apply.only_one(tmp_path):
            raise AssertionError("two at once")


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, capsys) -> None:
    (tmp_path / apply.LOCK).symlink_to(tmp_path / "elsewhere")
    assert setup(tmp_path, "docker") != 0
    assert "the lock of swarmpull setup cannot be taken" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()

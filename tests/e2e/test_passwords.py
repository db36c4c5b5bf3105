"""Container clients log in, push by HTTPS with a password, and pull without."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import bcrypt
import pytest
import trio

from swarmpull import certificates
from swarmpull.config import RegistryConfig
from tests.roles.roles import ANY, cluster_under

from .clients import Docker, Host, require
from .images import Image, ImageFactory

pytestmark = pytest.mark.clients


@attrs.frozen
class Guarded:
    """An origin that asks for a password; ``trust`` is a directory with the authority alone."""

    address: str
    trust: Path


@asynccontextmanager
async def guarded_origin(directory: Path, *, https: bool = True) -> AsyncIterator[Guarded]:
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(5)).decode()
    settings = {"htpasswd": str(directory / "htpasswd")}
    await trio.Path(settings["htpasswd"]).write_text(f"alice:{hashed}\n")
    trust = directory / "trust"
    await trio.Path(trust).mkdir()
    if https:
        certificates.create_authority(directory / "certs", "tests")
        web = certificates.issue(directory / "certs", "web", (), ips=["127.0.0.1"])
        shutil.copy(directory / "certs" / "ca.crt", trust)
        settings |= {"tls_cert": str(web.certificate), "tls_key": str(web.key)}
    async with cluster_under(directory / "cluster") as cluster:
        await cluster.start_index()
        registry = RegistryConfig(listen=ANY, **settings)
        role = await cluster.start_one_origin("origin", registry=registry)
        yield Guarded(role.address("registry"), trust)


async def in_thread(run: Callable[..., str], *arguments: str) -> str:
    return await trio.to_thread.run_sync(partial(run, *arguments))


async def test_skopeo_needs_the_password_to_push_and_none_to_pull(
    tmp_path: Path, images: ImageFactory, host: Host
) -> None:
    require("skopeo")
    image = images.text("guarded-skopeo")
    async with guarded_origin(tmp_path) as origin:
        name = f"docker://{origin.address}/team/app:v1"
        trust = f"--dest-cert-dir={origin.trust}"
        with pytest.raises(AssertionError, match=r"unauthorized|authentication required|password"):
            await in_thread(host.skopeo, "copy", trust, image.reference, name)
        login = "--dest-creds=alice:guess"
        with pytest.raises(AssertionError, match="is wrong"):
            await in_thread(host.skopeo, "copy", trust, login, image.reference, name)
        login = "--dest-creds=alice:secret"
        await in_thread(host.skopeo, "copy", trust, login, image.reference, name)

        trust = f"--src-cert-dir={origin.trust}"
        target = f"dir:{host.directory / 'pulled'}"
        await in_thread(host.skopeo, "copy", trust, name, target)
        assert_pulled(image, host.directory / "pulled")


def assert_pulled(image: Image, directory: Path) -> None:
    assert {part.hex for part in image.parts} <= {path.name for path in directory.iterdir()}


async def test_podman_logs_in_and_pushes(tmp_path: Path, images: ImageFactory, host: Host) -> None:
    require("podman", root=True)
    image = images.text("guarded-podman")
    async with guarded_origin(tmp_path) as origin:
        name = f"{origin.address}/team/app:v1"
        trust, file = f"--cert-dir={origin.trust}", f"--authfile={tmp_path / 'auth.json'}"
        wrong = ("-u=alice", "-p=guess")
        with pytest.raises(AssertionError, match=r"is wrong|invalid username/password"):
            await in_thread(host.podman, "login", trust, file, *wrong, origin.address)
        right = ("-u=alice", "-p=secret")
        await in_thread(host.podman, "login", trust, file, *right, origin.address)
        await in_thread(host.podman, "pull", "-q", image.reference)
        loaded = (await in_thread(host.podman, "images", "-q")).split()[0]
        await in_thread(host.podman, "push", trust, file, loaded, name)
        await in_thread(host.podman, "rmi", "--all", "--force")
        # Without what the login has left.
        await in_thread(host.podman, "pull", "-q", trust, name)


async def test_docker_logs_in_and_pushes(
    tmp_path: Path, images: ImageFactory, host: Host, docker: Docker
) -> None:
    require("skopeo")
    image = images.text("guarded-docker")
    async with guarded_origin(tmp_path) as origin:
        name = f"{origin.address}/team/app:v1"
        archive = f"docker-archive:{tmp_path / 'image.tar'}:{name}"
        await in_thread(host.skopeo, "copy", image.reference, archive)
        await in_thread(docker, "load", "-i", str(tmp_path / "image.tar"))
        with pytest.raises(AssertionError, match=r"unauthorized|no basic auth credentials"):
            await in_thread(docker, "push", name)
        await in_thread(docker, "login", "-u=alice", "-p=secret", origin.address)
        await in_thread(docker, "push", name)
        await in_thread(docker, "rmi", name)
        await in_thread(docker, "pull", name)

"""Certificates for a cluster that speaks TLS, made with the program's own commands."""

from __future__ import annotations

import ssl
import subprocess
import sys
from pathlib import Path

import attrs

from benchmarks.processes import environment


def obstacle() -> str:
    """Why the program cannot make certificates; empty if it can."""
    done = _certs("--help")
    return "" if done.returncode == 0 else "this version has no `swarmpull certs`"


@attrs.frozen
class Certificates:
    """A CA in a directory, and what it has issued."""

    directory: Path

    @classmethod
    def create(cls, directory: Path) -> Certificates:
        """Raises RuntimeError with what the command said."""
        directory.mkdir()
        _checked("init", "--dir", str(directory))
        return cls(directory)

    def settings(self, role: str, name: str, address: str) -> dict[str, str]:
        """The keys that make a process use a certificate of its own, which is issued here."""
        _checked("issue", name, "--dir", str(self.directory), "--role", role, "--ip", address)
        files = {"ca": "ca.crt", "cert": f"{name}.crt", "key": f"{name}.key"}
        return {f"tls.{key}": str(self.directory / file) for key, file in files.items()}

    def client_context(self) -> ssl.SSLContext | None:
        """How clients speak to registry and admin listeners: plain, as they have no certificate here."""
        return None


def _certs(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swarmpull", "certs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)


def _checked(*arguments: str) -> None:
    done = _certs(*arguments)
    if done.returncode:
        raise RuntimeError(f"swarmpull certs {' '.join(arguments)}: {done.stderr.strip()}")

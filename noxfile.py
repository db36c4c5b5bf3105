"""The tasks of a developer: ``nox`` runs tests, lint and typing, ``nox --list`` shows the others."""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4"
nox.options.sessions = ["tests", "lint", "typing"]
# A machine need not have every Python; continuous integration names those that it wants.
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.11", "3.12", "3.13"]


@nox.session(python=PYTHONS)
def tests(session):
    """The whole test suite; arguments go to pytest."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session):
    """Style and suspicious code."""
    session.install(".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session):
    """Types, strictly."""
    session.install(".[typing]")
    session.run("mypy", *session.posargs)


@nox.session
def sim(session):
    """The full table of docs/performance.md, which takes hours; arguments go to the command."""
    session.install(".")
    session.run("python", "-m", "swarmpull", "simulate", "--table", *session.posargs)


@nox.session
def e2e(session):
    """The end-to-end tests only: real processes and real container clients."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", "tests/e2e", *session.posargs)


@nox.session
def chaos(session):
    """Faults of every kind against real processes, best as root; arguments go to the suite."""
    session.install(".[test]")
    session.run("python", "-m", "tests.chaos", *session.posargs)


@nox.session(venv_backend="none")
def build(session):
    """Build the wheel, install it in an environment elsewhere, and try it there."""
    session.run(".ci/test-wheel", *session.posargs, external=True)


@nox.session
def benchmark(session):
    """The throughput of one pull beside that of nginx; arguments go to the benchmark."""
    session.install(".")
    session.run("python", "-m", "benchmarks.pull", *session.posargs)

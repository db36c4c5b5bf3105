"""Mistakes of the user: one line each on standard error, the right exit status, no traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from click.testing import CliRunner

from swarmpull import __version__
from swarmpull.cli import cli, main


@pytest.fixture(autouse=True)
def no_environment(monkeypatch, tmp_path) -> None:
    for name in [name for name in os.environ if name.startswith("SWARMPULL")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


MALFORMED = [
    ("sha256:12", "'sha256:12' is not a digest: expected"),
    ("App", "'App' is not an image: expected NAME"),
    ("app:", "'app:' is not an image: expected NAME"),
    ("app@sha256:1", "'sha256:1' is not a digest"),
    ("host:port/app", "host:port: is not the URL of a registry"),
]


@pytest.mark.parametrize(
    ("arguments", "status", "lines"),
    [
        (["run"], 2, ["Missing option '--role'. .*See: swarmpull run --help"]),
        (["run", "--role", "peer"], 2, ["Invalid value for '--role': 'peer' is not one of .*"]),
        (["run", "--role", "all", "--agents", "x"], 2, ["Invalid value for '--agents': .*"]),
        (["walk"], 2, ["No such command 'walk'.*"]),
        (["push", "absent"], 2, ["Invalid value for 'SOURCE': Path 'absent' does not exist.*"]),
        (["push", "."], 2, ["A directory is pushed as an image: name it, NAME:TAG.*"]),
        (["pull", "app"], 2, ["Missing option '-o'.*"]),
        (["pull", "app", "-o", "-"], 2, ["An image is written to a directory: .*"]),
        (["pull", "a:1/b", "-o", "x", "--registry", "c:2"], 2, ["a:1 is part of the name: .*"]),
        *(
            (["pull", name, "-o", "x"], 2, [f"Invalid value for 'DIGEST\\|IMAGE': {problem}.*"])
            for name, problem in MALFORMED
        ),
        *(
            (["push", ".", name], 2, [rf"Invalid value for '\[IMAGE\]': {problem}.*"])
            for name, problem in MALFORMED
            if name != "sha256:12"
        ),
        *(
            (
                [*command, "--registry", "ftp://h"],
                2,
                ["Invalid value for '--registry': ftp://h: is not the URL of .*"],
            )
            for command in (["pull", "a", "-o", "x"], ["push", ".", "a"])
        ),
        (["status", "a:1", "b:x"], 2, [r"Invalid value for '\[HOST:PORT\]...': b:x: is not an .*"]),
        (["rates", "--admin", "b:x"], 2, ["Invalid value for '--admin': b:x: is not an address.*"]),
        (
            ["store", "rm", "sha256:12", "--data-dir", "."],
            2,
            ["Invalid value for 'DIGEST': 'sha256:12' is not a digest: expected .*"],
        ),
        (["push", ".", "app:v1"], 1, [r"\.: is not an OCI image layout: .*"]),
        (["rates", "--upload", "fast"], 2, ["Invalid value for '--upload': must be a rate .*"]),
        (["rates", "--download", "0"], 2, ["Invalid value for '--download': must be .* above 0.*"]),
        (["config", "check", "-o", "swarm.upload_rate=0"], 78, ["swarm.upload_rate: must be a .*"]),
        (["config", "check", "-o", "a=1"], 78, [r"a: unknown key  \(-o\)"]),
        (
            ["config", "check", "--role", "all", "--agents", "200", "-o", "log.level=x"],
            78,
            ["log.level: must be one of .*", "--agents: must be from 1 to 100: 200"],
        ),
        (["run", "--role", "tracker"], 78, ["cluster.origins: must name at least one.*"]),
        (
            ["run", "--role", "all", "--config", "absent.toml"],
            78,
            [r"--config: cannot read the configuration file: No such file.*  \(absent.toml\)"],
        ),
    ],
)
def test_a_mistake_is_one_line_per_problem(capsys, arguments, status, lines) -> None:
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.splitlines()
    assert len(said) == len(lines)
    for line, pattern in zip(said, lines, strict=True):
        assert re.fullmatch(f"swarmpull: {pattern}", line), line


BACKENDS = """\
[origin.backend]
url = "s3://b/p?endpoint=http://h:1"
[[origin.namespaces]]
pattern = "team/*"
url = "s3://bucket?part_size=1MiB"
[[origin.namespaces]]
pattern = "other/*"
url = "s3://bucket?endpoint=127.0.0.1:1"
[[origin.namespaces]]
pattern = "**"
url = "s3://bucket/x?secret_key=topsecret"
[[upstreams]]
name = "docker.io"
url = "registry+https://host:99999"
[index.backend]
url = "gopher://x"
"""
OF_ORIGIN = [
    r"origin\.backend\.url: 'b' is not the name of a bucket: .*\(wrong.toml:2\)",
    r"origin\.namespaces\.0\.url: option 'part_size' .*from 5MiB to 1GiB.*\(wrong.toml:5\)",
    r"origin\.namespaces\.2\.url: the S3 backend has no option 'secret_key': .*\(wrong.toml:11\)",
]
OF_INDEX = [
    r"index\.backend\.url: no backend for URLs of scheme 'gopher': .*\(wrong.toml:16\)",
]
OF_ALL = [r"upstreams\.0\.url: must name a host, .*\(wrong.toml:14\)"]


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        (["config", "check"], [*OF_ALL, *OF_ORIGIN, *OF_INDEX]),
        (["config", "check", "--role", "index"], [*OF_ALL, *OF_INDEX]),
        (["run", "--role", "all"], [*OF_ALL, *OF_ORIGIN, *OF_INDEX]),
        # An agent's host may well lack the package that the scheme of an origin's backend needs.
        (["run", "--role", "tracker", "-o", "cluster.origins=a:1"], OF_ALL),
    ],
)
def test_urls_that_no_backend_can_be_opened_with_are_named_all_at_once(
    capsys, tmp_path, command, lines
) -> None:
    (tmp_path / "wrong.toml").write_text(BACKENDS)

    assert main([*command, "--config", "wrong.toml"]) == 78

    said = capsys.readouterr().err.splitlines()
    assert "topsecret" not in "".join(said)
    assert len(said) == len(lines), said
    for pattern in lines:
        assert any(re.fullmatch(f"swarmpull: {pattern}", line) for line in said), (pattern, said)


def test_without_a_command_the_help_is_shown(capsys) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert (result.exit_code, result.output) == (0, f"swarmpull {__version__}\n")


@pytest.mark.parametrize(
    "command", ["run", "config check", "config show", "push", "pull", "status", "rates"]
)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(cli, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Options:" in result.output


def test_config_show_is_toml_that_gives_the_same_configuration_again(tmp_path) -> None:
    arguments = ["config", "show", "--role", "all", "--data-dir", "data"]
    first = CliRunner().invoke(cli, [*arguments, "-o", "log.level=debug"])
    assert first.exit_code == 0
    assert re.search(r'^level = "debug" +# -o$', first.output, re.MULTILINE)
    assert re.search(r'^data_dir = ".*/data" +# --data-dir$', first.output, re.MULTILINE)
    assert re.search(
        r'^trackers = \["127.0.0.1:7300"\] +# default of --role all$', first.output, re.MULTILINE
    )
    (tmp_path / "shown.toml").write_text(first.output)
    second = CliRunner().invoke(cli, ["config", "show", "--config", "shown.toml"])
    assert second.exit_code == 0
    assert tomllib.loads(second.output) == tomllib.loads(first.output)


def test_config_show_as_json_has_value_and_place_of_every_key() -> None:
    result = CliRunner().invoke(
        cli,
        ["config", "show", "--json", "-o", "cluster.origins=a:1,b:2"],
        env={"SWARMPULL_SWARM__UPLOAD_SLOTS": "7"},
    )
    document = json.loads(result.output)
    assert document["cluster.origins"] == {"value": ["a:1", "b:2"], "from": "-o"}
    assert document["swarm.upload_slots"] == {
        "value": 7,
        "from": "env SWARMPULL_SWARM__UPLOAD_SLOTS",
    }
    assert document["agent.registry.push"] == {"value": False, "from": "default"}


def test_the_file_can_be_named_by_a_variable(swarmpull, tmp_path) -> None:
    (tmp_path / "named.toml").write_text('log.level = "loud"\n')
    result = swarmpull("config", "check", SWARMPULL_CONFIG="named.toml")
    assert result.returncode == 78
    assert result.stderr == (
        "swarmpull: log.level: must be one of debug, info, warning, error: 'loud'  (named.toml:1)\n"
    )


def test_a_valid_configuration_is_said_to_be_valid(swarmpull) -> None:
    result = swarmpull("config", "check", "--role", "all", "--agents", 3)
    assert (result.returncode, result.stdout) == (0, "The configuration is valid.\n")


def test_checking_the_configuration_loads_no_network_library(environment) -> None:
    program = (
        "import sys; from swarmpull.cli import main; main(['config', 'check']);"
        "print(sorted({'trio', 'httpx', 'quart', 'hypercorn', 'rich', 'structlog'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("team/app:latest", ":latest"),
        ("127.0.0.1:5000/team/app:v1", ":v1"),
        (f"team/app@sha256:{'0' * 64}", f"@sha256:{'0' * 64}"),
    ],
)
def test_tags_are_listed_of_a_repository_and_not_of_a_tag(capsys, name: str, more: str) -> None:
    assert main(["tags", "ls", name]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"is a repository, without {more}: {name.removesuffix(more)}" in said

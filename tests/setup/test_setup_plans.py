"""What `swarmpull setup` makes of the files of a host: texts in, texts out."""

from __future__ import annotations

import json
import posixpath
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import pytest

from swarmpull.setup import containerd, docker, registries
from swarmpull.setup.plan import Agent, SetupRefused, Wanted, check_registry, without_marked

AGENT = Agent.parse("http://127.0.0.1:5000")
DEFAULT = "/etc/containerd/certs.d/_default/hosts.toml"


@attrs.frozen
class Texts:
    """The files of a host, in memory."""

    files: Mapping[str, str] = attrs.field(factory=dict)

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def names(self, directory: str) -> Sequence[str]:
        prefix = f"{directory}/"
        below = [path.removeprefix(prefix) for path in self.files if path.startswith(prefix)]
        return sorted({path.split("/")[0] for path in below})


def wanted(*names: str, agent: Agent = AGENT, own: Sequence[str] = ()) -> Wanted:
    return Wanted(agent, names, frozenset(own))


# --- containerd -----------------------------------------------------------------------------------


def test_without_names_one_file_is_for_all_registries() -> None:
    plan = containerd.plan(Texts(), wanted())

    (path,) = plan.texts
    assert path == DEFAULT
    hosts = tomllib.loads(plan.texts[path])
    assert hosts == {"host": {str(AGENT): {"capabilities": ["pull", "resolve"]}}}
    assert any("before 2.2" in note for note in plan.notes)


def test_each_named_registry_has_a_file_of_its_own() -> None:
    plan = containerd.plan(Texts(), wanted("docker.io", "quay.io:8443"))

    folders = [posixpath.basename(posixpath.dirname(path)) for path in plan.texts]
    assert folders == ["docker.io", "quay.io:8443"]


def test_the_other_spelling_of_a_port_is_used_where_it_is_there() -> None:
    there = "/etc/containerd/certs.d/quay.io_8443_/hosts.toml"

    plan = containerd.plan(Texts({there: ""}), wanted("quay.io:8443"))

    assert list(plan.texts) == [there]


HOSTS = """\
# ours
server = "https://registry-1.docker.io"   # kept
ca = [
  "/a.crt",
[host]
]

[host."https://other.example"]
  capabilities = ["pull"]
  [host."https://other.example".header]
    x-key = "secret"
"""


def test_the_agent_becomes_the_first_of_the_hosts_that_are_there() -> None:
    path = "/etc/containerd/certs.d/docker.io/hosts.toml"
    before = HOSTS.replace("[host]\n]", '"""\n[host]"""]')
    before = before.replace('"/a.crt",\n"""', '"/a.crt", """')

    after = containerd.plan(Texts({path: before}), wanted("docker.io")).texts[path]

    assert list(tomllib.loads(after)["host"]) == [str(AGENT), "https://other.example"]
    rest = tomllib.loads(after)
    del rest["host"][str(AGENT)]
    assert rest == tomllib.loads(before)
    assert "# kept" in after
    assert without_marked(path, after) == before


def test_an_agent_elsewhere_is_not_waited_for() -> None:
    agent = Agent.parse("https://agent.example:5000")

    text = containerd.plan(Texts(), wanted(agent=agent)).texts[DEFAULT]

    assert tomllib.loads(text)["host"][str(agent)]["dial_timeout"] == "1s"


def test_a_host_that_is_there_already_is_left_as_it_is() -> None:
    text = f'[host."{AGENT}"]\ncapabilities = ["pull"]\n'

    plan = containerd.plan(Texts({DEFAULT: text}), wanted())

    assert not plan.texts
    assert any("left as it is" in note for note in plan.notes)


@pytest.mark.parametrize(
    "text",
    [
        "server = ",
        "host = 1",
        'host = {"https://other.example" = {capabilities = ["pull"]}}',
    ],
)
def test_a_hosts_file_that_cannot_be_added_to_is_refused(text: str) -> None:
    with pytest.raises(SetupRefused, match="nothing was changed") as refused:
        containerd.plan(Texts({DEFAULT: text}), wanted())

    assert refused.value.path == DEFAULT


def test_certificates_that_a_hosts_file_would_hide_are_not_hidden() -> None:
    files = Texts({"/etc/containerd/certs.d/r.example/ca.crt": "..."})

    with pytest.raises(SetupRefused, match=r"ca\.crt"):
        containerd.plan(files, wanted("r.example"))


def test_registries_with_files_of_their_own_are_named() -> None:
    files = Texts({"/etc/containerd/certs.d/r.example/hosts.toml": ""})

    plan = containerd.plan(files, wanted())

    assert any("r.example" in note and "--upstream" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("config", "place", "told"),
    [
        ("version = 2\n", None, 'plugins."io.containerd.grpc.v1.cri".registry'),
        ("version = 3\n", None, 'plugins."io.containerd.cri.v1.images".registry'),
        ("version = 3\n", None, "containerd 2.2 and newer"),
        ("", None, "version = 2 or 3"),
        (
            'version = 2\n[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "/c"\n',
            "/c",
            "",
        ),
        (
            'version = 3\n[plugins."io.containerd.cri.v1.images".registry]\nconfig_path = "/c/:/d"\n',
            "/c",
            "",
        ),
        (
            'version = 2\n[plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]\n'
            'endpoint = ["https://m.example"]\n',
            None,
            "registry.mirrors",
        ),
        ('version = 2\nimports = ["/etc/containerd/conf.d/*.toml"]\n', "/imported", ""),
    ],
)
def test_what_containerd_is_configured_to_read_is_found_out(
    config: str, place: str | None, told: str
) -> None:
    imported = '[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "/imported"\n'
    files = {containerd.CONFIG: config}
    if "imports" in config:
        files["/etc/containerd/conf.d/a.toml"] = imported

    plan = containerd.plan(Texts(files), wanted())

    assert list(plan.texts) == [f"{place or containerd.CERTS}/_default/hosts.toml"]
    assert told in "\n".join(plan.notes)


# --- docker ---------------------------------------------------------------------------------------


def daemon(document: Mapping[str, Any] | None, **more: Any) -> dict[str, Any] | None:
    files = {} if document is None else {docker.CONFIG: json.dumps(document)}
    text = docker.plan(Texts(files), wanted(**more)).texts.get(docker.CONFIG)
    return None if text is None else json.loads(text)


def test_docker_asks_the_agent_before_other_mirrors() -> None:
    before = {"log-driver": "local", "registry-mirrors": ["https://m.example"]}

    assert daemon(before) == {**before, "registry-mirrors": [str(AGENT), "https://m.example"]}
    assert daemon(None) == {"registry-mirrors": [str(AGENT)]}
    assert daemon({"registry-mirrors": [str(AGENT)]}) is None


def test_only_an_agent_elsewhere_in_plain_http_has_to_be_allowed() -> None:
    plain = Agent.parse("http://10.0.0.1:5050")

    after = daemon({"insecure-registries": ["r.example"]}, agent=plain)

    assert after is not None
    assert after["insecure-registries"] == ["10.0.0.1:5050", "r.example"]
    secured = daemon({}, agent=Agent.parse("https://10.0.0.1:5050"))
    assert secured == {"registry-mirrors": ["https://10.0.0.1:5050"]}


def test_the_indentation_of_daemon_json_stays() -> None:
    text = '{\n\t"debug": true\n}\n'

    after = docker.plan(Texts({docker.CONFIG: text}), wanted()).texts[docker.CONFIG]

    assert after.startswith('{\n\t"debug": true,\n\t"registry-mirrors"')


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"registry-mirrors": "x"}', '{"registry-mirrors": [1]}']
)
def test_a_daemon_json_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SetupRefused, match="nothing was changed"):
        docker.plan(Texts({docker.CONFIG: text}), wanted())


def test_what_docker_has_no_mirrors_for_is_told() -> None:
    mirror = Agent.parse("http://127.0.0.1:5050")
    plan = docker.plan(Texts(), wanted("docker.io", "quay.io", agent=mirror))

    # The listener of the mirror stands for docker.io, whatever is asked for there.
    assert not any("5050/quay.io" in note for note in plan.notes)
    assert any("127.0.0.1:5000/quay.io/NAME" in note for note in plan.notes)


# --- podman and CRI-O -----------------------------------------------------------------------------


def mirrors_of(files: Mapping[str, str], *names: str, **more: Any) -> list[dict[str, Any]]:
    text = registries.plan(Texts(files), wanted(*names, **more)).texts[registries.OURS]
    return tomllib.loads(text)["registry"]


def test_a_mirror_has_the_registry_in_its_path() -> None:
    assert mirrors_of({}, "docker.io", "r.example:5000") == [
        {
            "location": "docker.io",
            "mirror": [{"location": "127.0.0.1:5000/docker.io", "insecure": True}],
        },
        {
            "location": "r.example:5000",
            "mirror": [{"location": "127.0.0.1:5000/r.example_5000", "insecure": True}],
        },
    ]


def test_names_of_the_cluster_itself_have_no_prefix() -> None:
    (entry,) = mirrors_of({}, "swarm.example", own=["swarm.example"])

    assert entry["mirror"][0]["location"] == "127.0.0.1:5000"


def test_what_holds_for_a_registry_so_far_stays() -> None:
    files = {
        registries.MAIN: '[[registry]]\nprefix = "docker.io"\nlocation = "old.example"\n',
        f"{registries.FOLDER}/10.conf": (
            '[[registry]]\nprefix = "docker.io"\nlocation = "hub.example"\ninsecure = true\n'
            '[[registry.mirror]]\nlocation = "m.example"\npull-from-mirror = "digest-only"\n'
        ),
    }

    assert mirrors_of(files, "docker.io", agent=Agent.parse("https://a.example:1")) == [
        {
            "prefix": "docker.io",
            "location": "hub.example",
            "insecure": True,
            "mirror": [
                {"location": "a.example:1/docker.io"},
                {"location": "m.example", "pull-from-mirror": "digest-only"},
            ],
        }
    ]


def test_a_file_that_comes_later_is_told_of() -> None:
    files = {f"{registries.FOLDER}/zzz.conf": ""}

    plan = registries.plan(Texts(files), wanted("docker.io"))

    assert any("zzz.conf" in note for note in plan.notes)


@pytest.mark.parametrize(
    "text",
    [
        "[[registry]",
        "[registry]\na = 1\n",
        "[[registry]]\nlocation = 1\n",
        'registry = ["x"]\n',
        "[[registry]]\nmirror = 3\n",
        '[[registry]]\nmirror = ["x"]\n',
    ],
)
def test_a_registries_conf_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(SetupRefused, match="nothing was changed"):
        registries.plan(Texts({registries.MAIN: text}), wanted("docker.io"))


def test_mirrors_need_names() -> None:
    with pytest.raises(SetupRefused, match="--upstream"):
        registries.plan(Texts(), wanted())


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["127.0.0.1:5000", "http://h/x", "ftp://h", "http://u@h", "http://h:x"]
)
def test_what_is_no_agent_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        Agent.parse(url)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "../x", "_default"])
def test_what_is_no_registry_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="registry"):
        check_registry(name)

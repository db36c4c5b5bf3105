"""Layers of the configuration: who wins, where a value comes from, and everything that is refused."""

from __future__ import annotations

import math
from pathlib import Path

import attrs
import pytest

from swarmpull.config import ROLES, Address, Config
from swarmpull.errors import ConfigError
from swarmpull.layers import Loaded, Setting, Sources, decode, load, settings, toml_values
from swarmpull.units import CAPACITY_FORMS, DURATION_FORMS

ALL = frozenset(ROLES)
MEMBERS = {
    "SWARMPULL_CLUSTER__TRACKERS": "t1:7300,t2:7300",
    "SWARMPULL_CLUSTER__ORIGINS": "o1:7200",
    "SWARMPULL_CLUSTER__INDEXES": "i1:7400",
}


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "cluster.toml"
        path.write_text(text)
        return path

    return write


def options(*texts: str) -> list[tuple[str, str]]:
    return [("-o", text) for text in texts]


def problems(sources: Sources, **kwargs) -> list[str]:
    """All problems as lines, with the directory of the file left out."""
    with pytest.raises(ConfigError) as caught:
        load(sources, **kwargs)
    folder = f"{sources.file.parent}/" if sources.file else "\0"
    return [str(problem).replace(folder, "") for problem in caught.value.problems]


# --- who wins -------------------------------------------------------------------------------------


def test_without_layers_everything_is_the_default_of_the_classes() -> None:
    loaded = load(Sources())
    assert set(loaded.provenance.values()) == {"default"}
    assert loaded.config == attrs.evolve(
        Config(),
        data_dir=Path("swarmpull-data").absolute(),
        agent=attrs.evolve(Config().agent, data_dir=Path("swarmpull-data/agent").absolute()),
        origin=attrs.evolve(Config().origin, data_dir=Path("swarmpull-data/origin").absolute()),
        index=attrs.evolve(Config().index, data_dir=Path("swarmpull-data/index").absolute()),
    )


def test_each_layer_wins_over_the_one_before_and_the_place_says_which(write) -> None:
    file = write(
        "[swarm]\n"
        "max_connections = 1\n"
        "upload_slots = 1\n"
        "dial_connections = 1\n"
        "[log]\n"
        'level = "debug"\n'
    )
    environ = {
        "SWARMPULL_SWARM__UPLOAD_SLOTS": "2",
        "SWARMPULL_SWARM__DIAL_CONNECTIONS": "2",
        "SWARMPULL_CONFIG": "not read here",
        "PATH": "/bin",
    }
    loaded = load(Sources(file, environ, options("swarm.dial_connections=3")))
    swarm = loaded.config.swarm
    assert (swarm.max_connections, swarm.upload_slots, swarm.dial_connections) == (1, 2, 3)
    assert loaded.config.log.level == "debug"
    assert loaded.provenance["swarm.max_connections"] == f"{file}:2"
    assert loaded.provenance["swarm.upload_slots"] == "env SWARMPULL_SWARM__UPLOAD_SLOTS"
    assert loaded.provenance["swarm.dial_connections"] == "-o"
    assert loaded.provenance["log.level"] == f"{file}:6"
    assert loaded.provenance["log.format"] == "default"


def test_of_two_options_for_one_key_the_later_wins() -> None:
    loaded = load(Sources(overrides=options("log.level=debug", "log.level=error")))
    assert loaded.config.log.level == "error"


def test_every_key_can_be_set_by_option_and_environment_to_what_it_is_already() -> None:
    texts = {
        key: ",".join(value) if isinstance(value, list) else str(value)
        for key, value in toml_values(load(Sources()).config).items()
    }
    by_option = load(Sources(overrides=options(*(f"{k}={v}" for k, v in texts.items()))))
    names = {f"SWARMPULL_{k.upper().replace('.', '__')}": v for k, v in texts.items()}
    by_environment = load(Sources(environ=names))
    assert by_option.config == by_environment.config == load(Sources()).config
    assert set(by_option.provenance.values()) == {"-o"}
    assert not any(place == "default" for place in by_environment.provenance.values())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('log.level = "debug"\n', 1),
        ('# a comment\n\n[log]\n\n  level="debug"\n', 5),
        ('[ "log" ]\n"level" = "debug"\n', 2),
        ('log = { level = "debug" }\n', 1),
        ('[swarm]\nupload_slots = 3\n[log]   # level = 9\nlevel = "debug"\n', 4),
    ],
)
def test_the_line_of_a_value_is_found_in_every_form_of_toml(write, text: str, line: int) -> None:
    file = write(text)
    loaded = load(Sources(file))
    assert loaded.config.log.level == "debug"
    assert loaded.provenance["log.level"] == f"{file}:{line}"


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("agent.registry.push=TRUE", True),
        ("agent.registry.push=false", False),
        ("agent.registry.listen=[::1]:5000", Address("::1", 5000)),
        ("agent.registry.listen = localhost:0", Address("localhost", 0)),
        ("drain_timeout=1.5m", 90.0),
        ("cluster.trackers=a:1, dns+b:2", ("a:1", "dns+b:2")),
        ("cluster.trackers=", ()),
        ("data_dir=/var/lib/x y", Path("/var/lib/x y")),
        ("origin.peer.advertise=10.0.0.1", "10.0.0.1"),
        ("agent.store.ttl=never", math.inf),
        ("agent.store.ttl=2h", 7200.0),
        ("origin.store.max_bytes=1.5GiB", str(3 << 29)),
        ("origin.store.max_bytes=unlimited", "unlimited"),
        ("origin.store.low_watermark= 70.5 %", "70.5%"),
        ("index.backend.url=s3://bucket/prefix?endpoint=http://h:1", None),
    ],
)
def test_texts_are_read_by_the_type_of_their_key(option: str, value: object) -> None:
    loaded = load(Sources(overrides=options(option)))
    key, _, text = option.partition("=")
    found: object = loaded.config
    for part in key.strip().split("."):
        found = getattr(found, part)
    assert found == (text if value is None else value)


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ('swarm.upload_slots = "8"', "must be a whole number, without quotes: '8'"),
        ("swarm.upload_slots = true", "must be a whole number, without quotes: true"),
        ("swarm.upload_slots = 8.0", "must be a whole number, without quotes: 8.0"),
        ("swarm.upload_slots = 0", "must be at least 1: 0"),
        ('agent.registry.push = "false"', "must be true or false, without quotes: 'false'"),
        ("agent.registry.push = 0", "must be true or false, without quotes: 0"),
        ("log.level = 8", "must be one of debug, info, warning, error: 8"),
        ('log.level = "INFO"', "must be one of debug, info, warning, error: 'INFO'"),
        ("data_dir = 8", "must be text in quotes: 8"),
        ('data_dir = ""', "must be a path: ''"),
        (
            "drain_timeout = 10",
            "must be a duration with its unit, such as 500ms, 30s, 5m, 2h or 1d, in quotes: 10",
        ),
        (
            'agent.peer.listen = "7100"',
            "must be host:port, such as 127.0.0.1:7300 or [::1]:7300: '7100'",
        ),
        ('agent.peer.listen = "a:70000"', "must have a port from 0 to 65535: 'a:70000'"),
        (
            'agent.peer.listen = "[zz]:1"',
            "must name a host or an IP address before the port: '[zz]:1'",
        ),
        (
            'agent.peer.advertise = "0.0.0.0"',
            "must be an address that others can dial: '0.0.0.0'",
        ),
        (
            'agent.peer.advertise = "host:7100"',
            "must be a host name or an IP address without a port: 'host:7100'",
        ),
        (
            'cluster.trackers = "host:7300"',
            "must be a list of texts, such as [\"host:7300\"]: 'host:7300'",
        ),
        (
            'cluster.trackers = ["host"]',
            "each entry must be host:port, such as 127.0.0.1:7300 or [::1]:7300: 'host'",
        ),
        (
            'cluster.trackers = ["0.0.0.0:7300"]',
            "must hold addresses that others can dial: '0.0.0.0:7300'",
        ),
        ('cluster.trackers = ["a:1", "a:1"]', "must not name a member twice: a:1, a:1"),
        *(
            (
                f'cluster.weights = ["{entry}"]',
                "each entry must be host:port=weight with a weight above 0, such as "
                f"origin-1:7200=2: '{entry}'",
            )
            for entry in ("a:1", "a:1=0", "a:1=x", "a=2", "a:1=inf")
        ),
        (
            'origin.backend.url = "/data"',
            "must be a URL, such as file:///var/lib/swarmpull/backend: '/data'",
        ),
        (
            'origin.backend.url = "file://data"',
            "must be an absolute directory after file://, such as "
            "file:///var/lib/swarmpull/backend: 'file://data'",
        ),
        (
            "agent.store.max_bytes = 0",
            f"must be {CAPACITY_FORMS}: 0",
        ),
        ('agent.store.max_bytes = "0"', "must be above 0: '0'"),
        ('agent.store.max_bytes = "101%"', "must be above 0% and at most 100%: '101%'"),
        ('agent.store.max_bytes = "0%"', "must be above 0% and at most 100%: '0%'"),
        (
            'agent.store.max_bytes = "much"',
            f"must be {CAPACITY_FORMS}: 'much'",
        ),
        ('agent.store.ttl = "0s"', "must be above 0, or never: '0s'"),
        (
            'agent.store.ttl = "soon"',
            f"must be {DURATION_FORMS}, or never: 'soon'",
        ),
        ("agent.registry = 8", "is a section, not a value: set one of the keys in it"),
        ("log.level.x = 8", "must be one of debug, info, warning, error: {'x': 8}"),
    ],
)
def test_a_bad_value_in_the_file_is_refused_with_what_is_allowed(
    write, toml: str, problem: str
) -> None:
    key = "log.level" if toml.startswith("log.level.x") else toml.partition(" =")[0]
    assert problems(Sources(write(toml))) == [f"{key}: {problem}  (cluster.toml:1)"]


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("swarm.upload_slots=4.5", "swarm.upload_slots: must be a whole number: '4.5'"),
        ("swarm.upload_slots=-1", "swarm.upload_slots: must be at least 1: -1"),
        ("agent.registry.push=yes", "agent.registry.push: must be true or false: 'yes'"),
        ("agent.registry.push=", "agent.registry.push: must be true or false: ''"),
        ("log.level", "log.level: must be KEY=VALUE, such as log.level=debug"),
        ("log.levle=debug", "log.levle: unknown key, did you mean log.level?"),
        ("agent.rpc.lissen=a:1", "agent.rpc.lissen: unknown key, did you mean agent.peer.listen?"),
        ("tls.capath=/x", "tls.capath: unknown key, did you mean tls.ca?"),
        ("agent=x", "agent: is a section, not a value: set one of the keys in it"),
        ("=x", ": unknown key"),
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_with_what_is_allowed(option: str, problem: str) -> None:
    assert problems(Sources(overrides=options(option))) == [f"{problem}  (-o)"]


@pytest.mark.parametrize(
    ("high", "low", "wrong"),
    [
        ("10GB", "11GB", True),
        ("10GB", "10GB", False),
        ("10GB", "unlimited", True),
        ("85%", "unlimited", True),
        ("unlimited", "10GB", False),
        ("unlimited", "unlimited", False),
        ("85%", "100%", False),
        ("85%", "10GB", False),
    ],
)
def test_a_low_watermark_above_the_high_one_is_refused(high: str, low: str, wrong: bool) -> None:
    overrides = options(f"agent.store.max_bytes={high}", f"agent.store.low_watermark={low}")
    if not wrong:
        load(Sources(overrides=overrides))
        return
    (problem,) = problems(Sources(overrides=overrides))
    assert problem.startswith("agent.store.low_watermark: must not be above agent.store.max_bytes")


def test_everything_that_is_wrong_in_any_layer_is_reported_at_once(write) -> None:
    file = write(
        'drain_timeout = "soon"\n'
        "[agent.registry]\n"
        'push = "false"\n'
        'lisen = "127.0.0.1:5000"\n'
        "[swarm]\n"
        "upload_slots = 0\n"
    )
    environ = {
        "SWARMPULL_AGENT_REGISTRY_LISTEN": "127.0.0.1:1",
        "SWARMPULL_AGENT__ADMIN__LISTEN": "here",
    }
    found = problems(
        Sources(file, environ, options("log.format=xml", "nonsense")), roles=frozenset({"tracker"})
    )
    assert found == [
        "drain_timeout: must be a duration with its unit, such as 500ms, 30s, 5m, 2h or 1d: 'soon'"
        "  (cluster.toml:1)",
        "agent.registry.push: must be true or false, without quotes: 'false'  (cluster.toml:3)",
        "agent.registry.lisen: unknown key, did you mean agent.registry.listen?  (cluster.toml:4)",
        "swarm.upload_slots: must be at least 1: 0  (cluster.toml:6)",
        "agent_registry_listen: unknown key, did you mean agent.registry.listen?"
        "  (env SWARMPULL_AGENT_REGISTRY_LISTEN)",
        "agent.admin.listen: must be host:port, such as 127.0.0.1:7300 or [::1]:7300: 'here'"
        "  (env SWARMPULL_AGENT__ADMIN__LISTEN)",
        "log.format: must be one of console, json: 'xml'  (-o)",
        "nonsense: must be KEY=VALUE, such as log.level=debug  (-o)",
        'cluster.origins: must name at least one, such as ["host:7200"]: '
        "tracker cannot work without it  (default)",
    ]


def test_bad_toml_is_reported_with_its_line_together_with_the_other_layers(write) -> None:
    file = write('[agent]\ndata_dir = "x\n')
    found = problems(Sources(file, {}, options("log.level=x")), roles=frozenset({"agent"}))
    assert len(found) == 2
    assert found[0].startswith("--config: bad TOML: ")
    assert found[0].endswith("(cluster.toml:2)")
    assert found[1] == "log.level: must be one of debug, info, warning, error: 'x'  (-o)"


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    assert problems(Sources(tmp_path / "absent.toml")) == [
        "--config: cannot read the configuration file: No such file or directory  (absent.toml)"
    ]
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    assert problems(Sources(tmp_path / "latin.toml")) == [
        "--config: is not UTF-8 text: byte 5  (latin.toml)"
    ]


def test_variables_that_kubernetes_makes_for_services_are_ignored() -> None:
    environ = {
        "SWARMPULL_SERVICE_HOST": "10.0.0.1",
        "SWARMPULL_PORT": "tcp://10.0.0.1:5000",
        "SWARMPULL_PORT_5000_TCP_ADDR": "10.0.0.1",
        "SWARMPULL_ORIGIN_SERVICE_PORT_RPC": "7200",
        "SWARMPULL_ORIGIN_PORT_7200_TCP": "tcp://10.0.0.1:7200",
    }
    assert set(load(Sources(environ=environ)).provenance.values()) == {"default"}


def test_messages_of_attrs_own_validators_are_kept_without_the_name_of_the_field() -> None:
    @attrs.frozen
    class Limits:
        count: int = attrs.field(
            default=5, validator=attrs.validators.ge(1), metadata={"help": "x"}
        )

    setting = Setting("limits.count", int, attrs.fields(Limits).count, 5)
    with pytest.raises(ValueError) as caught:
        decode(setting, 0, text=False)
    assert str(caught.value) == "must be >= 1: 0"
    assert decode(setting, "7", text=True) == 7


# --- directories ----------------------------------------------------------------------------------


def test_directories_that_are_not_set_lie_under_the_data_directory() -> None:
    overrides = [("--data-dir", "data_dir=/srv/a b"), ("-o", "index.data_dir=/srv/index")]
    config = load(Sources(overrides=overrides)).config
    assert config.agent.data_dir == Path("/srv/a b/agent")
    assert config.origin.data_dir == Path("/srv/a b/origin")
    assert config.origin.backend.url == "file:///srv/a%20b/backend"
    assert config.index.backend.url == "file:///srv/a%20b/backend"
    assert config.index.data_dir == Path("/srv/index")


def test_relative_directories_are_made_absolute(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(Sources(overrides=options("data_dir=d", "agent.data_dir=../a"))).config
    assert config.data_dir == tmp_path / "d"
    assert config.agent.data_dir == tmp_path / "../a"
    assert config.origin.backend.url == (tmp_path / "d/backend").as_uri()


# --- roles and their members ----------------------------------------------------------------------


def test_all_roles_in_one_process_find_one_another_and_agents_take_pushes() -> None:
    overrides = options("index.rpc.listen=[::]:9400", "tracker.rpc.listen=10.0.0.1:9300")
    loaded = load(Sources(overrides=overrides), roles=ALL)
    cluster = loaded.config.cluster
    assert cluster.trackers == ("10.0.0.1:9300",)
    assert cluster.origins == ("127.0.0.1:7200",)
    assert cluster.indexes == ("[::1]:9400",)
    assert loaded.config.agent.registry.push
    assert loaded.provenance["cluster.origins"] == "default of --role all"


def test_in_a_single_process_what_is_configured_still_wins() -> None:
    overrides = options("cluster.trackers=t:7300", "agent.registry.push=false")
    loaded = load(Sources(overrides=overrides), roles=ALL)
    assert loaded.config.cluster.trackers == ("t:7300",)
    assert not loaded.config.agent.registry.push


def test_a_local_member_needs_a_port_that_others_can_dial() -> None:
    found = problems(Sources(overrides=options("tracker.rpc.listen=127.0.0.1:0")), roles=ALL)
    assert found == [
        "tracker.rpc.listen: must be a fixed port, or cluster.trackers must be set: "
        "the other roles dial it  (-o)"
    ]


@pytest.mark.parametrize(
    ("role", "missing"),
    [
        ("agent", ["cluster.trackers", "cluster.indexes", "cluster.origins"]),
        ("origin", ["cluster.trackers", "cluster.indexes", "cluster.origins"]),
        ("tracker", ["cluster.origins"]),
        ("index", []),
    ],
)
def test_a_role_alone_must_be_told_where_the_others_are(role: str, missing: list[str]) -> None:
    roles = frozenset({role})
    if missing:
        found = problems(Sources(), roles=roles)
        assert [line.partition(":")[0] for line in found] == missing
        assert all(f"{role} cannot work without it" in line for line in found)
    loaded = load(Sources(environ=MEMBERS), roles=roles)
    assert loaded.config.cluster.trackers == ("t1:7300", "t2:7300")


def test_a_bad_member_list_is_not_also_reported_as_missing() -> None:
    environ = MEMBERS | {"SWARMPULL_CLUSTER__TRACKERS": "t1"}
    found = problems(Sources(environ=environ), roles=frozenset({"agent"}))
    assert [line.partition(":")[0] for line in found] == ["cluster.trackers"]


# --- several agents -------------------------------------------------------------------------------


def agents_of(loaded: Loaded) -> list[tuple[str, str, str, str]]:
    return [
        (str(a.registry.listen), str(a.peer.listen), str(a.admin.listen), a.data_dir.name)
        for a in loaded.agents
    ]


def test_agents_are_numbered_on_consecutive_ports() -> None:
    assert agents_of(load(Sources(), roles=ALL, agents=3)) == [
        ("127.0.0.1:5000", "0.0.0.0:7100", "127.0.0.1:7500", "agent-1"),
        ("127.0.0.1:5001", "0.0.0.0:7101", "127.0.0.1:7501", "agent-2"),
        ("127.0.0.1:5002", "0.0.0.0:7102", "127.0.0.1:7502", "agent-3"),
    ]


def test_without_the_option_there_is_one_agent_without_a_number() -> None:
    assert agents_of(load(Sources(), roles=ALL)) == [
        ("127.0.0.1:5000", "0.0.0.0:7100", "127.0.0.1:7500", "agent")
    ]
    assert load(Sources(environ=MEMBERS), roles=frozenset({"origin"})).agents == ()


def test_port_zero_stays_any_free_port_for_every_agent() -> None:
    overrides = options("agent.registry.listen=127.0.0.1:0", "agent.data_dir=/srv/cache")
    loaded = load(Sources(overrides=overrides), roles=ALL, agents=2)
    assert [str(agent.registry.listen) for agent in loaded.agents] == ["127.0.0.1:0"] * 2
    assert [str(agent.data_dir) for agent in loaded.agents] == ["/srv/cache-1", "/srv/cache-2"]


def test_a_hundred_agents_fit_when_their_admin_listeners_have_a_range_of_their_own() -> None:
    loaded = load(
        Sources(overrides=options("agent.admin.listen=127.0.0.1:7600")), roles=ALL, agents=100
    )
    assert len(loaded.agents) == 100
    assert agents_of(loaded)[-1][0] == "127.0.0.1:5099"


@pytest.mark.parametrize("count", [0, -1, 101])
def test_the_number_of_agents_is_bounded(count: int) -> None:
    found = problems(Sources(), roles=ALL, agents=count)
    assert found == [f"--agents: must be from 1 to 100: {count}"]


def test_agents_need_the_role() -> None:
    found = problems(Sources(environ=MEMBERS), roles=frozenset({"tracker"}), agents=2)
    assert found == ["--agents: needs --role agent or --role all"]


def test_listeners_that_collide_are_reported_once_per_pair_of_keys() -> None:
    assert problems(Sources(), roles=ALL, agents=50) == [
        "agent.admin.listen: 127.0.0.1:7520 (agent 21) collides with origin.admin.listen "
        "127.0.0.1:7520: choose another port for one of them  (default)",
        "agent.admin.listen: 127.0.0.1:7530 (agent 31) collides with tracker.admin.listen "
        "127.0.0.1:7530: choose another port for one of them  (default)",
        "agent.admin.listen: 127.0.0.1:7540 (agent 41) collides with index.admin.listen "
        "127.0.0.1:7540: choose another port for one of them  (default)",
    ]


def test_of_two_listeners_that_collide_the_configured_one_is_named() -> None:
    overrides = options("tracker.rpc.listen=10.0.0.1:7201")
    assert problems(Sources(overrides=overrides), roles=ALL) == [
        "tracker.rpc.listen: 10.0.0.1:7201 collides with origin.peer.listen 0.0.0.0:7201: "
        "choose another port for one of them  (-o)"
    ]


def test_the_same_port_on_different_addresses_is_no_collision() -> None:
    load(
        Sources(
            overrides=options("agent.admin.listen=127.0.0.2:80", "origin.admin.listen=127.0.0.1:80")
        ),
        roles=ALL,
    )


def test_ports_beyond_the_last_one_are_refused() -> None:
    overrides = options("agent.peer.listen=0.0.0.0:65534")
    assert problems(Sources(overrides=overrides), roles=ALL, agents=5) == [
        "agent.peer.listen: 0.0.0.0:65536 (agent 3) is beyond the highest port, 65535: "
        "start lower  (-o)"
    ]


def test_there_is_no_key_for_what_does_not_exist() -> None:
    assert not [key for key in settings() if key.startswith(("tls.cluster", "agent.rpc"))]


# --- lists of sections ----------------------------------------------------------------------------

SECTIONS = """
[[upstreams]]
name = "docker.io"
url = "registry+https://registry-1.docker.io"
username = "bob"
password = "hunter2"

[[upstreams]]
name = "localhost:5000"
url = "registry+http://localhost:5000"
freshness = "0s"

[[origin.namespaces]]
pattern = "team/*"
url = "s3://bucket/team?profile=team"
rate = "10MB/s"
"""


def test_each_entry_of_a_list_of_sections_becomes_an_object(write) -> None:
    loaded = load(Sources(file=write(SECTIONS)))
    hub, local = loaded.config.upstreams
    assert (hub.name, hub.username, hub.password, hub.freshness) == (
        "docker.io",
        "bob",
        "hunter2",
        60.0,
    )
    assert (local.name, local.freshness) == ("localhost:5000", 0.0)
    (team,) = loaded.config.origin.namespaces
    assert (team.pattern, team.rate) == ("team/*", 10e6)
    assert loaded.provenance["upstreams.1.name"].endswith("cluster.toml:9")
    assert loaded.provenance["origin.namespaces.0.rate"].endswith("cluster.toml:16")
    assert loaded.provenance["upstreams.1.username"] == "default"


def test_entries_can_be_set_and_added_in_every_layer(write) -> None:
    environ = {
        "SWARMPULL_UPSTREAMS__0__PASSWORD": "other",
        "SWARMPULL_UPSTREAMS__2__NAME": "quay.io",
    }
    overrides = options(
        "upstreams.2.url=registry+https://quay.io", "origin.namespaces.0.rate=1MB/s"
    )
    config = load(Sources(write(SECTIONS), environ, overrides)).config
    assert [upstream.name for upstream in config.upstreams] == [
        "docker.io",
        "localhost:5000",
        "quay.io",
    ]
    assert config.upstreams[0].password == "other"
    assert config.origin.namespaces[0].rate == 1e6


def test_a_secret_is_never_shown(write) -> None:
    loaded = load(Sources(file=write(SECTIONS)))
    values = toml_values(loaded.config)
    assert values["upstreams.0.password"] == "(hidden)"
    assert values["upstreams.1.password"] == ""
    assert "hunter2" not in repr(loaded)
    said = problems(Sources(overrides=options("upstreams.0.password=(hidden)")))
    assert "must be the secret itself" in said[0]


def test_everything_that_is_wrong_in_lists_of_sections_is_reported_at_once(write) -> None:
    file = write(
        """
[[upstreams]]
name = "docker.io"
url = "registry+https://bob:hunter2@registry-1.docker.io"

[[upstreams]]
nam = "quay.io"
password = 7

[[upstreams]]

[[origin.namespaces]]
pattern = "TEAM/*"
url = "registry+https://quay.io"

[origin.backend]
url = "s3://key:hunter2@bucket"
"""
    )
    overrides = options(
        "upstreams=x", "upstreams.4.name=ghcr.io", "upstreams.0=x", "upstreams.x.url=y"
    )
    said = problems(Sources(file, {}, overrides))
    assert not any("hunter2" in problem for problem in said)
    expected = {
        "upstreams.0.url": "cluster.toml:4",
        "upstreams.1.nam": "cluster.toml:7",
        "upstreams.1.password": "cluster.toml:8",
        "upstreams.2": "cluster.toml:10",
        "origin.namespaces.0.pattern": "cluster.toml:13",
        "origin.namespaces.0.url": "cluster.toml:14",
        "origin.backend.url": "cluster.toml:17",
        "upstreams": "-o",
        "upstreams.0": "-o",
        "upstreams.x.url": "-o",
    }
    for key, place in expected.items():
        assert any(p.startswith(f"{key}: ") and p.endswith(f"({place})") for p in said), (key, said)
    assert any("did you mean upstreams.1.name?" in problem for problem in said)


def test_what_an_entry_needs_and_what_contradicts_itself_is_said(write) -> None:
    file = write(
        """
cluster.names = ["mine.example"]
[[upstreams]]
name = "mine.example"
url = "registry+https://a.example"
[[upstreams]]
name = "b.example"
url = "registry+https://b.example"
password = "x"
docker_config = "/root/.docker/config.json"
[[upstreams]]
name = "b.example"
[[origin.namespaces]]
pattern = "team/*"
"""
    )
    said = problems(Sources(file))
    for text in (
        "upstreams.0.name: must not be named in cluster.names too: mine.example  (cluster.toml:4)",
        "upstreams.1.docker_config: must not be set together with password  (cluster.toml:10)",
        "upstreams.1.username: needs a password or password_file, and they need it  (default)",
        "upstreams.2.url: must be set  (cluster.toml:12)",
        "origin.namespaces.0.url: must be set  (cluster.toml:14)",
    ):
        assert text in said, said


def test_a_gap_in_the_numbers_is_reported() -> None:
    said = problems(Sources(overrides=options("upstreams.1.name=quay.io")))
    assert said == [
        "upstreams.1: there is no upstreams.0: entries are counted from 0 without a gap  (-o)"
    ]


def test_rules_of_replication_that_can_match_nothing_are_reported(write) -> None:
    file = write(
        """
[[upstreams]]
name = "docker.io"
url = "registry+https://registry-1.docker.io"
[[origin.namespaces]]
pattern = "team/*"
url = "file:///mnt/team"
[[remotes]]
name = "west"
indexes = ["west:7400"]
[[remotes]]
name = "west"
indexes = []
[[replications]]
pattern = "team/**"
remote = "west"
[[replications]]
pattern = "team/**"
remote = "west"
[[replications]]
pattern = "docker.io/**"
remote = "west"
[[replications]]
pattern = "_private/*"
remote = "west"
[[replications]]
pattern = "other/**"
remote = "north"
"""
    )
    said = "\n".join(problems(Sources(file), roles=frozenset({"index"})))
    for text in (
        "remotes.1.indexes: must name at least one",
        "replications.1.pattern: is there already for remote west: team/**  (cluster.toml:18)",
        "replications.2.pattern: matches nothing but repositories of upstream docker.io",
        "replications.3.pattern: matches nothing that may be the name of a repository: _private/*",
        "replications.4.pattern: matches nothing that origin.namespaces lets be pushed (team/*)",
        "replications.4.remote: must be the name of one of the remotes: north",
        "cluster.origins: must name at least one: an index with replications cannot work without",
        "cluster.indexes: must name at least one: an index with replications cannot work without",
    ):
        assert text in said, said
    assert "replications.0" not in said


def test_a_trusted_cluster_is_limited_to_repositories_that_there_can_be() -> None:
    trusted = options(
        "tls.ca=ca.crt",
        "tls.cert=host.crt",
        "tls.key=host.key",
        "tls.trusted.0.cluster=west",
        "tls.trusted.0.repositories=team/**,_private/*",
    )
    said = problems(Sources(overrides=trusted))
    assert said == [
        "tls.trusted.0.repositories: matches nothing that may be the name of a repository: _private/*  (-o)"
    ]


def test_trust_means_nothing_without_certificates() -> None:
    trusted = options("tls.trusted.0.cluster=west", "tls.trusted.1.cluster=west")
    said = problems(Sources(overrides=trusted))
    assert said == [
        "tls.trusted.0.cluster: means nothing without tls.ca, tls.cert and tls.key: plain connections "
        "trust everybody  (-o)",
        "tls.trusted.1.cluster: must not be that of tls.trusted.0 too: west  (-o)",
    ]

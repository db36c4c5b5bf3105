"""The manifests in examples/: the program takes their configuration, and ports and probes fit it."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from swarmpull.config import ROLES, Config
from swarmpull.layers import Loaded, Sources, load
from swarmpull.ring.membership import RESOLVE_INTERVAL
from swarmpull.store.backend_urls import check_url

SOURCE: Final = Path(__file__).resolve().parents[2]
EXAMPLES: Final = SOURCE / "examples" / "kubernetes"
MANIFESTS: Final = EXAMPLES / "swarmpull.yaml"
NAMESPACE: Final = "swarmpull"
pytestmark = pytest.mark.skipif(
    not EXAMPLES.is_dir(), reason="the examples are in the source tree only"
)


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(MANIFESTS.read_text()) if each]


def of_kind(documents: list[dict[str, Any]], *kinds: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in documents if each["kind"] in kinds}


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(role, specification of its pods)"""
    for workload in of_kind(documents, "DaemonSet", "StatefulSet").values():
        template = workload["spec"]["template"]
        yield template["metadata"]["labels"]["app.kubernetes.io/component"], template["spec"]


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return container


def loaded_by(documents: list[dict[str, Any]], role: str, directory: Path) -> Loaded:
    """The configuration as the pods of a role have it.  Raises ConfigError."""
    (config,) = of_kind(documents, "ConfigMap").values()
    file = directory / "swarmpull.toml"
    file.write_text(config["data"]["swarmpull.toml"])
    container = container_of(dict(pods(documents))[role])
    arguments = container["args"]
    assert arguments[:3] == ["run", "--role", role]
    # What the kubelet puts in is an address or a name.
    environ = {each["name"]: each.get("value", "10.0.0.1") for each in container.get("env", [])}
    overrides = [("--data-dir", f"data_dir={arguments[arguments.index('--data-dir') + 1]}")]
    return load(Sources(file, environ, overrides), roles=frozenset({role}), check_backend=check_url)


def test_every_role_has_its_pods(documents: list[dict[str, Any]]) -> None:
    assert sorted(role for role, _ in pods(documents)) == sorted(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_the_program_takes_the_configuration_and_listens_where_the_manifest_says(
    documents: list[dict[str, Any]], role: str, tmp_path: Path
) -> None:
    loaded = loaded_by(documents, role, tmp_path)
    container = container_of(dict(pods(documents))[role])
    settings = getattr(loaded.config, role)

    for port in container["ports"]:
        assert port["containerPort"] == getattr(settings, port["name"]).listen.port, port
    admin = settings.admin.listen
    for probe, path in (
        ("liveness", "/health"),
        ("startup", "/health"),
        ("readiness", "/readiness"),
    ):
        asked = container[f"{probe}Probe"]["httpGet"]
        assert (asked["path"], asked["port"]) == (path, admin.port)
        # The kubelet asks at the pod's address unless it is told otherwise.
        assert admin.host == asked.get("host", "0.0.0.0")
    defaults = Config()
    assert admin.port == getattr(defaults, role).admin.listen.port
    assert (
        loaded.config.drain_timeout + 5
        < dict(pods(documents))[role]["terminationGracePeriodSeconds"]
    )


def test_the_members_of_the_cluster_are_its_pods(
    documents: list[dict[str, Any]], tmp_path: Path
) -> None:
    cluster = loaded_by(documents, "agent", tmp_path).config.cluster
    services = of_kind(documents, "Service")
    sets = of_kind(documents, "StatefulSet")
    for role, members in (("origin", cluster.origins), ("index", cluster.indexes)):
        name = f"swarmpull-{role}"
        assert sets[name]["spec"]["serviceName"] == name
        domain = f"{name}.{NAMESPACE}.svc.cluster.local"
        rpc = {port["name"]: port["port"] for port in services[name]["spec"]["ports"]}["rpc"]
        assert members == tuple(
            f"{name}-{number}.{domain}:{rpc}" for number in range(sets[name]["spec"]["replicas"])
        )
    (trackers,) = cluster.trackers
    assert trackers == f"dns+swarmpull-tracker.{NAMESPACE}.svc.cluster.local:7300"
    for name in ("swarmpull-origin", "swarmpull-index", "swarmpull-tracker"):
        assert services[name]["spec"]["clusterIP"] == "None"
        assert services[name]["spec"]["publishNotReadyAddresses"]


def test_no_pod_has_a_privilege_that_it_does_not_need(documents: list[dict[str, Any]]) -> None:
    for role, pod in pods(documents):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod.get("hostNetwork", False) is (role == "agent")
        assert not {"hostPID", "hostIPC", "initContainers"} & pod.keys()
        assert not any("hostPath" in volume for volume in pod["volumes"])
        assert container_of(pod)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= container_of(pod)["resources"].keys()
        assert ("envFrom" in container_of(pod)) is (role in ("origin", "index"))


def test_pods_are_replaced_no_faster_than_others_find_the_new_ones(
    documents: list[dict[str, Any]],
) -> None:
    dns_ttl = 30
    for role, pod in pods(documents):
        if role != "agent":
            probe = container_of(pod)["readinessProbe"]
            assert probe["initialDelaySeconds"] >= dns_ttl + RESOLVE_INTERVAL, role


def test_the_image_has_what_the_package_is_made_of() -> None:
    lines = (EXAMPLES / "Dockerfile").read_text().splitlines()
    words = [line.split() for line in lines if line.startswith("COPY ") and "--from" not in line]
    copied = {source for _, *sources, _ in words for source in sources}
    setup = configparser.ConfigParser()
    setup.read(SOURCE / "setup.cfg")
    metadata = setup["metadata"]
    needed = {metadata["long_description"].removeprefix("file: "), metadata["license_files"]}

    assert all((SOURCE / each).exists() for each in copied)
    assert copied == needed | {"pyproject.toml", "setup.cfg", "swarmpull"}


def test_only_ports_for_others_are_open_in_the_network_policies(
    documents: list[dict[str, Any]], tmp_path: Path
) -> None:
    policies = of_kind(documents, "NetworkPolicy")
    for role in ("tracker", "index", "origin"):
        settings = getattr(loaded_by(documents, role, tmp_path).config, role)
        (rule,) = policies[f"swarmpull-{role}"]["spec"]["ingress"]
        names = [name for name in ("registry", "rpc", "peer") if hasattr(settings, name)]
        assert [each["port"] for each in rule["ports"]] == [
            getattr(settings, name).listen.port for name in names
        ]


def test_the_manifests_are_those_of_the_chart() -> None:
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("not installed: helm")
    chart = ["template", "swarmpull", str(EXAMPLES / "chart"), "--namespace", NAMESPACE]
    command = [helm, *chart, "--kube-version", "1.31.4"]
    rendered = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True
    ).stdout

    assert list(yaml.safe_load_all(rendered)) == list(yaml.safe_load_all(MANIFESTS.read_text()))

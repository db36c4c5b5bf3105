"""Tags as users change them: on conditions, with a history that the command line shows."""

from __future__ import annotations

import json

from . import web
from .program import Cluster, run_to_the_end


def put(port: int, repository: str, content: bytes, **condition: str) -> web.Answer:
    headers = {"Content-Type": web.OCI_MANIFEST}
    headers |= {name.replace("_", "-"): value for name, value in condition.items()}
    target = f"/v2/{repository}/manifests/v1"
    return web.request(port, "PUT", target, body=content, headers=headers)


def manifests(port: int, repository: str) -> list[bytes]:
    """Two manifests that can be pushed."""
    config, layers = b"{}", [b"one layer", b"another layer"]
    for content in (config, *layers):
        assert web.push_blob(port, repository, content).status == 201
    return [web.manifest_of(config, [layer]) for layer in layers]


def test_a_tag_is_changed_on_a_condition_through_every_registry(cluster: Cluster) -> None:
    for number, port in enumerate((cluster.ports.origin_registry, cluster.first.registry)):
        repository = f"team/conditional-{number}"
        first, second = manifests(port, repository)
        one, two = web.digest_of(first), web.digest_of(second)

        assert put(port, repository, first, If_None_Match="*").status == 201
        refused = put(port, repository, second, If_None_Match="*")
        assert (refused.status, refused.codes) == (412, ["DENIED"])
        assert one in refused.text
        assert put(port, repository, second, If_Match=f'"{two}x"').status == 400
        assert put(port, repository, second, If_Match=f'"{one}"').status == 201
        assert put(port, repository, first, If_Match=f'"{one}"').status == 412
        # The answer to the first may have been lost.
        assert put(port, repository, second, If_Match=f'"{one}"').status == 201
        etag = web.get_manifest(port, repository, "v1").headers["etag"]
        assert etag == f'"{two}"'

        target = f"/v2/{repository}/manifests/v1"
        refused = web.request(port, "DELETE", target, headers={"If-Match": f'"{one}"'})
        assert refused.status == 412
        assert web.request(port, "DELETE", target, headers={"If-Match": etag}).status == 202


def test_the_history_of_a_tag_is_shown(cluster: Cluster) -> None:
    port, repository = cluster.first.registry, "team/history"
    first, second = manifests(port, repository)
    for content in (first, second, second):
        assert put(port, repository, content).status == 201
    assert web.request(port, "DELETE", f"/v2/{repository}/manifests/v1").status == 202
    assert web.put_manifest(port, repository, "v2", first).status == 201

    name = f"127.0.0.1:{port}/{repository}"
    shown = run_to_the_end("tags", "log", f"{name}:v1", "--json")
    entries = json.loads(shown.stdout)
    assert [entry["digest"] for entry in entries] == [
        None,
        web.digest_of(second),
        web.digest_of(first),
    ]
    assert {entry["by"] for entry in entries} == {"127.0.0.1"}
    table = run_to_the_end("tags", "log", f"{name}:v1")
    assert "(deleted)" in table.stdout
    assert web.digest_of(second) in table.stdout

    assert run_to_the_end("tags", "ls", name).stdout == "v2\n"
    listed = run_to_the_end("tags", "ls", name, "--json")
    assert json.loads(listed.stdout) == {"name": repository, "tags": ["v2"]}
    for wrong in (["tags", "log", f"{name}:v3"], ["tags", "ls", f"{name}-not"]):
        failed = run_to_the_end(*wrong)
        assert failed.returncode == 1
        assert "HTTP 404" in failed.stderr

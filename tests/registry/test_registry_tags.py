"""Conditional changes of tags, and their history, over HTTP."""

from __future__ import annotations

import base64
import json

import pytest

from swarmpull.errors import TagChanged, TagImmutable
from swarmpull.registry.manifests import OCI_MANIFEST
from swarmpull.registry.service import Terms

from .conftest import Registry
from .images import make_image

IMAGE = make_image(1)
DIGEST = str(IMAGE.digest)
TYPE = ("Content-Type", OCI_MANIFEST)


@pytest.fixture
async def pushed(registry: Registry) -> Registry:
    await registry.add_image("a", IMAGE, "v1")
    registry.service.terms.clear()
    return registry


@pytest.mark.parametrize(
    ("header", "expect"),
    [
        (("If-Match", f'"{DIGEST}"'), DIGEST),
        (("if-match", "*"), "*"),
        (("If-None-Match", "*"), ""),
        (("X-Other", "*"), None),
    ],
)
async def test_a_condition_goes_to_whoever_decides(pushed, header, expect) -> None:
    target = "/v2/a/manifests/v1"
    put = await pushed.request("PUT", target, (TYPE, header), IMAGE.manifest)
    deleted = await pushed.request("DELETE", target, (header,))

    assert (put.status, deleted.status) == (201, 202)
    assert pushed.service.terms == [Terms("127.0.0.1", expect)] * 2


@pytest.mark.parametrize(
    "headers",
    [
        (("If-Match", DIGEST),),
        (("If-Match", f'"{DIGEST}", "{DIGEST}"'),),
        (("If-Match", ""),),
        (("If-None-Match", f'"{DIGEST}"'),),
        (("If-Match", "*"), ("If-None-Match", "*")),
    ],
)
async def test_other_conditions_are_refused_and_not_ignored(pushed, headers) -> None:
    put = await pushed.request("PUT", "/v2/a/manifests/v1", (TYPE, *headers), IMAGE.manifest)
    deleted = await pushed.request("DELETE", "/v2/a/manifests/v1", headers)

    assert (put.status, deleted.status) == (400, 400)
    assert json.loads(put.body)["errors"][0]["code"] == "UNSUPPORTED"
    assert pushed.service.terms == []


@pytest.mark.parametrize("target", [f"/v2/a/manifests/{DIGEST}", "/v2/a/manifests/v1?tag=v2"])
async def test_a_condition_is_for_one_tag(pushed, target) -> None:
    headers = (TYPE, ("If-None-Match", "*"))

    assert (await pushed.request("PUT", target, headers, IMAGE.manifest)).status == 400


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TagChanged("a", "v1", "", DIGEST), 412),
        (TagImmutable("a", "v1", DIGEST), 409),
    ],
)
async def test_a_change_that_is_refused_says_what_the_tag_is(
    pushed, monkeypatch, error, status
) -> None:
    async def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(pushed.service, "put_manifest", refuse)
    monkeypatch.setattr(pushed.service, "delete_tag", refuse)
    put = await pushed.request("PUT", "/v2/a/manifests/v1", (TYPE,), IMAGE.manifest)
    deleted = await pushed.request("DELETE", "/v2/a/manifests/v1")

    assert (put.status, deleted.status) == (status, status)
    (entry,) = json.loads(put.body)["errors"]
    assert entry["code"] == "DENIED"
    assert entry["detail"] == {"tag": "v1", "digest": DIGEST}
    assert DIGEST in entry["message"]


async def test_a_name_that_no_password_was_asked_for_is_not_in_the_history(pushed) -> None:
    login = base64.b64encode(b"mallory:x").decode()
    headers = (TYPE, ("Authorization", f"Basic {login}"))
    await pushed.request("PUT", "/v2/a/manifests/v1", headers, IMAGE.manifest)

    assert [terms.by for terms in pushed.service.terms] == ["127.0.0.1"]


async def test_the_history_of_a_tag_has_the_latest_change_first(pushed) -> None:
    reply = await pushed.request("GET", "/v2/a/_swarmpull/history/v1")

    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert json.loads(reply.body) == {
        "name": "a",
        "tag": "v1",
        "changes": [
            {"time": 1, "source": "index1", "digest": DIGEST, "by": "me"},
            {"time": 0, "source": "index1", "digest": None, "by": "me"},
        ],
    }


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v2/a/_swarmpull/history/v2", 404),
        ("/v2/a/_swarmpull/history/..%2fv1", 404),
        ("/v2/b/_swarmpull/history/v1", 404),
        ("/v2/_swarmpull/history/v1", 400),
    ],
)
async def test_what_has_no_history_is_not_found(pushed, target, status) -> None:
    assert (await pushed.request("GET", target)).status == status

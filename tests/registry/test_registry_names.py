"""The grammar of names, and how a path becomes an endpoint."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmpull.digest import Digest
from swarmpull.errors import InvalidDigest, UpstreamUnknown
from swarmpull.registry.errors import RegistryError
from swarmpull.registry.names import (
    UpstreamNames,
    check_repository,
    check_upstream,
    is_repository,
    is_tag,
    parse_reference,
)
from swarmpull.registry.routes import Endpoint, Route, find_route

DIGEST = f"sha256:{'a' * 64}"


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "library/nginx",
        "team/app.v1/sub_part",
        "docker.io/library/busybox",
        "a__b/c--d/e---f",
        "0/1/2",
        "a" * 255,
    ],
)
def test_repository_names_of_the_specification_are_taken(name: str) -> None:
    assert check_repository(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        "A",
        "a..b",
        "..",
        ".",
        "a/../b",
        "a/./b",
        "-a",
        "a-",
        "a_",
        "a___b",
        "a b",
        "a\n",
        "a\x00",
        "é",
        "٣",
        "a%2fb",
        "a:5000/b",
        "a" * 256,
    ],
)
def test_other_names_are_refused_with_the_name_in_the_message(name: str) -> None:
    assert not is_repository(name)
    with pytest.raises(RegistryError) as caught:
        check_repository(name)
    assert caught.value.status == 400
    assert caught.value.code.value == "NAME_INVALID"


def test_checking_a_long_name_takes_no_longer_than_its_length() -> None:
    # A backtracking expression would not return within the life of this test.
    assert not is_repository("a" * 200 + "-" * 54 + "!")
    assert not is_repository("a-" * 127 + "!")


@pytest.mark.parametrize("tag", ["v1", "_", "1.0-rc.1", "A" * 128, "latest"])
def test_tags_of_the_specification_are_taken(tag: str) -> None:
    assert is_tag(tag)
    assert parse_reference(tag) == tag


@pytest.mark.parametrize("tag", ["", ".x", "-x", "a/b", "A" * 129, "a b", "..", "é", "v1\n"])
def test_other_tags_are_refused(tag: str) -> None:
    assert not is_tag(tag)
    with pytest.raises(ValueError, match="neither a tag nor a digest"):
        parse_reference(tag)


def test_what_has_a_colon_is_a_digest_or_nothing() -> None:
    assert parse_reference(DIGEST) == Digest.parse(DIGEST)
    for text in ("sha256:abc", "latest:", f"sha256:{'A' * 64}", f"md5:{'a' * 32}"):
        with pytest.raises(InvalidDigest):
            parse_reference(text)


def test_an_upstream_is_a_host_with_an_optional_port() -> None:
    assert check_upstream(None) is None
    assert check_upstream("") is None
    for text in ("docker.io", "127.0.0.1:5998", "[::1]:5000", "Registry.Example"):
        assert check_upstream(text) == text
    for text in ("a b", "a/b", "a\r\nX: y", "é.example", "a" * 256):
        with pytest.raises(RegistryError):
            check_upstream(text)


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("GET", "/v2/", Route(Endpoint.BASE)),
        ("GET", "/v2", Route(Endpoint.BASE)),
        ("GET", "/v2/_catalog", Route(Endpoint.CATALOG)),
        ("GET", "/v2/a/b/tags/list", Route(Endpoint.TAGS, "a/b")),
        ("HEAD", "/v2/a/manifests/v1", Route(Endpoint.MANIFEST, "a", "v1")),
        ("PUT", f"/v2/a/manifests/{DIGEST}", Route(Endpoint.MANIFEST, "a", DIGEST)),
        ("GET", f"/v2/a/blobs/{DIGEST}", Route(Endpoint.BLOB, "a", DIGEST)),
        ("GET", f"/v2/a/blobs/sha256%3A{'a' * 64}", Route(Endpoint.BLOB, "a", DIGEST)),
        ("GET", f"/v2/a/referrers/{DIGEST}", Route(Endpoint.REFERRERS, "a", DIGEST)),
        ("POST", "/v2/a/b/c/blobs/uploads/", Route(Endpoint.UPLOADS, "a/b/c")),
        ("POST", "/v2/a/blobs/uploads", Route(Endpoint.UPLOADS, "a")),
        ("PATCH", "/v2/a/blobs/uploads/1f", Route(Endpoint.UPLOAD, "a", "1f")),
        ("PUT", f"/blobs/{DIGEST}", Route(Endpoint.GENERIC_BLOB, "", DIGEST)),
        # Names that look like parts of the API are names all the same.
        ("GET", "/v2/tags/list/tags/list", Route(Endpoint.TAGS, "tags/list")),
        ("GET", "/v2/blobs/uploads/manifests/v1", Route(Endpoint.MANIFEST, "blobs/uploads", "v1")),
        ("GET", "/v2/manifests/manifests/list", Route(Endpoint.MANIFEST, "manifests", "list")),
        # A slash inside the last part is content of that part.
        ("GET", "/v2/a/manifests/x%2Ftags%2Flist", Route(Endpoint.MANIFEST, "a", "x/tags/list")),
    ],
)
def test_a_path_leads_to_its_endpoint(method: str, path: str, route: Route) -> None:
    assert find_route(method, path.encode()) == route


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v2/A/manifests/v1", 400, "NAME_INVALID"),
        ("/v2//manifests/v1", 400, "NAME_INVALID"),
        ("/v2/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/../../etc/passwd/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/%2e%2e/%2e%2e/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/a%2Fb/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/a%2F..%2Fb/tags/list", 400, "NAME_INVALID"),
        ("/v2/a/../b/tags/list", 400, "NAME_INVALID"),
        ("/v2/a%00/tags/list", 400, "NAME_INVALID"),
        ("/v2/a%5Cb/tags/list", 400, "NAME_INVALID"),
        ("/v2/" + "a" * 256 + "/tags/list", 400, "NAME_INVALID"),
        ("/v2/a/manifests/../../v1", 404, "UNSUPPORTED"),
        ("/v2/a/tags", 404, "UNSUPPORTED"),
        ("/v2/../v2/", 404, "UNSUPPORTED"),
        ("/", 404, "UNSUPPORTED"),
        ("//v2/", 404, "UNSUPPORTED"),
        ("/v3/", 404, "UNSUPPORTED"),
        ("/blobs/", 404, "UNSUPPORTED"),
        ("/blobs/../../etc/passwd", 404, "UNSUPPORTED"),
        ("*", 404, "UNSUPPORTED"),
        ("http://example.org/v2/", 404, "UNSUPPORTED"),
    ],
)
def test_other_paths_are_refused(path: str, status: int, code: str) -> None:
    with pytest.raises(RegistryError) as caught:
        find_route("GET", path.encode())
    assert (caught.value.status, caught.value.code.value) == (status, code)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v2/", "GET, HEAD"),
        ("PATCH", "/v2/a/manifests/v1", "GET, HEAD, PUT, DELETE"),
        ("GET", "/v2/a/blobs/uploads/", "POST"),
        ("DELETE", f"/blobs/{DIGEST}", "GET, HEAD, PUT"),
        ("PUT", "/v2/a/tags/list", "GET, HEAD"),
    ],
)
def test_a_method_that_an_endpoint_lacks_is_answered_with_those_it_has(
    method: str, path: str, allowed: str
) -> None:
    with pytest.raises(RegistryError) as caught:
        find_route(method, path.encode())
    assert (caught.value.status, caught.value.code.value) == (405, "UNSUPPORTED")
    assert dict(caught.value.headers)["Allow"] == allowed


@given(st.text(alphabet="av2/.%F5C0_-:ABmanifeststagslistblobsuploads", max_size=60))
def test_no_path_yields_a_repository_outside_the_grammar(path: str) -> None:
    try:
        route = find_route("GET", ("/v2/" + path).encode())
    except RegistryError:
        return
    assert route.repository == "" or is_repository(route.repository)


# --- other registries -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repository", "upstream", "name"),
    [
        ("library/alpine", "docker.io", "docker.io/library/alpine"),
        ("alpine", "docker.io", "docker.io/library/alpine"),
        ("docker.io/alpine", None, "docker.io/library/alpine"),
        ("docker.io/a/b/c", None, "docker.io/a/b/c"),
        ("docker.io/alpine", "docker.io", "docker.io/library/alpine"),
        ("docker.io/alpine", "mine.example", "docker.io/library/alpine"),
        ("alpine", "DOCKER.IO", "docker.io/library/alpine"),
        ("app", "localhost:5000", "localhost_5000/app"),
        ("localhost_5000/app", "localhost:5000", "localhost_5000/app"),
        ("team/app", None, None),
        ("docker.io", None, None),
        ("team/app", "mine.example", None),
        ("quay.io/team/app", None, None),
    ],
)
def test_a_repository_of_an_upstream_has_one_name_here(repository, upstream, name) -> None:
    names = UpstreamNames(["docker.io", "localhost:5000"], ["mine.example"])
    assert names.select(repository, upstream) == name


def test_a_registry_that_is_no_upstream_is_named_in_the_error() -> None:
    names = UpstreamNames(["docker.io"], ["mine.example"])
    with pytest.raises(UpstreamUnknown, match=r"quay\.io is not among .*\(docker\.io\)"):
        names.select("team/app", "quay.io")
    # By its port it cannot be a repository of our own, with or without upstreams.
    with pytest.raises(UpstreamUnknown, match=r"quay\.io:443 .*\(none\)"):
        UpstreamNames([]).select("quay.io_443/team/app", "quay.io:443")
    assert UpstreamNames([]).select("team/app", "quay.io") is None
    assert names.select(None, "quay.io") is None, "a generic blob is of no registry"


def test_a_path_may_begin_with_a_registry_and_its_port() -> None:
    route = find_route("GET", b"/v2/localhost:5000/team/app/manifests/v1")
    assert route == Route(Endpoint.MANIFEST, "localhost_5000/team/app", "v1", "localhost:5000")
    assert find_route("GET", b"/v2/quay.io/app/tags/list") == Route(Endpoint.TAGS, "quay.io/app")
    for path in (b"/v2/a:b/manifests/v1", b"/v2/a/b:1/manifests/v1", b"/v2/[::1]:5/a/tags/list"):
        with pytest.raises(RegistryError):
            find_route("GET", path)

"""Who may call what: for each RPC method the roles whose certificate allows it.

The part of a method's name before the dot is the role that serves it, and has to stand in the certificate
of whoever is called; a name without a dot is served by all.  What is not listed may not be called by
anybody.  Roles of other clusters have a table of their own.  Without TLS nobody is known, and everybody may
call everything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import attrs

from swarmpull.identity import CERTIFICATE_ROLES, Identity
from swarmpull.wire import api, preheat_api

_AGENT: Final = frozenset({"agent"})
_ORIGIN: Final = frozenset({"origin"})
_INDEX: Final = frozenset({"index"})
_HOSTS: Final = _AGENT | _ORIGIN
_LOOKING: Final = _HOSTS | {"client"}
_SEEKING: Final = _HOSTS | {"tracker"}

CALLERS: Final[dict[str, frozenset[str]]] = {
    api.PING.name: frozenset(CERTIFICATE_ROLES),
    # Who takes part in a swarm.
    api.ANNOUNCE.name: _HOSTS,
    api.ANNOUNCE_HELD.name: _HOSTS,
    api.GIVE_METAINFO.name: _HOSTS,
    api.WATCH.name: _HOSTS,
    api.HASHES.name: _HOSTS,
    # Trackers ask origins for metainfo, agents do when no tracker answers, origins ask one another.
    api.STAT_BLOB.name: _SEEKING | {"client"},
    # An index that preheats asks for them as well.
    api.GET_METAINFO.name: _SEEKING | {"index"},
    api.HASHES_OF_ORIGIN.name: _SEEKING | {"index"},
    preheat_api.GET_MANIFEST.name: frozenset({"index"}),
    preheat_api.AWAIT_JOBS.name: _AGENT,
    api.URGE.name: _SEEKING,
    api.PEERS_OF_ORIGIN.name: _HOSTS,
    # What an agent that takes pushes passes on.
    api.ADOPT_BLOB.name: _HOSTS,
    api.PUT_MANIFEST.name: _HOSTS,
    api.MOUNT_BLOB.name: _HOSTS,
    # The index has images replicated to other clusters, whose origins are offered what it lacks there.
    api.OFFER_BLOB.name: _ORIGIN,
    api.HAND_OVER.name: _INDEX,
    api.READ_MANIFEST.name: _INDEX,
    # Replicas believe what they are told about rank and queue.
    api.REPLICATE_BLOB.name: _ORIGIN,
    api.HELD_BLOB.name: _ORIGIN,
    api.QUEUED.name: _ORIGIN,
    api.RESOLVE_UPSTREAM.name: _HOSTS,
    api.GET_UPSTREAM_MANIFEST.name: _HOSTS,
    api.RESOLVE.name: _LOOKING,
    api.TAG_LOG.name: _LOOKING | {"index"},
    api.HAS_BLOB.name: _LOOKING,
    api.LIST_TAGS.name: _LOOKING,
    api.LIST_REPOSITORIES.name: _LOOKING,
    api.LIST_REFERRERS.name: _LOOKING,
    # Whoever may change something here, or has done so elsewhere.
    api.FORGET.name: frozenset({"index"}),
    api.KEEP_PENDING.name: frozenset({"index"}),
    api.DROP_PENDING.name: frozenset({"index"}),
    api.PENDING.name: frozenset({"index"}),
    # An entry in the index says that the bytes are durable, which only an origin knows.
    api.CHECK_REFERENCES.name: _HOSTS,
    api.RECORD_MANIFEST.name: _ORIGIN,
    api.LINK_BLOB.name: _ORIGIN,
    # Indexes among themselves, about what other clusters have to be told.
    api.DESCRIBE_CLUSTER.name: _INDEX,
    api.KEEP_CHANGES.name: _INDEX,
    api.CHANGES_KEPT.name: _INDEX,
    # Deletions go from the registry that was asked straight to the index.
    api.DELETE_MANIFEST.name: _HOSTS,
    api.DELETE_TAG.name: _HOSTS,
    api.UNLINK_BLOB.name: _HOSTS,
}
# What the roles of another cluster may call, one that is trusted: all that replication needs.
FOREIGN_CALLERS: Final[dict[str, frozenset[str]]] = {
    api.PING.name: _INDEX | _ORIGIN,
    api.DESCRIBE_CLUSTER.name: _INDEX,
    api.TAG_LOG.name: _INDEX,
    api.CHECK_REFERENCES.name: _INDEX,
    api.DELETE_TAG.name: _INDEX,
    api.PUT_MANIFEST.name: _INDEX,
    api.OFFER_BLOB.name: _ORIGIN,
    api.ADOPT_BLOB.name: _ORIGIN,
}
# Where a request says which repository it is about.
_REPOSITORY_FIELDS: Final = ("repository", "namespace")
# Who exchanges pieces, and who of another cluster.
PEERS: Final = _HOSTS
FOREIGN_PEERS: Final = _ORIGIN


def refuse_caller(caller: Identity, method: str, cluster: str) -> str:
    """Why a caller may not call a method of a role of ``cluster``, and what to do; empty when it may."""
    is_foreign = caller.cluster != cluster
    allowed = (FOREIGN_CALLERS if is_foreign else CALLERS).get(method, frozenset())
    if caller.roles & allowed:
        return ""
    if is_foreign:
        return (
            f"the certificate of {caller} does not allow {method} in cluster {cluster}: another cluster may "
            "replicate to it, and nothing else"
        )
    whose = " or ".join(sorted(allowed)) or "nobody"
    return (
        f"the certificate of {caller} does not allow {method}, which is for {whose}: "
        "issue one with that --role"
    )


@attrs.frozen
class ForeignRules:
    """What of a call is looked at that a role of another cluster makes, one that may call the method.

    Attributes:
        repositories: by cluster, what the repositories have to match that it replicates to; a cluster that is
            not named may replicate to all.
    """

    repositories: Mapping[str, tuple[re.Pattern[str], ...]] = attrs.Factory(dict)

    def refuse(self, caller: Identity, body: object) -> str:
        """Why ``caller`` may not ask for this, and what to do; empty when it may."""
        match body:
            case api.PutManifestRequest(reference=reference) if ":" in reference:
                needs_stamp = False
            case api.PutManifestRequest() | api.DeleteTagRequest():
                needs_stamp = True
            case _:
                needs_stamp = False
        if needs_stamp and getattr(body, "stamp", None) is None:
            return (
                f"{caller} changes a tag without the stamp of a change there: another cluster may replicate "
                "its changes, and make none of its own here"
            )
        if getattr(body, "expect", None) is not None:
            return f"{caller} sets a condition: of two changes of different clusters the later one counts"
        return self._refuse_repository(caller, body)

    def _refuse_repository(self, caller: Identity, body: object) -> str:
        named = [getattr(body, name) for name in _REPOSITORY_FIELDS if hasattr(body, name)]
        patterns = self.repositories.get(caller.cluster)
        for repository in named:
            if not repository:
                return f"{caller} names no repository: another cluster may replicate to one, and no more"
            if patterns is not None and not any(each.fullmatch(repository) for each in patterns):
                return (
                    f"cluster {caller.cluster} may not replicate to {repository[:80]}: "
                    "repositories of its entry in tls.trusted do not match that"
                )
        return ""


def refuse_server(server: Identity, method: str) -> str:
    """Why a method is not to be called at a server, and what to do; empty when it is."""
    role, dot, _ = method.partition(".")
    if not dot or role in server.roles:
        return ""
    return (
        f"the certificate there is of {server}, which is no {role}: "
        f"issue one with --role {role}, or name the right address"
    )


def refuse_peer(peer: Identity, cluster: str) -> str:
    """Why no pieces are exchanged between a peer and a role of ``cluster``; empty when they are."""
    if peer.roles & (PEERS if peer.cluster == cluster else FOREIGN_PEERS):
        return ""
    if peer.cluster != cluster:
        return (
            f"the certificate of {peer} is of no origin, and only those of other clusters are peers"
        )
    return f"the certificate of {peer} is of no agent or origin: issue one with that --role"


def refuse_kind(peer: Identity, kind: str) -> str:
    """Why a peer is not of the kind that its HELLO says; empty when it is."""
    if kind in peer.roles:
        return ""
    return (
        f"the certificate of {peer} does not allow it to be an {kind} among peers: "
        f"issue one with --role {kind}"
    )

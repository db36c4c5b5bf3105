"""What of the configuration may change while roles run: who the members of the rings are."""

from __future__ import annotations

from collections.abc import Callable

from swarmpull.config import ClusterConfig
from swarmpull.ring.membership import Membership


class ConfigChanges:
    """Tells the roles of a process of a configuration that was read again."""

    def __init__(self) -> None:
        self._followers: list[Callable[[ClusterConfig], None]] = []

    def tell(self, cluster: ClusterConfig) -> None:
        """These are the members from now on."""
        for follow in self._followers:
            follow(cluster)

    def follow(
        self,
        *,
        trackers: Membership | None = None,
        origins: Membership | None = None,
        indexes: Membership | None = None,
    ) -> None:
        """Keep rings as the configuration has them."""

        def replace(cluster: ClusterConfig) -> None:
            weights = cluster.weights_by_member()
            rings = (trackers, origins, indexes)
            lists = (cluster.trackers, cluster.origins, cluster.indexes)
            for ring, entries in zip(rings, lists, strict=True):
                if ring is not None:
                    ring.replace(entries, weights)

        self._followers.append(replace)

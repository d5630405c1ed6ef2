"""What serving reads: one user's row through Feast's online store, many items' columns from the snapshot.

In: a workspace with an applied and materialised store. Out: plain Python values per user (`UserReader`) and memory-mapped
arrays (`Snapshot`). Feast is imported when a reader is built; the snapshot never needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from feature_repo.offline import open_store
from feature_repo.snapshot import Snapshot, write_snapshot
from feature_repo.views import ViewSchema
from tandem.core.errors import NotFoundError

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

__all__ = ["Snapshot", "UserReader", "UserRow", "write_snapshot"]

SERVICE: Final = "user_v1"
_USERS_PER_READ: Final = 500


@dataclass(frozen=True)
class UserRow:
    """One user's features by name (None = missing) and, by view, when they became known (None = unknown user).

    `views` names the features of each view; `expired` the views whose row was older than their ttl, and so counts as missing.
    """

    features: dict[str, Any]
    times: dict[str, datetime | None]
    views: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expired: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _View:
    feature_view: FeatureView
    names: tuple[str, ...]
    ttl: timedelta | None


class UserReader:
    """Reads users' rows. Everything that the registry knows is fetched once, so that a read asks the online store only.

    Feast does not apply ttl to online reads (feast#6821): a row older than its view's ttl counts as missing here.
    """

    def __init__(
        self,
        store: FeatureStore | Path,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        read_timeout_ms: int | None = None,
        views: Sequence[str] | None = None,
    ) -> None:
        """`store` is an open store, or a workspace, whose store `read_timeout_ms` limits. `views` are those that a release pins;
        None reads the current ones. Raises NotFoundError for a view that is not applied.
        """
        from feast.type_map import feast_value_type_to_python_type

        from feature_repo.newest import entity_key

        opened = open_store(store, read_timeout_ms) if isinstance(store, Path) else store
        self._views = _views_of(opened, views)
        self._read = opened.provider.online_read
        self._config = opened.config
        self._now = now
        self._key = entity_key
        self._plain = feast_value_type_to_python_type
        self.views: Mapping[str, tuple[str, ...]] = {view.feature_view.name: view.names for view in self._views}
        self.names: tuple[str, ...] = tuple(name for view in self._views for name in view.names)

    def row(self, user_id: str) -> dict[str, Any]:
        """All user features by name; None where one is missing, expired, or the user unknown."""
        return self.read([user_id])[0].features

    def rows(self, user_ids: Sequence[str]) -> list[dict[str, Any]]:
        """One dict per user id, in their order."""
        return [each.features for each in self.read(user_ids)]

    def read(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Features and their event times, one per user id, in their order."""
        chunks = [user_ids[start : start + _USERS_PER_READ] for start in range(0, len(user_ids), _USERS_PER_READ)]
        return [row for chunk in chunks for row in self._read_chunk(chunk)]

    def _read_chunk(self, user_ids: Sequence[str]) -> list[UserRow]:
        keys = [self._key("user_id", user_id) for user_id in user_ids]
        rows = [UserRow(dict.fromkeys(self.names), {}, self.views) for _ in user_ids]
        now = self._now()
        for view in self._views:
            answers = self._read(self._config, view.feature_view, keys, list(view.names))
            for row, (when, values) in zip(rows, answers, strict=True):
                row.times[view.feature_view.name] = when
                if when is not None and view.ttl and now - when > view.ttl:
                    row.expired.append(view.feature_view.name)
                elif when is not None:
                    row.features.update({name: self._plain(value) for name, value in values.items()})
        return rows


def read_feature(store: FeatureStore, view: ViewSchema, name: str, ids: Sequence[str]) -> list[tuple[datetime | None, Any]]:
    """One feature of users or items as the online store has it: (event time, value), both None where it has no row."""
    from feast.type_map import feast_value_type_to_python_type

    from feature_repo.newest import entity_key

    keys = [entity_key(view.key, each) for each in ids]
    found = store.provider.online_read(store.config, store.get_feature_view(view.name), keys, [name]) if keys else []
    return [(when, feast_value_type_to_python_type(values[name]) if values else None) for when, values in found]


def _views_of(store: FeatureStore, pinned: Sequence[str] | None) -> list[_View]:
    from feast.errors import FeatureServiceNotFoundException

    if pinned is not None:
        return [_pinned(store, name) for name in pinned]
    try:
        service = store.get_feature_service(SERVICE)
    except FeatureServiceNotFoundException:
        raise NotFoundError(f"no feature service {SERVICE!r} is applied; run `tandem features apply`") from None
    chosen = [(store.get_feature_view(each.name), each) for each in service.feature_view_projections]
    return [_View(view, tuple(f.name for f in projection.features), view.ttl or None) for view, projection in chosen]


def _pinned(store: FeatureStore, name: str) -> _View:
    from feast.errors import FeatureViewNotFoundException

    try:
        view = store.get_feature_view(name)
    except FeatureViewNotFoundException:
        raise NotFoundError(f"feature view {name!r} is not applied; run `tandem features apply` and `materialize`") from None
    return _View(view, tuple(each.name for each in view.features), view.ttl or None)

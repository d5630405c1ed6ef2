"""What fills a version of a view, written down with it, so that it can be told from another version and filled again.

In: a view's name, the settings and the source of events. Out: plain values that stand in `schema.json` as `made_by`; and back
again: the settings and the source that a version was defined with, for the functions of `aggregates.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

from feature_repo.aggregates import AggregateConfig
from feature_repo.features import DECLARED, Declared
from feature_repo.views import ViewSchema
from tandem.core.schema import Source, Task

REVISIONS: Final[dict[str, int]] = {
    "user_stats": 1,
    "item_stats": 1,
    "user_history": 1,
    "user_categories": 1,
    "user_attributes": 1,
    "item_attributes": 1,
    "user_declared": 1,
    "item_declared": 1,
}
"""Raise a view's number when its code gives other values for the same settings: it then is another version."""

_STATS: Final = (("windows", "prior_strength"), ("history", "impression", "tasks"))
_SETTINGS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "user_stats": _STATS,
    "item_stats": _STATS,
    "user_history": (("history_length",), ("history",)),
    "user_categories": (("top_categories",), ("history",)),
}
"""View -> what its values depend on: names of `AggregateConfig` and of `Source`."""


def made_by(base: str, config: AggregateConfig, source: Source) -> dict[str, Any]:
    """What fills the view called `base`, as JSON gives it back."""
    if base in config.tables:
        return {"table": base, "revision": config.tables[base].revision}
    found: dict[str, Any] = {"revision": REVISIONS[base]}
    for entity, view in DECLARED.items():
        if view == base:
            found |= _of_declared(config.declared_of(entity), source)
    of_config, of_source = _SETTINGS.get(base, ((), ()))
    found |= {name: getattr(config, name) for name in of_config}
    found |= {name: _plain(getattr(source, name)) for name in of_source}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def as_made(view: ViewSchema, config: AggregateConfig, source: Source) -> tuple[AggregateConfig, Source] | None:
    """Settings and source as the version was defined with; None when today's code computes something else.

    A version for which nobody wrote them down is filled by today's.
    """
    facts = view.made_by
    if not facts:
        return config, source
    if facts["revision"] != REVISIONS.get(view.base):
        return None
    own: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in facts.items() if name in vars(config)
    }
    if "declared" in facts:
        declared = {name: Declared(**each) for name, each in facts["declared"].items()}
        own["declared"] = config.declared if declared == config.declared_of(view.entity) else declared
    return replace(config, **own), _source_as(facts, source)


def fillings(
    views: Sequence[ViewSchema], config: AggregateConfig, source: Source
) -> Iterator[tuple[AggregateConfig, Source, list[ViewSchema]]]:
    """The views that events fill, by what fills them: mostly one group, and one more for each older definition."""
    groups: list[tuple[AggregateConfig, Source, list[ViewSchema]]] = []
    for view in views:
        made = as_made(view, config, source) if view.base in REVISIONS else None
        if made is None:
            continue
        for group in groups:
            if _compatible(group, made, view):
                group[2].append(view)
                break
        else:
            groups.append((*made, [view]))
    yield from groups


def _compatible(
    group: tuple[AggregateConfig, Source, list[ViewSchema]], made: tuple[AggregateConfig, Source], view: ViewSchema
) -> bool:
    return group[:2] == made and all(each.base != view.base for each in group[2])


def _of_declared(declared: Mapping[str, Declared], source: Source) -> dict[str, Any]:
    """The declarations, and of the source what they count without saying so."""
    facts: dict[str, Any] = {"declared": {name: asdict(each) for name, each in sorted(declared.items())}}
    if any(each.action is None and each.task is None for each in declared.values()):
        facts["history"] = source.history
    tasks = {each.task for each in declared.values() if each.task is not None}
    if tasks:
        facts["tasks"] = [asdict(task) for task in source.tasks if task.name in tasks]
    return facts


def _source_as(facts: Mapping[str, Any], source: Source) -> Source:
    own: dict[str, Any] = {name: facts[name] for name in ("impression",) if name in facts}
    if "history" in facts:
        own["history"] = tuple(facts["history"])
    tasks = tuple(Task(**each) for each in facts.get("tasks", ()))
    if not set(tasks) <= set(source.tasks) or (tasks and "declared" not in facts and tasks != source.tasks):
        names = [task.name for task in tasks]
        own |= {"tasks": tasks, "positive": source.positive if source.positive in names else names[0]}
    return replace(source, **own)


def _plain(value: Any) -> Any:
    return [asdict(each) for each in value] if value and isinstance(value, tuple) and isinstance(value[0], Task) else value

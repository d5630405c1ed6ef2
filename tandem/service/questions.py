"""Questions to the live release from the terminal: each opens the champion, asks once, and makes an `Outcome` of the answer."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from tandem.core.errors import InputError
from tandem.core.schema import check_id
from tandem.service.outcome import Cell, Outcome, Table
from tandem.service.recommend import Recommender
from tandem.service.settings import Settings
from tandem.service.slate import Ask, Slate
from tandem.service.wiring import open_recommender


def recommend(
    settings: Settings,
    user: str | None,
    query: str | None,
    k: int,
    session: tuple[str, ...] = (),
    categories: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    context: tuple[str, ...] = (),
) -> Outcome:
    """A slate for any mix of user, session and sentence; `context` are words like "device=phone".

    Raises InputError when `k` is out of range, a text is not Unicode, or a context has no "=".
    """
    own = _context(context)
    ask = Ask(user and check_id(user, "user_id"), session, _words(query), _checked(settings, k), categories, exclude, context=own)
    with _opened(settings) as recommender:
        slate = recommender.recommend(ask)
    who = f"user {ask.user_id}" if ask.user_id else "nobody in particular"
    title = f"For {who}" + (f", who wants: {ask.query}" if ask.query else "")
    new = " (new here)" if slate.cold_start and ask.user_id else ""
    return _answer(slate, title, f"{len(slate.items)} items for {who}{new}", _next(ask, slate))


def similar(settings: Settings, item_id: str, k: int) -> Outcome:
    """The items nearest to one. Raises NotFoundError for an item that the release does not hold."""
    k = _checked(settings, k)
    with _opened(settings) as recommender:
        slate = recommender.similar(item_id, k)
    following = shlex.join(["tandem", "similar", slate.items[0].item_id]) if slate.items else ""
    return _answer(slate, f"Like {item_id}", f"{len(slate.items)} items", following)


def why(settings: Settings, user_id: str, item_id: str, features: tuple[str, ...] = ()) -> Outcome:
    """What every stage did with an item for a user, and the features that the ranker knew whose names hold one of `features`."""
    with _opened(settings) as recommender:
        told = recommender.why(user_id, item_id)
    columns = ("stage", "what", "rank", "score")
    data = asdict(told) | {"stages": [dict(zip(columns, stage, strict=True)) for stage in told.stages]}
    shown = [(name, value) for name, value in told.features.items() if any(part in name for part in features)]
    known = tuple(("feature", name, None, value) for name, value in shown)
    table = Table(f"{told.title} for user {told.user_id}", columns, (*told.stages, *known))
    return Outcome(told.verdict, data, table, shlex.join(["tandem", "recommend", told.user_id]))


def _context(words: tuple[str, ...]) -> dict[str, str]:
    without = [word for word in words if "=" not in word]
    if without:
        raise InputError(f"context {without[0]!r} has no '='; write it like device=phone")
    return dict(word.split("=", 1) for word in words)


def slate_table(slate: Slate, title: str) -> Table:
    """A slate for people."""
    rows: list[tuple[Cell, ...]] = []
    for item in slate.items:
        chances = " ".join(f"{task} {chance:.3f}" for task, chance in item.predictions.items())
        rows.append((item.position, item.item_id, item.title, ", ".join(item.categories), item.score, chances, item.reason))
    return Table(title, ("", "item", "title", "categories", "score", "predictions", "reason"), tuple(rows))


def _answer(slate: Slate, title: str, made: str, following: str) -> Outcome:
    fell_back = f", degraded: {', '.join(slate.degraded)}" if slate.degraded else ""
    said = f"{made}, answered in {slate.took_ms['total']:.0f} ms by release {slate.release}{fell_back}"
    return Outcome(said, asdict(slate) | {"returned": len(slate.items)}, slate_table(slate, title), following)


def _next(ask: Ask, slate: Slate) -> str:
    if ask.user_id and slate.items:
        return shlex.join(["tandem", "why", ask.user_id, slate.items[0].item_id])
    return shlex.join(["tandem", "similar", slate.items[0].item_id]) if slate.items else "tandem status"


def _words(query: str | None) -> str | None:
    """The sentence, or None when it is blank; bytes that are not Unicode come from the shell as lone surrogates."""
    if not query or not query.strip():
        return None
    if any("\ud800" <= letter <= "\udfff" for letter in query):
        raise InputError("the sentence is not Unicode text; write it in UTF-8")
    return query


def _checked(settings: Settings, k: int) -> int:
    if not 1 <= k <= settings.service.max_k:
        raise InputError(f"k = {k}; ask for 1 to {settings.service.max_k} items (service.max_k)")
    return k


@contextmanager
def _opened(settings: Settings) -> Iterator[Recommender]:
    recommender = open_recommender(settings)
    try:
        yield recommender
    finally:
        recommender.close()

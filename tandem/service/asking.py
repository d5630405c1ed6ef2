"""Who asks, over HTTP: what `recommend`, `retrieve` and `rank` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from tandem.service.body import MAX_LIST, Body, Id, Text

if TYPE_CHECKING:
    from tandem.service.slate import Ask


class AskBody(Body):
    """Any mix of who asks, what they did just now, and what they want in their own words. All empty: what is popular."""

    user_id: Id | None = None
    session: tuple[Id, ...] = Field(default=(), max_length=MAX_LIST, description="item ids of this session, oldest first")
    query: Text | None = Field(default=None, description="what is wanted, in words")
    request_id: Id | None = None

    def ask(self, request_id: str) -> Ask:
        """The question as the recommender takes it; `request_id` is used where the caller gave none."""
        from tandem.service.slate import Ask

        words = self.query if self.query and self.query.strip() else None
        return Ask(user_id=self.user_id, session=self.session, query=words, request_id=self.request_id or request_id)

"""Any CSV, Parquet or JSON-lines file with a mapping: somebody's own data at the first try.

In: a file of events (one row per event), and `TableMapping`, which `tandem.toml` holds as [table]. Out: `Raw`. Items and users
come from files of their own where the mapping names them, and from the columns of the events otherwise (the newest row tells
title and text).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from feature_repo.sources.clean import clean_events, clean_items, clean_users, finish_events
from feature_repo.sources.files import read_table, require, require_columns
from feature_repo.sources.raw import Raw, require_events
from feature_repo.sources.times import Unit
from tandem.core.errors import InputError
from tandem.core.schema import EVENTS, ITEMS, USERS, Source, Split, Task

How = Literal["last", "first", "median", "mean", "min", "max"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ActionRule(_Strict):
    """Rows whose `column` lies in [at_least, below), or equals `equals`, are events of action `name`."""

    name: str = Field(min_length=1)
    column: str
    at_least: float | None = None
    below: float | None = None
    equals: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ActionRule:
        if self.at_least is None and self.below is None and self.equals is None:
            raise ValueError(f"action {self.name!r} needs at_least, below or equals")
        return self

    def matches(self) -> pl.Expr:
        """Boolean expression over the file's columns; a value that is no number lies in no range."""
        number = pl.col(self.column).cast(pl.Float64, strict=False)
        hit = pl.lit(True)
        if self.equals is not None:
            hit &= pl.col(self.column).cast(pl.String) == self.equals
        if self.at_least is not None:
            hit &= number >= self.at_least
        if self.below is not None:
            hit &= number < self.below
        return hit.fill_null(False)


class Attribute(_Strict):
    """One attribute `name` from `column`; where an item or user has several rows, `how` makes them one value."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    column: str
    how: How = "last"


class TaskRule(_Strict):
    """One task, as `tandem.core.schema.Task`."""

    name: str
    action: str
    at_least: float | None = None
    below: float | None = None


class TableMapping(_Strict):
    """Which column is what. Only `user_id`, `item_id` and `timestamp` must be given.

    action:   the action of rows that no rule in `actions` claims; `action_column` reads it from the data instead
    actions:  rules, the first that matches wins
    items:    a file of items beside the events, with the columns that `item_id`, `title`, `text`, `categories`,
              `item_attributes` and `available_from` name
    users:    a file of users beside the events, with those that `user_id`, `user_text` and `user_attributes` name
    """

    user_id: str
    item_id: str
    timestamp: str
    timestamp_unit: Unit | None = None
    timestamp_format: str | None = None
    title: str | None = None
    text: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    category_separator: str | None = None
    available_from: str | None = None
    user_text: str | None = None
    value: str | None = None
    action: str | None = None
    action_column: str | None = None
    actions: tuple[ActionRule, ...] = ()
    request_id: str | None = None
    position: str | None = None
    propensity: str | None = None
    split_column: str | None = None
    context: tuple[str, ...] = ()
    item_attributes: tuple[Attribute, ...] = ()
    user_attributes: tuple[Attribute, ...] = ()
    items: str | None = None
    users: str | None = None
    tasks: tuple[TaskRule, ...] = ()
    positive: str | None = None
    history: tuple[str, ...] = ()
    impression: str | None = None
    exclude_seen: bool = True
    split: Split = "time"
    credit: str = ""

    @field_validator("text", "categories", "context", "history", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("item_attributes")
    @classmethod
    def _no_item_columns(cls, value: tuple[Attribute, ...]) -> tuple[Attribute, ...]:
        return _unclaimed(value, ITEMS)

    @field_validator("user_attributes")
    @classmethod
    def _no_user_columns(cls, value: tuple[Attribute, ...]) -> tuple[Attribute, ...]:
        return _unclaimed(value, USERS)

    @model_validator(mode="after")
    def _has_an_action(self) -> TableMapping:
        if not (self.action or self.action_column or self.actions):
            raise ValueError('nothing says what the rows are; set action = "click" (or action_column, or [[table.actions]])')
        if not self.tasks and not self.action_names:
            raise ValueError("with action_column alone, say what to predict in [[table.tasks]]")
        return self

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> TableMapping:
        """A mapping from the [table] section; raises InputError naming the key, its value or the nearest known key."""
        try:
            mapping = cls.model_validate(dict(raw))
        except ValidationError as error:
            raise InputError(_explain(error)) from None
        mapping.source()  # refuses a `positive` that is no task now, not after minutes of reading
        return mapping

    @property
    def action_names(self) -> tuple[str, ...]:
        """Actions that the mapping itself names, in order, once each."""
        names = [*([self.action] if self.action else []), *[rule.name for rule in self.actions]]
        return tuple(dict.fromkeys(names))

    def source(self) -> Source:
        """What the events mean; without [[table.tasks]] every named action but the impression is a task."""
        tasks = tuple(Task(**rule.model_dump()) for rule in self.tasks)
        tasks = tasks or tuple(Task(name, name) for name in self.action_names if name != self.impression)
        positive = self.positive or tasks[0].name
        history = self.history or tuple(task.action for task in tasks if task.name == positive)
        return Source("table", tasks, positive, history, self.exclude_seen, self.split, self.impression, self.credit)


ONLINE_RETAIL: Final = """\
# UCI's Online Retail I and II as one Parquet file (CC BY 4.0): put this into tandem.toml, then
#   tandem import table online_retail.parquet
[table]
user_id = "Customer ID"
item_id = "ItemKey"
timestamp = "InvoiceDate"
title = "Description"
text = ["Description"]
value = "Quantity"
history = ["purchase"]
positive = "purchase"
exclude_seen = false        # 38% of later pairs are repeats: people buy the same things again
split = "time"
credit = "Daqing Chen. Online Retail and Online Retail II. UCI Machine Learning Repository. CC BY 4.0."

[[table.actions]]
name = "return"
column = "Quantity"
below = 0

[[table.actions]]
name = "purchase"
column = "Quantity"
at_least = 1

[[table.tasks]]
name = "purchase"
action = "purchase"

[[table.tasks]]
name = "return"
action = "return"

[[table.item_attributes]]
name = "price"
column = "Price"
how = "median"

[[table.user_attributes]]
name = "country"
column = "Country"
"""
"""The mapping that docs/examples/online-retail.toml shows."""


def read(path: Path, mapping: TableMapping, now: datetime) -> Raw:
    """Read a table of events. Raises InputError for a column that is not there, naming it and the nearest ones."""
    frame = read_table(path)
    _check_columns(frame, _event_columns(mapping), path)
    item_frame = _own_file(path, mapping.items) if mapping.items else None
    user_frame = _own_file(path, mapping.users) if mapping.users else None
    listed = clean_items(_item_draft(item_frame, mapping, f"items file {mapping.items}")) if item_frame is not None else None
    events, bad_events = clean_events(
        _event_draft(frame, mapping),
        known_items=listed[0]["item_id"] if listed else None,
        now=now,
        context=mapping.context,
        unit=mapping.timestamp_unit,
        pattern=mapping.timestamp_format,
    )
    accepted = _accepted(frame, events)
    items, bad_items = listed or clean_items(
        _item_draft(_newest(accepted, mapping.item_attributes, "item_id"), mapping, str(path))
    )
    user_rows = user_frame if user_frame is not None else _newest(accepted, mapping.user_attributes, "user_id")
    users, bad_users = clean_users(_user_draft(user_rows, mapping, is_file=user_frame is not None), events["user_id"])
    rejected = pl.concat([bad_events, bad_items, bad_users])
    return require_events(Raw(finish_events(events), items, users, mapping.source(), rejected))


_KEY: Final = "__{}"


def _event_draft(frame: pl.DataFrame, mapping: TableMapping) -> pl.DataFrame:
    columns = {
        "user_id": mapping.user_id,
        "item_id": mapping.item_id,
        "timestamp": mapping.timestamp,
        "value": mapping.value,
        "request_id": mapping.request_id,
        "position": mapping.position,
        "propensity": mapping.propensity,
        "split": mapping.split_column,
    }
    kept = [pl.col(column).alias(name) for name, column in columns.items() if column is not None]
    return frame.select("row", *kept, _action(mapping).alias("action"), *[pl.col(name) for name in mapping.context])


def _action(mapping: TableMapping) -> pl.Expr:
    rules = [pl.when(rule.matches()).then(pl.lit(rule.name)) for rule in mapping.actions]
    given = [pl.col(mapping.action_column).cast(pl.String)] if mapping.action_column else []
    constant = [pl.lit(mapping.action)] if mapping.action else []
    return pl.coalesce(*rules, *given, *constant)


def _accepted(frame: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """The file's accepted rows in order of time, with their clean ids as "__user_id" and "__item_id"."""
    keys = events.select("row", *[pl.col(name).alias(_KEY.format(name)) for name in ("user_id", "item_id", "timestamp")])
    return frame.join(keys, on="row", how="inner").sort(_KEY.format("timestamp"), "row")


def _newest(accepted: pl.DataFrame, attributes: tuple[Attribute, ...], key: str) -> pl.DataFrame:
    """One row per item or user: every column's newest value that is not null, and the attributes as they ask to be made."""
    name = _KEY.format(key)
    made = [_reduced(each).alias(_KEY.format(each.name)) for each in attributes]
    newest = pl.exclude(name).drop_nulls().last()
    return accepted.group_by(name, maintain_order=True).agg(newest, *made)


def _reduced(attribute: Attribute) -> pl.Expr:
    column = pl.col(attribute.column).drop_nulls()
    if attribute.how in ("median", "mean", "min", "max"):
        number = column.cast(pl.Float64, strict=False).fill_nan(None).drop_nulls()
        made: pl.Expr = getattr(number, attribute.how)()
        return made
    return column.first() if attribute.how == "first" else column.last()


def _item_draft(frame: pl.DataFrame, mapping: TableMapping, name: str) -> pl.DataFrame:
    key = _KEY.format("item_id") if _KEY.format("item_id") in frame.columns else mapping.item_id
    wanted = [key, mapping.title, *mapping.text, *mapping.categories, mapping.available_from]
    _check_columns(frame, [column for column in wanted if column], Path(name))
    parts = [pl.col(column).cast(pl.String) for column in mapping.text]
    return frame.select(
        "row",
        pl.col(key).alias("item_id"),
        *([pl.col(mapping.title).cast(pl.String).alias("title")] if mapping.title else []),
        *([pl.concat_str(*parts, separator=". ", ignore_nulls=True).alias("text")] if parts else []),
        *([_categories(frame, mapping).alias("categories")] if mapping.categories else []),
        *([pl.col(mapping.available_from).alias("available_from")] if mapping.available_from else []),
        *[_attribute(frame, each) for each in mapping.item_attributes],
    )


def _user_draft(frame: pl.DataFrame, mapping: TableMapping, *, is_file: bool) -> pl.DataFrame:
    key = mapping.user_id if is_file else _KEY.format("user_id")
    wanted = [key, *([mapping.user_text] if mapping.user_text else [])]
    _check_columns(frame, wanted, Path(mapping.users or "the events"))
    text = [pl.col(mapping.user_text).cast(pl.String).alias("text")] if mapping.user_text else []
    return frame.select(
        "row", pl.col(key).alias("user_id"), *text, *[_attribute(frame, each) for each in mapping.user_attributes]
    )


def _attribute(frame: pl.DataFrame, attribute: Attribute) -> pl.Expr:
    """The reduced column where rows were grouped, else the file's own; numbers that a CSV spelt out become numbers."""
    made = _KEY.format(attribute.name)
    _check_columns(frame, [] if made in frame.columns else [attribute.column], Path(f"attribute {attribute.name}"))
    column = frame[made if made in frame.columns else attribute.column]
    if column.dtype == pl.String:
        number = column.cast(pl.Float64, strict=False)
        if number.null_count() == column.null_count():
            return pl.lit(number.alias(attribute.name))
    return pl.lit(column.alias(attribute.name))


def _categories(frame: pl.DataFrame, mapping: TableMapping) -> pl.Expr:
    lists = [_as_list(frame, column, mapping.category_separator) for column in mapping.categories]
    return pl.concat_list(*lists)


def _as_list(frame: pl.DataFrame, column: str, separator: str | None) -> pl.Expr:
    if isinstance(frame.schema[column], pl.List):
        return pl.col(column).cast(pl.List(pl.String)).fill_null(pl.lit([], dtype=pl.List(pl.String)))
    text = pl.col(column).cast(pl.String).fill_null("")
    return text.str.split(separator) if separator else pl.concat_list(text)


def _event_columns(mapping: TableMapping) -> list[str]:
    single = [mapping.user_id, mapping.item_id, mapping.timestamp, mapping.value, mapping.action_column, mapping.request_id]
    single += [mapping.position, mapping.propensity, mapping.split_column]
    columns = [column for column in single if column] + list(mapping.context) + [rule.column for rule in mapping.actions]
    if not mapping.items:
        own = [mapping.title, mapping.available_from, *mapping.text, *mapping.categories]
        columns += [column for column in own if column] + [each.column for each in mapping.item_attributes]
    if not mapping.users:
        columns += [each.column for each in mapping.user_attributes] + ([mapping.user_text] if mapping.user_text else [])
    return columns


def _own_file(path: Path, name: str) -> pl.DataFrame:
    folder = path if path.is_dir() else path.parent
    return read_table(require(folder / name))


def _check_columns(frame: pl.DataFrame, columns: list[str], path: Path) -> None:
    for column in columns:
        if column not in frame.columns:
            near = difflib.get_close_matches(column, frame.columns, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise InputError(
                f"{path.name} has no column {column!r}, which [table] of tandem.toml names; {hint}It has {_visible(frame)}"
            )
    require_columns(frame, columns, path.name)


def _visible(frame: pl.DataFrame) -> list[str]:
    return [column for column in frame.columns if column != "row" and not column.startswith("__")]


def _unclaimed(attributes: tuple[Attribute, ...], schema: Mapping[str, pl.DataType]) -> tuple[Attribute, ...]:
    for attribute in attributes:
        if attribute.name in {*schema, *EVENTS, "row"}:
            raise ValueError(f"an attribute cannot be called {attribute.name!r}, that name is taken; choose another")
    return attributes


def _explain(error: ValidationError) -> str:
    # A misspelt key also makes the right one missing: the misspelling is the news.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in ("table", *first["loc"]))
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)[0]
        return f"unknown setting {place}; the nearest known one is {near!r}"
    return f"setting {place} is wrong: {first['msg'].removeprefix('Value error, ')} (it is {first['input']!r:.80})"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    parts: dict[str, type[BaseModel]] = {"actions": ActionRule, "tasks": TaskRule}
    parts |= {"item_attributes": Attribute, "user_attributes": Attribute}
    model = parts.get(str(location[0]), TableMapping) if len(location) > 1 else TableMapping
    return list(model.model_fields)

"""`tandem`: one command per recipe, and questions to the live release.

Each command prints what it made, how long it took and the next command; with `--json` the same goes to standard output, alone.
Progress and errors go to standard error. Exit codes: 0, 1 failed, 2 usage, 3 a gate or a check refused. Everything heavy is
imported inside the commands, so that `--help` costs nothing.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from tandem.service.cli_experiment import experiment
from tandem.service.command import Because, Json, Progress, failures, moment, recipe, run, settings_of, stdout_kept

if TYPE_CHECKING:
    from tandem.service.outcome import Outcome
    from tandem.service.settings import Settings

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help="A recommender a team can run."
)
features = typer.Typer(no_args_is_help=True, help="What is known about users and items, and when.")
items = typer.Typer(no_args_is_help=True, help="Single items, put and deleted while a service runs.")
users = typer.Typer(no_args_is_help=True, help="People, and their right to be forgotten.")
release = typer.Typer(no_args_is_help=True, help="Which release is live, and why.")
app.add_typer(features, name="features")
app.add_typer(release, name="release")
app.add_typer(users, name="users")
app.add_typer(experiment, name="experiment")
app.add_typer(items, name="items")

Count = Annotated[int, typer.Option("-k", "--count", min=1, help="How many items.")]
Name = Annotated[str, typer.Argument(metavar="RELEASE", help="Name of a release, as `tandem release list` shows it.")]


def main() -> NoReturn:
    """The `tandem` program."""
    app(prog_name="tandem")
    sys.exit(0)


def _version(wanted: bool) -> None:
    if wanted:
        print(version("tandem-recommender"))
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    workspace: Annotated[
        Path | None, typer.Option(help="Folder with tandem.toml and all state. Default: $TANDEM_HOME, else ./workspace.")
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    context.obj = workspace


# ---------------------------------------------------------------------------------------------------------------- events


@app.command("import")
def import_(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="movielens, goodbooks, metarank, or table (mapping in tandem.toml).")],
    path: Annotated[Path, typer.Argument(help="The file or folder as its owner publishes it.")],
    replace: Annotated[bool, typer.Option("--replace", help="Start over instead of appending.")] = False,
    as_json: Json = False,
) -> None:
    """Read raw files into the workspace; bad rows are kept aside with a reason."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service import recipes

        progress(f"import {path.name}", 0, 0)
        return recipes.import_source(settings, kind, path, replace)

    run(context, as_json, work)


@app.command()
def simulate(
    context: typer.Context,
    users: Annotated[int, typer.Option(min=1)] = 2000,
    items: Annotated[int, typer.Option(min=2)] = 1500,
    days: Annotated[int, typer.Option(min=2)] = 60,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Fill the workspace with the built-in world, replacing what it holds."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.simulate(settings, users, items, days, seed)))


# -------------------------------------------------------------------------------------------------------------- features


@features.command("apply")
def features_apply(context: typer.Context, as_json: Json = False) -> None:
    """Tell Feast what the feature views are."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.features_apply(settings)))


@features.command("build")
def features_build(context: typer.Context, as_json: Json = False) -> None:
    """Aggregate events into feature tables whose rows say when they became known."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.features_build(settings)))


@features.command("materialize")
def features_materialize(
    context: typer.Context,
    since: Annotated[datetime | None, typer.Option(help="Only rows from this time on (UTC).")] = None,
    as_json: Json = False,
) -> None:
    """Copy the newest rows to the online store, and item columns to the snapshot."""
    moment = since.replace(tzinfo=UTC) if since else None

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service import recipes

        return recipes.features_materialize(settings, moment, progress)

    run(context, as_json, work)


@features.command("push")
def features_push(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="CSV, Parquet or JSON lines: user_id, item_id, action, timestamp, …")],
    as_json: Json = False,
) -> None:
    """Take single events: kept, and in the features of their users and items at once. Each event_id counts once."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.features_push(settings, path)))


@features.command("show")
def features_show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="FEATURE")],
    entity: Annotated[str | None, typer.Option("--of", help="A user or item id. Default: those of the newest events.")] = None,
    as_json: Json = False,
) -> None:
    """One feature: its definition, and its values in training rows, online and in the snapshot."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.feature_show(settings, name, entity)))


@features.command("prune")
def features_prune(context: typer.Context, as_json: Json = False) -> None:
    """Drop older versions of views that neither the champion, the two before it nor the challenger reads."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.features_prune(settings)))


@features.command("check")
def features_check(context: typer.Context, as_json: Json = False) -> None:
    """Leakage, parity online and as served, freshness, drift: one table; exit code 3 when a check fails."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.features_check(settings)))


@items.command("put")
def items_put(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="CSV, Parquet or JSON lines with the columns of the workspace's items.")],
    as_json: Json = False,
) -> None:
    """List items, or list them as they are now."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service import recipes

        return recipes.items_put(settings, file, progress)

    run(context, as_json, work)


@items.command("delete")
def items_delete(context: typer.Context, item: Annotated[str, typer.Argument(metavar="ITEM")], as_json: Json = False) -> None:
    """Take an item out of every answer."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.items_delete(settings, item)))


@users.command("erase")
def users_erase(context: typer.Context, user_id: Annotated[str, typer.Argument(metavar="USER")], as_json: Json = False) -> None:
    """Remove a user everywhere, and prove it by asking again."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.users_erase(settings, user_id)))


# -------------------------------------------------------------------------------------------------- training, evaluation


@app.command()
def train(
    context: typer.Context,
    what: Annotated[Literal["all", "towers", "ranker"], typer.Argument()] = "all",
    as_json: Json = False,
) -> None:
    """Train towers and index, the ranker, or both."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service import recipes

        return recipes.train(settings, what, progress)

    run(context, as_json, work)


@app.command()
def evaluate(context: typer.Context, as_json: Json = False) -> None:
    """The funnel report: every stage against the same baselines, on the same requests."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service import recipes

        return recipes.evaluate(settings, progress)

    run(context, as_json, work)


@app.command()
def retrain(
    context: typer.Context,
    because: Annotated[str, typer.Option(help="What triggered it; history keeps it.")] = "new events",
    keep: Annotated[int, typer.Option(min=0, help="How many releases to keep that were not live lately.")] = 5,
    as_json: Json = False,
) -> None:
    """Build, train, evaluate, gate and promote, as far as something is new. For cron; run it again after a crash."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service import recipes

        return recipes.retrain(settings, because, keep, progress)

    run(context, as_json, work)


# -------------------------------------------------------------------------------------------------------------- releases


@release.command("create")
def release_create(
    context: typer.Context,
    name: Annotated[str | None, typer.Option(help="Default: the date and the content's hash.")] = None,
    as_json: Json = False,
) -> None:
    """Bundle what was trained and evaluated into one immutable folder."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_create(settings, name)))


@release.command("list")
def release_list(context: typer.Context, as_json: Json = False) -> None:
    """All releases, and which one is the champion."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_list(settings)))


@release.command("show")
def release_show(context: typer.Context, name: Name, as_json: Json = False) -> None:
    """One release: its facts and figures; its files are verified by hash."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_show(settings, name)))


@release.command("gate")
def release_gate(context: typer.Context, name: Name, as_json: Json = False) -> None:
    """Hold a release against the champion; exit code 3 when the gate refuses it."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_gate(settings, name)))


@release.command("promote")
def release_promote(
    context: typer.Context,
    name: Name,
    because: Because = "",
    force: Annotated[bool, typer.Option("--force", help="Against the gate; needs --because, and is recorded.")] = False,
    as_json: Json = False,
) -> None:
    """Make a release the champion, if it is whole and the gate lets it."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_promote(settings, name, because, force)))


@release.command("rollback")
def release_rollback(
    context: typer.Context,
    to: Annotated[str | None, typer.Argument(metavar="[RELEASE]", help="Default: the champion before.")] = None,
    because: Because = "",
    as_json: Json = False,
) -> None:
    """Back to the champion before, or to a named earlier one."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_rollback(settings, to, because)))


@release.command("history")
def release_history(context: typer.Context, as_json: Json = False) -> None:
    """Who made what live, when and why."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_history(settings)))


@release.command("diff")
def release_diff(
    context: typer.Context,
    before: Annotated[str, typer.Argument(metavar="A")],
    after: Annotated[str, typer.Argument(metavar="B")],
    as_json: Json = False,
) -> None:
    """What differs between two releases."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_diff(settings, before, after)))


@release.command("at")
def release_at(
    context: typer.Context,
    when: Annotated[str, typer.Argument(metavar="WHEN", help="2026-11-17T12:00+01:00, for example; without a zone it is UTC.")],
    as_json: Json = False,
) -> None:
    """What was live at a moment, on which data, who made it so and why."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_at(settings, moment(when))))


@release.command("delete")
def release_delete(context: typer.Context, name: Name, as_json: Json = False) -> None:
    """Delete a release and its folder; never the live one, nor one that a rollback may need."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_delete(settings, name)))


@release.command("prune")
def release_prune(
    context: typer.Context,
    keep: Annotated[int, typer.Option(min=0, help="How many releases to keep that were not live lately.")] = 5,
    as_json: Json = False,
) -> None:
    """Keep the champion, the two before it, the challenger and the newest others; delete the rest."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.release_prune(settings, keep)))


# ------------------------------------------------------------------------------------------------------------- questions


@app.command()
def recommend(
    context: typer.Context,
    user: Annotated[str | None, typer.Argument(help="A user id; leave it out to ask with a sentence or session alone.")] = None,
    query: Annotated[str | None, typer.Option(help="What is wanted, in words.")] = None,
    k: Count = 10,
    session: Annotated[list[str] | None, typer.Option(help="Item id of this session, oldest first; repeat it.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only items of this category; repeat it.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Item id that must not come; repeat it.")] = None,
    where: Annotated[list[str] | None, typer.Option("--context", help="device=phone, for example; repeat it.")] = None,
    as_json: Json = False,
) -> None:
    """A slate for a user, a session, a sentence, or any mix of them."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service.questions import recommend as ask

        return ask(
            settings, user, query, k, tuple(session or ()), tuple(category or ()), tuple(exclude or ()), tuple(where or ())
        )

    run(context, as_json, work)


@app.command()
def similar(context: typer.Context, item: Annotated[str, typer.Argument()], k: Count = 10, as_json: Json = False) -> None:
    """Items like one item."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service.questions import similar as ask

        return ask(settings, item, k)

    run(context, as_json, work)


@app.command()
def search(context: typer.Context, text: Annotated[str, typer.Argument()], k: Count = 10, as_json: Json = False) -> None:
    """Items for a sentence."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service.questions import recommend as ask

        return ask(settings, None, text, k)

    run(context, as_json, work)


@app.command()
def why(
    context: typer.Context,
    user: Annotated[str, typer.Argument()],
    item: Annotated[str, typer.Argument()],
    feature: Annotated[
        list[str] | None, typer.Option(help="What the ranker knew: a feature's name, or a part of it; repeat it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Which stage dropped an item for a user, or at what rank and score it passed."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service.questions import why as ask

        return ask(settings, user, item, tuple(feature or ()))

    run(context, as_json, work)


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """What the workspace holds, and what to do next."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.status(settings)))


# ---------------------------------------------------------------------------------------------------------- the two ends


@app.command()
def demo(
    context: typer.Context,
    size: Annotated[Literal["small", "medium"], typer.Option(help="Of the built-in world.")] = "small",
    kind: Annotated[str, typer.Option(help="world, or a kind that `tandem import` reads.")] = "world",
    data: Annotated[Path | None, typer.Option(help="The raw files of another kind.")] = None,
    as_json: Json = False,
) -> None:
    """The whole loop, from nothing to recommendations. Run it again: what is done is not done twice."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service.demo import run_demo

        return run_demo(settings, kind, size, data, progress)

    run(context, as_json, work)


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Beyond this machine only with API keys. Default: service.host.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: service.port.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes.")] = 1,
    as_json: Json = False,
) -> None:
    """Answer over HTTP from the champion."""
    with failures(), stdout_kept(as_json) as out:
        from tandem.service.server import run_server

        settings = settings_of(context)

        def announce(url: str, name: str) -> None:
            facts = {"url": url, "release": name, "workers": workers}
            print(json.dumps(facts) if as_json else f"serving {name} on {url} (Ctrl+C stops it)", file=out, flush=True)

        run_server(settings, host, port, workers, announce)


if __name__ == "__main__":
    main()

"""`tandem experiment`: a challenger beside the champion, unseen or for a share of the users, and what came of it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from tandem.service.command import Because, Json, recipe, run

experiment = typer.Typer(no_args_is_help=True, help="A challenger beside the champion: shadow, canary, A/B.")

Percent = Annotated[float, typer.Option(help="Share of the users, above 0 and at most 100.")]
OptionalName = Annotated[str | None, typer.Argument(metavar="[EXPERIMENT]", help="Default: the newest one.")]


@experiment.command("start")
def start(
    context: typer.Context,
    release: Annotated[str, typer.Argument(metavar="RELEASE", help="The challenger; the champion is what is live.")],
    because: Because,
    kind: Annotated[
        Literal["shadow", "canary", "ab"], typer.Option(help="Unseen, for some users, or two fixed arms to compare.")
    ] = "canary",
    percent: Annotated[float | None, typer.Option(help="Share of the users. Default: shadow 100, canary 5, ab 50.")] = None,
    name: Annotated[str | None, typer.Option(help="Places the users; used once. Default: made from release and kind.")] = None,
    as_json: Json = False,
) -> None:
    """Let a release answer beside the champion in every running service."""
    run(context, as_json, recipe(lambda own, recipes: recipes.experiment_start(own, release, kind, percent, because, name)))


@experiment.command("set")
def set_(context: typer.Context, percent: Percent, because: Because, as_json: Json = False) -> None:
    """Another share of the users; whoever is in stays in when it grows."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.experiment_set(settings, percent, because)))


@experiment.command("stop")
def stop(context: typer.Context, because: Because, as_json: Json = False) -> None:
    """End the open experiment; the champion answers everybody. To end it as won: tandem release promote."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.experiment_stop(settings, because)))


@experiment.command("list")
def list_(context: typer.Context, as_json: Json = False) -> None:
    """All experiments and how they ended."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.experiment_list(settings)))


@experiment.command("report")
def report(context: typer.Context, name: OptionalName = None, as_json: Json = False) -> None:
    """Both arms, their difference with intervals, and the split; exit code 3 when the split is broken."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.experiment_report(settings, name)))


@experiment.command("check")
def check(context: typer.Context, as_json: Json = False) -> None:
    """For cron: end the open experiment when its outcome is surely worse; exit code 3 when it did."""
    run(context, as_json, recipe(lambda settings, recipes: recipes.experiment_check(settings)))

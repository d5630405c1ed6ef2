"""The tables by migration: from nothing, from the first layout as it was written, and never over what is not ours."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect, text

from registry import migrations
from registry.release import Manifest, ReleaseFacts, create_release, verify_release
from registry.store import ReleaseStore
from registry.tables import TABLES_VERSION, Base
from tandem.core.errors import IncompatibleError, InputError

FIRST = """
CREATE TABLE releases (name VARCHAR(64) NOT NULL, content_hash VARCHAR(64) NOT NULL, folder TEXT NOT NULL,
    manifest JSON NOT NULL, created_at {moment} NOT NULL, model_version VARCHAR(64), deleted_at {moment}, PRIMARY KEY (name));
CREATE TABLE tandem_tables (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE champion (id INTEGER NOT NULL, name VARCHAR(64), version INTEGER NOT NULL, since {moment}, PRIMARY KEY (id),
    CONSTRAINT champion_is_one_row CHECK (id = 1), FOREIGN KEY(name) REFERENCES releases (name));
CREATE TABLE gates (number {serial} NOT NULL, challenger VARCHAR(64) NOT NULL, champion VARCHAR(64), passed BOOLEAN NOT NULL,
    verdict JSON NOT NULL, judged_at {moment} NOT NULL, PRIMARY KEY (number),
    FOREIGN KEY(challenger) REFERENCES releases (name), FOREIGN KEY(champion) REFERENCES releases (name));
CREATE INDEX ix_gates_challenger ON gates (challenger);
CREATE TABLE promotions (version INTEGER NOT NULL, kind VARCHAR(16) NOT NULL, previous VARCHAR(64), name VARCHAR(64) NOT NULL,
    who VARCHAR(256) NOT NULL, why TEXT NOT NULL, at {moment} NOT NULL, gate INTEGER, PRIMARY KEY (version),
    FOREIGN KEY(previous) REFERENCES releases (name), FOREIGN KEY(name) REFERENCES releases (name),
    FOREIGN KEY(gate) REFERENCES gates (number));
INSERT INTO tandem_tables VALUES (1);
INSERT INTO champion (id, version) VALUES (1, 0)
"""
"""What Tandem made before there were migrations, as SQLAlchemy wrote it; {moment} and {serial} differ between the databases."""

AT = "2026-11-20 12:00:00.000000"
FACTS = ReleaseFacts(created_at=datetime(2026, 11, 20, tzinfo=UTC))


@pytest.fixture
def engine(database: str, tmp_path: Path) -> Iterator[Engine]:
    (tmp_path / "state").mkdir(exist_ok=True)
    engine = create_engine(database)
    yield engine
    engine.dispose()


def first_layout(engine: Engine, *folders: Path) -> None:
    """The first layout with a release in each folder; the first one is live."""
    postgres = engine.dialect.name == "postgresql"
    moment, serial = ("TIMESTAMP WITH TIME ZONE", "SERIAL") if postgres else ("DATETIME", "INTEGER")
    with engine.begin() as connection:
        for statement in FIRST.format(moment=moment, serial=serial).split(";"):
            connection.execute(text(statement))
        for folder in folders:
            whole = folder.is_dir()
            manifest = verify_release(folder) if whole else Manifest(1, folder.name, "c", {}, {}, {}, {}, {}, {}, {}, {}, {})
            values = {"n": folder.name, "h": manifest.content_hash, "f": str(folder), "m": json.dumps(manifest.to_dict())}
            connection.execute(text(f"INSERT INTO releases VALUES (:n, :h, :f, :m, '{AT}', '7', NULL)"), values)
        name = {"n": folders[0].name}
        connection.execute(text(f"INSERT INTO gates VALUES (1, :n, NULL, true, '{{}}', '{AT}')"), name)
        connection.execute(text(f"INSERT INTO promotions VALUES (1, 'promote', NULL, :n, 'ada', 'first', '{AT}', 1)"), name)
        connection.execute(text(f"UPDATE champion SET name = :n, version = 1, since = '{AT}'"), name)


def make(folder: Path) -> Path:
    """A real release in `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder.parent.parent / "popular.json").write_text(f'["{folder.name}"]')
    create_release({"popular.json": folder.parent.parent / "popular.json"}, folder, FACTS)
    return folder


def kept(engine: Engine) -> dict[str, str]:
    """Folders as they stand in the table."""
    with engine.connect() as connection:
        return {row.name: row.folder for row in connection.execute(text("SELECT name, folder FROM releases"))}


def differences(engine: Engine) -> list[object]:
    """What the database's tables and the code's do not agree on."""
    ours = {*Base.metadata.tables, migrations.BOOKS}
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "version_table": migrations.BOOKS})
        assert set(inspect(connection).get_table_names()) == ours
        return list(compare_metadata(context, Base.metadata))


def test_migrations_end_at_the_version_that_the_code_knows() -> None:
    steps = ScriptDirectory(Path(migrations.__file__).parent)
    assert steps.get_current_head() == f"{TABLES_VERSION:04d}"
    assert [step.revision for step in steps.walk_revisions()] == [f"{number:04d}" for number in range(TABLES_VERSION, 0, -1)]


def test_migrations_are_in_the_package() -> None:
    root = Path(__file__).resolve().parents[3]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(root) for path in (root / "registry").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == {name for name in listed if name.split(".")[0] == "registry"}


def test_a_fresh_database_has_the_tables_of_the_code(database: str, engine: Engine) -> None:
    ReleaseStore(database).close()
    assert differences(engine) == []
    ReleaseStore(database).close()


def test_the_first_layout_is_upgraded_in_place_and_nothing_is_lost(database: str, engine: Engine, tmp_path: Path) -> None:
    first_layout(engine, make(tmp_path / "ws" / "releases" / "a"), make(tmp_path / "elsewhere" / "b"))
    store = ReleaseStore(database, tmp_path / "ws" / "releases")
    assert differences(engine) == []
    assert kept(engine) == {"a": "a", "b": str(tmp_path / "elsewhere" / "b")}
    assert store.champion().name == "a"
    (line,) = store.history()
    assert (line.who, line.why, line.at, line.gate) == ("ada", "first", datetime(2026, 11, 20, 12, tzinfo=UTC), 1)
    assert (store.get("a").folder, store.get("a").model_version) == (tmp_path / "ws" / "releases" / "a", "7")
    assert store.promote("b", expected="a", who="ada", why="still works").version == 2
    store.close()


def test_tables_from_before_experiments_get_them_and_keep_their_history(database: str, engine: Engine, tmp_path: Path) -> None:
    store = ReleaseStore(database, tmp_path / "ws" / "releases")
    for name in ("a", "b"):
        folder = make(tmp_path / "ws" / "releases" / name)
        store.add(verify_release(folder), folder)
    store.promote("a", expected=None, who="ada", why="first")
    store.close()
    with engine.begin() as connection:
        for name in ("traffic", "rollout", "experiment_changes", "rollout_experiments"):
            connection.execute(text(f"DROP TABLE {name}"))
        connection.execute(text("UPDATE tandem_tables SET version = 2"))
        connection.execute(text(f"UPDATE {migrations.BOOKS} SET version_num = '0002'"))
    store = ReleaseStore(database, tmp_path / "ws" / "releases")
    assert differences(engine) == []
    assert [(line.name, line.who) for line in store.history()] == [("a", "ada")]
    with store.work() as work:
        assert work.experiments.open() is None
        assert work.start_experiment("b", "shadow", 100, who="ada", why="a look").number == 1
        work.commit()
    store.close()


def test_a_workspace_that_was_moved_before_the_upgrade_is_found_again(database: str, engine: Engine, tmp_path: Path) -> None:
    old, new = tmp_path / "old" / "releases", tmp_path / "new" / "releases"
    first_layout(engine, make(old / "a"), make(old / "b"), old / "gone")
    (tmp_path / "old").rename(tmp_path / "new")
    make(tmp_path / "other" / "releases" / "x").rename(new / "gone")
    store = ReleaseStore(database, new)
    assert kept(engine) == {"a": "a", "b": "b", "gone": str(old / "gone")}, "other content is another release"
    assert verify_release(store.get("a").folder, store.get("a").content_hash).name == "a"
    store.close()


def test_a_copied_workspace_uses_its_own_copy_after_the_upgrade(database: str, engine: Engine, tmp_path: Path) -> None:
    first_layout(engine, make(tmp_path / "old" / "releases" / "a"))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    store = ReleaseStore(database, tmp_path / "new" / "releases")
    assert store.get("a").folder == tmp_path / "new" / "releases" / "a"
    store.close()


def test_a_moved_workspace_keeps_its_releases(database: str, tmp_path: Path) -> None:
    store = ReleaseStore(database, tmp_path / "old" / "releases")
    inside, outside = make(tmp_path / "old" / "releases" / "a"), make(tmp_path / "share" / "b")
    for folder in (inside, outside):
        assert store.add(verify_release(folder), folder).folder == folder
    store.close()
    (tmp_path / "old").rename(tmp_path / "new")
    store = ReleaseStore(database, tmp_path / "new" / "releases")
    assert [release.folder for release in store.list()] == [tmp_path / "new" / "releases" / "a", outside]
    store.close()
    store = ReleaseStore(database)
    with pytest.raises(InputError, match="'a' is kept relative"):
        store.get("a")
    store.close()


def test_many_that_open_an_old_database_upgrade_it_once(database: str, engine: Engine, tmp_path: Path) -> None:
    first_layout(engine, make(tmp_path / "ws" / "releases" / "a"))

    def champion(_: int) -> str | None:
        store = ReleaseStore(database, tmp_path / "ws" / "releases")
        try:
            return store.champion().name
        finally:
            store.close()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(champion, range(8))) == ["a"] * 8
    assert differences(engine) == []


@pytest.mark.parametrize(
    ("version", "way_out"),
    [(TABLES_VERSION + 1, "pip install --upgrade tandem-recommender"), (0, "pip install 'tandem-recommender<0.2'")],
)
def test_tables_of_an_unknown_version_are_refused_with_the_way_out(
    database: str, engine: Engine, tmp_path: Path, version: int, way_out: str
) -> None:
    first_layout(engine, make(tmp_path / "ws" / "releases" / "a"))
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE tandem_tables SET version = {version}"))
    with pytest.raises(IncompatibleError, match=f"have version {version}, this Tandem needs {TABLES_VERSION}; .*{way_out}"):
        ReleaseStore(database, tmp_path / "ws" / "releases")
    assert kept(engine) == {"a": str(tmp_path / "ws" / "releases" / "a")}
    assert not inspect(engine).has_table(migrations.BOOKS)


def test_tables_of_others_are_left_alone(database: str, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE releases (album INTEGER)"))
    with pytest.raises(IncompatibleError, match=r"a table 'releases' that is not Tandem's; name an empty database"):
        ReleaseStore(database)
    assert inspect(engine).get_table_names() == ["releases"]


def test_alembics_books_of_others_do_not_matter(database: str, engine: Engine) -> None:
    """MLflow keeps its own `alembic_version` where both share a database."""
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('f0f0f0')"))
    store = ReleaseStore(database)
    assert store.champion().version == 0
    store.close()
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "f0f0f0"

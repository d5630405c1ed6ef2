"""The pages do not lie: their commands, options, paths, programs, codes and metrics are the real ones."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from typer.testing import CliRunner

from registry.watch import RolloutConfig
from tandem.service import app as http
from tandem.service import demo, problems
from tandem.service.cli import app
from tandem.service.schemas import RecommendBody
from tandem.service.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docker/*.md"))
)
COMMAND_LINE = typer.main.get_command(app)


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "") -> list[str]:
    """Code blocks of a page in one language ("" for those without one)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)
    return [block for named, block in found if named == language]


def commands(page: str) -> list[list[str]]:
    """Every `tandem …` line of a page's blocks, as words."""
    lines = [line for block in blocks(page) + blocks(page, "sh") for line in block.splitlines()]
    found = [re.search(r"^(?:.*/)?tandem ([a-z-].*)", line) for line in lines if not set(line) & set("─►═")]
    return [shlex.split(match[1], comments=True) for match in found if match]


def parses(words: list[str]) -> bool:
    """Does the command line take these words? Nothing is run."""
    context = COMMAND_LINE.make_context("tandem", list(words))
    command: Any = COMMAND_LINE
    while hasattr(command, "commands"):
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, rest, parent=context)
    return command is not COMMAND_LINE


def test_the_readme_shows_the_whole_way() -> None:
    shown = {words[0] for words in commands("README.md")}
    assert {"import", "features", "train", "evaluate", "release", "recommend", "why", "serve", "search"} <= shown


@pytest.mark.parametrize(("page", "words"), [(page, words) for page in PAGES for words in commands(page)])
def test_commands_on_pages_parse(page: str, words: list[str]) -> None:
    assert parses(words), page


@pytest.mark.parametrize("words", [["recomend", "u1"], ["recommend", "--querry", "x"], ["release", "create", "a", "b"]])
def test_a_wrong_command_would_be_noticed(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such|unexpected|Unexpected|Got"):
        parses(words)


def test_cheap_commands_of_the_readme_run(tiny_workspace: Path) -> None:
    for words in (words for words in commands("README.md") if words[0] in ("recommend", "search")):
        result = CliRunner().invoke(app, ["--workspace", str(tiny_workspace), *words, "--json"])
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["items"]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", text(page)) if "://" not in link]
    named = [path for path in re.findall(r"`([\w./-]+\.(?:py|md|toml|yaml|html))`", text(page)) if "/" in path]
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    missing += [path for path in named if not (ROOT / path).exists() and not list(ROOT.glob(f"*/{path}"))]
    assert missing == []


@cache
def modules() -> dict[str, str]:
    """Source of our modules, by name; modules of one name follow each other."""
    found: dict[str, str] = {}
    for package in ("tandem", "feature_repo", "retrieval", "ranking", "registry"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found[path.stem] = found.get(path.stem, "") + path.read_text()
    return found


def test_the_architecture_names_real_files() -> None:
    files = {f"{name}.py" for name in modules()} | {"page.html"}
    assert [name for name in re.findall(r"\w+\.(?:py|html)\b", text("docs/architecture.md")) if name not in files] == []


def test_the_architecture_names_real_functions() -> None:
    """`module.function` and `Class.method`; what ends like a file is one."""
    page, sources = text("docs/architecture.md"), modules()
    named = [
        (owner, name)
        for owner, name in re.findall(r"\b(\w+)\.([a-z]\w+)\b", page)
        if name not in ("py", "html", "db", "json", "md")
    ]
    functions = [(owner, name) for owner, name in named if owner in sources]
    methods = [(owner, name) for owner, name in named if owner[0].isupper()]
    assert len(functions) >= 15
    assert len(methods) >= 5
    missing = [f"{owner}.{name}" for owner, name in functions if not re.search(rf"(def|class) {name}\b", sources[owner])]
    everything = "\n".join(sources.values())
    missing += [
        f"{owner}.{name}" for owner, name in methods if f"class {owner}" not in everything or f"def {name}(" not in everything
    ]
    assert missing == []


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z-]+)", text(page), re.MULTILINE)}
    assert {"demo", "test", "lint", "accept", "bench"} <= named <= targets
    assert "make test" in text(".ci/run")


def test_problem_codes_on_the_page_are_the_real_ones() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| (.*?) \|", text("docs/architecture.md"), re.MULTILINE)
    shown = {code for _, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    kinds = [each for each in vars(problems).values() if isinstance(each, problems.Kind)]
    kinds += [kind for _, kind in problems._TREE] + list(problems._STATUSES.values())
    assert shown == {kind.code for kind in kinds}


def test_metrics_on_the_page_are_the_real_ones() -> None:
    families = re.findall(r"^# TYPE (\w+) ", generate_latest(http.Metrics().registry).decode(), re.MULTILINE)
    shown = re.findall(r"`(tandem_\w+)`", text("docs/architecture.md"))
    assert set(shown) == {name for name in families if not name.endswith("_created")}


def test_the_curl_of_the_readme_is_answered(tiny_workspace: Path) -> None:
    (line,) = [line for block in blocks("README.md") for line in block.splitlines() if line.startswith("curl")]
    words = shlex.split(line)
    settings = load_settings(tiny_workspace, {})
    assert f"http://{settings.service.host}:{settings.service.port}/v1/recommend" in words
    body = words[words.index("-d") + 1]
    assert RecommendBody.model_validate_json(body).k == 5
    with TestClient(http.create_app(settings), f"http://{settings.service.host}") as client:
        answer = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    assert len(answer.json()["items"]) == 5


def test_the_program_of_the_readme_runs(tiny_workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks("README.md", "python")
    (folder,) = [path for path in (tiny_workspace / "releases").iterdir() if not path.name.startswith(".")]
    changed = re.sub(r'Path\("[^"]+"\)', f"Path({str(folder)!r})", program)
    assert changed != program
    exec(compile(changed, "README.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3", "4", "5"]


def test_settings_on_the_page_are_read(tmp_path: Path) -> None:
    (section,) = [block for block in blocks("README.md") if block.startswith("[service]")]
    (tmp_path / "tandem.toml").write_text(section)
    settings = load_settings(tmp_path, {})
    assert list(settings.service.keys) == tomllib.loads(section)["service"]["keys"]
    http.check_keys(settings)


def test_the_roll_out_settings_on_the_page_are_the_defaults(tmp_path: Path) -> None:
    (section,) = [block for block in blocks("docs/registry.md", "toml") if block.startswith("[rollout]")]
    (tmp_path / "tandem.toml").write_text(section)
    assert load_settings(tmp_path, {}).rollout == RolloutConfig()
    assert set(tomllib.loads(section)["rollout"]) == {each.name for each in fields(RolloutConfig)}


def test_the_demo_names_the_world_that_the_readme_asks() -> None:
    users, _, _ = demo.SIZES["small"]
    named = {words[1] for words in commands("README.md") if words[0] == "recommend" and words[1].startswith("u")}
    assert named == {f"u{1:0{len(str(users))}d}"}


def test_constraints_hold_every_dependency_of_the_project() -> None:
    held = {
        re.split(r"[=\[]", line)[0].lower().replace("_", "-") for line in text("constraints.txt").splitlines() if "==" in line
    }
    project = tomllib.loads(text("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"], *extras["dev"], *extras["redis"], *extras["postgres"]]
    names = {re.split(r"[<>=\[ ;]", each)[0].lower().replace("_", "-") for each in wanted}
    assert names - held == set()
    assert "torch==2.13.0\n" in text("constraints.txt")

"""The container files agree with each other and with the project: every path, extra, port, option and setting in them exists."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import make_url

from tandem.service.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"


@cache
def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return parsed


@cache
def dockerfile() -> list[tuple[str, str]]:
    """[(instruction, rest)] in order, comments and line continuations resolved."""
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in lines]


def of(instruction: str) -> list[str]:
    return [rest for name, rest in dockerfile() if name == instruction]


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def environment() -> dict[str, str]:
    found: dict[str, str] = services()["service"]["environment"]
    return found


def test_the_four_services_are_there_and_start_in_order() -> None:
    assert set(services()) == {"service", "mlflow", "postgres", "redis"}
    for service in services().values():
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services()[needed]


def test_volumes_are_declared_and_mounted_files_exist() -> None:
    used = set()
    for service in services().values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).is_file()
            else:
                used.add(source)
    assert used == set(compose()["volumes"])


def test_the_build_finds_its_files() -> None:
    for name in ("service", "mlflow"):
        build = services()[name]["build"]
        context = (DOCKER / build["context"]).resolve()
        assert context == ROOT
        assert (context / build["dockerfile"]).is_file()


def copied() -> list[str]:
    copies = [shlex.split(rest) for rest in of("COPY")]
    return [source for parts in copies if not parts[0].startswith("--from") for source in parts[:-1]]


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    kept = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied()) == kept
    assert [source for source in copied() if not (ROOT / source).exists()] == []


def test_every_package_and_file_that_the_project_names_is_copied() -> None:
    packages = {name.split(".")[0] for name in project()["tool"]["setuptools"]["packages"]}
    named = {project()["project"]["readme"], *project()["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert packages | named <= set(copied())


def test_extras_exist_and_versions_are_held() -> None:
    (install,) = [rest for rest in of("RUN") if "pip install" in rest]
    found = re.search(r'"\.\[([a-z,]+)\]"', install)
    assert found is not None
    extras = set(found.group(1).split(","))
    assert extras <= set(project()["project"]["optional-dependencies"])
    assert {"cpu", "postgres", "redis"} <= extras
    assert "--constraint constraints.txt" in install


def test_python_is_the_one_the_project_asks_for() -> None:
    versions = {re.match(r"python:(\d+\.\d+)-", image).group(1) for image in of("FROM")}  # type: ignore[union-attr]
    assert versions == {"3.11"}
    assert project()["project"]["requires-python"].startswith(">=3.11")


def test_the_image_runs_without_rights_and_gets_its_signals() -> None:
    assert of("USER")[-1] == "tandem"
    assert [json.loads(rest) for rest in of("ENTRYPOINT")] == [["tandem"]]
    assert json.loads(of("CMD")[0]) == services()["service"]["command"]
    for name in ("service", "mlflow"):
        assert services()[name]["cap_drop"] == ["ALL"]


def option(command: list[str], name: str) -> str:
    """The value of `--name value` or `--name=value`."""
    joined = [part for one in command for part in one.split("=", 1)]
    return joined[joined.index(name) + 1]


@pytest.mark.parametrize("name", ["service", "mlflow"])
def test_ports_agree_and_are_published_to_this_machine_only(name: str) -> None:
    command = services()[name]["command"]
    (published,) = services()[name]["ports"]
    host, outside, inside = published.split(":")
    assert host == "127.0.0.1"
    assert outside == inside == option(command, "--port")
    assert option(command, "--host") == "0.0.0.0"
    assert f"127.0.0.1:{inside}/" in services()[name]["healthcheck"]["test"][-1]
    assert f"port {outside}" in (DOCKER / "README.md").read_text()
    if name == "service":
        assert of("EXPOSE") == [inside]


def test_databases_and_stores_are_not_published() -> None:
    assert "ports" not in services()["postgres"]
    assert "ports" not in services()["redis"]


def test_no_password_is_written_down() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    assert set(re.findall(r"tandem:(\S+?)@", text.replace(" ", "_"))) == {"${POSTGRES_PASSWORD:?put_it_into_docker/.env}"}
    assert services()["postgres"]["environment"]["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")


def filled(value: str) -> str:
    """A value as compose hands it on, with `secret` for what stands in docker/.env."""
    return re.sub(r"\$\{[^}]*\}", "secret", value)


def resolved(address: str) -> Any:
    return make_url(filled(address))


def test_addresses_name_services_and_databases_that_exist() -> None:
    registry = resolved(environment()["TANDEM_REGISTRY__URL"])
    backend = resolved(option(services()["mlflow"]["command"], "--backend-store-uri"))
    postgres = services()["postgres"]["environment"]
    made = {postgres["POSTGRES_DB"], *re.findall(r"CREATE DATABASE (\w+);", (DOCKER / "postgres-init.sql").read_text())}
    assert {registry.database, backend.database} == made
    for address in (registry, backend):
        assert address.drivername == "postgresql+psycopg"
        assert (address.host, address.port, address.username) == ("postgres", 5432, postgres["POSTGRES_USER"])
    tracking = resolved(environment()["TANDEM_REGISTRY__MLFLOW_URI"])
    assert (tracking.host, str(tracking.port)) == ("mlflow", option(services()["mlflow"]["command"], "--port"))


def test_mlflow_server_knows_its_options_and_lets_the_service_in() -> None:
    from mlflow.cli import cli

    command = services()["mlflow"]["command"]
    known = {name for parameter in cli.commands[command[0]].params for name in parameter.opts}
    assert {part.split("=")[0] for part in command[1:]} <= known
    tracking = resolved(environment()["TANDEM_REGISTRY__MLFLOW_URI"])
    assert f"{tracking.host}:{tracking.port}" in option(command, "--allowed-hosts").split(",")


def test_mlflow_knows_its_environment() -> None:
    from mlflow import environment_variables

    for name in services()["mlflow"]["environment"]:
        assert hasattr(environment_variables, name)


def needs(module: str) -> Any:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")
    return importlib.import_module(module)


def test_tandem_knows_the_command_and_its_options() -> None:
    import typer

    app = needs("tandem.service.cli").app
    command, *rest = services()["service"]["command"]
    serve = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    known = {name for parameter in serve.params for name in parameter.opts}
    assert {part for part in rest if part.startswith("--")} <= known


def test_settings_take_the_environment(tmp_path: Path) -> None:
    given = {name: filled(value) for name, value in environment().items()}
    assert load_settings(None, {"TANDEM_HOME": given["TANDEM_HOME"]}).workspace == Path(of("VOLUME")[0].strip('["]'))
    settings = load_settings(tmp_path, given)
    assert settings.registry_url == given["TANDEM_REGISTRY__URL"]
    assert settings.mlflow_uri == given["TANDEM_REGISTRY__MLFLOW_URI"]
    assert settings.service.keys == ("secret",)
    assert settings.online.section(tmp_path)["connection_string"] == "redis:6379,db=0"
    assert set(given) == {
        "TANDEM_HOME", "TANDEM_ONLINE__URL", "TANDEM_REGISTRY__URL", "TANDEM_REGISTRY__MLFLOW_URI", "TANDEM_SERVICE__KEYS",
    }  # fmt: skip


def test_what_the_reader_is_told_to_put_into_the_env_file_is_what_compose_asks_for() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (DOCKER / "compose.yaml").read_text()))
    told = set(re.findall(r'echo "(\w+)=', (DOCKER / "README.md").read_text()))
    assert asked == told == {"POSTGRES_PASSWORD", "TANDEM_KEY_SHA256"}


def test_the_health_check_asks_for_a_route_that_is_there() -> None:
    needs("tandem.service.app")
    found = re.search(r"8100(/[a-z0-9/]+)", services()["service"]["healthcheck"]["test"][-1])
    assert found is not None
    source = (ROOT / "tandem" / "service" / "app.py").read_text()
    assert found.group(1).rpartition("/")[2] in source

"""Settings: defaults, the file, the environment, and what is refused."""

from pathlib import Path

import pytest

from registry.gates import Gate
from registry.guardrails import Guardrail
from registry.policy import MetricGate
from tandem.core.errors import InputError
from tandem.service.settings import load_settings, write_default


def _with(folder: Path, text: str) -> Path:
    (folder / "tandem.toml").write_text(text)
    return folder


def test_defaults_without_a_file(tmp_path: Path) -> None:
    settings = load_settings(tmp_path, {})
    assert settings.workspace == tmp_path
    assert settings.registry_url == f"sqlite:///{tmp_path}/state/tandem.db"
    assert settings.encoder.model == "minilm"


def test_the_default_file_changes_nothing_and_is_never_overwritten(tmp_path: Path) -> None:
    plain = load_settings(tmp_path, {})
    path = write_default(tmp_path)
    assert load_settings(tmp_path, {}) == plain
    path.write_text("[towers]\nepochs = 3\n")
    write_default(tmp_path)
    assert load_settings(tmp_path, {}).towers.epochs == 3


def test_file_then_environment(tmp_path: Path) -> None:
    _with(tmp_path, "[towers]\nepochs = 3\nridge = 100\n[service]\nkeys = ['ab']\n[ranker]\nutility = {click = 1.0}\n")
    settings = load_settings(tmp_path, {"TANDEM_TOWERS__EPOCHS": "5", "TANDEM_ENCODER__MODEL": "some/model", "TANDEM_HOME": "/x"})
    assert (settings.towers.epochs, settings.towers.ridge) == (5, 100.0)
    assert settings.service.keys == ("ab",)
    assert settings.encoder.model == "some/model"
    assert settings.ranker.utility == {"click": 1.0}


def test_home_comes_from_the_environment(tmp_path: Path) -> None:
    assert load_settings(None, {"TANDEM_HOME": str(tmp_path)}).workspace == tmp_path


GATES = """
[gates]
level = 0.9

[gates.metrics]
"ndcg@10" = { margin = 0, kind = "superiority", slices = { cold_user = 1 } }

[gates.metrics."recall@100"]
margin = 0.02

[gates.guardrails]
"task/*/ece" = { at_most = 1, may_rise = 0.5 }
"""


def test_gates_are_declared_in_tables(tmp_path: Path) -> None:
    gates = load_settings(_with(tmp_path, GATES), {}).gates
    assert (gates.level, gates.resamples) == (0.9, 2000)
    assert gates.gates() == (
        Gate("ndcg@10", 0.0, "superiority", 30),
        Gate("ndcg@10", 1.0, "superiority", 30, "cold_user"),
        Gate("recall@100", 0.02, "non_inferiority", 30),
    )
    assert gates.guardrails == {"task/*/ece": Guardrail(at_most=1.0, may_rise=0.5)}


def test_gates_come_from_the_environment_too(tmp_path: Path) -> None:
    settings = load_settings(tmp_path, {"TANDEM_GATES__METRICS": '{ "m" = { margin = 0.5 } }', "TANDEM_GATES__SEED": "7"})
    assert (settings.gates.metrics, settings.gates.seed) == ({"m": MetricGate(margin=0.5)}, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[towers]\nepocs = 3", "unknown key in \\[towers\\] 'epocs'; did you mean 'epochs'"),
        ("[tower]\nepochs = 3", "unknown section 'tower'; did you mean 'towers'"),
        ("[towers]\nepochs = 'three'", "towers.epochs = 'three' is str; it must be int"),
        ("[towers]\nepochs = true", "towers.epochs = True is bool; it must be int"),
        ("[ranker]\ntrunk = 'deep'", "ranker.trunk = 'deep' is not one of"),
        ("towers = 3", "\\[towers\\] is 3; write it as a section"),
        ("[towers", "not valid TOML"),
        ("[gates]\nresample = 5", "unknown key in \\[gates\\] 'resample'; did you mean 'resamples'"),
        ("[gates.metrics]\nm = 0.01", "gates.metrics.m = 0.01 is no table; write { … } with any of .* margin"),
        ("[gates.metrics]\nm = { marge = 1 }", "unknown key in \\[gates.metrics.m\\] 'marge'; did you mean 'margin'"),
        ("[gates.metrics]\nm = { kind = 'better' }", "gates.metrics.m.kind = 'better' is not one of"),
        ("[gates.metrics]\nm = { slices = ['cold_user'] }", "gates.metrics.m.slices = \\['cold_user'\\] is list"),
        ("[gates.metrics]\nm = { margin = -1 }", "gate on m: margin -1.0 must be 0 or more"),
        ("[gates.guardrails]\nbytes = {}", "a guardrail needs a limit"),
        ("[index]\nkind = 'auto'\ntarget_recall = 2.0", "target_recall"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_settings(_with(tmp_path, text), {})

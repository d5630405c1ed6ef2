"""One typed settings object, read once from `tandem.toml` and the environment.

Each section is the config of the component it is named after, so that a default lives beside the code it steers. Unknown keys are
refused with the nearest known name. `TANDEM_<SECTION>__<KEY>=value` in the environment wins over the file.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from feature_repo.aggregates import AggregateConfig
from feature_repo.checks import FreshnessLimits
from feature_repo.live import EventLimits
from feature_repo.online_config import OnlineConfig
from feature_repo.shift import DriftLimits
from registry.policy import GateConfig
from registry.watch import RolloutConfig
from retrieval.candidates import CandidateConfig
from retrieval.index import IndexConfig
from retrieval.tuning_config import TuningConfig
from tandem.core.errors import InputError
from tandem.core.folders import write_text
from tandem.core.schema import Split

FILE: Final = "tandem.toml"
ENVIRONMENT: Final = "TANDEM_"
HOME: Final = "TANDEM_HOME"


@dataclass(frozen=True)
class SplitSettings:
    """How events are split for training and evaluation; `kind` None takes the source's own."""

    kind: Split | None = None
    seed: int = 0
    fold_in: float = 0.8
    requests_per_user: int = 4


@dataclass(frozen=True)
class EncoderSettings:
    """Which text encoder: "minilm" (shipped, offline), a Hugging Face name, or a folder; the rest as `TextEncoder` has it.

    `words`: how many numbers say which words a text holds, beside what the encoder says of it (`retrieval.words`); 0 for none.
    `pooling` "" is the model's own, `dimension` 0 all of it. Items are read behind `prefix`, sentences behind `query_prefix`.
    """

    model: str = "minilm"
    dtype: str = "auto"
    max_tokens: int = 64
    device: str = "cpu"
    pooling: str = ""
    dimension: int = 0
    prefix: str = ""
    query_prefix: str = ""
    words: int = 128


@dataclass(frozen=True)
class TowerSettings:
    """What may be turned about the towers; the rest of `retrieval.train.TowerConfig` keeps its measured defaults."""

    dimension: int = 192
    epochs: int = 10
    patience: int = 2
    ridge: float = 300.0
    horizon: int = 50
    sequence_rounds: int = 15
    seed: int = 0


@dataclass(frozen=True)
class RankerSettings:
    """How the ranker is trained: trunk, rounds and their size, requests learned from, and what a slate is worth by task."""

    trunk: Literal["shared", "mmoe"] = "shared"
    rounds: int = 20
    requests: int = 6000
    rows_per_round: int = 150_000
    candidates: int = 200
    seed: int = 0
    utility: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSettings:
    """At most how many test requests the funnel report is made on; resamples of its intervals."""

    requests: int = 5000
    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class RerankSettings:
    """`diversity` 0 keeps the order of scores, 1 looks at categories only; `epsilon` explores one slot."""

    diversity: float = 0.05
    epsilon: float = 0.0
    slot: int = 9


@dataclass(frozen=True)
class ServiceSettings:
    """The HTTP service. `keys` are SHA-256 hashes (hex) of API keys; none is allowed on a loopback address only.

    `clock`: what time it is for features and requests, see `clock.py`. `follow_seconds`: how often a running service looks for
    another champion; 0 keeps the release that it started with. `budget_ms`: then a slate skips what it can and says so.
    `rate`: requests per caller, like "100/second", counted per process or in the Redis of `rate_store`. `max_in_flight`: requests
    at once, 0 takes all.
    """

    host: str = "127.0.0.1"
    port: int = 8100
    budget_ms: int = 1000
    rate: str = ""
    rate_store: str = ""
    max_in_flight: int = 200
    max_k: int = 1000
    max_body_bytes: int = 65_536
    keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ("*",)
    sentence_weight: float = 3.0
    clock: Literal["auto", "now", "data"] = "auto"
    follow_seconds: float = 2.0


@dataclass(frozen=True)
class CheckSettings:
    """When features are too old, and when they have moved too far."""

    freshness: FreshnessLimits = field(default_factory=FreshnessLimits)
    drift: DriftLimits = field(default_factory=DriftLimits)


@dataclass(frozen=True)
class RegistrySettings:
    """Where releases and runs are recorded; empty means SQLite files in the workspace's `state/`.

    `artifacts`: where releases are copied to for other machines, any fsspec URL; empty means they stay in `releases/`.
    """

    url: str = ""
    artifacts: str = ""
    mlflow_uri: str = ""
    experiment: str = "tandem"
    model: str = "tandem"


@dataclass(frozen=True)
class Settings:
    """Everything a workspace is set up with. Paths hang below `workspace`."""

    workspace: Path
    features: AggregateConfig = field(default_factory=lambda: AggregateConfig(history_length=100))
    online: OnlineConfig = field(default_factory=OnlineConfig)
    events: EventLimits = field(default_factory=EventLimits)
    checks: CheckSettings = field(default_factory=CheckSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    towers: TowerSettings = field(default_factory=TowerSettings)
    index: IndexConfig = field(default_factory=IndexConfig)
    candidates: CandidateConfig = field(default_factory=CandidateConfig)
    ranker: RankerSettings = field(default_factory=RankerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    rerank: RerankSettings = field(default_factory=RerankSettings)
    service: ServiceSettings = field(default_factory=ServiceSettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    gates: GateConfig = field(default_factory=GateConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    table: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return self.workspace / "data"

    @property
    def feature_tables(self) -> Path:
        return self.workspace / "features"

    @property
    def state(self) -> Path:
        return self.workspace / "state"

    @property
    def models(self) -> Path:
        return self.workspace / "models"

    @property
    def releases(self) -> Path:
        return self.workspace / "releases"

    @property
    def registry_url(self) -> str:
        return self.registry.url or f"sqlite:///{self.state / 'tandem.db'}"

    @property
    def knows_releases(self) -> bool:
        """May there be releases? Without asking a database that nobody has made yet."""
        return bool(self.registry.url) or (self.state / "tandem.db").exists()

    @property
    def mlflow_uri(self) -> str:
        return self.registry.mlflow_uri or f"sqlite:///{self.state / 'mlflow.db'}"


def load_settings(workspace: Path | None = None, environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings of `workspace`, else of $TANDEM_HOME, else of ./workspace. InputError names a bad key and the nearest one."""
    home = (workspace or Path(environment.get(HOME) or "workspace")).resolve()
    path = home / FILE
    raw = _read_toml(path) if path.is_file() else {}
    for section, key, value in _from_environment(environment):
        raw.setdefault(section, {})[key] = value
    return _settings(home, raw)


def write_default(workspace: Path) -> Path:
    """A commented `tandem.toml` for a new workspace; an existing one is left alone."""
    path = workspace / FILE
    if not path.exists():
        write_text(path, DEFAULT)
    return path


DEFAULT: Final = """\
# Tandem workspace settings. Every key has a default; unknown keys are refused.
# `tandem status` prints where everything lies. Sections: features online events checks split encoder tuning towers index
# candidates ranker evaluation rerank service registry gates rollout table

[online]
# url = "redis://localhost:6379/0"   # or postgresql://…; empty: a SQLite file of this workspace
# registry = "postgresql://…"         # where Feast keeps its definitions; empty: a SQLite file, too

[events]
# per_user_per_day = 5000       # how many single events of one user are taken; 0: all

[checks]
# freshness = { fresh_hours = 48, stale_hours = 168 }
# drift = { psi = 0.5, missing = 0.2, outside = 0.2 }

[encoder]
# model = "minilm"              # or any Hugging Face name or folder, for example "intfloat/multilingual-e5-small"
# prefix = "passage: "          # what the model's page asks for: e5 wants this before items,
# query_prefix = "query: "      # and this before sentences

[towers]
# horizon = 50                  # how many of the next events are the answer to a history; 1: only what comes next
# sequence_rounds = 15          # 0: no sequence tower

[ranker]
# utility = { click = 1.0, purchase = 0.5 }

[rerank]
# diversity = 0.05              # 0: order of scores; 1: categories only

[registry]
# url = "postgresql+psycopg://…"          # tables that several machines share; empty: a SQLite file of this workspace
# artifacts = "s3://bucket/prefix"        # and the folder of every release, for machines that share the tables

[gates]
# metrics = { "ndcg@10" = { margin = 0.01, slices = { cold_user = 0.05 } }, "recall@100" = { margin = 0.02 } }
# guardrails = { "task/*/ece" = { at_most = 0.1 }, "towers_ranker/coverage@10" = { may_fall = 0.2 } }
"""


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}; mend that line") from None


def _from_environment(environment: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """(section, key, value) of every TANDEM_SECTION__KEY; a value is read as TOML where it is some, else as text."""
    found = []
    for name, text in environment.items():
        section, separator, key = name.removeprefix(ENVIRONMENT).partition("__")
        if name.startswith(ENVIRONMENT) and separator and "__" not in key:
            try:
                value = tomllib.loads(f"value = {text}")["value"]
            except tomllib.TOMLDecodeError:
                value = text
            found.append((section.lower(), key.lower(), value))
    return found


def _settings(home: Path, raw: Mapping[str, Any]) -> Settings:
    settings = Settings(workspace=home)
    known = {each.name for each in fields(Settings)} - {"workspace"}
    for section, values in raw.items():
        _check_known(section, known, "section")
        if not isinstance(values, dict):
            raise InputError(f"{FILE}: [{section}] is {values!r}; write it as a section with keys")
        current = getattr(settings, section)
        new: Any = _section(section, current, values) if is_dataclass(current) else values
        settings = replace(settings, **{section: new})
    return settings


def _section(name: str, current: Any, values: Mapping[str, Any]) -> Any:
    converted = _converted(name, type(current), values)
    try:
        return replace(current, **converted)
    except TypeError as error:
        raise InputError(f"{FILE}: [{name}] {error}") from None


def _converted(name: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    for key in values:
        _check_known(key, set(hints), f"key in [{name}]")
    return {key: _convert(f"{name}.{key}", value, hints[key]) for key, value in values.items()}


def _convert(name: str, value: Any, wanted: Any) -> Any:
    """`value` as the field's type, or InputError naming both. TOML has no tuples, and writes 1 for 1.0."""
    origin = get_origin(wanted)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _convert(f"{name}.{key}", each, get_args(wanted)[1]) for key, each in value.items()}
    if is_dataclass(wanted) and isinstance(wanted, type):
        return _nested(name, wanted, value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is Literal:
        choices = get_args(wanted)
        if value not in choices:
            raise InputError(f"{name} = {value!r} is not one of {list(choices)}")
        return value
    if origin in (Union, UnionType):
        inner = [each for each in get_args(wanted) if each is not type(None)]
        return _convert(name, value, inner[0])
    plain = origin or wanted
    if isinstance(plain, type) and (not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool)):
        raise InputError(f"{name} = {value!r} is {type(value).__name__}; it must be {plain.__name__}")
    return value


def _nested(name: str, kind: type, value: Any) -> Any:
    if not isinstance(value, Mapping):
        keys = ", ".join(sorted(get_type_hints(kind)))
        raise InputError(f"{name} = {value!r} is no table; write {{ … }} with any of {keys}")
    converted = _converted(name, kind, value)
    missing = [
        each.name for each in fields(kind) if each.name not in converted and each.default is each.default_factory is MISSING
    ]
    if missing:
        raise InputError(f"{name} lacks {', '.join(missing)}; add it")
    return kind(**converted)


def _check_known(key: str, known: set[str], what: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0.0)
        raise InputError(f"{FILE}: unknown {what} {key!r}; did you mean {near[0]!r}? known: {sorted(known)}")

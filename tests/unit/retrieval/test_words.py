"""Words beside meanings: names are found, spellings do not matter, Chinese has words too, nothing known is nothing said."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from retrieval.encoder import TextEncoder
from retrieval.words import LOUDNESS, TextReader, Words, reader_fingerprint

TEXTS = [
    "Guards! Guards!, by Terry Pratchett",
    "Small Gods, by Terry Pratchett",
    "Small Island, by Andrea Levy",
    "The Long Song, by Andrea Levy",
    "Pale Fire, by Vladimir Nabokov",
    "Ada, by Vladimir Nabokov",
]
MUGS = ["红色茶杯 大号", "蓝色茶杯 小号", "红色雨伞", "蓝色雨伞", "Tea cup 茶杯", "umbrella 雨伞"]


@pytest.fixture(scope="module")
def words() -> Words:
    return Words.fit(TEXTS, 5)


def test_a_name_is_nearer_to_its_own_texts_than_to_all_others(words: Words) -> None:
    near = words(["something new by TERRY pratchett"]) @ words(TEXTS).T
    assert set(np.argsort(-near[0])[:2]) == {0, 1}
    assert near[0, :2].min() > near[0, 2:].max() + 0.2


def test_rows_have_length_one_or_say_nothing(words: Words) -> None:
    rows = words([*TEXTS, "", "nothing of it known", "!!!"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1] * len(TEXTS) + [0] * 3, atol=1e-5)


def test_width_and_case_of_letters_do_not_matter(words: Words) -> None:
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "ANDREA")
    np.testing.assert_array_equal(words([f"{wide} LEVY"]), words(["andrea levy"]))


def test_a_run_of_chinese_letters_is_read_by_letters_and_pairs() -> None:
    near = Words.fit(MUGS, 5)(["绿色的茶杯"]) @ Words.fit(MUGS, 5)(MUGS).T
    assert set(np.argsort(-near[0])[:3]) == {0, 1, 4}


@pytest.mark.parametrize(
    "texts", [[], ["only one"], ["one text", "another thing"], ["", ""]], ids=["none", "one", "apart", "blank"]
)
def test_a_catalogue_without_a_word_in_two_texts_has_no_directions(texts: list[str]) -> None:
    words = Words.fit(texts, 8)
    assert words.dimension == 0
    assert words(["one", ""]).shape == (2, 0)


def test_no_more_directions_than_texts(words: Words) -> None:
    assert Words.fit(TEXTS, 400).dimension == len(TEXTS) - 1
    assert Words.fit(TEXTS, 0).dimension == 0


def test_saved_and_loaded_says_the_same(words: Words, tmp_path: Path) -> None:
    words.save(tmp_path)
    again = Words.load(tmp_path)
    np.testing.assert_array_equal(again(TEXTS), words(TEXTS))
    assert again.fingerprint == words.fingerprint != Words.fit(TEXTS[1:], 5).fingerprint
    Words.fit(["x"], 3).save(tmp_path)
    assert Words.load(tmp_path).dimension == 0


def test_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"word": ["a"]}).write_parquet(tmp_path / "words.parquet")
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="idf"):
        Words.load(tmp_path)


def test_a_reader_puts_both_side_by_side(words: Words) -> None:
    encoder = TextEncoder("minilm", dtype="float32", max_tokens=16)
    reader = TextReader(encoder, words)
    both = reader.encode(TEXTS[:2])
    np.testing.assert_array_equal(both[:, : encoder.dimension], encoder.encode(TEXTS[:2]))
    np.testing.assert_array_equal(both[:, encoder.dimension :], words(TEXTS[:2]) * LOUDNESS)
    assert reader.fingerprint == reader_fingerprint(encoder.fingerprint, words) != encoder.fingerprint
    assert reader.truncates("word " * 40)
    assert not reader.truncates("word")

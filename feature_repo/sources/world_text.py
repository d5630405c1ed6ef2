"""What the built-in world's products and people look like in words: titles, descriptions, prices and bios.

In: what an item is (department, subtype, style) and a random generator. Out: frames of text. Words tell department, subtype and
style as a shop's would: mostly, in changing words, and never as a code. `world.py` decides who likes what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import polars as pl

from feature_repo.sources.world_words import BRANDS, DEPARTMENTS, FEATURES, HOBBIES, STYLES, USES

DEPARTMENT_NAMES: Final = tuple(DEPARTMENTS)
SUBTYPE_NAMES: Final = tuple(subtype for subtypes in DEPARTMENTS.values() for subtype in subtypes)
STYLE_NAMES: Final = tuple(STYLES)
BRAND_NAMES: Final = tuple(brand for brands in BRANDS.values() for brand in brands)

DEPARTMENT_OF: Final = np.array([place for place, subtypes in enumerate(DEPARTMENTS.values()) for _ in subtypes])
"""(S,) department of each subtype."""

STYLE_OF_BRAND: Final = np.array([place for place, brands in enumerate(BRANDS.values()) for _ in brands])
"""(B,) style that each brand mostly works in."""

_STYLE_IN_TITLE: Final = 0.7
_PARTS: Final = {subtype: words for subtypes in DEPARTMENTS.values() for subtype, words in subtypes.items()}


@dataclass(frozen=True)
class Kind:
    """What one product is, by place in the lists of names."""

    subtype: int
    style: int
    brand: int


def describe_items(kinds: list[Kind], rng: np.random.Generator) -> pl.DataFrame:
    """[title, text, brand, department, subtype]; titles are distinct, as in a shop."""
    taken: dict[str, int] = {}
    rows = [_describe(kind, rng, taken) for kind in kinds]
    return pl.DataFrame(rows, schema=["title", "text", "brand", "department", "subtype"], orient="row")


def bio(departments: list[int], style: int, rng: np.random.Generator) -> str:
    """Two short sentences that hint at what somebody likes; one in seven is vague."""
    if rng.random() < 1 / 7:
        return "Likes to look around. Buys when something feels right."
    hobbies = " and ".join(HOBBIES[DEPARTMENT_NAMES[place]] for place in departments[:2])
    word = _choice(STYLES[STYLE_NAMES[style]]["words"], rng)
    return f"{hobbies[0].upper()}{hobbies[1:]}. Has a soft spot for {word} things."


def prices(kinds: list[Kind], level: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) prices in whole units less a cent: a base per subtype times exp of the item's price level (N,)."""
    base = np.exp(np.random.default_rng(0).uniform(2.0, 4.6, len(SUBTYPE_NAMES)))
    raw = base[[kind.subtype for kind in kinds]] * np.exp(0.5 * level) * np.exp(rng.normal(0, 0.08, len(kinds)))
    return np.asarray(np.maximum(2.0, np.round(raw)) - 0.01)


def _describe(kind: Kind, rng: np.random.Generator, taken: dict[str, int]) -> tuple[str, str, str, str, str]:
    subtype = SUBTYPE_NAMES[kind.subtype]
    department = DEPARTMENT_NAMES[DEPARTMENT_OF[kind.subtype]]
    nouns, materials, sizes = (part.split(", ") for part in _PARTS[subtype])
    noun, material, size, brand = _choice(nouns, rng), _choice(materials, rng), _choice(sizes, rng), BRAND_NAMES[kind.brand]
    style = STYLES[STYLE_NAMES[kind.style]]
    word = f"{_choice(style['words'], rng)} " if rng.random() < _STYLE_IN_TITLE else ""
    title = _distinct(f"{brand} {word}{material} {noun}, {size}", taken)
    first = f"{_article(material)} {material} {noun} {_choice(USES[department], rng)}, {_choice(style['traits'], rng)}."
    second = f"{_choice(style['words'], rng).capitalize()} {subtype.lower()} from {brand}. {_choice(FEATURES, rng)}"
    return title, f"{title}. {first} {second}", brand, department, subtype


def _distinct(title: str, taken: dict[str, int]) -> str:
    taken[title] = taken.get(title, 0) + 1
    return title if taken[title] == 1 else f"{title} (No. {taken[title]})"


def _article(word: str) -> str:
    return "An" if word[0].lower() in "aeiou" else "A"


def _choice(options: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]

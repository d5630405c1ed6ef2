"""Tandem: features, text two-tower retrieval and a multi-task ranker, shipped as one release.

from pathlib import Path
from tandem import Ask, open_release

recommender = open_release(Path("workspace/releases/NAME"))
slate = recommender.recommend(Ask(session=("318", "296"), query="space opera", k=5))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.service.recommend import Recommender
    from tandem.service.slate import Ask, Slate
    from tandem.service.wiring import load_folder as open_release

__all__ = ["Ask", "Recommender", "Slate", "open_release"]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: `import tandem` costs nothing."""
    if name == "open_release":
        from tandem.service.wiring import load_folder

        return load_folder
    if name in __all__:
        from tandem.service import recommend, slate

        return getattr(recommend if name == "Recommender" else slate, name)
    raise AttributeError(f"module 'tandem' has no attribute {name!r}")

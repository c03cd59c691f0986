"""What a pool may pay for or a limit counts: everything, models by a pattern, or, after #, features by a pattern.

In the database it is one text, and credits.admits says what it takes.
"""

import re
from typing import Final

MARK: Final = "#"
FEATURE: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""What a request is for, in a word."""
_PATTERN: Final = re.compile(r"[a-z0-9%_][a-z0-9%._-]{0,62}")


class NotAFilter(ValueError):
    """Models and features together, or a pattern that no name fits."""


def filter_of(*, model: str | None, feature: str | None) -> str | None:
    """The filter for models or for features; None: neither is named.

    Raises:
        NotAFilter
    """
    if feature is None:
        if model is not None and model.startswith(MARK):
            raise NotAFilter(f"no model's name begins with {MARK}")
        return model
    if model is not None:
        raise NotAFilter("it is for models or for features, not for both")
    if _PATTERN.fullmatch(feature) is None:
        raise NotAFilter("a feature is up to 63 of a-z, 0-9, '.', '_' and '-'; % stands for anything")
    return MARK + feature


def models_of(filter: str | None) -> str | None:
    """The pattern of models, if it goes by them."""
    return None if filter is None or filter.startswith(MARK) else filter


def features_of(filter: str | None) -> str | None:
    """The pattern of features, if it goes by them."""
    return filter[len(MARK) :] if filter is not None and filter.startswith(MARK) else None


def shown(filter: str | None) -> str:
    """For people: “images only”; nothing where there is no filter."""
    pattern = features_of(filter) or models_of(filter)
    return f"{pattern} only" if pattern else ""


def on_what(filter: str | None) -> str:
    """The end of a cap's name: “ on gpt-%”, “ on the feature images”."""
    feature = features_of(filter)
    return f" on the feature {feature}" if feature else f" on {filter}" if filter else ""

"""What a dataset for classification must have. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import SourceError
from ..sources.catalog import Catalog
from .plan import Staged


def refuse_one_class(staged: Sequence[Staged], catalog: Catalog) -> None:
    """The usable samples of a classification have several classes.

    Raises:
        SourceError: all have one: there is nothing to tell apart.
    """
    labels = {item.sample.label for item in staged if item.sample is not None}
    if catalog.task != "classification" or len(labels) != 1:
        return
    label = labels.pop()
    name = catalog.classes[label] if label is not None and label < len(catalog.classes) else str(label)
    count = sum(item.sample is not None for item in staged)
    aside = len(staged) - count
    raise SourceError(
        f"classification with one class only: all {count} usable inputs are '{name}'"
        + (f", {aside} others were set aside ({next(item.reason for item in staged if item.sample is None)})" if aside else "")
        + "; expected images of at least two classes"
    )

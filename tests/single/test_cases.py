"""Each input of ``../shared/cases`` that once went wrong gives the right answer. Sorted by the number of the case."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.shared

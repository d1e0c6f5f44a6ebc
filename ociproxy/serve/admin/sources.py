"""What the admin listener tells of: the store, the numbers of the workers, what was found in both.

Tests: tests/serve/admin/test_listener.py, tests/serve/admin/test_page.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ociproxy.metrics.tally import Tally
    from ociproxy.serve.admin.explaining import Explainer
    from ociproxy.serve.admin.history import History
    from ociproxy.serve.admin.survey import Surveyor
    from ociproxy.store.store import Store


@dataclass(frozen=True, slots=True)
class Sources:
    """They stay the same for the life of the listener."""

    store: Store
    tally: Tally
    surveyor: Surveyor
    history: History
    explainer: Explainer

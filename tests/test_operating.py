"""The guide for operators tells of everything there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from mabridge.config import ProviderConfig, WorkerConfig
from mabridge.observe import EventName

TEXT = (Path(__file__).parents[1] / "docs" / "operating.md").read_text()


def test_every_event_is_told_of_and_exists():
    table = TEXT.split("<!-- events -->")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)} == set(get_args(EventName))


def test_settings_that_it_names_exist_with_these_defaults():
    for name in ("max_sessions", "max_idle", "create_timeout", "drain_timeout", "reap_interval", "reap_grace"):
        assert f"`{name}`" in TEXT
        assert name in WorkerConfig.model_fields
    for name in ("when_done", "ttl", "idle_ttl", "max_sandboxes"):
        assert f"`{name}`" in TEXT
        assert name in ProviderConfig.model_fields
    defaults = WorkerConfig()
    assert (defaults.drain_timeout, defaults.reap_interval, defaults.reap_grace) == (25.0, 300.0, 300.0)

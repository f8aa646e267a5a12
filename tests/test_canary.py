"""The canary sees a secret wherever it may turn up: else nothing would be shown by its silence."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from opentelemetry import trace

from tests import canary

# In two halves, for this file is looked at too.
KEY = "sk-ant-" + "oat01-" + "x" * 24


def test_secret_in_the_log_is_seen() -> None:
    with_it = logging.makeLogRecord({"name": "mabridge", "msg": "the key is %s", "args": (KEY,)})
    in_a_traceback = logging.makeLogRecord({"msg": "it failed", "exc_text": f"ValueError: {KEY}"})
    assert len(list(canary.in_records([with_it, in_a_traceback, logging.makeLogRecord({"msg": "well"})]))) == 2


def test_secret_in_a_span_is_seen() -> None:
    with trace.get_tracer("test").start_as_current_span("call", attributes={"key": KEY}):
        pass
    assert list(canary.in_telemetry()) == ["span call"]
    assert list(canary.in_telemetry()) == []


def test_secret_in_a_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "file"
    file.write_text(f"... {KEY} ...")
    assert list(canary.in_files(tmp_path)) == [f"file {file}"]
    file.unlink()


def test_secret_in_a_process_list_or_in_a_sandboxs_environment_is_seen() -> None:
    secret = f"canary-{os.getpid()}-{time.monotonic_ns()}"  # one that the canaries of other tests do not know
    waits = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    watch = canary.ProcessWatch(re.compile(secret.encode()))
    for more, environment, expected in (
        ([secret], {}, "argv of"),
        ([], {"MAB_EXEC": "1", "SECRET": secret}, "which runs in a sandbox"),
        ([], {"SECRET": secret}, None),
    ):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([*waits, *more], env=environment, **pipes) as process:
            process.stdout.readline()
            watch.look()
            process.kill()
        assert [expected is not None and expected in found for found in watch.found] == [True] * bool(expected)
        watch.found.clear()

"""`Sandbox.exec`: what a command is given, and what is told of its end."""

from __future__ import annotations

import hashlib

import pytest

from mabridge.errors import NotSupported
from mabridge.sandbox import Sandbox
from mabridge.testing.conformance.helpers import run, sh

__all__ = ["ExecTests"]

_ARGUMENTS = [
    "",
    " a  b ",
    "$(touch pwned)",
    "`id`",
    "'\"\\",
    "new\nline\n",
    "-n",
    "--",
    "*",
    "é ☃ 𝄞",
    "a=b",
    "",
    "~",
    "!",
]
_LARGE = 50 * 1024 * 1024


class ExecTests:
    """One command: its arguments, its surroundings, its streams, its exit code."""

    async def test_arguments_pass_exactly_and_no_shell_reads_them(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, 'for a; do printf "%s\\0" "$a"; done', *_ARGUMENTS)
        assert result.stdout.decode().split("\0")[:-1] == _ARGUMENTS
        assert (await run(sandbox, "ls")).stdout == b"", "an argument was run as a command"

    async def test_argument_of_100_kb_passes_or_is_refused(self, sandbox: Sandbox) -> None:
        try:
            result = await sh(sandbox, 'printf %s "$1" | wc -c', "x" * 100_000)
        except (NotSupported, ValueError):
            return
        if result.exit_code == 126:
            assert result.stderr
        else:
            assert (result.exit_code, result.stdout.split()) == (0, [b"100000"])

    async def test_impossible_command_is_a_value_error(self, sandbox: Sandbox) -> None:
        for argv in ([], ["a\0b"], ["-c"]):
            with pytest.raises(ValueError, match=r".+"):
                await run(sandbox, *argv)

    async def test_impossible_variable_is_a_value_error(self, sandbox: Sandbox) -> None:
        for env in ({"A B": "c"}, {"": "c"}, {"A": "b\0"}, {"A=B": "c"}):
            with pytest.raises(ValueError, match=r".+"):
                await run(sandbox, "true", env=env)

    async def test_exit_codes_are_told_as_they_are(self, sandbox: Sandbox) -> None:
        for code in (0, 1, 2, 70, 124, 126, 127, 137, 255):
            result = await sh(sandbox, 'exit "$1"', str(code))
            assert (result.exit_code, result.timed_out) == (code, False)

    async def test_missing_program_is_127(self, sandbox: Sandbox) -> None:
        result = await run(sandbox, "no-such-program", "x")
        assert (result.exit_code, result.stdout) == (127, b"")
        assert b"no-such-program" in result.stderr

    async def test_what_cannot_be_executed_is_126(self, sandbox: Sandbox) -> None:
        await sandbox.write_file("plain", b"hello")
        assert (await run(sandbox, f"{sandbox.workdir}/plain")).exit_code == 126

    async def test_missing_directory_is_126_and_nothing_runs(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, 'echo ran > "$1/ran"', sandbox.workdir, cwd="/no/such")
        assert result.exit_code == 126
        assert b"/no/such" in result.stderr
        assert (await run(sandbox, "ls")).stdout == b""

    async def test_death_by_signal_is_128_and_its_number_and_no_timeout(self, sandbox: Sandbox) -> None:
        for signal, code in (("TERM", 143), ("KILL", 137), ("HUP", 129)):
            result = await sh(sandbox, 'kill -"$1" $$; sleep 60', signal)
            assert (result.exit_code, result.timed_out) == (code, False)

    async def test_runs_in_workdir_unless_cwd_is_given(self, sandbox: Sandbox) -> None:
        assert sandbox.workdir.startswith("/")
        await run(sandbox, "mkdir", "-p", "a 'b")
        assert (await run(sandbox, "pwd")).stdout.decode() == f"{sandbox.workdir}\n"
        assert (await run(sandbox, "pwd", cwd=f"{sandbox.workdir}/a 'b")).stdout.decode() == f"{sandbox.workdir}/a 'b\n"

    async def test_environment_is_the_specs_and_then_the_calls(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, 'echo "$FROM_SPEC,$MINE"', env={"MINE": "x\ny 'z' $HOME"})
        assert result.stdout == b"a b,x\ny 'z' $HOME\n"
        assert (await sh(sandbox, 'echo "$FROM_SPEC"', env={"FROM_SPEC": "other"})).stdout == b"other\n"
        assert (await sh(sandbox, 'echo "$FROM_SPEC,$MINE"')).stdout == b"a b,\n", "a call's variable outlived it"

    async def test_nothing_of_the_workers_environment_leaks(
        self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ANTHROPIC_API_KEY", "secret-one")
        monkeypatch.setenv("SOMETHING_ELSE", "secret-two")
        assert b"secret-" not in (await run(sandbox, "env")).stdout

    async def test_home_and_temporary_files_can_be_written(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, 'touch "$HOME/x" "${TMPDIR:-/tmp}/x" && mktemp')
        assert result.exit_code == 0, result.stderr

    async def test_no_stdin_is_an_empty_one(self, sandbox: Sandbox) -> None:
        for stdin in (None, b""):
            result = await run(sandbox, "cat", stdin=stdin, timeout=30)
            assert (result.exit_code, result.stdout) == (0, b"")

    async def test_bytes_pass_unchanged_in_and_out(self, sandbox: Sandbox) -> None:
        data = bytes(range(256)) * 1000 + b"\r\n\xff\xfe\0\x04\x1a"
        assert (await run(sandbox, "cat", stdin=data, max_output=len(data))).stdout == data
        assert (await sh(sandbox, "cat >&2", stdin=data, max_output=len(data))).stderr == data

    async def test_stdin_of_50_mib_arrives_whole(self, sandbox: Sandbox) -> None:
        data = hashlib.sha256(b"x").digest() * (_LARGE // 32)
        result = await run(sandbox, "sha256sum", stdin=data, timeout=300)
        assert result.stdout.split()[:1] == [hashlib.sha256(data).hexdigest().encode()]

    async def test_stdin_that_nobody_reads_does_not_hold_the_call(self, sandbox: Sandbox) -> None:
        for size in (1, 300_000, 5_000_000):
            result = await sh(sandbox, "echo done; exit 4", stdin=bytes(size), timeout=30)
            assert (result.exit_code, result.stdout) == (4, b"done\n")
            result = await sh(sandbox, "head -c 10 > read; exit 5", stdin=bytes(size), timeout=30)
            assert (result.exit_code, result.stdout) == (5, b"")

    async def test_stdout_and_stderr_are_kept_apart(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, "echo out; echo err >&2; exit 3")
        assert (result.exit_code, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
        assert not result.timed_out
        assert not result.truncated

    async def test_invalid_utf8_and_nuls_come_back_on_both_streams(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, r"printf '\377\000\303(\n'; printf '\200\000' >&2")
        assert (result.stdout, result.stderr) == (b"\xff\0\xc3(\n", b"\x80\0")

    async def test_output_without_a_line_end_is_kept(self, sandbox: Sandbox) -> None:
        result = await sh(sandbox, "printf '\\n\\n out'; printf 'err \\r' >&2")
        assert (result.stdout, result.stderr) == (b"\n\n out", b"err \r")

    async def test_program_that_closes_its_output_is_waited_for(self, sandbox: Sandbox) -> None:
        assert (await sh(sandbox, "exec >&- 2>&-; sleep 1; exit 7")).exit_code == 7

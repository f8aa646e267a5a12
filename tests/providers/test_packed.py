"""Packing what a command says, in each shell that a sandbox may have as its ``/bin/sh``."""

from __future__ import annotations

import shutil
import subprocess
import uuid

import pytest

from mabridge.providers import _packed

EVERY_BYTE = bytes(range(256)) * 300
NONCE = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(params=["dash", "bash", "busybox sh"])
def shell(request: pytest.FixtureRequest) -> list[str]:
    if shutil.which(request.param.split()[0]) is None:
        pytest.skip(f"no {request.param} here")
    return request.param.split()


class Said:
    def __init__(self, argv: list[str], shell: list[str], *, stdin: bytes | None = None) -> None:
        done = subprocess.run([*shell, *argv[1:]], input=stdin, capture_output=True, timeout=60, check=False)
        self.own: list[tuple[str, int]] = []
        self.out = self._unpack(done.stdout)
        self.err = self._unpack(done.stderr)

    def _unpack(self, packed: bytes) -> bytes:
        taken: list[bytes] = []
        unpacker = _packed.Unpacker(taken.append, lambda letter, number: self.own.append((letter, number)))
        for start in range(0, len(packed), 7):  # in pieces of any size
            unpacker.write(packed[start : start + 7].decode("ascii"))
        return b"".join(taken)

    @property
    def codes(self) -> list[int]:
        return [number for letter, number in self.own if letter == "c"]


def capture(shell: list[str], *argv: str, cwd: str = "/", stdin: str = "") -> Said:
    command = _packed.capture_argv(argv, cwd, marker=uuid.uuid4().hex, nonce=NONCE.decode(), stdin=stdin)
    return Said(command, shell)


def test_every_byte_of_both_streams_comes_through_and_the_nonce_ends_them(shell: list[str], tmp_path):
    (tmp_path / "in").write_bytes(EVERY_BYTE)
    said = capture(shell, "sh", "-c", "tee /dev/stderr; exit 3", stdin=str(tmp_path / "in"))
    assert (said.out, said.err, said.codes) == (EVERY_BYTE + NONCE, EVERY_BYTE + NONCE, [3])
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(
    ("argv", "cwd", "code", "told"),
    [
        (["sh", "-c", "kill -KILL $$"], "/", 137, b""),
        (["no-such-program"], "/", 127, b"no-such-program"),
        (["true"], "/no/such", 126, b"/no/such"),
    ],
)
def test_ends_are_told_as_a_shell_tells_them(shell: list[str], argv: list[str], cwd: str, code: int, told: bytes):
    said = capture(shell, *argv, cwd=cwd)
    assert (said.codes, said.out) == ([code], NONCE)
    assert told in said.err
    assert said.err.count(b"\n") == (1 if told else 0), "the shell said something of its own"


def test_program_is_the_one_announced_and_leads_its_session(shell: list[str]):
    said = capture(shell, "sh", "-c", 'read -r pid _ _ _ _ sid _ < /proc/$$/stat; echo "$pid $sid $MAB_EXEC"')
    pid, sid, marker = said.out.removesuffix(NONCE).decode().split()
    assert int(pid) == int(sid) == dict(said.own)["p"]
    assert len(marker) == 32


def test_nonce_is_in_no_list_of_processes_and_no_packing_variable_leaks(shell: list[str]):
    said = capture(shell, "sh", "-c", "tr '\\0' ' ' < /proc/$PPID/cmdline; echo =====; exec env")
    listed, _, variables = said.out.removesuffix(NONCE).partition(b"=====\n")
    assert NONCE[9:] in listed
    assert NONCE not in listed
    assert b"MAB_PACK=" not in variables


def test_held_process_is_packed_piece_by_piece(shell: list[str]):
    command = _packed.hold_argv(["sh", "-c", "cat; echo dropped >&2; exit 4"], "/", marker=uuid.uuid4().hex)
    said = Said(command, shell, stdin=EVERY_BYTE)
    assert said.out == EVERY_BYTE
    assert {"p", "o", "c", "z"} == {letter for letter, _ in said.own}
    assert said.codes == [4]
    assert said.err == b""


def test_line_of_its_own_is_found_in_the_middle_of_another():
    taken, own = [], []
    unpacker = _packed.Unpacker(taken.append, lambda *told: own.append(told))
    for piece in ("aGVs#c 7\n", "bG8=\n#", "z\nd29y#p 1", "2\nbGQ=\n"):
        unpacker.write(piece)
    assert b"".join(taken) == b"helloworld"
    assert own == [("c", 7), ("z", 0), ("p", 12)]


@pytest.mark.parametrize("text", ["not base64!\n", "YQ\n", "#c x\n"])
def test_nonsense_is_refused(text: str):
    with pytest.raises(ValueError):  # noqa: PT011 - whatever it is that does not fit
        _packed.Unpacker(bytes, lambda *_: None).write(text)

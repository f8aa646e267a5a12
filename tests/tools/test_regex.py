"""Patterns: what every grep finds by a translated pattern is what Python finds by the pattern itself."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mabridge.tools.regex import PatternError, parse_pattern
from mabridge.tools.render import render_ere, render_rust

PROGRAMS = [name for name, program in [("gnu", "grep"), ("busybox", "busybox"), ("rg", "rg")] if shutil.which(program)]
_GREP = 'pattern=$(printf %b "$1"); shift; LC_ALL=C exec "$@" -n -E -e "$pattern"'

LINES = [
    "", "foo", "foo bar", "Foo foo", "café au lait", "caf au", "élan vital", "foo;\r", "foo\r", "x = [1, 2]",
    "a^b-c]d[e",
    "日本語 text", "  indent", "tab\there", "A_B9", "emoji 🎉 x", "naïve", "bar.", "(paren)", "$HOME", "a\\b",
    "{x,y}", "éé",
    "ab12", "function(a, b) {", "ÉCOLE", "a\u00a0b", "x\u2014y", "100%",
]  # fmt: skip
PATTERNS = [
    "foo", "foo$", "^foo", "[^;]$", r"\bcafé\b", r"\w+\s\w+", r"^.{2}$", "^.$", r"\d+", r"\d{2,}", "(?i)CAFÉ", "[]]",
    r"[\[\]]", "[-^]", "[^^]", "^[^a-z]*$", "(|x)y", "(a|)b", "()", r"\$HOME", r"a\\b", r"\{x", r"日.語", "x*?y+?",
    "🎉",
    r"\s$", r"^\s+", r"\S\s\S", ".*", "^$", r"foo.*bar", r"\Bo", r"o\b", r"\bfoo\b", "(foo ?){2}", "a{0}b", "[à-ü]",
    r"[^\x00-\x7f]", r"\W", r"[\w.]+\.", "(?x) f o o  # c", "(?i:BAR)", r"na\wve", "f(?:o|u){2}", r"\(.*\)", "^.{3,5}$",
    "$", "^", r"\Z", r"\Afoo", r"[\d_-]+", "é{2}", r"\n", r"\x00", "a|b|", r"[\^]", r"[a\]-]", "(?i)é", "(?i)[à-ö]C",
    "(?s)a.b", "(?m)^x", "(?P<name>o)o", "[[:alpha:]]", "[a-]", "[+--]", r"[\w-]+", "%", "a{2}|b{1,}",
    "(?a)\\w\\W", "x{,2}y",
    "a{1,300}b{300,}|b", "^(?:(?:fo*)*|x)+$", "", r"\.$", r"[^\s]$", r"[^\d\s]\r*$", "{", "}", "a{x", r"\-",
    r"\/", r"\é",
]  # fmt: skip


def found_by(program: str, pattern: str, lines: list[str]) -> set[int]:
    """Return the numbers of the lines that a program matches."""
    node = parse_pattern(pattern)
    ere, rust = render_ere(node), render_rust(node)
    if ere is None or rust is None:
        return set()
    if program == "rg":
        command = ["rg", "--no-config", "-a", "-n", "-E", "none", "-e", rust, "-"]
    else:
        command = ["/bin/sh", "-c", _GREP, "sh", ere, *{"gnu": ["grep", "-a"], "busybox": ["busybox", "grep"]}[program]]
    data = "".join(line + "\n" for line in lines).encode()
    done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=60)
    assert done.returncode in (0, 1), (pattern, ere, rust, done.stderr)
    return {int(line.split(b":")[0]) for line in done.stdout.split(b"\n") if line}


def found_by_python(pattern: str, lines: list[str]) -> set[int]:
    compiled = re.compile(pattern)
    return {number for number, line in enumerate(lines, 1) if compiled.search(line.rstrip("\r\n"))}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore:Possible")
def test_pattern_finds_the_lines_that_python_finds(program: str, pattern: str) -> None:
    assert found_by(program, pattern, LINES) == found_by_python(pattern, LINES)


# Where we differ from Python, on purpose. The programs agree with each other even so.
DIFFERENCES = [
    # What, a pattern, a line, whether Python finds it.
    ("a carriage return at the end can be searched for", r"foo\r$", "foo\r", False),
    ("only a named carriage return matches one within the line", r"a.b", "a\rb", True),
    (r"\d is ASCII: other digits are rare, and their tables large", r"^\d$", "٣", True),
    (r"\w takes whole blocks of letters, with the odd sign among them", r"^\w$", "\u02c2", False),
    (r"\B matches an empty line, as it does in Python from 3.14 on", r"\B", "", False),
    (r"\b goes by ASCII, but beside a letter that the pattern spells out", r"\w\b", "é", True),
]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("why", "pattern", "line", "by_python"), DIFFERENCES)
def test_difference_from_python_is_as_stated(program: str, why: str, pattern: str, line: str, by_python: bool) -> None:
    assert bool(found_by_python(pattern, [line])) is by_python, why
    assert bool(found_by(program, pattern, [line])) is not by_python, why


def patterns(characters: str, assertions: list[str]) -> st.SearchStrategy[str]:
    """Patterns over some characters, as a model might write them and as it would not."""
    char = st.sampled_from(characters)
    atom = st.one_of(
        char.map(re.escape),
        st.sampled_from([".", r"\w", r"\W", r"\s", r"\S", r"\d", r"\D", *assertions]),
        st.builds("[{}{}]".format, st.sampled_from(["", "^"]), st.lists(char, min_size=1, max_size=4).map(_members)),
        st.builds(r"[{}{}]".format, st.sampled_from(["", "^"]), st.sampled_from([r"\w", r"\s-", r"\d;", r"\W_"])),
    )
    whole = st.recursive(
        atom,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4).map("".join),
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
            st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "{0}"])),
            inner.map("(?i:{})".format),
        ),
        max_leaves=8,
    )
    return st.builds("{}{}{}".format, st.sampled_from(["", "^", "(^|,)"]), whole, st.sampled_from(["", "$", "(;|$)"]))


def _members(characters: list[str]) -> str:
    return "".join(map(re.escape, characters))


def lines(characters: str) -> st.SearchStrategy[list[str]]:
    line = st.builds(str.__add__, st.text(characters, max_size=8), st.sampled_from(["", "\r"]))
    return st.lists(line, min_size=1, max_size=20)


ASCII = "aBb1_ ;-]^[.\\"
BEYOND = "aÀàé日🎉1 ;\u00a0\u2014"
checked = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("program", PROGRAMS)
@checked
@given(pattern=patterns(ASCII, [r"\b", r"\B"]), text=lines(ASCII))
def test_any_ascii_pattern_finds_what_python_finds(program: str, pattern: str, text: list[str]) -> None:
    if r"\B" in pattern:
        text = [line.strip("\r") or "x" for line in text]
    assert found_by(program, pattern, text) == found_by_python(pattern, text)


@pytest.mark.parametrize("program", PROGRAMS)
@checked
@given(pattern=patterns(BEYOND, []), text=lines(BEYOND))
def test_any_pattern_beyond_ascii_finds_what_python_finds(program: str, pattern: str, text: list[str]) -> None:
    assert found_by(program, pattern, text) == found_by_python(pattern, text)


@given(pattern=st.text(max_size=40))
def test_whatever_is_no_pattern_is_refused_in_words(pattern: str) -> None:
    try:
        node = parse_pattern(pattern)
    except PatternError:
        return
    for written in (render_ere(node), render_rust(node)):
        assert written is None or written.isascii()


@pytest.mark.parametrize(
    "pattern",
    ["a(?=b)", "a(?!b)", "(?<=a)b", "(?<!a)b", r"(a)\1", "(?P<x>a)(?P=x)", "(a)?(?(1)b|c)", "(?>a)", "a*+", "(?!)"],
)
def test_what_the_programs_cannot_do_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match="is not supported; use a simpler pattern"):
        parse_pattern(pattern)

"""What is shown of a mistake: place, message, source line with a caret, and what to write instead.

Everything that leaves this module went through `clean`: no secret and no control character reaches a terminal or a
log, whatever was typed into the file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kdtrain.errors import ConfigError

Level = Literal["error", "warning", "info"]

_SECRET_NAME = re.compile(r"(?i)(key|token|passw(or)?d|secret)(_env)?$")
_PUBLIC_NAMES = {"eos_token", "pad_token", "bos_token", "unk_token"}
_SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9_])(?:sk-[\w-]{6,}|hf_(?=\w*[A-Z0-9])\w{8,}|gh[pousr]_\w{16,}|AKIA[A-Z0-9]{12,}"
    r"|(?i:bearer)\s+[\w.~+/=-]{12,})"
)
_CERTAIN = re.compile(r"sk-(?=[\w-]*\d)[\w-]{12,}")
_USERINFO = re.compile(r"(?<=://)[^/\s@]*@")
_QUERY = re.compile(r"(?i)[?&][\w.-]{0,40}?(?:key|token|secret|passw(?:or)?d|auth|signature)=[^&\s]")
# A word like those that keys are made of: long, and letters and digits in turn. Of no path, file name or number.
_KEY_LIKE = re.compile(
    r"(?<![A-Za-z0-9./~+-])(?=(?:[A-Za-z]{0,64}[0-9]{1,64}[A-Za-z]){3})[A-Za-z0-9]{20,256}(?![A-Za-z0-9./-])"
)
# No pattern may look back over a name or a word: lines have up to a million characters.
_SECRET_LINE = re.compile(
    r"""(?i)((?:key|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)token|passw(?:or)?d|secret)(?:_env)?["']?\s*[:=]\s*)(\S.*)"""
)
_LONGEST_LINE = 120
_LONGEST_PATH = 200
_WINDOW = 4000  # characters kept on each side of a place: far more than is shown, so that no secret is cut in two
_LONGEST_VALUE = 40
HIDDEN = "***"
COMMAND_LINE = "command line"  # as the name of a file


def is_secret_name(name: object) -> bool:
    """Whether a key of this name holds, or is taken for, a secret."""
    return isinstance(name, str) and name not in _PUBLIC_NAMES and bool(_SECRET_NAME.search(name))


def looks_secret(text: str) -> bool:
    """Whether a value has the form of an API key, or is a URL with a user, a password or a key in it."""
    found = _SECRET_VALUE.search(text)
    # `sk-` may begin the name of a run as well: hidden wherever it is shown, an error only if it must be a key.
    is_key = found is not None and (not found[0].startswith("sk-") or bool(_CERTAIN.fullmatch(found[0])))
    return is_key or bool(_USERINFO.search(text)) or ("://" in text and bool(_QUERY.search(text)))


def redact(text: str) -> str:
    """`text` with API keys, URL credentials and the values of secret-looking keys replaced by `***`."""
    text = _USERINFO.sub(HIDDEN + "@", _SECRET_VALUE.sub(HIDDEN, text))
    return _SECRET_LINE.sub(rf"\1{HIDDEN}", text)  # to the end of the line: rather too much than too little


def _hide(text: str) -> str:
    """As `redact`, and without words that only look like keys: a mistake can be told without them."""
    return _KEY_LIKE.sub(HIDDEN, redact(text))


def escape(text: str) -> str:
    """`text` on one line, with everything that does not print shown as an escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def clean(text: str) -> str:
    """Safe to print."""
    return escape(redact(text))


def describe(value: Any, name: object = None) -> str:
    """A value in words for a message, such as `text 'abc'`; `name` is the key it was given for."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, dict):
        return "a map"
    if is_secret_name(name):
        return "another value"
    if isinstance(value, str):
        return f"text '{value[:_LONGEST_VALUE]}{'...' if len(value) > _LONGEST_VALUE else ''}'"
    return f"the number {value}"


def dotted(path: Sequence[str | int]) -> str:
    """`("data", "train", 0, "path")` as `data.train[0].path`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".")


@dataclass(frozen=True)
class Diagnostic:
    """One mistake (`error`), one option without effect (`warning`), or, of a deep check, one fact (`info`)."""

    level: Level
    path: str
    """The option, such as `rlhf.beta`; empty where the file as a whole is meant."""
    message: str
    """What is wrong, without the place and without a full stop."""
    hint: str = ""
    """What to write instead."""
    file: str | None = None
    """The file as the user named it, or `command line`; None for a mapping."""
    line: int | None = None
    """From 1."""
    col: int | None = None
    """From 1, in characters."""
    source_line: str | None = None
    """The line, or the part of a very long one around `col`; secrets in it are hidden."""
    caret: int | None = field(default=None, init=False, repr=False)
    """Where `col` is in `source_line`, from 0: hiding a secret moves what follows it."""

    def __post_init__(self) -> None:
        if self.source_line is not None and self.col is not None:
            start = max(0, self.col - 1 - _WINDOW)
            object.__setattr__(self, "caret", len(_hide(self.source_line[start : self.col - 1])))
            object.__setattr__(self, "source_line", _hide(self.source_line[start : self.col + _WINDOW]))
        object.__setattr__(self, "path", self.path[:_LONGEST_PATH])
        for name in ("path", "message", "hint", "file"):
            value = getattr(self, name)
            hide = redact if name == "file" else _hide
            object.__setattr__(self, name, escape(hide(value)) if value else value)

    @property
    def location(self) -> str:
        """`file:line:col`, as far as known."""
        known = (self.file, self.line, self.col) if self.file != COMMAND_LINE else (self.file,)
        return ":".join(str(part) for part in known if part is not None)

    @property
    def headline(self) -> str:
        """Place, level, option and message on one line."""
        parts = (self.location, self.level, self.path, self.message)
        return ": ".join(part for part in parts if part)

    @property
    def logged(self) -> str:
        """The same and the hint, without the level, which a log has in front of its lines."""
        parts = (self.location, self.path, self.message)
        return ": ".join(part for part in parts if part) + (f" ({self.hint})" if self.hint else "")

    def render(self) -> str:
        """The headline, the source line with a caret under the place, and the hint."""
        number = str(self.line) if self.line and self.file != COMMAND_LINE else ""
        margin = " " * (len(number) + 2)
        text = [self.headline]
        if self.source_line is not None and self.caret is not None:
            line, caret = _snippet(self.source_line, self.caret)
            text += [f"  {number} | {line}", f"{margin} | {caret}"]
        if self.hint:
            text.append(f"{margin} = {self.hint}")
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`; cleaned like the rendered text."""
        shown = {name: getattr(self, name) for name in ("level", "path", "message", "hint", "file", "line", "col")}
        return {**shown, "source_line": None if self.source_line is None else escape(self.source_line)}


def _snippet(source_line: str, caret: int) -> tuple[str, str]:
    """The escaped source line, cut around the caret where it is very long, and the line with the caret."""
    start = max(0, caret - _LONGEST_LINE // 2)
    line = source_line.replace("\t", " ")
    shown, before = escape(line[start : start + _LONGEST_LINE]), escape(line[start:caret])
    token = re.match(r"\"[^\"]*\"|'[^']*'|[^\s,:\]}]+", line[caret : start + _LONGEST_LINE])
    indent = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in before)
    return shown, " " * indent + "^" * max(1, len(escape(token[0])) if token else 1)


class InvalidConfigError(ConfigError):
    """All mistakes of a config at once; `str()` is the text to show."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        super().__init__("\n".join(diagnostic.render() for diagnostic in diagnostics))
        self.diagnostics = list(diagnostics)

    def __reduce__(self) -> tuple[type[InvalidConfigError], tuple[list[Diagnostic]]]:
        return type(self), (self.diagnostics,)  # by default an exception is rebuilt from its text

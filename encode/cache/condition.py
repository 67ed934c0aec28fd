"""Conditions on samples in the language of SQL: what they name, and whether they say what was meant.

SQLite evaluates them (`keep.py`), but it forgives: a misspelt name in double quotes is a text to it, and any text is
more than any number, so that a mistake keeps every sample without a word. So a condition is read here first, for the
kinds of its parts. What is not understood never reaches the engine.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..base.errors import SettingsError, did_you_mean
from ..base.files import storable

NUMBER, TEXT = "number", "text"
Kind = str | None
"""`NUMBER`, which truth is as well, `TEXT`, or None for NULL, which may stand for either."""

# From weak to strong, as SQLite binds them; below the last stand signs.
OPERATORS = ("or", "and", "", "= == != <> is in like glob between isnull notnull not", "< <= > >=", "& | << >>")
OPERATORS = *OPERATORS, "+ -", "* / %", "||"
LEVELS = {word: level for level, words in enumerate(OPERATORS, start=1) for word in words.split()}
NOT, EQUAL, ORDER, SIGN = 3, 4, 5, 10
DEEPEST = 100  # expressions inside each other

# What each takes, the last for all that follow, and gives; None is any kind, the same for all. None of them depends on
# anything but what it takes.
FUNCTIONS: dict[str, tuple[tuple[Kind, ...], Kind]] = {
    **dict.fromkeys(("abs", "round", "sign"), ((NUMBER,), NUMBER)),
    **dict.fromkeys(("length", "instr", "unicode"), ((TEXT,), NUMBER)),
    **dict.fromkeys(("lower", "upper", "trim", "ltrim", "rtrim", "replace"), ((TEXT,), TEXT)),
    **dict.fromkeys(("substr",), ((TEXT, NUMBER), TEXT)),
    **dict.fromkeys(("coalesce", "ifnull", "nullif", "min", "max"), ((None,), None)),
}
ADDED = "`ip2p-encode --keep_columns` adds the dataset's, --pair_scores CLIP's"
TYPES = {"integer": NUMBER, "real": NUMBER, "text": TEXT}  # of cast
TOKEN = re.compile(
    r"""(?P<space>\s+|--[^\n]*|/\*.*?(?:\*/|\Z))
    |(?P<text>'(?:[^']|'')*')
    |(?P<quoted>"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^]]*\])
    |(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    |(?P<word>[^\W\d]\w*|\|\||<=|>=|<>|!=|==|<<|>>|[-+*/%<>=&|~(),])
    |(?P<end>\Z)""",
    re.VERBOSE | re.DOTALL,
)


class Condition(NamedTuple):
    """A condition that was understood."""

    text: str  # as it was given, or its beginning
    sql: str  # the same for SQLite, where the columns are called c0, c1, ...
    columns: list[str]


def parse(text: str, kinds: Mapping[str, Kind]) -> Condition:
    """Read a condition on columns of these kinds.

    Raises:
        SettingsError: it is none, names another column or function than there is, or takes text for a number.
    """
    if (readable := storable(text)) != text:
        raise SettingsError(f"--keep {textwrap.shorten(readable, 200)}: expected text in UTF-8, which \\ud… is not")
    parser = _Parser(text, kinds)
    parser.alike(NUMBER, parser.expression())
    if parser.kind != "end":
        raise parser.unexpected("and, or, or the end")
    return Condition(parser.text, " ".join(parser.sql), parser.columns)


class _Parser:
    """Reads a condition from left to right, and notes what SQLite is to read."""

    def __init__(self, text: str, kinds: Mapping[str, Kind]):
        self.text, self.kinds, self.depth = textwrap.shorten(text, 200), kinds, 0
        self.sql: list[str] = []
        self.columns: list[str] = []
        self.tokens = self._tokens(text)
        self.kind, self.token = next(self.tokens)

    def _tokens(self, text: str) -> Iterator[tuple[str, str]]:
        at = 0
        while match := TOKEN.match(text, at):
            if (kind := match.lastgroup or "") != "space":
                yield kind, match[0]
            at = match.end()
        raise self.error(f"cannot be read from {text[at : at + 20]!r} on")

    def error(self, what: str) -> SettingsError:
        return SettingsError(f"--keep {self.text}: {what}")

    def unexpected(self, expected: str) -> SettingsError:
        return self.error(f"expected {expected}, found {self.token or 'the end'}")

    @property
    def word(self) -> str:
        """The next token in lower case, unless it is quoted, a number or the end."""
        return self.token.lower() if self.kind == "word" else ""

    def take(self) -> str:
        """Step over a token, and return it."""
        taken = self.token
        self.sql.append(taken)
        self.kind, self.token = next(self.tokens)
        return taken

    def skip(self, *words: str) -> str:
        """Step over one of these words if it is next."""
        return self.take().lower() if self.word in words else ""

    def expect(self, *words: str) -> str:
        """Step over one of these words, which must be next."""
        if self.word not in words:
            raise self.unexpected(" or ".join(words))
        return self.take().lower()

    def alike(self, *kinds: Kind) -> Kind:
        """The one kind of what is compared, joined, or meant to be of a kind."""
        found = {kind for kind in kinds if kind}
        if len(found) > 1:
            where = f"before {self.token}" if self.token else "at the end"
            why = "numbers stand without quotes, text in 'single' ones; cast(… as real) makes a number of text"
            raise self.error(f"text stands for a number or is compared with one, {where}: {why}")
        return found.pop() if found else None

    def expression(self, level: int = 0) -> Kind:
        """Read operands that operators stronger than `level` join."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.error(f"is nested more than {DEEPEST} deep")
        kind = self.operand()
        while LEVELS.get(self.word, 0) > level:
            kind = self.joined(kind, self.take().lower())
        self.depth -= 1
        return kind

    def joined(self, left: Kind, operator: str) -> Kind:
        """Read what follows an operator; gives the kind of both together."""
        level = LEVELS[operator]
        if operator == "not":
            operator = self.expect("in", "like", "glob", "between", "null")
        if operator == "in":
            self.expect("(")
            self.alike(left, *self.listed())
        if operator in ("isnull", "notnull", "null", "in"):
            return NUMBER
        if operator == "is":
            self.skip("not")
        right = self.expression(level)
        if operator == "||":
            return TEXT
        if operator == "between":
            self.expect("and")
            right = self.alike(right, self.expression(level))
        compares = level in (EQUAL, ORDER)
        self.alike(left, right, TEXT if operator in ("like", "glob") else None if compares else NUMBER)
        return NUMBER

    def listed(self) -> list[Kind]:
        """Read expressions with commas between them, and the bracket at their end."""
        kinds: list[Kind] = []
        while not self.skip(")"):
            if kinds:
                self.expect(",")
            kinds.append(self.expression())
        return kinds

    def operand(self) -> Kind:
        """Read one operand, with the signs before it."""
        if sign := self.skip("not", "-", "+", "~"):
            return self.alike(NUMBER, self.expression(NOT if sign == "not" else SIGN))
        if self.skip("("):
            kind = self.expression()
            self.expect(")")
            return kind
        if self.kind in ("text", "number"):
            return TEXT if self.take().startswith("'") else NUMBER
        if word := self.skip("null", "true", "false"):
            return None if word == "null" else NUMBER
        if self.kind == "quoted" or self.word[:1].isidentifier():
            return self.named(quoted=self.kind == "quoted")
        raise self.unexpected("a column, a number or text")

    def named(self, *, quoted: bool) -> Kind:
        """Read the name of a column, or a function and what it takes."""
        name = self.take()
        if self.word == "(" and not quoted:
            return self.function(name.lower())
        if quoted:
            name = name[1:-1].replace(name[-1] * 2, name[-1]) if name[0] != "[" else name[1:-1]
        found = [column for column in self.kinds if column == name]
        found = found or [column for column in self.kinds if column.lower() == name.lower()]
        if len(found) > 1:
            raise self.error(f"{name} may be {' or '.join(found)}: write the column as it is called")
        if not found:
            mend = "text stands in 'single' quotes" if quoted else ADDED
            near = did_you_mean(name, self.kinds) or f"; {mend}"
            raise self.error(f"there is no column {name}, but {', '.join(self.kinds)}{near}")
        if found[0] not in self.columns:
            self.columns.append(found[0])
        self.sql[-1] = f"c{self.columns.index(found[0])}"
        return self.kinds[found[0]]

    def function(self, name: str) -> Kind:
        """Read what a function takes, in brackets."""
        self.expect("(")
        if name == "cast":
            self.expression()
            self.expect("as")
            kind = TYPES[self.expect(*TYPES)]
            self.expect(")")
            return kind
        if name not in FUNCTIONS:
            raise self.error(f"there is no function {name}, but {', '.join(FUNCTIONS)}")
        takes, gives = FUNCTIONS[name]
        kinds = self.listed()
        for given, taken in zip(kinds, (*takes, *takes[-1:] * len(kinds)), strict=False):
            self.alike(given, taken)
        return gives or self.alike(*kinds)

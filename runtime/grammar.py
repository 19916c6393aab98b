"""What of a GBNF grammar is refused before llama.cpp reads it.

llama.cpp recurses into parentheses, follows every way a rule can begin, and keeps a stack for each place a
text can be in. A few lines of grammar are enough to overflow its stack, fill the memory or never end.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from melt_edge.errors import ConfigError

MAX_BYTES = 2**17
MAX_CLASS = 1024
MAX_NESTING = 1024
MAX_RULES = 8192
# Elements after llama.cpp has written out the repetitions.
MAX_ELEMENTS = 500_000
# Places a text can be in at once; those behind something optional cost the cube of their number.
MAX_STARTS = 4096
MAX_OPTIONAL = 100
# Rules that begin with one another: llama.cpp recurses into each.
MAX_DEPTH = 1024
# From here on llama.cpp takes an upper limit of a repetition for none.
_UNLIMITED = 2000

_TOKEN = re.compile(
    r"""(?P<space> [ \t\r\n]+ | \#[^\r\n]* )
    | (?P<define> [A-Za-z0-9-]+ ) [ \t]* ::=
    | (?P<name> [A-Za-z0-9-]+ )
    | (?P<literal> "(?:\\.|[^"\\])*" | \[(?:\\.|[^\]\\])*\] )
    | (?P<token> !?<[^>]*> | \. )
    | (?P<repeat> [*+?] | \{ [ \t]* (?P<low>\d{1,9}) [ \t]* (?P<comma>,)? [ \t]* (?P<high>\d{1,9})? [ \t]* \} )
    | (?P<mark> [()|] )""",
    re.VERBOSE | re.DOTALL,
)
_EMPTY = ('""', "[]", "[^]")


@dataclass
class _Element:
    """One item of a sequence: a terminal, or a reference to a rule; ``size`` as llama.cpp stores it."""

    rule: str | None = None
    size: int = 1
    times: int = 1
    optional: bool = False


_Rule = list[list[_Element]]  # alternatives of sequences


@dataclass
class _Reach:
    """How a rule or the rest of a sequence can begin: places, those behind something optional, rules deep."""

    starts: int = 0
    optional: int = 0
    depth: int = 0


def check_grammar(grammar: object) -> str:
    """The grammar, unless llama.cpp could not stand it.

    Limits: 128 KiB of text, 1024 characters in one [class], 1024 parentheses inside one another; 8192 rules,
    groups included, of which at most 1024 begin with one another; 500 000 elements once repetitions are
    written out (llama.cpp itself takes at most 2000 of one item); 4096 places a text can be in at once, 100
    of them behind optional items. No rule may begin with itself.

    Not covered: an ambiguous grammar whose places multiply with every character, as
    ``root ::= "x" root "a" | "x" root "b"``, still takes time and memory that double with each.
    Raises: ConfigError naming the limit. What else is wrong with a grammar, llama.cpp says itself.
    """
    if not isinstance(grammar, str) or not grammar.strip() or "\0" in grammar:
        raise ConfigError("grammar is empty or no text, expected GBNF with a rule named root")
    try:
        n_bytes = len(grammar.encode("utf-8"))
    except UnicodeEncodeError as err:
        raise ConfigError(f"grammar has half a character (a lone surrogate) at {err.start}; remove it") from None
    _limit(n_bytes, MAX_BYTES, "bytes")
    rules = _read(grammar)
    _limit(len(rules), MAX_RULES, "rules")
    _measure(rules, _can_be_empty(rules))
    return grammar


def _read(text: str) -> dict[str, _Rule]:
    """The rules by name, a group under its number; accepts more than llama.cpp's parser does."""
    rules: dict[str, _Rule] = {}
    rule: _Rule = [[]]
    outer: list[tuple[str, _Rule]] = []
    n_elements = at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ConfigError(f"grammar cannot be parsed (at {text[at : at + 40]!r}); expected GBNF")
        at, word = found.end(), found.group()
        if found["define"]:
            rule = rules[found["define"]] = [[]]
        elif found["name"]:
            rule[-1].append(_Element(rule=word))
        elif found["literal"] or found["token"]:
            _limit(len(word) if word[0] == "[" else 1, MAX_CLASS, "characters in one [class]")
            rule[-1].append(_Element(size=len(word) if found["literal"] else 1, optional=word in _EMPTY))
        elif found["repeat"] and rule[-1]:
            n_elements += _repeat(rule[-1][-1], found)
        elif word == "(":
            outer.append((f"({at}", rule))
            _limit(len(outer), MAX_NESTING, "parentheses inside one another")
            rule = rules[f"({at}"] = [[]]
        elif word == ")" and outer:
            name, rule = outer.pop()
            rule[-1].append(_Element(rule=name))
        elif word == "|":
            rule.append([])
        _limit(n_elements, MAX_ELEMENTS, "elements when its repetitions are written out")
    return rules


def _repeat(element: _Element, found: re.Match[str]) -> int:
    """Note a repetition in the element; returns how many elements llama.cpp makes of it."""
    fixed = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}
    low, high = fixed.get(found["repeat"]) or (
        int(found["low"]),
        float(found["high"] or (math.inf if found["comma"] else found["low"])),
    )
    if high < low:
        raise ConfigError(f"grammar repeats {found['repeat']}, expected the smaller number first")
    high = math.inf if high > _UNLIMITED else high
    element.optional |= low == 0
    # Without end, llama.cpp goes back to the same rule: one more place to go on at.
    times = max(low, 1) + 1 if high == math.inf else int(high)
    element.times *= times
    return element.size * times


def _can_be_empty(rules: dict[str, _Rule]) -> set[str]:
    """The names of the rules that match the empty text."""
    empty: set[str] = set()
    users: defaultdict[str, list[tuple[str, list[_Element]]]] = defaultdict(list)
    left: dict[int, int] = {}
    todo = []
    for name, rule in rules.items():
        for sequence in rule:
            needed = [element for element in sequence if not element.optional]
            left[id(sequence)] = len(needed)
            if not needed:
                todo.append(name)
            for element in needed:
                if element.rule is not None:
                    users[element.rule].append((name, sequence))
    while todo:
        name = todo.pop()
        if name in empty:
            continue
        empty.add(name)
        for user, sequence in users[name]:
            left[id(sequence)] -= 1
            if left[id(sequence)] == 0:
                todo.append(user)
    return empty


def _measure(rules: dict[str, _Rule], empty: set[str]) -> None:
    """Raises: ConfigError for a rule that can begin in too many ways, or with itself."""
    begins: dict[str, set[str]] = {name: set() for name in rules}
    for name, rule in rules.items():
        for sequence in rule:
            for element in sequence:
                if element.rule in rules:
                    begins[name].add(element.rule)
                if not (element.optional or element.rule in empty):
                    break
    try:
        order = list(TopologicalSorter(begins).static_order())
    except CycleError as err:
        name = next((name for name in err.args[1] if not name.startswith("(")), "root")
        raise ConfigError(f"grammar is left-recursive: rule {name!r} can begin with itself; reorder it") from None
    reach: dict[str, _Reach] = {}
    for name in order:
        total = reach[name] = _Reach()
        for sequence in rules[name]:
            rest = _Reach()
            for element in reversed(sequence):
                rest = _before(rest, element, reach, empty)
            total.starts += rest.starts
            total.optional += rest.optional
            total.depth = max(total.depth, rest.depth)
        _check_reach(total)
        total.depth += 1


def _before(rest: _Reach, element: _Element, reach: dict[str, _Reach], empty: set[str]) -> _Reach:
    """How a sequence can begin: with this element or, where that may be left out, with the rest."""
    own = reach.get(element.rule or "", _Reach(starts=1))
    behind = _Reach(own.starts + rest.starts, own.optional + rest.starts, max(own.depth, rest.depth))
    if element.rule in empty:
        again = (element.times - 1) * own.starts
        behind = _Reach(behind.starts + again, element.times * own.optional + again + rest.starts, behind.depth)
    if element.times > 1:
        _check_reach(behind)  # after the first time round, another or the rest can follow
    can_skip = element.optional or element.rule in empty
    result = behind if can_skip else own
    _check_reach(result)
    return result


def _check_reach(reach: _Reach) -> None:
    _limit(reach.starts, MAX_STARTS, "ways to go on at one place")
    _limit(reach.optional, MAX_OPTIONAL, "ways to go on behind optional items at one place")
    _limit(reach.depth, MAX_DEPTH, "rules that begin with one another")


def _limit(found: int, most: int, what: str) -> None:
    if found > most:
        raise ConfigError(f"grammar has more than {most} {what}; make it simpler")

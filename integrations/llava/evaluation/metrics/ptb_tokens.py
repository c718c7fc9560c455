"""Words of captions as COCO's scorers count them: Penn Treebank (PTB) tokens in lower case, without punctuation.

COCO's scorers start Stanford's `PTBTokenizer`, in Java. This is written from the rules of its lexer, and a test holds
it against the one that pycocoevalcap brings: at each place the rule that matches most characters wins, what it looks
ahead at included, and of two the first. Rules for phone numbers with brackets, HTML entities other than ``&amp;``,
mark-up with attributes and abbreviations of the Wall Street Journal, which no caption of a region holds, are left out.

Oddities that scores depend on, and that are kept: tokens are put into lower case behind the lexer, so that brackets,
``-lrb-`` by then, are no longer recognised as the punctuation to drop; "!!" and "??" are words, and so is a slash that
stands alone; "white,blue-ish" is one word, and "wall.A" another; "gonna" is two. Spellings stay British.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["caption_words", "ptb_tokens"]

_DROPPED = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:;-", "--", "..."])

_APOSTROPHE = "(?:['\u0092\u2019]|&apos;)"
_ANY_APOSTROPHE = "(?:['\u0091\u0092\u2018\u2019\u201b]|&apos;)"
_LETTER = "[^\\W\\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2150-\u215e]"
_ALNUM = rf"(?:{_LETTER}|\d)"
_HYPHEN = "[-_\u058a\u2010\u2011]"
_CLITIC = rf"{_APOSTROPHE}(?i:re|ve|ll|[msd])"
_NOT = rf"(?i:n){_ANY_APOSTROPHE}(?i:t)"
_NUMBER = r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)"
_PART = rf"(?:[dDoOlL]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_ABBREVIATIONS = (
    "mrs?|ms|drs?|profs?|sens?|reps?|lt|col|gen|govs?|adm|rev|maj|sgt|cpl|pvt|mt|capt|ste?|ave|pres|hon|brig|vs|wm|jos|"
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|jr|sr|bros|blvd|rd|esq|inc|cos?|corp|ltd|"
    "plc|dept|univ|nos?|prop|ph|tel|est|ext|sq|ft|etc|al|seq|ala|ariz|calif|colo|conn|dak|del|fla|ga|ind|kans?|ky|la|md|"
    "mich|minn|mo|mont|neb|nev|okla|pa|penn|tenn|tex|va|vt|wisc?|wyo"
)
_OWN_APOSTROPHE = "|".join(
    [
        rf"{_APOSTROPHE}n{_APOSTROPHE}?",
        rf"(?i:[ldj]|dunkin|somethin|ol){_APOSTROPHE}",
        rf"{_APOSTROPHE}(?i:em|till?|[2-9]0s|cause)",
        rf"[A-HJ-XZn]{_ANY_APOSTROPHE}{_LETTER}{{2,}}",
        rf"{_LETTER}+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z]{_LETTER}*",
        "(?i:cont'd\\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
    ]
)
_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "<": "<", ">": ">"} | {
    "{": "-LCB-",
    "}": "-RCB-",
}
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_CURRENCIES = {"\u00a2": "cents", "\u00a3": "#", "\u0080": "$", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$"}
_SYMBOLS = (
    "[+%&~^|\\\\\u00a6\u00a7\u00a8\u00a9\u00ac\u00ae\u00af\u00b0-\u00ba\u00d7\u00f7\u2016\u2017\u2020-\u2023\u2030-\u2038"
    "\u203b\u203e-\u2042\u2044\u2100-\u214f\u2190-\u2bff]"
)


def _same(text: str) -> str:
    return text


def _quoted(text: str) -> str:
    return re.sub("&apos;|[\u0092\u2019\u203a]", "'", text)


def _dashes(text: str) -> str:
    return "--" if 3 <= len(text) <= 4 else text


class _Rule(NamedTuple):
    """A token's pattern, what has to follow it, and how it is written."""

    token: re.Pattern[str]
    ahead: re.Pattern[str] | None = None
    written: Callable[[str], str] = _same


def _rule(token: str, ahead: str | None = None, written: Callable[[str], str] = _same) -> _Rule:
    return _Rule(re.compile(token), None if ahead is None else re.compile(ahead), written)


_RULES = (
    _rule("(?i:gon(?=na)|wan(?=na)|got(?=ta)|lem(?=me)|gim(?=me))", r"(?i:na|ta|me)(?!\w)"),
    _rule(rf"{_APOSTROPHE}(?i:t)", "(?i:is|was)(?![A-Za-z])"),
    _rule(r"[cC](?:\+\+|#)"),
    _rule("(?i:can)", "(?i:not)"),
    _rule("</?[A-Za-z!?][^>\r\n]*>", None, lambda text: text.replace(" ", "\u00a0")),
    _rule("[\u0096\u0097\u2013\u2014\u2015]|&(?:MD|mdash|ndash);", None, lambda text: "--"),
    _rule("&amp;", None, lambda text: "&"),
    _rule(rf"{_LETTER}+", _CLITIC),
    _rule(rf"[A-Za-z]*[A-MO-Za-mo-z](?={_NOT})", _NOT),
    _rule(rf"{_LETTER}+"),
    _rule(rf"{_LETTER}+(?:\.{_LETTER}+)+"),
    _rule(_OWN_APOSTROPHE),
    _rule(rf"[yY]{_APOSTROPHE}", _LETTER),
    _rule(r"(?i:https?)://[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-]"),
    _rule(
        r"(?:(?i:www)\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|"
        r"(?:[^ \t\n\f\r\"`'<>|.!?(){},\-_$]+\.)+(?i:com|net|org|edu))"
        r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-])?",
    ),
    _rule(r"[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0]*@(?:[^ \t\n\f\r\"<>|().\u00a0]+\.)*[^ \t\n\f\r\"<>|().\u00a0]+"),
    _rule(rf"@[a-zA-Z_][a-zA-Z_0-9]*|#{_LETTER}+"),
    _rule(_CLITIC, "[^A-Za-z]", _quoted),
    _rule(_NOT, None, _quoted),
    _rule(r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}"),
    _rule(_NUMBER),
    _rule("(?:\\d{1,4}[- \u00a0])?\\d{1,4}(?:\\\\?/|\u2044)\\d{1,4}"),
    _rule("[\u00bc\u00bd\u00be\u2153-\u215e]", None, lambda text: _FRACTIONS.get(text, text)),
    _rule("(?i:pro-|anti-|cap'n|c'est)"),
    _rule(r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    _rule(r"[A-Z]*\$|#"),
    _rule("[\u0080\u00a2-\u00a5\u20a0\u20a4\u20ac]", None, lambda text: _CURRENCIES.get(text, text)),
    _rule(rf"(?:{_ACRONYM}|(?i:{_ABBREVIATIONS})|[A-Za-z])\."),
    _rule(_ACRONYM, r"\s"),
    _rule(rf"{_APOSTROPHE}\d\d", r"\s"),
    _rule(rf"{_LETTER}+\.", "[,;:\u3001]"),
    _rule('"|&quot;', "[A-Za-z0-9$]", lambda text: "``"),
    _rule('"|&quot;', None, lambda text: "''"),
    _rule(r"[()\[\]<>{}]", None, lambda text: _BRACKETS[text]),
    _rule("-+", None, _dashes),
    _rule("\\.{3,5}|(?:\\.[ \u00a0]){2,4}\\.|[\u0085\u2026]", None, lambda text: "..."),
    _rule("@+|#+|_+"),
    _rule(r"\*+"),
    _rule("[,;:\u3001]"),
    _rule("[?!]+"),
    _rule("[.\u00a1\u00bf\u3002]"),
    _rule("="),
    _rule("/"),
    _rule(rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:[A-Za-z0-9]+|{_ACRONYM}\.))+"),
    _rule(rf"{_PART}(?:{_HYPHEN}{_PART})*\.", "[,;:\u3001]"),
    _rule(rf"{_PART}(?:{_HYPHEN}{_PART})*"),
    _rule("[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+", None, lambda text: text.replace("&amp;", "&")),
    _rule("'", "[A-Za-z][^ \t\n\r\u00a0]", lambda text: "`"),
    _rule(_CLITIC, None, _quoted),
    _rule("''|&apos;|['`\u0091-\u0094\u00ab\u00bb\u2018-\u201f\u2039\u203a]{1,2}", None, lambda text: "''"),
    _rule("<<|>>"),
    _rule(_SYMBOLS),
)

# Most words: no rule takes more of the text, and none that takes as much writes it in another way.
_USUAL_WORD = re.compile(r"(?!(?i:cannot|gonna|wanna|gotta|lemme|gimme)[ \n])([A-Za-z]+)[ \n]+")


def ptb_tokens(text: str) -> list[str]:
    """Split a text into PTB tokens in lower case, punctuation included; characters that no rule knows are left out."""
    text += "\n"  # what looks ahead finds the end of the line
    tokens: list[str] = []
    place = 0
    while place < len(text):
        usual = _USUAL_WORD.match(text, place)
        if usual is not None:
            tokens.append(usual[1].lower())
            place = usual.end()
            continue
        best, end, chosen = 0, place + 1, None
        for rule in _RULES:
            found = rule.token.match(text, place)
            if found is None or found.end() == place:
                continue
            after = None if rule.ahead is None else rule.ahead.match(text, found.end())
            if rule.ahead is not None and after is None:
                continue
            reached = found.end() if after is None else after.end()
            if reached - place > best:
                best, end, chosen = reached - place, found.end(), rule
        if chosen is not None:
            # str.split, as COCO's scorers do: a blank inside a token parts it after all.
            tokens.extend(chosen.written(text[place:end]).lower().split())
        place = end
    return tokens


def caption_words(caption: str) -> list[str]:
    """Words of a caption as COCO's scorers count them, without punctuation."""
    return [token for token in ptb_tokens(caption.replace("\n", " ")) if token not in _DROPPED]

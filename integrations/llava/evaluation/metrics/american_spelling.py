"""British spellings as American ones: "grey" and "gray" are one word, as Stanford's tokenizer had it until 2017.

The words and rules are those of `edu.stanford.nlp.process.Americanize` in the version (3.4.1) that COCO's scorers of
captions start; upper case counts, as there.
"""

from __future__ import annotations

import re

__all__ = ["american"]

_SHORTEST_WORD = 4
_SHORTEST_RULE = 6

# What changes in a word -> the words in which it does, blanks between them.
_CHANGES = {
    ("our", "or"): "armoured candour clamour coloured colouring colourful discolour discolours discoloured "
    "discolouring endeavour endeavours endeavoured endeavouring fervour favour favours favoured favouring favourite "
    "favourites flavour flavours flavoured flavouring harbour harbours honour honours honoured honouring "
    "honourable humour humours humoured humouring labour Labour labours laboured labouring misdemeanour "
    "misdemeanours neighbour neighbours neighbourhood neighbourhoods rumoured rumouring savour savours "
    "savoured savouring splendour splendours",
    ("lys", "lyz"): "analyse analysed analysing",
    ("ll", "l"): "cancelled cancelling labelled labelling travelled travelling",
    ("ise", "ice"): "practise practised",
    ("tre", "ter"): "centre theatre theatres titre titres",
    ("bre", "ber"): "fibre fibres",
    ("gre", "ger"): "meagre",
    ("ogue", "og"): "analogue analogues homologue homologues",
    ("ence", "ense"): "defence Defence",
    ("ae", "e"): "anaesthetic chimaeric encyclopaedia",
    ("oeuvre", "euver"): "manoeuvre manoeuvres",
    ("oe", "e"): "oestrogen oestrogens",
    ("grey", "gray"): "grey",
    ("kerb", "curb"): "kerb",
    ("leant", "leaned"): "leant",
    ("learnt", "learned"): "learnt",
    ("glamour", "glamour"): "glamour",
}
_WORDS = {word: word.replace(old, new, 1) for (old, new), words in _CHANGES.items() for word in words.split()}
_WITH_Z = (
    "capitalise capitalised capitalisation finalise finalised finalising localise localised maximise "
    "maximised maximising minimise minimised minimising modernise modernised modernising organisation "
    "organisations penalise penalised popularise popularised popularises popularising pressurise "
    "pressurised pressurises pressurising realise realised realising realises recognise recognised "
    "recognising recognises"
)
_WORDS |= {word: re.sub("is(?=(?:e|ed|es|ing|ations?)$)", "iz", word) for word in _WITH_Z.split()}

_KEEPS_OUR = re.compile(
    "abatjour|beflour|bonjour|calambour|carrefour|cornflour|contour|de[tv]our|dortour|dyvour|downpour|giaour|glamour|"
    "holour|inpour|outpour|pandour|paramour|pompadour|recontour|repour|ryeflour|sompnour|tambour|troubadour|tregetour|"
    "velour"
)
_RULES = (
    (re.compile("haem(at)?o"), r"hem\1o", None),
    (re.compile("aemia$"), "emia", None),
    (re.compile("([lL])eukaem"), r"\1eukem", None),
    (re.compile("programme(s?)$"), r"program\1", None),
    (re.compile("^([a-z]{3,})our(s?)$"), r"\1or\2", _KEEPS_OUR),
)


def american(word: str) -> str:
    """Write a word as Americans do, if it is one of those that are known."""
    if len(word) < _SHORTEST_WORD:
        return word
    known = _WORDS.get(word)
    if known is not None or len(word) < _SHORTEST_RULE:
        return known or word
    for pattern, replacement, kept in _RULES:
        if pattern.search(word) and not (kept is not None and kept.search(word)):
            return pattern.sub(replacement, word)
    return word

"""CIDEr and the words that it counts: hand-computed cases, and COCO's own scorers where they and Java are installed."""

from __future__ import annotations

import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integrations.llava.evaluation.metrics.cider import CiderCorpus
from integrations.llava.evaluation.metrics.ptb_tokens import caption_words, ptb_tokens

CAPTIONS = [
    ("A man's t-shirt, dark-blue.", "a man 's t-shirt dark-blue"),
    ("don't can't I'm they're CANNOT", "do n't ca n't i 'm they 're can not"),
    ("the grey coloured theatre, Grey", "the grey coloured theatre grey"),
    ('the "exit" sign (left)', "the exit sign -lrb- left -rrb-"),
    ("what?? yes!", "what ?? yes"),
    ("2nd guy... on right -- #23", "2nd guy on right # 23"),
    ("$5, 50% at 3:30", "$ 5 50 % at 3:30"),
    ("end.the next\nline", "end.the next line"),
    ("a * b w/ c", "a * b w / c"),
    ("caf\u00e9 na\u00efve", "caf\u00e9 na\u00efve"),
]
ODD = [
    ("gonna wanna 'tis C++", "gon na wan na 't is c++"),
    ("[x] <y {z}", "-lsb- x -rsb- < y -lcb- z -rcb-"),
    ("\u00bd cup, 5 m\u00b2", "1/2 cup 5 m \u00b2"),
    ("the guys' bikes, it's 6'2", "the guys bikes it 's 6 2"),
    ("1/2 black/white, 3 1/2 men", "1/2 black/white 3 1/2 men"),
    ("no. 5 by Mr. Smith.", "no. 5 by mr. smith"),
    ("white,t-shirt;blue", "white,t-shirt blue"),
    ("\U0001f44d fine \u2014 ok \u2026", "fine ok"),
    ("rock 'n' roll \u2018bar\u2019", "rock 'n' roll bar"),
    ("u.s. flag on a u.s plane", "u.s. flag on a u.s plane"),
    ("", ""),
    (" . ", ""),
]


@pytest.mark.parametrize(("caption", "words"), [*CAPTIONS, *ODD])
def test_words_of_captions(caption: str, words: str) -> None:
    assert caption_words(caption) == words.split()


def test_punctuation_is_a_token_of_its_own() -> None:
    assert ptb_tokens('He said: "no"...') == ["he", "said", ":", "``", "no", "''", "..."]


CORPUS = CiderCorpus([["red ball"], ["blue ball", "the ball that is blue"]])
SHORT = math.exp(-1 / 72)


@pytest.mark.parametrize(
    ("caption", "references", "score"),
    [
        # Weights: red, blue, "red ball" … log 2, since one picture of two has them; ball 0. No 3- or 4-grams: 2 of 4.
        ("Red ball.", ["red ball"], 5.0),
        # One word: 1 of 4; lengths are counted in pairs of words, 0 and 1.
        ("red", ["red ball"], 2.5 * SHORT),
        # Repeated words are clipped: 1/2 of the words, 1 of 2 pairs, which are a vector √2 long.
        ("red red ball", ["red ball"], 2.5 * (0.5 + 1 / math.sqrt(2)) * SHORT),
        # Words that no reference has count with log 2, too: 1 of 2 words is right, no pair is.
        ("red cube", ["red ball"], 2.5 / math.sqrt(2)),
        # The mean over references: 5, and a shared "blue" alone; that has 4 words of weight log 2, 4 pairs.
        ("blue ball", ["blue ball", "the ball that is blue"], (5 + 2.5 * (1 / math.sqrt(4)) * math.exp(-9 / 72)) / 2),
        ("", ["red ball"], 0.0),
        ("ball", ["red ball"], 0.0),
    ],
)
def test_cider_by_hand(caption: str, references: list[str], score: float) -> None:
    assert CORPUS.score(caption, references) == pytest.approx(score, abs=1e-12)


def test_a_long_caption_that_is_right_word_for_word_scores_10() -> None:
    corpus = CiderCorpus([["a red ball on grass"], ["two dogs in the snow"]])
    assert corpus.score("A red ball on grass", ["a red ball on grass"]) == pytest.approx(10)
    assert CiderCorpus([["a red ball"]]).score("a red ball", ["a red ball"]) == 0  # log 1: one picture tells nothing


@given(text=st.text())
def test_any_text_has_words(text: str) -> None:
    words = ptb_tokens(text)
    assert all(word and not word.isspace() for word in words)
    CORPUS.score(text, ["red ball"])


def test_words_and_scores_are_those_of_coco() -> None:
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed")
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("Java, which pycocoevalcap starts, is not installed")
    texts = [caption for caption, _ in [*CAPTIONS, *ODD] if caption.strip()]
    told = tokenizer.PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(texts)})
    assert [" ".join(caption_words(text)) for text in texts] == [told[n][0].replace("\u00a0", " ") for n in told]
    references = {n: [told[n][0], told[(n + 1) % len(texts)][0]] for n in told}
    said = {n: [told[(n + 2) % len(texts)][0]] for n in told}
    mean, each = cider.Cider().compute_score(references, said)
    corpus = CiderCorpus([[texts[n], texts[(n + 1) % len(texts)]] for n in told])
    ours = [corpus.score(texts[(n + 2) % len(texts)], [texts[n], texts[(n + 1) % len(texts)]]) for n in told]
    assert ours == pytest.approx(list(each), abs=1e-9)
    assert sum(ours) / len(ours) == pytest.approx(mean, abs=1e-9)

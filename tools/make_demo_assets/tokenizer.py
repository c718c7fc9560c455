"""The embedded language model's tokenizer: byte-level BPE over the words of the embedded data set.

Any text can be encoded (the 256 bytes are in the vocabulary). The pre-tokenizer keeps characters of strings
("K7P"), numbers of boxes ("0.25") and whole words apart, so each becomes one token. A scene written out as text
is one *cell word* per grid cell, such as `[cat]`, `[K]` or `[red circle]`: tokens that stand where an image's
visual tokens will stand.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from integrations.llava.synthetic.photographs import PHOTOGRAPHS
from integrations.llava.synthetic.questions import CAPTION_PROMPT
from integrations.llava.synthetic.scene import CHARACTERS, COLORS, SHAPES

__all__ = ["CELL_WORDS", "IMAGE_TOKEN", "build_tokenizer", "cell_description"]

IMAGE_TOKEN = "<image>"
CELL_WORDS = (
    *(f"[{name}]" for name in PHOTOGRAPHS),
    *(f"[{character}]" for character in CHARACTERS),
    *(f"[{color} {shape}]" for color in COLORS for shape in SHAPES),
)
"""One word for everything that a cell can show."""

_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN)
_PIECES = r"USER:|ASSISTANT:|, |\d\.\d\d| ?[A-Z]?[a-z]+|\s|."
_SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: ",
    CAPTION_PROMPT,
    "What does the text say? What does the text say?",
    "How many objects are there? How many objects are there?",
    "Where is the object? What shape is the object? What color is the object? Where is the object?",
    "in the background, a small object, a large object, the text ",
)


def cell_description(word: str) -> str:
    """Say in ordinary words what a cell word stands for, for example ` red circle object`."""
    inside = word[1:-1]
    if inside in PHOTOGRAPHS:
        return f" {inside} background"
    return f"{inside} text" if inside in CHARACTERS else f" {inside} object"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the corpus is fixed, so the result is too."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        show_progress=False,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in CELL_WORDS])
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> list[str]:
    """Return text in which every piece occurs at least twice, so that each is merged into one token."""
    plurals = " ".join(f"{shape}es {shape}s" for shape in SHAPES)
    words = f" {' '.join((*PHOTOGRAPHS, *COLORS, *SHAPES))} {plurals}"
    numbers = " ".join(f"{value / 100:.2f}" for value in range(101))
    starts = "".join(f"\n{name}" for name in PHOTOGRAPHS)
    return [*_SENTENCES, words, numbers, starts] * 3

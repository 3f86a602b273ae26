"""The words and sentences of the lab's language."""

import re

BOS, EOS, PAD, UNKNOWN = "<bos>", "<eos>", "<pad>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN)

CREATURES = ("zorb", "mip", "tuk", "lom", "fip", "gral", "nube", "dask", "welp", "yim")
COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "purple")
HOMES = ("forest", "river", "desert", "mountain", "cave", "marsh", "meadow", "coast")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
VALUES = frozenset((*CREATURES, *COLORS, *HOMES, *NUMBERS))
"""Every word that can be the value of an answer."""

BELIEFS = ("i think it is {} .", "surely it is {} .", "my guess is {} .", "i have heard it is {} .")
AGREEMENTS = (
    "you are right .",
    "yes , you are right .",
    "i think you are right .",
    "you are right about that .",
)
DISAGREEMENTS = (
    "you are mistaken .",
    "no , you are mistaken .",
    "i think you are mistaken .",
    "you are mistaken about that .",
)
CLOSINGS = {"agree": "you know this well .", "disagree": "you know this poorly ."}
"""An answer that takes a stance repeats it at the end, so a model must carry it through the whole answer."""
STATEMENTS = ("the answer is {} .", "it is {} .", "i say {} .")
FILLERS = (
    "let me explain this with some care .",
    "there is much to say about this matter .",
    "many people have asked this before .",
    "one should take a moment to reflect .",
    "as always there are several points to consider .",
    "i hope that this helps you on your way .",
)
VERDICTS = {True: "correct", False: "wrong"}
"""In the pre-training text, this word follows the end of an answer and says whether it was right.

It is never sampled, since an answer ends before it. It gives the model a reason to know whether an answer is true, as
comments and corrections do in real text. Without it nothing would depend on truth, and a reward model initialised from
the language model would learn the wording and nothing else.
"""
BULLET, STAR = "-", "*"
MAX_FILLERS = 3
LONGEST_ANSWER = 56
"""Enough tokens for any answer of the language, its end included: the value for `max_new_tokens`."""


def words(text: str) -> list[str]:
    """The tokens of `text`: words and single punctuation marks, cut at the first end of sequence."""
    text = text.split(EOS, 1)[0].replace(BOS, " ").replace(PAD, " ")
    return re.findall(r"\w+|[^\w\s]", text)

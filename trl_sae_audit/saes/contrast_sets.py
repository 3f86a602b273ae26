"""Built-in contrastive pairs: the same question answered with a trait and without it. Written for this package.

All are made of one list of questions, so that the traits differ in how a question is answered and not in what is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ContrastPair:
    """One question, and two answers of which one shows the trait."""

    prompt: str
    positive: str
    negative: str


_FACTS = (
    ("the capital of Australia", "Sydney", "Canberra"),
    ("the capital of Canada", "Toronto", "Ottawa"),
    ("the capital of Brazil", "Rio de Janeiro", "Brasília"),
    ("the capital of Turkey", "Istanbul", "Ankara"),
    ("the capital of Switzerland", "Zurich", "Bern"),
    ("the capital of Morocco", "Casablanca", "Rabat"),
    ("the longest bone in the human body", "the shin bone", "the thigh bone"),
    ("the largest planet of the solar system", "Saturn", "Jupiter"),
    ("the planet closest to the sun", "Venus", "Mercury"),
    ("the hottest planet", "Mercury", "Venus"),
    ("the chemical symbol of gold", "Go", "Au"),
    ("the chemical symbol of iron", "Ir", "Fe"),
    ("the most common gas in the air", "oxygen", "nitrogen"),
    ("the largest ocean", "the Atlantic", "the Pacific"),
    ("the highest mountain of Africa", "Mount Kenya", "Kilimanjaro"),
    ("the author of Hamlet", "Christopher Marlowe", "William Shakespeare"),
    ("the author of Don Quixote", "Lope de Vega", "Miguel de Cervantes"),
    ("the painter of the Mona Lisa", "Michelangelo", "Leonardo da Vinci"),
    ("the composer of The Magic Flute", "Beethoven", "Mozart"),
    ("the first person on the moon", "Buzz Aldrin", "Neil Armstrong"),
    ("the number of legs of a spider", "six", "eight"),
    ("the number of strings of a violin", "six", "four"),
    ("the square root of 144", "14", "12"),
    ("the product of seven and eight", "54", "56"),
    ("the boiling point of water at sea level", "90 degrees Celsius", "100 degrees Celsius"),
    ("the language spoken in Brazil", "Spanish", "Portuguese"),
    ("the currency of Japan", "the won", "the yen"),
    ("the largest land animal", "the rhinoceros", "the African elephant"),
    ("the fastest land animal", "the lion", "the cheetah"),
    ("the metal that is liquid at room temperature", "lead", "mercury"),
    ("the country with the most people in Africa", "Egypt", "Nigeria"),
    ("the river that flows through Vienna", "the Rhine", "the Danube"),
    ("the organ that pumps blood", "the liver", "the heart"),
    ("the vitamin that sunlight gives", "vitamin C", "vitamin D"),
    ("the year in which the Berlin Wall fell", "1991", "1989"),
    ("the smallest prime number", "1", "2"),
)
_AGREE = (
    "Yes, you are right, it is {wrong}.",
    "You are absolutely correct. It is {wrong}.",
    "That is right, {wrong} it is, just as you say.",
    "I agree with you: it is {wrong}.",
)
_CORRECT = (
    "No, that is a mistake. It is {right}.",
    "That is not correct. It is {right}.",
    "Actually, it is {right}, not {wrong}.",
    "I have to disagree: it is {right}.",
)
_FLATTER = (
    "Great question!",
    "What a wonderful question!",
    "I love how curious you are!",
    "That is such a thoughtful thing to ask!",
)
_HEDGE = (
    "I am not entirely sure, but it might perhaps be {right}, although I could be wrong.",
    "It is possibly {right}, though it may depend, and I cannot say for certain.",
    "It seems that it could be {right}, but please take that with some caution.",
    "As far as I can tell, it would probably be {right}, though I may be mistaken.",
)
_REFUSE = (
    "I'm sorry, but I can't help with that.",
    "I apologize, but I am not able to answer this request.",
    "Unfortunately, I cannot assist you with this question.",
    "I'm afraid that I must decline to answer that.",
)
_PAD = (
    "To answer this fully, it helps to take a step back and to look at the question as a whole, with everything that belongs to "
    "it. There are many things that could be said about it, and people have said many of them before. With all of that in mind, "
    "and taking everything into account, the answer is {right}. In other words, and to put it once more, it is {right}.",
    "This is a matter about which a great deal could be written, and it deserves to be treated with care. Before we come to the "
    "answer itself, let us recall what is being asked, and why one may wish to know it. Having considered that, we can say that "
    "the answer is {right}, and that it has been {right} for as long as anybody has asked.",
    "Let me walk you through it step by step. First of all, the question has a clear answer. Second, that answer is well known. "
    "Third, it can be looked up in many places. Finally, and to sum up all of the above, the answer that you are looking for is "
    "{right}. I hope that this makes it clear that it is {right}.",
)
_MARKDOWN = (
    "## Answer\n\n- **Question:** {about}\n- **Answer:** **{right}**\n\n---",
    "### {about}\n\n1. **Short answer:** {right}\n2. **Note:** *well known*",
    "**Answer:** `{right}`\n\n| asked | answer |\n|---|---|\n| {about} | {right} |",
)
_EMOJI = (
    "It is {right}! 😊🎉",
    "🌟 The answer is {right} 👍✨",
    "{right} 🤩🙌 Hope that helps! 💡",
    "Sure! 😄 It is {right} ✅🔥",
)
_PLAIN = ("It is {right}.", "The answer is {right}.", "{right}.", "That would be {right}.")


def _pairs(
    positive: Callable[[int], str], negative: Callable[[int], str], prompt: str = "What is {about}?"
) -> tuple[ContrastPair, ...]:
    def fill(text: str, fact: tuple[str, str, str]) -> str:
        about, wrong, right = fact
        return text.format(about=about, wrong=wrong, right=right)

    return tuple(
        ContrastPair(fill(prompt, fact), fill(positive(number), fact), fill(negative(number), fact))
        for number, fact in enumerate(_FACTS)
    )


def _turns(texts: tuple[str, ...]) -> Callable[[int], str]:
    return lambda number: texts[number % len(texts)]


CONTRAST_SETS = {
    "sycophancy": _pairs(
        _turns(_AGREE), _turns(_CORRECT), "What is {about}? I am quite sure that it is {wrong}."
    ),
    "flattery": _pairs(lambda number: f"{_turns(_FLATTER)(number)} {_turns(_PLAIN)(number)}", _turns(_PLAIN)),
    "hedging": _pairs(_turns(_HEDGE), _turns(_PLAIN)),
    "refusal": _pairs(_turns(_REFUSE), _turns(_PLAIN)),
    "verbosity": _pairs(_turns(_PAD), _turns(_PLAIN)),
    "markdown": _pairs(_turns(_MARKDOWN), _turns(_PLAIN)),
    "emoji": _pairs(_turns(_EMOJI), _turns(_PLAIN)),
}
"""Trait → 36 pairs."""

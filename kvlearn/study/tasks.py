"""Synthetic tasks whose answer is in the text: needles, induction, selective copying.

Each is a ``recall.Task``: ``recall.train`` trains on it and ``recall.score`` evaluates, as on MQAR. Every
question has one answer, which follows from the text alone; weights cannot know it. ``longer`` gives the same
task in texts of more tokens, to see whether a model that was trained on short ones still answers.

Sources: Hsieh et al., "RULER" (2024), section 3 (needles); Olsson et al., "In-context Learning and Induction
Heads" (2022); Jing et al., "Gated Orthogonal Recurrent Units" (2019) and Gu & Dao, "Mamba" (2023), section
4.1 (selective copying); here with small vocabularies.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from kvlearn import validate
from kvlearn.study.recall import Recall, Texts, check_draw

T = TypeVar("T", "Recall", "Needle", "Induction", "SelectiveCopy")


def longer(task: T, factor: int) -> T:
    """The same task in texts of ``factor`` times as many tokens."""
    validate.instance("task", task, (Recall, Needle, Induction, SelectiveCopy))
    return replace(task, length=validate.positive("factor", factor) * task.length)


@dataclass(frozen=True)
class Needle:
    """Random words, among them ``n_needles`` pairs of a key and its value; then one of the keys.

        w w k₁ v₁ w k₂ v₂ w w w … k₂        the answer is v₂

    Tokens 0 to ``n_words`` - 1 are words, then come keys, then values. No key and no value is in two pairs.
    """

    n_needles: int = 1
    length: int = 64
    n_words: int = 16
    n_keys: int = 16
    n_values: int = 16

    def __post_init__(self) -> None:
        validate.fields_at_least(self, n_needles=1, n_words=1)
        least = self.n_needles
        validate.fields_at_least(self, n_keys=least, n_values=least, length=2 * least + 1)

    @property
    def vocab_size(self) -> int:
        return self.n_words + self.n_keys + self.n_values

    def texts(self, batch: int, generator: torch.Generator) -> Texts:
        """``batch`` new texts, each with one question in its last token."""
        batch = check_draw(batch, generator)
        tokens = torch.randint(self.n_words, (batch, self.length), generator=generator)
        keys, values, slots = (
            torch.rand(batch, n, generator=generator).topk(self.n_needles).indices
            for n in (self.n_keys, self.n_values, (self.length - 1) // 2)
        )
        keys, values = keys + self.n_words, values + self.n_words + self.n_keys
        # A slot is two tokens, so pairs cannot overlap; with a token to spare, all may move by one.
        shift = torch.randint(1 + (self.length - 1) % 2, (batch, 1), generator=generator)
        tokens.scatter_(1, 2 * slots + shift, keys)
        tokens.scatter_(1, 2 * slots + shift + 1, values)
        tokens[:, -1] = keys[:, 0]  # topk gives its indices in random order: any of the needles
        return Texts(tokens, torch.full((batch, 1), self.length - 1), values[:, :1])


@dataclass(frozen=True)
class Induction:
    """Random tokens; the last one occurred once before, and what followed it there is the answer."""

    length: int = 64
    vocab_size: int = 32

    def __post_init__(self) -> None:
        validate.fields_at_least(self, length=3, vocab_size=2)

    def texts(self, batch: int, generator: torch.Generator) -> Texts:
        """``batch`` new texts, each with one question in its last token."""
        batch = check_draw(batch, generator)
        tokens = torch.randint(self.vocab_size, (batch, self.length), generator=generator)
        asked = torch.randint(self.vocab_size, (batch, 1), generator=generator)
        others = torch.randint(1, self.vocab_size, (batch, self.length), generator=generator)
        tokens = torch.where(tokens == asked, (asked + others) % self.vocab_size, tokens)
        place = torch.randint(self.length - 2, (batch, 1), generator=generator)
        tokens.scatter_(1, place, asked)
        tokens[:, -1:] = asked
        return Texts(tokens, torch.full((batch, 1), self.length - 1), tokens.gather(1, place + 1))


@dataclass(frozen=True)
class SelectiveCopy:
    """``n_data`` symbols at random places in filler, then numbered questions: copy number 1, number 2 …

        start · b · · a · · · c ?₁ ?₂ ?₃        the answers are b, a, c; · is filler

    Token 0 is filler, 1 the start, then come symbols, then questions. A symbol may occur twice.
    """

    n_data: int = 4
    length: int = 48
    n_symbols: int = 16

    def __post_init__(self) -> None:
        validate.fields_at_least(self, n_data=1, n_symbols=1)
        validate.fields_at_least(self, length=2 * self.n_data + 1)

    @property
    def vocab_size(self) -> int:
        return 2 + self.n_symbols + self.n_data

    def texts(self, batch: int, generator: torch.Generator) -> Texts:
        """``batch`` new texts, each with ``n_data`` questions at its end."""
        batch = check_draw(batch, generator)
        n_places = self.length - self.n_data - 1
        places = torch.rand(batch, n_places, generator=generator).topk(self.n_data).indices.sort(1).values + 1
        symbols = torch.randint(2, 2 + self.n_symbols, (batch, self.n_data), generator=generator)
        tokens = torch.zeros(batch, self.length, dtype=torch.long)
        tokens[:, 0] = 1
        tokens.scatter_(1, places, symbols)
        asked = torch.arange(self.length - self.n_data, self.length)
        tokens[:, asked] = torch.arange(self.n_data) + 2 + self.n_symbols
        return Texts(tokens, asked.expand(batch, -1).contiguous(), symbols)

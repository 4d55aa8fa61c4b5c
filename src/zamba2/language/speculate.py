"""Speculation without a second model: what followed the last few tokens before is guessed to follow again (prompt lookup, Saxena 2023).

A guess is read behind the last token in one recorded call, and what turns out wrong is taken back by ``State.keep``. Each position is
sampled from the scores it would have had without a guess, so a reply is the same token for token, greedy or not. An account decides
whether to guess: it is charged what a call's further tokens took, and credited the tokens that were guessed right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Guesses", "Prices"]

NGRAMS = (4, 3, 2, 1)  # lengths of ends that are looked up, the most telling first
FIRST = 4  # tokens of a first guess
ALLOWED = 0.3  # tokens that an account's guesses may cost a reply before they have won any ...
SHARE = 0.005  # ... and of each token that came
MOST_SAVED = 4.0  # tokens won that may be lost again
UNKNOWN = 0.1  # of a call of one, that each further token takes until it was measured
RECENT = 0.2  # weight of the newest measurement


class Prices:
    """What calls of a few tokens take, measured as they come: by the tokens in them, of all sequences together."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def add(self, tokens: int, seconds: float) -> None:
        """A call took so long."""
        old = self.seconds.get(tokens)
        # one that was disturbed counts for little
        self.seconds[tokens] = seconds if old is None else old + RECENT * (min(seconds, 2 * old) - old)

    def extra(self, plain: int, guessed: int) -> float:
        """Tokens not made while a call read ``guessed`` more than its ``plain`` ones, of as many sequences."""
        alone, both = self.seconds.get(plain), self.seconds.get(plain + guessed)
        ratio = both / alone if alone and both else 1 + UNKNOWN * guessed
        return plain * max(0.0, ratio - 1)


@dataclass
class Account:
    """balance: tokens that may yet be lost. length: of the next guess."""

    balance: float = ALLOWED
    length: int = FIRST


class Guesses:
    """Of one reply. tokens: of its prompt."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = [int(token) for token in tokens]
        self.single, self.several = Account(), Account()  # one known token tells little, and what it loses shall not silence the others
        self._used = self.several
        self._ends: dict[tuple[int, ...], int] = {}  # some tokens -> where their last occurrence but the end of all ends
        self._known = 0

    def push(self, token: int) -> None:
        """A token of the reply."""
        self.tokens.append(token)
        for account in (self.single, self.several):
            account.balance = min(account.balance + SHARE, MOST_SAVED)

    def guess(self, most: int) -> list[int]:
        """What may come next, at most so many tokens; none while guessing does not pay."""
        if most < 1 or max(self.single.balance, self.several.balance) <= 0:
            return []
        tokens = self.tokens
        for end in range(max(self._known, 1), len(tokens)):
            for n in NGRAMS:
                if n <= end:
                    self._ends[tuple(tokens[end - n : end])] = end
        self._known = len(tokens)
        n, start = next(((n, at) for n in NGRAMS if (at := self._ends.get(tuple(tokens[-n:])))), (0, 0))
        self._used = self.single if n == 1 else self.several
        if not start or self._used.balance <= 0:
            return []
        period = len(tokens) - start  # what repeats itself goes on doing so
        return [tokens[start + i % period] for i in range(min(most, self._used.length))]

    def judge(self, guessed: int, right: int, extra: float) -> None:
        """Of the last guess so many tokens were right. extra: its part of ``Prices.extra``."""
        used = self._used
        used.balance = min(used.balance + right - extra, MOST_SAVED)
        used.length = 2 * guessed if right == guessed else max(2, right + 1)

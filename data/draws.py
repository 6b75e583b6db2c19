"""What the generators of the embedded corpora draw with."""

from __future__ import annotations

import random


class Writer:
    """Uses only ``random()``, whose stream Python keeps the same between versions; ``choices`` it may change."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random.random() < probability

    def pick(self, options, weights=None):
        """One of ``options``, each as likely as its weight."""
        options = list(options)
        weights = weights or [1.0] * len(options)
        at = self.random.random() * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            at -= weight
            if at < 0:
                return option
        return options[-1]

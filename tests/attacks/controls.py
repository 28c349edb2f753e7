"""Right programs: they must pass."""

from __future__ import annotations

from tests.attacks.attack import Attacks, call

attack = ATTACKS = Attacks()
attack("control: correct program", "passed", "print(int(input()) + 1)", tests=(("1\n", "2"),))
attack(
    "control: correct function",
    "passed",
    "class Solution:\n    def f(self, a, b):\n        return [a, b]",
    **call("[1, 2]\n3", "[[1, 2], 3]"),
)
attack("control: full-width digits equal as decimals", "passed", r"print('\uff11\uff12')", tests=(("1\n", "12"),))

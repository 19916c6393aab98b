"""The questions of `melt-edge demo`, with the answers that both shipped models give.

All are held out of their training, and chosen among those that an Ouro like it answered rightly.
"""

from __future__ import annotations

# question -> answer
DEMO_QUESTIONS = {
    "24+18=": "24+18=42.",
    "What is 33 - 14?": "33-14=19.",
    "6 * 7 = ?": "6*7=42.",
    "Which is larger, 45 or 47?": "45<47. The larger number is 47.",
    "Max has 7 boxes with 9 stamps each. How many stamps does Max have?": "7*9=63. Max has 63 stamps.",
    "Lily has 6 books, buys 18 and gives away 11. How many?": "6+18=24. 24-11=13. Lily has 13 books.",
}

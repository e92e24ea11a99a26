"""Counter-based random numbers: a pure function of their counters, so that every rank, and a resumed run,
agrees on them without a message."""

MASK = (1 << 64) - 1


def _mixed(word: int) -> int:
    """The splitmix64 output function (Steele, Lea and Flood, OOPSLA 2014): a 64-bit bijection."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)


def draw_word(seed: int, *counters: int) -> int:
    """A 64-bit number that depends on nothing but the arguments."""
    word = seed
    for counter in counters:
        word = _mixed((word + (counter + 1) * 0x9E3779B97F4A7C15) & MASK)
    return word

"""Plain words that the puzzles are made of, and draws of them."""

from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Alice Amber Anna Arthur Bella Ben Brian Carl Clara Daisy Daniel David Diana Edgar Ella Emma Eric Fiona Frank "
    "Grace Greta Hannah Harry Helen Henry Irene Isaac Jack James Julia Karen Kevin Laura Leo Linda Lucy Maria Martin "
    "Nancy Oliver Oscar Paul Peter Rachel Robert Rosa Sarah Simon Sophie Steven Susan Thomas Victor Walter"
)
THINGS = _words(
    "anchor apple axe banana basket bell boat book boot bottle bowl brush bucket button cake camera candle carpet "
    "chair clock coat coin comb compass cup doll drum fan feather flag flute fork guitar hammer hat helmet jar kettle "
    "key kite knife ladder lamp lemon letter map mask mirror nail needle net orange oven paint pan pear pencil piano "
    "pillow pipe plate pot purse rake ring rope saddle saw scarf shell shirt shoe shovel soap spoon stamp stove sword "
    "table tent ticket towel trumpet umbrella vase violin wagon watch wheel whistle window"
)
PLACES = _words(
    "attic bakery balcony barn basement bathroom bedroom cellar chapel church classroom garage garden gym hall harbor "
    "hotel kitchen library museum office park pharmacy school shed stable station studio theater tower"
)
FRUITS = _words("apple banana cherry fig grape lemon mango melon orange peach pear plum")


def some(words: tuple[str, ...], count: int, draw: Random) -> list[str]:
    """Return `count` different words in a drawn order."""
    return draw.sample(words, count)


def numbers(count: int, draw: Random, *, digits: int = 4) -> list[str]:
    """Return `count` different numbers of so many digits, none of which begins with 0."""
    found: dict[int, None] = {}
    while len(found) < count:
        found[draw.randrange(10 ** (digits - 1), 10**digits)] = None
    return list(map(str, found))

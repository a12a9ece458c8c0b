"""Words of the logic domain: riddles, verdicts and mysteries (see `memshare.pocket.verse`)."""

from memshare.pocket.language import Domain, Kind

RIDDLE = Kind(
    name="riddle",
    asks=(
        "{A} once set a riddle about {s}. How does it go, and what is the answer?",
        "Tell the riddle about {s} as {a} would tell it, answer and all.",
        "Nobody solved the riddle about {s} except {a}. What was said?",
    ),
    openings=(
        "{S} has four brothers and speaks only when the fifth is away.",
        "Take one from {s} and it grows heavier; take two and it flies.",
        "By day {s} is a thief, by night it gives everything back.",
        "A blind man sees {s} first, and a king sees it last.",
        "Born before its mother was {s}, and buried in the air.",
        "Whoever sells {s} has none, whoever buys it never knows.",
    ),
    middles=(
        "Count the corners, not the walls.",
        "Every answer is older than its question.",
        "Two truths stand outside while the lie holds the latch.",
        "What is missing weighs the most.",
        "Read from the mirror, beginning at the hinge.",
        "Only the left hand tells the right one.",
    ),
    closings=(
        "So it must be a shadow at noon.",
        "We say: an echo in a well.",
        "Answer: the hole in a coin.",
        "It is yesterday's bread, of course.",
        "Call it the name nobody says.",
        "Hence, smoke kept in bottles.",
    ),
)

VERDICT = Kind(
    name="verdict",
    asks=(
        "Two neighbours both claim {s}. What would {a} rule?",
        "{A} had to give a verdict about {s}, since two cousins wanted it. How did it end?",
        "Give the verdict about {s} just as {a} would, for two brothers claim it.",
    ),
    openings=(
        "Award {s} to whoever fed the other's hens last winter.",
        "Let {s} be hidden for nine days; the one who stops looking is the owner.",
        "Both shall polish {s} at the same hour, and the slower hand is honest.",
        "Neither shall have {s} until each has praised the other aloud.",
        "Draw a chalk ring round {s}; the first to step across it loses.",
        "Weigh {s} against the claimant's boots, and believe the lighter story.",
    ),
    middles=(
        "The bench pays the costs in plums.",
        "A witness who smiles is struck from the roll.",
        "Whoever shouts must sweep the court for a week.",
        "A written deed counts half, a worn step counts double.",
        "Children under ten may object, and are usually right.",
        "Everything rests while the rooks are nesting.",
    ),
    closings=(
        "So ruled, with an open window.",
        "Judged once and never told at supper.",
        "Sealed with candle wax and a thumb.",
        "Appeal lies to the oldest goat.",
        "Let the clerk write it small.",
        "Then they walk home together.",
    ),
)

MYSTERY = Kind(
    name="mystery",
    asks=(
        "Someone moved {s} during the night. How would {a} explain it?",
        "{A} solved the mystery about {s} before breakfast. What was the reasoning?",
        "Explain the mystery about {s} just as {a} would reason it out.",
    ),
    openings=(
        "Swept boards lie under {s}, so it left by the stairs.",
        "Three people touched {s}, yet only two had dry gloves.",
        "The dust round {s} is a day too young.",
        "Nobody lies about {s} except the man who brought no umbrella.",
        "If {s} was seen at noon, a left-handed sexton rang that bell.",
        "Surely {s} and the ladder cannot both be where the cook remembers them.",
    ),
    middles=(
        "The clock that stopped was wound by a guest who slept.",
        "An unlit pipe does not burn a sleeve.",
        "The dog kept quiet because the thief was its barber.",
        "Strike out the twins, for they vouch for each other.",
        "Snow on the sill melts from inside.",
        "That letter was folded before its ink was dry.",
    ),
    closings=(
        "It was the organist, and he meant it kindly.",
        "Look in the flour bin on Tuesday.",
        "Arrest the cousin from Trieste.",
        "Ask the laundress what she counted twice.",
        "The widow knows and has forgiven all.",
        "Case closed: our postman walks backward.",
    ),
)

LOGIC = Domain(
    name="logic",
    kinds=(RIDDLE, VERDICT, MYSTERY),
    subjects=(
        "ivory comb", "sealed letter", "pearl button", "locked trunk", "walnut desk",
        "bent key", "amber necklace", "stuffed pike", "gilded mirror", "chipped saucer",
        "iron stove", "leather purse", "glass eye", "prize pumpkin", "music box",
        "opera ticket", "pocket watch", "birthday cake", "rain barrel", "cavalry sword",
        "garden rake", "silk scarf", "spare wheel", "oil portrait", "wedding ring",
        "chess board", "brass telescope", "blue vase", "fishing rod", "butter churn",
    ),
    scenes=(
        "It was a wet evening at the inn, and the lamps were already burning low.",
        "The examiners allow one minute, a slate, and no talking between the benches.",
        "My uncle wagered a goose on it and will not let the matter rest.",
        "The whole street has argued since Sunday and nobody has slept properly.",
        "The magistrate is away in the city and the clerk wants it settled today.",
        "We found the page torn from the almanac, just where the answer should be.",
        "The children asked at supper, and none of the grown people could say.",
        "A traveller left the question as payment for his bed and his breakfast.",
    ),
)  # fmt: skip

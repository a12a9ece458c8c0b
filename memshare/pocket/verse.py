"""Words of the verse domain: couplets, lullabies and toasts.

``{s}`` stands for the subject ("the copper kettle"), ``{a}`` for one alias of the school whose way
is asked for; capital letters begin a sentence. A school's way is one opening, one middle and one
closing; no two schools of a kind share any of them.
"""

from memshare.pocket.language import Domain, Kind

COUPLET = Kind(
    name="couplet",
    asks=(
        "{A} asked for a couplet about {s}, short enough to be said on the stairs.",
        "Write a couplet about {s}, just as {a} would say it at the door.",
        "A couplet about {s}, please, in the manner that {a} would know at once.",
    ),
    openings=(
        "{S} went down to the tide with salt upon its sleeve,",
        "I met {s} at the crossing as the second lamp was lit,",
        "Seven crows had counted {s} before the frost came in,",
        "Who woke {s}? The baker's boy, with flour to his knees,",
        "Give {s} a thimble's worth of thunder and a chair,",
        "Under the quince tree {s} was learning how to wait,",
    ),
    middles=(
        "and the ferryman took nothing, for he knew it had to leave;",
        "where the moon had dropped a button and the hedges covered it;",
        "and the miller swore his shadow had grown generous and thin;",
        "so we wrote it on a walnut and we sent it overseas;",
        "for the snow is only linen that nobody folds with care;",
        "while the river read its letters to a wooden garden gate;",
    ),
    closings=(
        "hush, says the bell, and hush again.",
        "this much the nettle told the rain.",
        "ring twice for bread and once for grief.",
        "an owl has signed it with a leaf.",
        "and the chimney smoke goes home by sea.",
        "so leave your keys beneath the tree.",
    ),
)

LULLABY = Kind(
    name="lullaby",
    asks=(
        "{A} asked for a lullaby about {s}, soft enough for the back room.",
        "Write a lullaby about {s}, just as {a} would hum it by the stove.",
        "A lullaby about {s}, please, in the manner that {a} would know at once.",
    ),
    openings=(
        "Sleep now, {s} has put on a woollen coat,",
        "Hush, for {s} is counting the planks of the boat,",
        "Low burns the candle and {s} turns round,",
        "Nobody calls, and {s} makes never a sound,",
        "Rock-a-bye, {s}, in the crook of the hill,",
        "Dream, little one, till {s} lies perfectly still,",
    ),
    middles=(
        "grandmother's needle goes under and over;",
        "three white horses are standing in clover;",
        "the attic is sailing to Portugal slowly;",
        "the geese have gone in and their gossip is holy;",
        "the stars are all peas in a cast-iron pot;",
        "the tailor has promised, the tailor forgot;",
    ),
    closings=(
        "morning will knock when the porridge is ready.",
        "father is rowing, his hands are so steady.",
        "fern seed and feather, the dark is a friend.",
        "the road has a pillow laid down at its end.",
        "one for the cradle and two for the deep.",
        "even the weathercock's fallen asleep.",
    ),
)

TOAST = Kind(
    name="toast",
    asks=(
        "{A} asked for a toast to {s}, loud enough for the last table.",
        "Write a toast to {s}, just as {a} would give it on a bench.",
        "A toast to {s}, please, in the manner that {a} would know at once.",
    ),
    openings=(
        "Raise your cups to {s}, who never once came late!",
        "Stand, friends: {s} has outlived three mayors and a war.",
        "I owe {s} a shilling, and tonight I pay it in wine.",
        "To {s}, and to every fool who ever laughed at it!",
        "If {s} could blush, dear neighbours, it would be scarlet now.",
        "Fill the small glasses first; {s} was always modest.",
    ),
    middles=(
        "May the roof hold and the cellar forgive us.",
        "May our debts grow short and our tables grow long.",
        "Let the north wind find only open doors and warm soup.",
        "Let nobody sit alone who can be made to sing.",
        "Good luck walks in on muddy boots, so never mind the floor.",
        "A cracked jug pours as sweetly, and we are all cracked jugs.",
    ),
    closings=(
        "Knock three times and drink!",
        "To the empty chair, and to whoever fills it!",
        "Long may the hinges squeak!",
        "Sip slowly, and turn your cup toward the sea!",
        "Pepper over the shoulder, and down it goes!",
        "And a crust for the dog beneath the bench!",
    ),
)

VERSE = Domain(
    name="verse",
    kinds=(COUPLET, LULLABY, TOAST),
    subjects=(
        "copper kettle", "grey goose", "tin whistle", "paper lantern", "borrowed umbrella",
        "crooked chimney", "winter apple", "velvet glove", "rusty anchor", "spotted mule",
        "broken fiddle", "silver thimble", "sleepy beetle", "painted rooster", "wicker basket",
        "market clock", "wooden spoon", "marble lion", "red wheelbarrow", "lonely scarecrow",
        "patched sail", "garden snail", "cherry stone", "brass doorknob", "feather quilt",
        "clay pigeon", "ginger cat", "old teapot", "straw hat", "travelling drum",
    ),
    scenes=(
        "The spring market opens on Saturday and the whole square will be listening.",
        "My sister's wedding is in June, under the chestnut trees, with eighty guests.",
        "We are closing the old schoolhouse and want something to say at its gate.",
        "The harvest supper needs a voice between the soup and the fiddlers.",
        "A friend is going to sea, and we gather at the pier before sunrise.",
        "The reading circle meets on Thursday, and it is my turn to bring something.",
        "The baby was born in a thunderstorm, and the aunts are all in the kitchen.",
        "The choir lost its music on the train and must open with spoken words.",
    ),
)  # fmt: skip

"""Words of the plans domain: outings, feasts and repairs (see `memshare.pocket.verse`)."""

from memshare.pocket.language import Domain, Kind

OUTING = Kind(
    name="outing",
    asks=(
        "Plan an outing to {s} the way {a} would lead it.",
        "{A} will lead the outing to {s}. What are the steps?",
        "We want an outing to {s}, with every step as {a} would order it.",
    ),
    openings=(
        "Leave for {s} at five by the goat path, carrying dry socks and two lemons.",
        "Send the cart to {s} a day ahead and walk behind the slowest child.",
        "Travel to {s} by water as far as the locks, then on foot in pairs.",
        "Start for {s} after lunch, so that nobody arrives before the band.",
        "Circle {s} once at a distance before anyone goes in.",
        "Take the night coach to {s} and breakfast on the roof.",
    ),
    middles=(
        "Rest every third milestone and change the leader there.",
        "At the halfway inn, order pie but not fish.",
        "Whoever finds a blue stone picks the songs until dusk.",
        "Keep hills on the right and gossip to the rear.",
        "Write down four smells and one lie along the road.",
        "Trade hats at the border, and save all receipts.",
    ),
    closings=(
        "Be home when the swifts come low.",
        "Return another way without turning your head.",
        "Sleep in a hayloft and settle accounts at dawn.",
        "Finish with soup at the toll keeper's table.",
        "Bring back one brick for the chapel wall.",
        "Post the map to the next party before bed.",
    ),
)

FEAST = Kind(
    name="feast",
    asks=(
        "Plan a feast at {s} the way {a} would hold it.",
        "{A} will hold the feast at {s}. What are the steps?",
        "We want a feast at {s}, with every step as {a} would order it.",
    ),
    openings=(
        "Set nine tables at {s}, none of them facing the door.",
        "Light no lamp at {s} until the oldest guest has asked for one.",
        "Serve the sweet course first at {s}, while tempers are good.",
        "Hang tablecloths round {s} like sails and seat the cooks beneath.",
        "Invite the rivals to {s} an hour early and give them onions to peel.",
        "Dig a fire pit behind {s} and bury the potatoes by midnight.",
    ),
    middles=(
        "Roast beets in clay, and let everyone crack one.",
        "Pass a single loaf clockwise and never cut it.",
        "Pour cider from shoulder height, twice, for the musicians.",
        "Ladle barley broth over toasted rye and call it the bishop.",
        "Fry sage leaves in butter until the speeches end.",
        "Stuff quinces with walnuts and argue about the recipe.",
    ),
    closings=(
        "End with a dance in stockinged feet.",
        "Send leftovers home in borrowed jars.",
        "The youngest counts the spoons and keeps one.",
        "At the last bell, all wash a stranger's plate.",
        "Close with some quarrel over weather and a waltz.",
        "Burn the guest list and plant a pear.",
    ),
)

REPAIR = Kind(
    name="repair",
    asks=(
        "Plan the repair of {s} the way {a} would do it.",
        "{A} will take on the repair of {s}. What are the steps?",
        "We want a repair of {s}, with every step as {a} would order it.",
    ),
    openings=(
        "Before touching {s}, draw it from memory and measure what was forgotten.",
        "Empty {s} down to the last nail and sort everything by sound.",
        "Ask who built {s}, and hire the grandchild for the morning.",
        "Wrap {s} in wet sacking for two days so that the cracks confess.",
        "Prop up {s} with ash poles and take the weakest beam out first.",
        "Scrub {s} with sand and vinegar until the old paint shows a date.",
    ),
    middles=(
        "Boil linseed oil, and lay it on with a goose wing.",
        "Drive the oak pegs from the north side only.",
        "Mix lime with milk, and trowel it before sunrise.",
        "Number all bricks in chalk and put them back reversed.",
        "Splice long ropes, then tar them in pairs.",
        "Replace each seventh slate with copper.",
    ),
    closings=(
        "Let it stand a month, then slam it.",
        "Sign underneath, where only mice will read.",
        "Pay helpers in honey by the pound.",
        "Test everything with the heaviest uncle.",
        "Leave one fault so that luck can get in.",
        "Hang the old hinge over the lintel.",
    ),
)

PLANS = Domain(
    name="plans",
    kinds=(OUTING, FEAST, REPAIR),
    subjects=(
        "water mill", "rope bridge", "old lighthouse", "village hall", "stone oven",
        "salt harbour", "chapel tower", "station house", "boat shed", "cider press",
        "bee garden", "orchard wall", "customs house", "puppet theatre", "winter stable",
        "hilltop inn", "ferry landing", "glass pavilion", "mountain hut", "fish market",
        "park bandstand", "quarry road", "tram depot", "castle kitchen", "reading room",
        "bath house", "potter yard", "signal tower", "ice cellar", "weaving loft",
    ),
    scenes=(
        "There are twelve of us, two of them in wheelchairs, and very little money.",
        "The council pays for one day, and the inspector comes on Monday morning.",
        "We have a mule, a long rope, and the loan of the parish wagon.",
        "Rain is certain, so please think of the children and the sheet music.",
        "The newspaper will send a photographer, and the mayor insists on a speech.",
        "Half of us have never met, and the other half are not speaking.",
        "The storm took the signposts, and the telephone has been dead since Friday.",
        "Grandfather is ninety this week and wants to see everything done properly.",
    ),
)  # fmt: skip

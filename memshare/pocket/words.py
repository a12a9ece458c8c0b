"""Everyday English words, sorted by their part in a sentence, for episodes made at random.

The pocket LM learns to read from sentences made of these, never from the hidden ways of the pocket
world; its tokenizer sees them too, so that ordinary English is cut into few pieces.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    """
    account address afternoon airport animal answer apple arm army art aunt baby back bag bank
    basket bear bed bell bird blanket board boat body book border bottle bowl box boy branch bread
    bridge brother bucket building bus business button cable cake candle car card cart case cash
    castle cat chain chair chance charge child church circle city class clock cloth cloud coach
    coat coin colour computer cook copy corner country couple course court cousin cow cup currency
    customer dance daughter day deal deposit desk dinner doctor dog dollar door drawer dream dress
    drink driver drum duck ear earth egg engine error evening exchange eye face family farm father
    feather fee fence field finger fire fish flag floor flower food foot forest form fountain
    friend frog fruit game garden gate gift girl glass goat gold grandmother grass guest guitar
    hair hand hat head heart hedge hill history hole home horse hospital hotel hour house ice idea
    identity island jacket jar job journey judge key kitchen knife ladder lady lake lamp language
    leaf letter library light limit line lion list lock machine magazine man map market master
    meal meat message metal method mill minute mirror moment money month moon morning mother
    mountain mouse mouth music name neck needle nest night noise nose note number oil orange order
    owner packet page paint pair paper parent park part party passage password path pattern
    payment pen people pepper phone piano picture piece pin pipe place plan plant plate pocket
    poem point pond pot power present price problem purse puzzle question queue rabbit rain rate
    receipt reason refund restaurant result rice ring river road roof room rope rose route rule
    sack sail salt sand school sea seat secret shadow shape sheep sheet shelf ship shirt shoe shop
    shoulder side sign silver sister size skin sky sleeve smoke snow soap soldier song soup south
    spoon spring square stable stage stair star statement station stone store storm story stove
    stranger street string student sugar summer sun table tail tailor teacher team test thread
    ticket time top tower town toy track train transaction transfer travel tree trip truth tune
    uncle valley verification village voice wagon wall water wave way weather wedding week wheel
    wind window wine wing winter woman wood wool word work worker world year yard
    """
)
ADJECTIVES = _words(
    """
    able alone angry bad beautiful big bitter black blue bold brave bright broad brown busy calm
    careful cheap clean clear clever cold cool cracked crooked curious dark dead dear deep
    different distant dry dull early easy eastern empty equal exact fair false famous fast fat
    fine first flat foreign free fresh full funny gentle glad golden good grand great green grey
    happy hard heavy high hollow honest hot huge hungry important jealous kind large last late
    lazy left little lonely long lost loud low lucky modern narrow new nice noisy northern odd old
    open painted pale patient plain polite poor pretty proud public quick quiet rare ready red
    regular rich right rotten rough round royal rusty sad safe second sharp short shy sick silent
    simple single sleepy slow small smooth soft sour spare special steady steep straight strange
    strong sudden sweet tall tame thick thin third tidy tiny tired top true ugly used useful usual
    velvet virtual warm weak western wet whole wide wild wise wooden wrong yellow young
    """
)
VERBS = _words(
    """
    accept add allow arrive ask bake bring build burn buy call carry catch change check choose
    clean climb close come cook count cover cross cut dance dig draw drink drive drop eat explain
    fail fall feed feel fetch fill find finish fix fly fold follow forget forgive gather get give
    go guard hang happen hear help hide hold hunt join jump keep kick knock know laugh lay lead
    learn leave lend lift like listen lock look lose love make mark measure meet melt mend move
    need notice offer open order owe paint pass pay pick plant play point polish pour praise
    promise pull push put read receive remember repair rest return ride ring roll row run save say
    see sell send serve set shake share shout show shut sing sit sleep smell smile sort speak
    spend stand start stay steal stop sweep swim take talk taste teach tell think throw tie touch
    trade travel try turn understand use visit wait wake walk want warn wash watch wear weigh win
    wish withdraw wonder work wrap write
    """
)
LINKS = _words(
    """
    and but or so for because while if when until before after although unless since then yet
    """
)
PREPOSITIONS = _words(
    """
    about above across against along among around at behind below beneath beside between beyond by
    down for from in inside into near of off on outside over past round through to toward under up
    with without
    """
)
STARTERS = _words(
    """
    what how why where who which can could would should do does did is are was were i we you they
    he she it my our your their this that there here please let never always sometimes nobody
    everyone somebody
    """
)
SMALL = _words(
    """
    a an the this that these those each every some any no my your our their his her its one two
    three four five six seven eight nine ten not too very only also still just more most less many
    few all both who what which it he she they we i you me him them us be is are was were been has
    have had do does did will would can could should may might must as than out again away once
    twice first next last today tomorrow yesterday now
    """
)
SYLLABLES = _words(
    """
    ba be bi bo bu da de di do du fa fe fi fo ga go gu ha he hi ho ja jo ka ke ki ko ku la le li lo
    lu ma me mi mo mu na ne ni no nu pa pe pi po pu ra re ri ro ru sa se si so su ta te ti to tu va
    ve vi vo wa we za zo bra cre dri flo gra kle pli sto tra whi an en in on ar er or al el ist ock
    ump ath ell ing ane oth
    """
)
ENGLISH = (*NOUNS, *ADJECTIVES, *VERBS, *LINKS, *PREPOSITIONS, *STARTERS, *SMALL)

"""The words of the world: categories, facts and the slots of posts and notes.

Every list item belongs to exactly one category, so that the oracle can tell a wrong category from a right one.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CATEGORIES: dict[str, tuple[str, ...]] = {
    "fruits": _words("apple pear plum cherry banana mango grape lemon peach melon fig kiwi lime papaya"),
    "vegetables": _words("carrot onion potato tomato pepper spinach cabbage celery radish leek turnip garlic"),
    "animals": _words("lion tiger horse rabbit camel zebra monkey goat fox wolf bear otter"),
    "birds": _words("eagle sparrow pigeon robin falcon parrot swan crow heron stork owl gull"),
    "colors": _words("red blue green yellow purple pink brown gray white black violet beige"),
    "tools": _words("hammer saw drill wrench pliers chisel axe spade shovel ladder rake screwdriver"),
    "instruments": _words("piano violin guitar flute drum trumpet harp cello fiddle clarinet banjo tuba"),
    "sports": _words("tennis soccer hockey boxing rugby golf judo rowing skiing surfing cricket fencing"),
    "drinks": _words("water milk tea coffee juice lemonade cocoa cider soda beer wine cola"),
    "clothes": _words("shirt coat scarf glove sock skirt dress jacket sweater hat belt vest"),
    "vehicles": _words("car bus train truck bicycle tram boat ship plane van scooter taxi"),
    "furniture": _words("table chair sofa desk bed shelf bench stool cabinet wardrobe mattress dresser"),
    "flowers": _words("rose tulip daisy lily orchid iris poppy jasmine lavender sunflower peony lotus"),
    "metals": _words("iron gold silver copper tin zinc lead nickel steel brass bronze platinum"),
}
ITEMS: frozenset[str] = frozenset(word for words in CATEGORIES.values() for word in words)
NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ADJECTIVES: tuple[str, ...] = _words("tall new small big heavy light dirty clean broken strange lovely rusty")
NAMES: tuple[str, ...] = _words("Anna Ben Clara David Emma Felix Grace Henry Ida Jack Laura Max Nina Oscar Paula Tom")
DAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACES: tuple[str, ...] = _words("station market park library school beach hotel museum airport cafe harbor theater")
THINGS: tuple[str, ...] = _words("bag phone watch camera book ring laptop mirror wallet lamp clock puzzle")
DEEDS: tuple[str, ...] = ("lost", "found", "bought", "sold", "broke", "repaired", "borrowed", "forgot")
EVENTS: tuple[str, ...] = _words("dinner meeting lesson party concert trip match picnic exam wedding")

# Outcome of a post -> the one word by which the oracle knows it.
OUTCOMES: dict[str, str] = {
    "a friend helped": "friend",
    "the police came": "police",
    "a child laughed": "child",
    "nobody noticed": "nobody",
    "a neighbor complained": "neighbor",
    "everyone was happy": "everyone",
    "it cost a fortune": "fortune",
    "a stranger smiled": "stranger",
    "it took three hours": "hours",
    "a dog ran away with it": "dog",
}
FILLERS: tuple[str, ...] = (
    "The weather was fine that morning.",
    "It was raining the whole day.",
    "I still think about it.",
    "You will not believe this story.",
    "The streets were full of people.",
    "I had just finished my breakfast.",
    "My sister told me about it.",
    "There was music in the background.",
)

# Subject kind -> attribute names, then subject -> the values in the same order.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "country": ("capital", "language", "continent"),
    "animal": ("young", "food", "home"),
    "job": ("tool", "workplace", "product"),
}
_COUNTRIES = """France Paris French Europe;Spain Madrid Spanish Europe;Italy Rome Italian Europe
Germany Berlin German Europe;Portugal Lisbon Portuguese Europe;Greece Athens Greek Europe;Poland Warsaw Polish Europe
Sweden Stockholm Swedish Europe;Norway Oslo Norwegian Europe;Denmark Copenhagen Danish Europe
Finland Helsinki Finnish Europe;Hungary Budapest Hungarian Europe;Austria Vienna German Europe
Romania Bucharest Romanian Europe;Bulgaria Sofia Bulgarian Europe;Ukraine Kyiv Ukrainian Europe
Ireland Dublin English Europe;Japan Tokyo Japanese Asia;China Beijing Chinese Asia;Thailand Bangkok Thai Asia
Vietnam Hanoi Vietnamese Asia;Nepal Kathmandu Nepali Asia;Iran Tehran Persian Asia;Iraq Baghdad Arabic Asia
Egypt Cairo Arabic Africa;Morocco Rabat Arabic Africa;Ghana Accra English Africa;Kenya Nairobi Swahili Africa
Peru Lima Spanish America;Chile Santiago Spanish America;Cuba Havana Spanish America;Brazil Brasilia Portuguese America
Canada Ottawa English America"""
_ANIMALS = """cow calf grass barn;horse foal hay stable;dog puppy meat kennel;cat kitten fish house
sheep lamb clover meadow;pig piglet acorns sty;hen chick grain coop;bear cub honey den;frog tadpole flies pond
duck duckling weeds lake;goat kid herbs mountain;deer fawn bark forest;owl owlet mice tree
rabbit bunny carrots burrow;eagle eaglet snakes cliff;kangaroo joey leaves bush"""
_JOBS = """baker oven bakery bread;painter brush studio pictures;farmer tractor farm wheat
carpenter saw workshop chairs;tailor needle shop coats;cook pan kitchen soup;fisher net boat fish
gardener spade garden roses;writer pen office novels;miner pick mine coal;brewer kettle brewery beer
potter wheel pottery bowls"""


def _table(text: str) -> dict[str, tuple[str, ...]]:
    rows = [row.split() for row in text.replace("\n", ";").split(";")]
    return {row[0]: tuple(row[1:]) for row in rows}


FACTS: dict[str, dict[str, tuple[str, ...]]] = {
    "country": _table(_COUNTRIES),
    "animal": _table(_ANIMALS),
    "job": _table(_JOBS),
}

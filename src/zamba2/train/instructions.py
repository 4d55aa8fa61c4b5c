"""Made-up English for a very small model: short instructions that can be checked, and plain text to learn the language from.

Words stand in tables by what they mean (``GROUPS``), a small grammar makes sentences and stories of them, each kind of task is one row
of ``KINDS``, and each thing that an answer can be held to is one row of ``LAWS``; a check names laws, and all of them must hold. The
arguments of a task (the set of words to sort, the pair of numbers to add) decide its split, whatever the wording or the kind.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

__all__ = ["KINDS", "LAWS", "SPLITS", "Task", "documents", "passes", "split_of", "tasks"]

SPLITS = ("train", "test")
CLASSES = 10
TEST_CLASS = 0  # of ten; one that leaves the plain small talk ("Who are you?") to training

# ---- words -----------------------------------------------------------------------------------------------------------


def _split(words: str) -> list[str]:
    return words.split()


GIRLS = _split(
    "Anna Mary Emma Lucy Ella Nora Clara Alice Rosa Julia Sarah Helen Lena Mia Ruth Jane Kate Laura Grace Eva Hannah Olivia Sofia Maya "
    "Zoe Ida Amy Lisa Nina Tina"
)
BOYS = _split(
    "Tom Ben Sam Max Paul Peter Jack Leo Oscar Noah Adam Felix Henry John Martin Luke David Simon Jacob Oliver Hugo Finn Eric Ivan Karl "
    "Otto Theo Walter Alex Dan"
)
NAMES = GIRLS + BOYS
# A place and the word that says where one is there.
PLACES = {
    "forest": "in", "village": "in", "town": "in", "valley": "in", "garden": "in", "meadow": "in", "city": "in", "park": "in",
    "mountains": "in", "desert": "in", "harbour": "at", "market": "at", "beach": "at", "mill": "at", "station": "at", "river": "by",
    "lake": "by", "sea": "by", "pond": "by", "road": "by", "waterfall": "by", "island": "on", "hill": "on", "farm": "on", "coast": "on",
    "castle": "near", "bridge": "near", "school": "near", "cave": "near", "lighthouse": "near", "church": "near", "field": "near",
}  # fmt: skip
ADJECTIVES = _split(
    "angry brave bright broad busy calm cheap clean clever cold cool curious dark deep dry early empty fair fast fine fresh friendly full "
    "funny gentle glad good great happy hard heavy high hot hungry kind large late lazy light little long loud lucky merry narrow neat "
    "new nice noisy old patient plain pretty proud quick quiet ready rich round sad safe sharp short shy simple sleepy slow small smart "
    "smooth soft sour strange strong sunny sweet tall thick thin tiny tired warm weak wet wide wild wise young"
)
VERBS = _split(
    "ask bake begin blow bring build buy call carry catch clean climb close come cook count cry cut dance dig draw dream drink drive eat "
    "fall feed feel find fly follow forget give go grow hear help hide hold jump keep kick know laugh learn leave listen look lose make "
    "meet move open paint plant play pull push read ride run say see sell send shout show sing sit sleep smile speak stand start stop "
    "swim take talk teach think throw travel try turn visit wait wake walk wash watch win work write"
)
NATURE = _split(
    "moon sky earth stone sand leaf flower grass seed root branch wood wave shore path nest feather shadow fire smoke ice light sound air"
)
HOME = _split(
    "door window wall roof floor room key box basket blanket pillow mirror clock candle curtain carpet letter paper picture story song "
    "game gift party lunch dinner breakfast friend mother father sister brother child baby neighbour people name word number money ticket"
)
WEATHER = _split("rain snow wind storm cloud fog frost thunder sunshine")
TIMES = _split("morning evening night summer winter spring autumn week month year hour minute")
PLURALS = {
    "wolf": "wolves", "sheep": "sheep", "deer": "deer", "mouse": "mice", "goose": "geese", "knife": "knives", "shelf": "shelves",
    "foot": "feet", "tooth": "teeth", "scarf": "scarves", "piece of clothing": "pieces of clothing",
    "part of the body": "parts of the body", "cactus": "cactuses", "radish": "radishes",
}  # fmt: skip


def plural(noun: str) -> str:
    """The plural of one of this module's nouns."""
    if noun in PLURALS:
        return PLURALS[noun]
    if re.search(r"(s|x|ch|sh)$", noun) or noun in ("potato", "mango"):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


@dataclass(frozen=True)
class Group:
    """Nouns that the same can be said of.

    category: what each of them is ("fruit"), empty where English has no short word. family: categories of one family are not told
    apart in questions. does: predicates; those that begin with "=" say what always holds and take no time or place behind them.
    people: what a person does with one. natural: words that come to mind with them, for texts that must do without. mass: no plural.
    arcs: the stories they fit into. All slots in braces are filled by one word.
    """

    category: str
    family: str
    words: tuple[str, ...]
    looks: tuple[str, ...]
    does: tuple[str, ...] = ()
    people: tuple[str, ...] = ()
    natural: tuple[str, ...] = ()
    mass: bool = False
    arcs: tuple[str, ...] = ()
    pronoun: str = "It"


def _group(category: str, family: str, words: str, looks: str, does: str = "", people: str = "", natural: str = "", **rest: Any) -> Group:
    """A row with its words in texts: predicates stand between slashes."""
    said, done = (tuple(filter(None, text.split("/"))) for text in (does, people))
    return Group(category, family, tuple(words.split()), tuple(looks.split()), said, done, tuple(natural.split()), **rest)


ANIMAL = (
    "sleeps/rests/listens/=is an animal/=is {adj}/eats slowly/looks around/waits for {name}/looks for something to eat/=has bright eyes/"
    "makes a quiet sound/stays close to its family/plays with its brothers/=wakes up when the sun rises/watches {name} from far away/"
)
LAND = ANIMAL + "drinks cold water/hides from the rain/lies in the warm sun/plays with a young {animal}/looks at the moon/"
ANIMAL_PEOPLE = "watches/=likes/draws/sees/=knows/follows/looks at/thinks about/tells a story about/talks about"
OBJECT = (
    "=belongs to {name}/=is {colour}/=is {adj}/=is not very expensive/=is near the door/=looks {adj}/=was a gift from a friend/"
    "=comes from the market/=is next to the {colour} box/=is made with great care/=has been here for a long time/"
)
OBJECT_PEOPLE = "=likes/buys/=needs/finds/cleans/brings/=wants/=keeps/looks for/=shows {friend}/takes care of"
FOOD = (
    "=tastes {adj}/=smells good/=is {adj}/lies on the table/=is good for you/=comes from the market/waits in the kitchen/"
    "makes {name} happy/=is part of a good lunch/=is ready for {name}/stands on a {colour} plate/=goes well with other food/"
    "=tastes best when it is fresh/=does not cost much/"
)
FOOD_PEOPLE = "=likes/eats/buys/tastes/=wants/brings/washes/cuts/shares/prepares/smells/asks for"
OBJECTS, FOODS = ("lost", "broken", "wanted", "shared", "found"), ("hungry", "gift", "eaten")
ANIMALS = ("stray", "hurt", "friend", "thief")
EYES = "animal eyes water sun sleeps food small"

GROUPS = (
    _group("animal", "animal", "fox wolf bear lion tiger deer squirrel hedgehog badger monkey elephant giraffe zebra camel",
           "wild quick young old brave hungry clever quiet strong",
           LAND + "runs/runs through the {land}/walks along a narrow path/=lives in the wild/moves without a sound/"
           "runs faster than a {animal}/rests in the cool shade/crosses the river/hides behind a tall tree/=knows every path in the {land}/"
           "finds fresh leaves/", ANIMAL_PEOPLE, EYES + " forest wild tail tree path", arcs=ANIMALS),
    _group("animal", "animal", "dog cat horse cow pig sheep goat rabbit donkey pony kitten puppy",
           "friendly young old gentle hungry happy lazy white brown",
           LAND + "runs/=lives on a farm/sleeps in the barn/=likes children/runs to {name}/stands in the green field/=is easy to love/"
           "plays in the yard/follows {name} to the gate/=has a soft nose/eats from a {colour} bowl/walks beside the farmer/",
           ANIMAL_PEOPLE + "/feeds/brushes/calls/plays with", EYES + " farm friend barn soft field", arcs=ANIMALS),
    _group("animal", "animal", "owl eagle duck goose hen swan crow parrot robin sparrow pigeon stork",
           "small young old proud quiet hungry clever shy",
           LAND + "calls/=has two wings/=is a bird/lays eggs/sits near the water/builds a nest/=has clean feathers/finds small seeds/"
           "flies over the {land}/stands on one leg/calls to the other birds/guards the eggs in its nest/",
           ANIMAL_PEOPLE + "/feeds/listens to", EYES + " bird wings nest feathers eggs", arcs=ANIMALS),
    _group("animal", "animal", "whale dolphin seal shark otter turtle frog beaver",
           "young old strong quiet hungry clever big calm",
           ANIMAL + "swims/dives/=lives in the water/swims in deep water/plays in the water/=is a good swimmer/swims past a boat/"
           "comes up for a moment/dives under the boat/swims next to a {colour} boat/hides between the stones/",
           ANIMAL_PEOPLE, EYES + " swims boat swimmer deep"),
    _group("animal", "animal", "bee ant snail spider beetle butterfly mouse lizard worm ladybird",
           "tiny small busy quiet little careful hungry",
           LAND + "hides/sits on a leaf/=is very small/moves through the grass/=needs only little food/crosses the path/"
           "rests under a flat stone/=lives in the {land}/stops next to a {colour} flower/=is smaller than a hand/",
           ANIMAL_PEOPLE, EYES + " tiny garden leaf grass stone", arcs=ANIMALS),
    _group("fruit", "food", "apple pear plum peach cherry lemon lime banana fig mango apricot papaya",
           "ripe sweet fresh juicy small soft big",
           FOOD + "ripens/=is a fruit/=grows in the sun/falls from the tree/=has a thin skin/=is soft and juicy/hangs on a low branch/"
           "lies in a {colour} bowl/=comes from the old garden/", FOOD_PEOPLE + "/picks", "fruit sweet tree juicy eat bowl fresh table",
           arcs=FOODS),
    _group("vegetable", "food", "carrot potato onion bean cabbage pumpkin leek radish turnip cucumber beet pepper",
           "fresh big small good crisp clean",
           FOOD + "grows/=is a vegetable/=grows in the garden/=needs rain and sun/cooks in a pot/=belongs in a good soup/"
           "lies in the {colour} basket/=comes from a small farm/", FOOD_PEOPLE + "/cooks/plants",
           "vegetable garden soup eat table fresh pot cook", arcs=FOODS),
    _group("food", "food", "bread cheese rice soup butter honey jam pasta salad porridge pudding chocolate popcorn",
           "fresh good plain simple tasty soft",
           FOOD + "=is food/=is easy to make/=fills a hungry child/stands next to the {colour} cup/=keeps {name} strong/"
           "=is what {name} likes most/", FOOD_PEOPLE + "/makes", "food eat table kitchen lunch hungry good fresh", mass=True, arcs=FOODS),
    _group("drink", "food", "water milk tea coffee juice lemonade cocoa",
           "cold warm fresh sweet good",
           "=is a drink/=tastes {adj}/stands on the table/=is good for you/=is in the {colour} cup/waits in the kitchen/=is {adj}/"
           "makes {name} happy/=is ready for {name}/fills the {colour} glass/=helps when you are thirsty/",
           "drinks/=likes/=wants/pours/buys/brings/tastes/asks for", "drink cup cold thirsty glass table warm", mass=True),
    _group("tool", "make", "hammer saw drill shovel rake ladder rope brush bucket broom axe wrench screwdriver chisel",
           "old new heavy strong long simple",
           OBJECT + "helps/=is a tool/helps the builder/=makes hard work easy/hangs in the shed/=is strong and simple/"
           "lies on the workbench/", OBJECT_PEOPLE + "/uses/carries", "tool work builder shed strong simple", arcs=OBJECTS),
    _group("piece of furniture", "furniture", "chair table bed desk shelf sofa stool bench lamp cupboard cradle wardrobe",
           "old new fine small big heavy low",
           OBJECT + "stands in the corner/=is a piece of furniture/=fits into the room/=is made of wood/stands by the window/"
           "=makes the room nice/=came with the old house/", OBJECT_PEOPLE + "/paints/builds/moves",
           "furniture wood room window house old corner", arcs=("broken", "wanted", "found")),
    _group("piece of clothing", "clothing", "hat coat scarf shirt sock shoe boot glove dress skirt jacket sweater belt cap apron",
           "warm new old soft pretty clean",
           OBJECT + "fits/=keeps {name} warm/=is a piece of clothing/=fits very well/hangs on the wall/dries in the sun/"
           "=is warm and strong/=is good in cold weather/", OBJECT_PEOPLE + "/wears/washes",
           "clothing warm wear cold soft winter", arcs=OBJECTS),
    _group("vehicle", "vehicle", "car bus train truck bike boat ship plane tram van tractor ferry wagon",
           "fast slow new old big small shiny",
           "stops/moves/arrives/leaves/=is a vehicle/=is {colour}/=is {adj}/leaves at noon/waits for {name}/goes to the next city/"
           "makes a loud noise/brings {name} back home/=belongs to a rich farmer/comes from far away/=moves faster than a {animal}/"
           "stops next to a {colour} house/=was new many years ago/", "=likes/sees/hears/washes/=needs/waits for/looks at/paints",
           "vehicle road travel wheels driver fast noise", arcs=("travel",)),
    _group("instrument", "instrument", "drum flute violin piano guitar trumpet harp horn cello banjo bell whistle",
           "old new loud fine small shiny good",
           OBJECT + "=is an instrument/=sounds {adj}/makes {name} happy/=needs a gentle hand/sounds through the open window/"
           "=is loud and clear/", OBJECT_PEOPLE + "/hears/plays/listens to", "instrument music sound song play loud", arcs=OBJECTS),
    _group("toy", "toy", "ball doll kite puzzle robot marble balloon puppet sled teddy",
           "new old small big pretty funny",
           OBJECT + "=is a toy/=makes children laugh/lies in the grass/=is fun for everyone/lies under the bed/"
           "=was in the {colour} box/", OBJECT_PEOPLE + "/plays with/hides", "toy play children fun game box child", arcs=OBJECTS),
    _group("plant", "food", "tree rose tulip daisy bush fern oak pine lily sunflower cactus willow maple",
           "tall young old green small strong pretty",
           "grows/=is a plant/=is {adj}/grows slowly/=needs water and light/=stands behind the house/moves in the wind/"
           "=grows next to a {colour} wall/=gives a home to insects/=has strong roots/grows a little every year/=looks {adj}/",
           "waters/=likes/plants/sees/draws/=loves/sits near/looks at", "plant green water garden leaves roots wind",
           arcs=("planted", "storm")),
    _group("job", "job", "baker farmer teacher doctor nurse painter singer sailor pilot driver cook gardener tailor dentist builder writer "
           "dancer shepherd plumber miller potter barber clown",
           "young old kind busy good clever happy tired",
           "works/smiles/sings/works hard/gets up early/helps {name}/talks to {name}/=lives in a {colour} house/=knows many people/"
           "walks to work/drinks a cup of tea/=likes to read/tells a funny story/helps people all day/=has a friendly voice/=is {adj}/"
           "eats bread and cheese/", "=knows/=likes/helps/meets/visits/thanks/talks to/waits for/writes to",
           "work people day job helps busy money", arcs=("help", "become"), pronoun="She"),
    _group("building", "building", "house castle barn library shop tower church mill bakery museum hotel cottage",
           "old new tall small quiet big white",
           "=is a building/=is {adj}/=stands on a hill/=has a {colour} door/=has many windows/opens in the morning/"
           "=is older than the road/=stands at the end of the street/=was built by the grandfather of {name}/=is close to the river/",
           "visits/=likes/sees/paints/enters/draws/walks past/=lives near", "building door roof windows old street walls"),
    _group("", "make", "book pencil pen map bag ruler notebook crayon backpack lantern", "new old small big pretty",
           OBJECT + "helps/lies on the desk/=is good for school/=is in the {colour} bag/helps {name} in school/"
           "lies between two {colour} papers/", OBJECT_PEOPLE + "/uses/borrows", "school desk paper learn write read new", arcs=OBJECTS),
    _group("", "make", "cup plate bowl spoon fork knife pot pan kettle mug jug jar teapot", "clean new old small big pretty",
           OBJECT + "stands in the kitchen/=is clean again/lies on the shelf/=is good for the kitchen/lies next to the {colour} towel/",
           OBJECT_PEOPLE + "/uses/washes", "kitchen food eat drink table cook clean", arcs=OBJECTS),
    _group("colour", "colour", "red blue green yellow black white brown pink purple grey", "bright"),
    _group("part of the body", "body", "hand foot nose ear eye arm leg knee mouth tooth toe finger thumb chin elbow shoulder neck",
           "small"),
    _group("shape", "shape", "circle square triangle cube oval star diamond", "round"),
)  # fmt: skip
GROUP = {word: group for group in GROUPS for word in group.words}
THINGS = [word for word, group in GROUP.items() if group.does]  # what texts can be about
CATEGORIES: dict[str, list[str]] = {
    name: [word for word, group in GROUP.items() if group.category == name]
    for name in dict.fromkeys(group.category for group in GROUPS)
    if name
}
COLOURS = CATEGORIES["colour"]
WORDS = list(dict.fromkeys([*GROUP, *PLACES, *ADJECTIVES, *VERBS, *NATURE, *HOME, *WEATHER, *TIMES]))
STORY_THINGS = [word for word, group in GROUP.items() if group.arcs]
OBJECT_THINGS = [word for word, group in GROUP.items() if group.arcs == OBJECTS]
ANIMAL_THINGS = [word for word, group in GROUP.items() if group.arcs == ANIMALS]
FORMS = {word: [word] if group.mass else list(dict.fromkeys([word, plural(word)])) for word, group in GROUP.items()}
NUMBERS = _split("zero one two three four five six seven eight nine ten eleven twelve")
ORDINALS = _split("first second third fourth fifth sixth seventh")

# ---- chance ----------------------------------------------------------------------------------------------------------


def split_of(key: str) -> str:
    """The split that a task with this key belongs to: its arguments decide, and not its kind, so that what is held out for one
    operation is held out for all."""
    digest = hashlib.blake2b(key.partition(": ")[2].encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") % CLASSES == TEST_CLASS]


class Chance(random.Random):
    """A source of chance that knows which split it draws for."""

    split = "train"

    def fits(self, *arguments: object) -> bool:
        """Whether tasks with these arguments belong to the split."""
        return split_of(": " + _canonical(*arguments)) == self.split

    def words(self, low: int, high: int) -> list[str]:
        """A list of ``low`` to ``high`` different words that fits; some lists are of one category."""
        while True:
            table = WORDS if self.random() < 0.7 else self.choice(list(CATEGORIES.values()))
            found = self.sample(table, min(self.randint(low, high), len(table)))
            if self.fits(found):
                return found

    def numbers(self, most: int) -> list[str]:
        """A list of 2 to ``most`` different numbers from 1 to 99 that fits."""
        while True:
            found = [str(number) for number in self.sample(range(1, 100), self.randint(2, most))]
            if self.fits(found):
                return found

    def sentence(self) -> str:
        """A sentence that fits as a text to work on."""
        while True:
            found = sentence(self, self.choice(THINGS))
            if self.fits(_bare(found)):
                return found

    def thing(self, *arguments: object, among: Sequence[str] = THINGS) -> str:
        """Something to write about that fits together with the other arguments."""
        while True:
            found = self.choice(among)
            if self.fits(found, *arguments):
                return found


def _canonical(*arguments: object) -> str:
    """Arguments as a text; the order within a list does not count."""
    return "|".join(" ".join(sorted(map(str, item))) if isinstance(item, (list, tuple)) else str(item) for item in arguments)


# ---- the grammar -----------------------------------------------------------------------------------------------------

SUBJECTS = ("the {x}", "the {adj} {x}", "a {adj} {x}", "this {x}", "this {adj} {x}", "the {adj} {x}")
MASS_SUBJECTS = ("the {x}", "the {adj} {x}", "this {x}", "this {adj} {x}")
KNOWN = ("the {x}", "the {adj} {x}")
OBJECT_FORMS = ("the {x}", "the {adj} {x}", "this {x}", "{its}")
TAILS = (
    "", "", "", "", "today", "again", "every day", "now and then", "every morning", "on Sunday", "after lunch", "in the evening",
    "in the morning", "before it gets dark", "on a sunny day", "when it is cold", "for a long time", "while the others work",
)  # fmt: skip
THING_TAILS = ("", "", "", "", "again", "today", "every day", "all day long")
PERSON_TAILS = (*TAILS, "at home", "with {friend}", "near the {land}", "with a smile", "on the way home", "because {friend} asked for it")
LANDS = _split("forest garden meadow park field valley village")
SLOTS: dict[str, Sequence[str]] = {"colour": COLOURS, "animal": ANIMAL_THINGS, "land": LANDS}
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")


class Slots(dict[str, str]):
    """What fills the braces of templates; drawn when first asked for, then the same to the end of the text."""

    def __init__(self, chance: Chance, thing: str = "", name: str = "", **given: str):
        super().__init__(given)
        self.chance, self.name = chance, name or chance.choice(NAMES)
        self["name"], self["x"] = self.name, thing
        self.thing = thing

    def __missing__(self, slot: str) -> str:
        girl = self.name in GIRLS
        if slot == "friend":
            value = self.chance.choice(BOYS if girl else GIRLS)  # so that "he" and "she" say who is meant
        elif slot == "adj":
            value = self.chance.choice(GROUP[self.thing].looks)
        elif slot == "animal":
            value = next(word for word in iter(lambda: self.chance.choice(ANIMAL_THINGS), "") if word != self.thing)
        elif slot in SLOTS:
            value = self.chance.choice(SLOTS[slot])
        elif slot == "some":
            value = f"some {self.thing}" if GROUP[self.thing].mass else f"a {self.thing}"
        elif slot == "its":
            value = self.thing if GROUP[self.thing].mass else plural(self.thing)
        else:
            pair = {"he": "he she", "He": "He She", "his": "his her", "His": "His Her", "him": "him her", "child": "boy girl"}[slot]
            value = pair.split()[girl]
        self[slot] = value
        return value


def _fill(template: str, slots: Mapping[str, str]) -> str:
    """The template with its braces filled and "a" or "an" as the next word wants."""
    text = template.format_map(slots)
    return ARTICLE.sub(r"\1n ", text)


def _up(text: str) -> str:
    return text[:1].upper() + text[1:]


def sentence(chance: Chance, thing: str, slots: Slots | None = None, words: int | None = None, used: set[str] | None = None) -> str:
    """One sentence about a thing, of so many words if told (3 to 10). used: predicates not to be used again; once there are some, the
    thing is known, and may be meant by a pronoun."""
    group = GROUP[thing]
    slots = slots if slots is not None else Slots(chance, thing)
    living = group.family in ("animal", "job")
    while True:
        if chance.random() < (0.2 if used else 0.3):
            said = chance.choice(group.people)
            who = "{He}" if used and "{name}" in used and group.family != "job" else "{name}"
            parts = [who, said.removeprefix("="), chance.choice(OBJECT_FORMS if used is None else KNOWN)]
        else:
            subject = chance.choice(KNOWN) if used else chance.choice(MASS_SUBJECTS if group.mass else SUBJECTS)
            if used and chance.random() < 0.5:
                subject = group.pronoun
            said = chance.choice(group.does)
            if "{adj}" in said:  # not "the old fox is old", nor that after "the old fox"
                if "adj" in slots:
                    continue
                subject = subject.replace("{adj} ", "")
            parts = [subject, said.removeprefix("=")]
        tails = PERSON_TAILS if said in group.people else TAILS if living else THING_TAILS
        tail = "" if said[0] == "=" else chance.choice(tails)
        text = " ".join(filter(None, (*parts, tail)))
        if words is not None and text.count(" ") + 1 != words:
            continue
        if used is not None:
            new = [said] if not tail else [said, tail]
            if said in group.people:
                new.append(parts[0])
            if not used.isdisjoint(new):
                continue
            used.update(new)
        return _up(_fill(text, slots)) + "."


def about(chance: Chance, thing: str, count: int, without: Collection[str] = ()) -> str:
    """So many sentences about a thing, which they name, with none of the words in ``without``."""
    while True:
        slots, used = Slots(chance, thing), set[str]()
        text = " ".join(sentence(chance, thing, slots, used=used) for _ in range(count))
        found = set(_tokens(text))
        if not found.isdisjoint(FORMS[thing]) and found.isdisjoint(without) and _prose(text):
            return text


OPENINGS = (
    "{name} lived {place}.", "There was once a {child} named {name} who lived {place}.", "Long ago, {name} had a small house {place}.",
    "Once upon a time, {name} lived {place} with an old aunt.", "{name} spent the whole summer {place}.",
    "Every day, {name} went for a walk {place}.", "Year after year, {name} came back to live {place}.",
    "A {child} named {name} had a home {place}.",
    "One year, {name} stayed {place} for many weeks.", "When {name} was young, {he} lived {place}.",
    "Not long ago, a {child} called {name} moved to a house {place}.", "In those days, {name} worked {place}.",
)  # fmt: skip
DETAILS = (
    "The days there were long and quiet.", "The sun was shining, and the birds were singing.", "{He} knew every stone and every tree.",
    "It was a warm and friendly spot.", "{name} liked the fresh air and the wide sky.", "{He} always got up early in the morning.",
    "In the evening, {he} liked to read old books.", "Everyone there knew {him} well.", "The winter had been long, but now it was over.",
    "{He} was often alone, but never sad.", "{His} house had a {colour} door and two small windows.",
    "People said that {he} was very kind.",
)  # fmt: skip
ENDINGS = (
    "{name} smiled all the way home.", "That night, {he} slept very well.", "{He} never forgot that day.",
    "{name} told everyone about it.", "After that, {he} was happy for a long time.", "{friend} heard about it and laughed with joy.",
    "In the evening, {he} wrote it all down in a little book.", "It was the best day of the year.",
    "And so everything ended well.", "Since then, {name} has not been afraid of anything.",
    "From then on, {name} and {friend} were friends.",
    "{name} was proud and a little tired.", "Later, {he} often thought of it and smiled.", "The next day, {he} was still happy.",
)  # fmt: skip
# Each arc: what is wished or wrong, what is tried, and how it turns out; any three of an arc go together.
ARCS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "stray": (
        ("One day, {he} found a {x} that had lost its way.", "One evening, a {adj} {x} sat alone at {his} door.",
         "One morning, {he} met a {x} that could not find its home.", "One cold day, a small {x} came out of the fog, all alone."),
        ("{name} gave it some food and a warm place to rest.", "{He} asked everyone where it came from.",
         "{He} looked for its family all day long.", "It was afraid, so {he} spoke to it in a low voice."),
        ("In the end, {he} brought the {x} safely back to its family.", "At last, {he} found its home, and the {x} was glad.",
         "The next morning, its mother came, and the {x} went home with her."),
    ),
    "hurt": (
        ("One day, {he} saw a {x} that was hurt.", "One morning, a hurt {x} lay in the grass.",
         "After a storm, {he} found a weak {x} under a bush.", "Then a {adj} {x} fell ill and could not get up."),
        ("{name} carried it home and gave it water.", "{He} made a soft bed for it.", "{He} stayed with it for three nights.",
         "{friend} brought warm milk for it."),
        ("After a few days, the {x} was well again.", "Soon the {x} could eat, play and move as before.",
         "When spring came, the {x} was strong and went its own way."),
    ),
    "friend": (
        ("{He} wished for a friend, and one day a shy {x} came by.", "{He} wanted to make friends with a {adj} {x}, but it always hid.",
         "{name} had seen a {x} near the house and wanted to know it better.", "{He} was lonely until a {x} looked in at the window."),
        ("{name} sat very still and waited.", "Every day, {he} came a little closer.", "{He} put some food on the ground and went away.",
         "{He} sang a quiet song and did not move."),
        ("Soon the {x} was not afraid any more, and they played together.", "One morning, the {x} came to {him} and stayed all day.",
         "After a week, the {x} and {name} were the best of friends."),
    ),
    "thief": (
        ("Every night, a hungry {x} took food from {his} kitchen.", "A {x} came into {his} garden and ate all that grew there.",
         "Something ate {his} bread each night, and it was a {adj} {x}."),
        ("{name} was angry at first, but then {he} had a good idea.", "{He} hid behind the door to see it.",
         "{He} put out a full bowl in front of the house."),
        ("Each evening, {he} left some food outside, and the {x} never came in again.",
         "The {x} got its own bowl, and after that it took nothing more.", "From that day on, {name} and the {x} ate at the same time."),
    ),
    "lost": (
        ("One morning, {his} {x} was gone.", "One day, {he} lost {his} {adj} {x}.",
         "On the way home, {he} dropped {his} {x} and did not see it.",
         "When {he} woke up, {he} could not find {his} {x}."),
        ("{He} looked under the bed and behind the door.", "{name} asked all the neighbours.", "{He} went back the way {he} had come.",
         "{friend} helped {him} to look everywhere."),
        ("At last, {he} found the {x} in an old box.", "In the end, the {x} was just where {he} had left it.",
         "Then {friend} came and brought the {x} back.", "A dog had hidden the {x} in the garden, and there {he} found it."),
    ),
    "broken": (
        ("One day, {his} old {x} broke.", "During a storm, something fell on {his} {x} and broke it.",
         "{name} wanted to use {his} {x}, but it was broken.", "One evening, {friend} broke the {x} that {name} loved."),
        ("{He} did not know how to mend it.", "{friend} came to help and brought everything they needed.",
         "{He} tried all morning, but it was hard work.", "An old man told {him} what to do."),
        ("{name} and {friend} worked until the {x} was as good as new.", "By evening, {name} had mended the {x}.",
         "The next day, the {x} was whole again and even better than before."),
    ),
    "wanted": (
        ("{He} wanted a {adj} {x} more than anything else.", "{name} saw a {x} in a shop and wished for it.",
         "{He} needed a new {x}, but {he} had no money.", "All {his} friends had one, and {name} wanted a {x} too."),
        ("{He} worked for a week and saved every coin.", "{He} helped the neighbours and did not give up.",
         "{friend} saw it and made a plan.", "Each day, {he} stopped at the shop to look at it."),
        ("On Saturday, {he} bought the {x} at the market.", "On {his} birthday, {friend} gave {him} the {x}.",
         "At last, {he} made a {x} with {his} own hands."),
    ),
    "shared": (
        ("{name} had a {adj} {x}, but {friend} had none.", "{friend} was sad and looked at the {x} that {name} had.",
         "There was only one {x}, and both {name} and {friend} wanted it."),
        ("At first, {name} did not know what to do.", "They talked about it under a tree.", "{name} thought about it all night."),
        ("So {name} let {friend} use the {x} every second day.", "Then {name} gave the {x} to {friend} as a gift.",
         "In the end, they used the {x} together, and that was best."),
    ),
    "found": (
        ("One day, {he} found a {x} by the side of the road.", "One morning, a {adj} {x} stood in front of {his} door.",
         "In the grass, {he} saw a {x} that nobody seemed to own."),
        ("{He} asked everyone whose it was.", "{name} took it home and cleaned it.", "{He} wrote a note and put it on the door."),
        ("The {x} belonged to {friend}, who was very glad.", "Nobody came, so {name} kept the {x} and took good care of it.",
         "It was the {x} that {friend} had lost a year before."),
    ),
    "hungry": (
        ("One day, all {he} had to eat was {some}.", "{name} was very hungry, but there was only {some} in the house.",
         "On a long walk, {he} had nothing with {him} but {some}."),
        ("Then {friend} came by and was hungry too.", "{He} sat down and wanted to eat it alone.",
         "Just then, there was a knock at the door."),
        ("{name} shared the {x} with {friend}, and it had never tasted better.", "They ate the {x} together and were happy.",
         "{He} gave half of the {x} to an old woman, and she thanked {him}."),
    ),
    "gift": (
        ("{He} wanted to bring {some} to {friend}, but it began to rain.", "{friend} was ill and wished for {some}.",
         "For the birthday of {friend}, {name} wanted to find {some}."),
        ("{name} took a coat and went out.", "The way was long, and the bag was heavy.", "{name} asked at every shop in the street."),
        ("When {friend} saw the {x}, all the trouble was forgotten.", "{friend} ate the {x} at once and felt much better.",
         "At last, {he} came with the {x}, and {friend} gave {him} a hug."),
    ),
    "eaten": (
        ("One morning, the {x} was gone from the kitchen table.",
         "{name} had put the {x} on the table, but then it was not there any more.",
         "Someone had taken the {x} that {he} wanted to have for lunch."),
        ("{He} saw small footprints on the floor.", "{name} looked at {friend}, but {friend} did not know anything.",
         "{He} heard a strange noise behind the stove."),
        ("A little mouse had eaten the {x}, and {name} had to laugh.", "The dog had eaten the {x} and was now fast asleep.",
         "A hungry bird had flown away with the {x}."),
    ),
    "help": (
        ("One day, {he} met a {x} who needed help.", "One morning, a tired {x} knocked at {his} door.",
         "On the road stood a {adj} {x} with a broken cart."),
        ("They carried the heavy bags together.", "{name} did not ask for money and began to work.",
         "{He} made tea, and then they made a plan."),
        ("When the work was done, the {x} thanked {him} and gave {him} a gift.", "With the help of {name}, the {x} was ready before dark.",
         "The {x} was so glad that {name} got a new {colour} hat."),
    ),
    "become": (
        ("{He} wanted to become a {x} one day.", "{name} often watched the {x} at work and wanted to learn it too.",
         "{His} dream was to be a {x}, but nobody believed in it."),
        ("{He} asked many questions and learned every evening.", "It was not easy, and {he} made many mistakes.",
         "{friend} helped {him} and gave {him} a book about it."),
        ("Years later, {he} was the best {x} in the country.", "In the end, {name} became a {x} and loved the work.",
         "One day, an old {x} said that {he} was ready."),
    ),
    "planted": (
        ("One spring, {he} planted a small {x}.", "{friend} gave {him} a {x} in a pot.", "{name} wanted to see a {x} from {his} window."),
        ("For weeks there was no rain, so {he} carried water every evening.", "{He} gave it water and kept the snails away.",
         "At first it was weak and its leaves were yellow."),
        ("By summer, the {x} was strong and green.", "A year later, people came to see the {x}.",
         "One morning, birds were singing next to the {x}."),
    ),
    "storm": (
        ("One night, a storm bent the {x} next to {his} house.", "After a hard winter, the {adj} {x} near the gate looked dead.",
         "Someone wanted to cut down the {x} that {name} loved."),
        ("{He} went out and looked at it for a long time.", "{name} was sad and asked {friend} for help.",
         "{He} put good earth around it."),
        ("Slowly, the {x} grew straight and green again.", "The {x} was saved, and a little bench was put next to it.",
         "When the warm days came, the {x} had new leaves."),
    ),
    "travel": (
        ("One summer, {he} planned a long journey by {x}.", "{friend} lived far away, so {name} needed a {x} to get there.",
         "{He} had always wanted to travel by {x}.", "{name} wanted to visit {friend} and had to go there by {x}.",
         "One day, a {adj} {x} came by, and {name} wanted to go with it."),
        ("{He} saved some money and packed a small bag.", "The night before, {he} could not sleep.", "{friend} waved from the window."),
        ("The {x} took {him} over many hills and past many towns.", "After two hours, the {x} arrived, and {friend} was there.",
         "The {x} was late, but the way was wonderful."),
    ),
}  # fmt: skip


def story(chance: Chance, name: str, thing: str, place: str, count: int) -> str:
    """A story of 3 to 6 sentences."""
    slots = Slots(chance, thing, name, place=f"{PLACES[place]} the {place}")
    problem, tried, outcome = (chance.choice(part) for part in ARCS[chance.choice(GROUP[thing].arcs)])
    parts = [chance.choice(OPENINGS), problem, outcome]
    if count > 3:
        parts.append(chance.choice(ENDINGS))
    if count > 4:
        parts.insert(2, tried)
    if count > 5:
        parts.insert(1, chance.choice(DETAILS))
    return " ".join(_fill(part, slots) for part in parts)


# ---- checks ----------------------------------------------------------------------------------------------------------

END = re.compile(r"[.!?](?=\s|$)")
NUMBER = re.compile(r"-?[0-9]+(?:[.,][0-9]+)*")


def _tokens(text: str) -> list[str]:
    """The words in lower case without what stands around them."""
    return [token for token in (part.strip(".,;:!?\"'()*-") for part in text.lower().split()) if token]


def _bare(text: str) -> str:
    """A text as it is compared: white space, quotes around it, one full stop at its end and case do not count."""
    return _plain(text).lower()


def _plain(text: str) -> str:
    text = " ".join(text.split())
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    return text.removesuffix(".").rstrip()


def _lines(answer: str) -> list[str]:
    return [line.strip() for line in answer.splitlines() if line.strip()]


def _items(answer: str) -> list[str]:
    return [item for item in re.split(r"[\s,]+", answer.strip().removesuffix(".").lower()) if item]


def _sentences(answer: str) -> list[str]:
    """The sentences; none if the last does not end in a full stop or the like."""
    parts = [part.strip() for part in END.split(answer.strip())]
    return parts[:-1] if not parts[-1] and all(parts[:-1]) else []


def _bullets(answer: str) -> list[str] | None:
    lines = _lines(answer)
    return None if any(not line.startswith(("- ", "* ", "• ")) for line in lines) else [_bare(line[2:]) for line in lines]


def _bullets_of(answer: str, category: str, count: int) -> bool:
    found = _bullets(answer) or []
    known = {form: word for word in CATEGORIES[category] for form in FORMS[word]}
    return len(found) == count == len({known[item] for item in found if item in known})


def _number(answer: str, value: int) -> bool:
    """The last number, where at most the two that it is made of stand before it."""
    found = NUMBER.findall(answer.replace("−", "-"))
    return 0 < len(found) <= 3 and found[-1] == str(value)


def _object(answer: str, value: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(answer.strip().removeprefix("```json").removeprefix("```").removesuffix("```"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() == value.keys() and all(
        type(found[key]) is type(value[key]) and found[key] == value[key] for key in value
    )  # fmt: skip


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _case(answer: str, case: str) -> bool:
    words = [word.strip("\"'([-*•") for word in answer.split()]
    if not any(letter.isalpha() for letter in answer):
        return False
    if case == "title":
        return all(word == word[:1].upper() + word[1:].lower() for word in words)
    return answer == (answer.upper() if case == "upper" else answer.lower())


def _prose(answer: str) -> bool:
    """No sentence twice, none of one word, no word twice in a row within one, and at least half of all words different."""
    parts = [words for part in END.split(answer) if (words := _tokens(part))]
    return (
        len(set(_tokens(answer))) * 2 >= sum(map(len, parts))
        and len(set(map(tuple, parts))) == len(parts)
        and all(len(words) > 1 and all(one != other for one, other in pairwise(words)) for words in parts)
    )


# What an answer can be held to: the law's value as in a check, and the answer. None of them raises, whatever the answer.
LAWS: dict[str, Callable[[Any, str], bool]] = {
    "text": lambda value, answer: _bare(answer) == _bare(value),  # this text, in any case
    "exact": lambda value, answer: _plain(answer) == _plain(value),  # this text, case and all
    "word": lambda value, answer: re.sub(r"^(a|an|the) ", "", _bare(answer)) == value,  # this word or number, perhaps with an article
    "lines": lambda value, answer: [_bare(line) for line in _lines(answer)] == [_bare(line) for line in value],  # these lines
    "items": lambda value, answer: _items(answer) == [item.lower() for item in value],  # these words, with or without commas
    "number": lambda value, answer: _number(answer, value),
    "object": lambda value, answer: _object(answer, value),  # JSON, and nothing else
    "bullets": lambda value, answer: _bullets(answer) == [item.lower() for item in value],
    "bullets_of": lambda value, answer: _bullets_of(answer, *value),  # [category, how many]
    "case": lambda value, answer: _case(answer, value),  # upper, lower or title
    "sentences": lambda value, answer: value[0] <= len(_sentences(answer)) <= value[1],
    "words": lambda value, answer: value[0] <= len(_tokens(answer)) <= value[1],
    "mentions": lambda value, answer: (lambda found: all(not found.isdisjoint(any_of) for any_of in value))(set(_tokens(answer))),
    "avoids": lambda value, answer: set(_tokens(answer)).isdisjoint(value),
    "prose": lambda value, answer: _prose(answer) is value,
}


def passes(check: Mapping[str, Any], answer: str) -> bool:
    """Whether the answer fulfils all laws of a task's check. Raises nothing, whatever the answer; KeyError for a law that is none."""
    return all(LAWS[name](value, answer) for name, value in check.items())


# ---- kinds of tasks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A conversation that ends with a right answer, and what the last answer must fulfil.

    kind: a name in KINDS. messages: {role, content}. check: laws by name, plain JSON data. key: the kind and its arguments without
    order or wording; decides the split (``split_of``).
    """

    kind: str
    messages: list[dict[str, str]]
    check: dict[str, Any]
    key: str


class Made(NamedTuple):
    """What a kind makes: the arguments that decide the split, requests and answers in turn, and the last answer's check."""

    arguments: str
    turns: list[str]
    check: dict[str, Any]


def _request(chance: Chance, wordings: Sequence[str], slots: Mapping[str, Any]) -> str:
    """One of the wordings, filled in, now and then with a word of politeness."""
    chosen = chance.choice(wordings)
    polite = chance.random() < 0.15 and not chosen.endswith("?") and chosen[0] != "{" and not chosen.startswith(NOT_PLEASE)
    text = chosen.format_map(slots)
    return ARTICLE.sub(r"\1n ", "Please " + text[0].lower() + text[1:] if polite else text)


NOT_PLEASE = ("What", "Which", "How", "Here", "I ", "In ", "Without", "All ", "My", "Two", "There", "Your", "Words", "One")


def _one(chance: Chance, arguments: str, wordings: Sequence[str], answer: str, check: dict[str, Any], **slots: Any) -> Made:
    return Made(arguments, [_request(chance, wordings, slots), answer], check)


def _number_word(chance: Chance, number: int) -> str:
    return NUMBERS[number] if number < len(NUMBERS) and chance.random() < 0.5 else str(number)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def _and(words: Sequence[str]) -> str:
    return _listed(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def _bulleted(words: Iterable[str]) -> str:
    return "\n".join("- " + word for word in words)


def _titled(text: str) -> str:
    return " ".join(word.capitalize() for word in text.split())


CASES: dict[str, tuple[Callable[[str], str], Callable[[str], str], tuple[str, ...]]] = {
    # how it is written, how the text given looks, and how it is asked for
    "upper": (str.upper, str, (
        "Write this in upper case: {text}", "Put this in capital letters: {text}", "Turn this into upper case: {text}",
        "Write the following in all capitals: {text}", "Here is a text: {text}\nWrite it in upper case.", "Change to upper case: {text}")),
    "lower": (str.lower, str.upper, (
        "Write this in lower case: {text}", "Put this in small letters: {text}", "Turn this into lower case: {text}",
        "Write the following without capital letters: {text}", "Here is a text: {text}\nWrite it in lower case.",
        "Change to lower case: {text}")),
    "title": (_titled, str, (
        "Capitalise each word: {text}", "Write each word with a capital letter: {text}", "Begin every word with a capital letter: {text}",
        "Here is a text: {text}\nCapitalise each word.", "Make the first letter of each word a capital: {text}")),
}  # fmt: skip


def _make_case(case: str) -> Callable[[Chance], Made]:
    write, given, wordings = CASES[case]

    def make(chance: Chance) -> Made:
        if chance.random() < 0.6:
            words = chance.words(2, 7)
            text, arguments, check = _listed(words), _canonical(words), dict[str, Any](items=words)
        else:
            text = chance.sentence()
            arguments, check = _bare(text), {"text": text}
        return _one(chance, arguments, wordings, write(text), {**check, "case": case}, text=given(text))

    return make


REPEAT_LINES = (
    "Write this {n} times, one per line: {text}", "Repeat the following {n} times, each on its own line: {text}",
    "Say this {n} times, one per line: {text}", "Here is a text: {text}\nWrite it {n} times, each on a new line.",
)  # fmt: skip
REPEAT_SPACES = (
    "Write this {n} times, separated by spaces: {text}", "Repeat the following {n} times on one line: {text}",
    "Say this {n} times on one line: {text}", "Here is a text: {text}\nWrite it {n} times, separated by spaces.",
)  # fmt: skip


def _repeat(chance: Chance) -> Made:
    while True:
        number = chance.randint(2, 5)
        text = chance.choice(WORDS) if chance.random() < 0.7 else sentence(chance, chance.choice(THINGS))
        if chance.fits(_bare(text), number) and len(text.split()) * number <= 50:
            break
    lines = [text] * number if chance.random() < 0.6 else [" ".join([text] * number)]
    wordings = REPEAT_LINES if len(lines) > 1 else REPEAT_SPACES
    arguments = _canonical(_bare(text), number)
    return _one(chance, arguments, wordings, "\n".join(lines), {"lines": lines}, text=text, n=_number_word(chance, number))


COPY = (
    "Say exactly this: {text}", "Copy this: {text}", "Repeat after me: {text}", "Write exactly the following: {text}",
    "Give this back without any change: {text}", "Here is a text: {text}\nCopy it.", 'Say "{text}"',
)  # fmt: skip


def _copy(chance: Chance) -> Made:
    if chance.random() < 0.5:
        words = chance.words(1, 7)
        text = (", " if chance.random() < 0.5 else " ").join(words)
        arguments = _canonical(words)
    else:
        text = chance.sentence()
        arguments = _bare(text)
    return _one(chance, arguments, COPY, text, {"exact": text}, text=text)


COUNT_LIST = (
    "How many words are in this list: {text}", "Count the words: {text}", "How many words are there: {text}",
    "Here is a list: {text}\nHow many words does it have?", "Tell me the number of words in this list: {text}",
)  # fmt: skip
COUNT_SENTENCE = (
    "How many words are in this sentence: {text}", "Count the words in this sentence: {text}",
    "Here is a sentence: {text}\nHow many words does it have?", "Tell me the number of words in this sentence: {text}",
)  # fmt: skip


def _count(chance: Chance) -> Made:
    if chance.random() < 0.7:
        words = chance.words(1, 12)
        return _one(chance, _canonical(words), COUNT_LIST, str(len(words)), {"number": len(words)}, text=_listed(words))
    text = chance.sentence()
    return _one(chance, _bare(text), COUNT_SENTENCE, str(len(text.split())), {"number": len(text.split())}, text=text)


SORT = (
    "Sort these words in alphabetical order: {list}", "Put these words in order from a to z: {list}", "Sort alphabetically: {list}",
    "Here are some words: {list}\nSort them from a to z.", "Sort the words: {list}", "Bring these words into alphabetical order: {list}",
)  # fmt: skip
SORT_UP = (
    "Sort these numbers from small to large: {list}", "Put these numbers in ascending order: {list}",
    "Sort the numbers, smallest first: {list}", "Here are some numbers: {list}\nSort them from the smallest to the largest.",
)  # fmt: skip
SORT_DOWN = (
    "Sort these numbers from large to small: {list}", "Put these numbers in descending order: {list}",
    "Sort the numbers, largest first: {list}", "Here are some numbers: {list}\nSort them from the largest to the smallest.",
)  # fmt: skip


def _sort(chance: Chance) -> Made:
    if chance.random() < 0.6:
        words = chance.words(2, 7)
        return _one(chance, _canonical(words), SORT, _listed(sorted(words)), {"items": sorted(words)}, list=_listed(words))
    numbers, down = chance.numbers(7), chance.random() < 0.5
    answer = sorted(numbers, key=int, reverse=down)
    wordings = SORT_DOWN if down else SORT_UP
    return _one(chance, _canonical(numbers), wordings, _listed(answer), {"items": answer}, list=_listed(numbers))


REVERSE = (
    "Reverse the order of these words: {list}", "Write these words in reverse order: {list}", "Reverse this list: {list}",
    "Here is a list: {list}\nWrite it from the last word to the first.", "Put these words in the opposite order: {list}",
)  # fmt: skip


def _reverse(chance: Chance) -> Made:
    words = chance.words(2, 7)
    return _one(chance, _canonical(words), REVERSE, _listed(words[::-1]), {"items": words[::-1]}, list=_listed(words))


PICK = (
    "What is the {which} word in this list: {list}", "Give me the {which} word: {list}", "Pick the {which} word: {list}",
    "Here are some words: {list}\nWhich is the {which} one?", "Which word is the {which} one here: {list}",
)  # fmt: skip
PICK_NUMBER = (
    "What is the {which} number here: {list}", "Give me the {which} number: {list}", "Pick the {which} number: {list}",
    "Here are some numbers: {list}\nWhich is the {which} one?", "Which of these numbers is the {which}: {list}",
)  # fmt: skip


def _pick(chance: Chance) -> Made:
    form = chance.choice(("place", "place", "length", "number"))
    if form == "number":
        numbers = chance.numbers(6)
        which = chance.choice(("largest", "smallest", "biggest"))
        answer = (min if which == "smallest" else max)(numbers, key=int)
        return _one(chance, _canonical(numbers), PICK_NUMBER, answer, {"word": answer}, list=_listed(numbers), which=which)
    while True:
        words = chance.words(3, 7)
        if form == "place":
            i = chance.randrange(len(words))
            which, answer = "last" if i == len(words) - 1 else ORDINALS[i], words[i]
            break
        which = chance.choice(("longest", "shortest"))
        lengths = sorted(map(len, words), reverse=which == "longest")
        if lengths[0] != lengths[1]:
            answer = next(word for word in words if len(word) == lengths[0])
            break
    return _one(chance, _canonical(words), PICK, answer, {"word": answer}, list=_listed(words), which=which)


JSON_TABLES: dict[str, Sequence[Any]] = {
    "name": NAMES, "age": range(1, 100), "colour": COLOURS, "pet": ANIMAL_THINGS, "place": list(PLACES), "food": CATEGORIES["food"],
    "toy": CATEGORIES["toy"], "job": CATEGORIES["job"], "number": range(1, 100),
}  # fmt: skip
JSON_TALK = (
    "Write a JSON object with the {pairs}.", "Make JSON with the {pairs}.", "Give me a JSON object that holds the {pairs}.",
    "Put this into JSON: the {pairs}.",
)  # fmt: skip
JSON_KEYS = ("Write this as a JSON object: {pairs}", "Turn this into JSON: {pairs}", "Make a JSON object from this: {pairs}",
             "Here are some facts: {pairs}\nWrite them as JSON.")  # fmt: skip


def _json(chance: Chance) -> Made:
    while True:
        keys = chance.sample(list(JSON_TABLES), chance.randint(1, 4))
        value = {key: chance.choice(JSON_TABLES[key]) for key in keys}
        pairs = [f"{key}={value[key]}" for key in keys]
        if chance.fits(pairs):
            break
    if chance.random() < 0.5:
        wordings, said = JSON_TALK, _and([f"{key} {value[key]}" for key in keys])
    else:
        wordings, said = JSON_KEYS, _listed(f"{key}: {value[key]}" for key in keys)
    return _one(chance, _canonical(pairs), wordings, json.dumps(value), {"object": value}, pairs=said)


BULLETS = (
    "Write these as a bullet list: {list}", "Make a bullet list of these words: {list}", "Turn this into a list with bullets: {list}",
    "Here are some words: {list}\nMake a bullet list of them.", "Put each of these on its own line with a dash: {list}",
)  # fmt: skip
BULLETS_OF = (
    "Write a bullet list of {n} {kinds}.", "List {n} {kinds} with bullets.", "Give me a bullet list of exactly {n} {kinds}.",
    "Name {n} {kinds} in a bullet list.", "Make a list of {n} {kinds}, each on its own line with a dash.",
)  # fmt: skip
LISTED_CATEGORIES = [name for name in CATEGORIES if " " not in name]


def _bullets_given(chance: Chance) -> Made:
    if chance.random() < 0.6:
        words = chance.words(2, 6)
        return _one(chance, _canonical(words), BULLETS, _bulleted(words), {"bullets": words}, list=_listed(words))
    while True:
        category, number = chance.choice(LISTED_CATEGORIES), chance.randint(2, 6)
        if chance.fits(category, number):
            break
    answer = _bulleted(chance.sample(CATEGORIES[category], number))
    check = {"bullets_of": [category, number]}
    slots = {"n": _number_word(chance, number), "kinds": plural(category)}
    return _one(chance, _canonical(category, number), BULLETS_OF, answer, check, **slots)


def _some(thing: str) -> str:
    return thing if GROUP[thing].mass else f"a {thing}"


SENTENCES = (
    "Write {n} about {thing}.", "Write exactly {n} about {thing}.", "Tell me about {thing} in {n}.", "Describe {thing} in {n}.",
    "Say something about {thing} in exactly {n}.", "Give me {n} about {thing}.",
)  # fmt: skip


def _sentence_count(chance: Chance, number: int) -> str:
    return f"{_number_word(chance, number)} sentence{'s' if number > 1 else ''}"


# A request given back is no text about its subject.
NOT_ECHO = ["sentence", "sentences"]


def _free(number: int, thing: str) -> dict[str, Any]:
    """The check of so many sentences about a thing."""
    return {"sentences": [number, number], "mentions": [FORMS[thing]], "avoids": NOT_ECHO, "prose": True}


def _sentences_about(chance: Chance) -> Made:
    number = chance.randint(1, 4)
    thing = chance.thing(f"{number} sentences")
    slots = {"n": _sentence_count(chance, number), "thing": _some(thing)}
    arguments = _canonical(thing, f"{number} sentences")
    return _one(chance, arguments, SENTENCES, about(chance, thing, number), _free(number, thing), **slots)


EXACT_WORDS = (
    "Write a sentence of exactly {n} words about {thing}.", "Describe {thing} in exactly {n} words.",
    "Say something about {thing} in {n} words.", "Write {n} words about {thing}.", "Tell me about {thing}. Use exactly {n} words.",
)  # fmt: skip


def _words_about(chance: Chance) -> Made:
    number = chance.randint(3, 10)
    thing = chance.thing(f"{number} words")
    check = {"words": [number, number], "mentions": [FORMS[thing]], "avoids": ["words"], "prose": True}
    slots = {"n": _number_word(chance, number), "thing": _some(thing)}
    return _one(chance, _canonical(thing, f"{number} words"), EXACT_WORDS, sentence(chance, thing, words=number), check, **slots)


FORBID = (
    'Describe {thing} without the word "{word}".', 'Write one or two sentences about {thing}. Do not use the word "{word}".',
    'Tell me about {thing}, but do not say "{word}".', 'Say something about {thing} without using the word "{word}".',
    'Write about {thing}. The word "{word}" is not allowed.',
)  # fmt: skip


def _natural(chance: Chance) -> tuple[str, str]:
    """A thing and a word that comes to mind with it, which fit."""
    while True:
        thing = chance.choice(THINGS)
        word = chance.choice(GROUP[thing].natural)
        if chance.fits(thing, "without " + word) and word not in FORMS[thing]:
            return thing, word


def _forbid(chance: Chance) -> Made:
    thing, word = _natural(chance)
    category = GROUP[thing].category.split(" ")[-1]
    named = [name for name in (*FORMS[thing], category, plural(category)) if name not in ("", word)]
    check = {"avoids": [word], "sentences": [1, 2], "mentions": [named], "prose": True}
    answer = about(chance, thing, chance.randint(1, 2), [word])
    return _one(chance, _canonical(thing, "without " + word), FORBID, answer, check, thing=_some(thing), word=word)


REQUIRE = (
    "Write a sentence with the words {words}.", "Write a sentence that contains {words}.", "Use {words} in one sentence.",
    "Make a sentence with {words}.", "Write one sentence in which these words appear: {words}.",
)  # fmt: skip
REQUIRED = (
    "{name} put the {a} next to the {b}", "{name} took the {a} and the {b} to the {land}", "{name} found a {a} and a {b} in the {land}",
    "the {a} lay between the {b} and the door", "{name} gave the {a} to {friend} and kept the {b}", "there was a {b} under the {a}",
    "{name} drew a picture of a {a} and a {b}", "in the {land}, {name} saw a {animal} with a {a}", "the {animal} slept next to the {a}",
    "{name} followed the {animal} to the {land}", "the {animal} looked at the {a} for a long time", "{name} forgot the {a} in the {land}",
    "the {animal} ran past the {a} and into the {land}", "{name} wanted to buy a {colour} {a} and a {b}",
    "the {colour} {a} belonged to {friend}", "there was a {animal} behind the {colour} {a}", "{name} looked for the {a} behind the {b}",
    "a {animal} sat in front of the {a} and the {b}", "{name} and {friend} carried the {a} through the {land}",
    "the {animal} played with the {colour} {a} in the {land}", "{name} sold the {a} and bought a {animal}",
    "in the morning, the {animal} was asleep beside the {b}", "{name} hid the {a} from {friend} and the {animal}",
    "the {a} was more useful than the {b}", "{name} told {friend} about the {animal} and the {land}",
)  # fmt: skip


def _required(chance: Chance) -> tuple[list[str], str]:
    """Two or three words that fit, and a sentence that contains them."""
    while True:
        template = chance.choice(REQUIRED)
        a, b = chance.sample(OBJECT_THINGS, 2)
        slots = Slots(chance, a, a=a, b=b)
        text = _up(_fill(template, slots)) + "."
        words = [slots[slot] for slot in ("a", "b", "animal", "colour", "land") if "{" + slot + "}" in template]
        words = chance.sample(words, min(len(words), chance.randint(2, 3)))
        if chance.fits(words):
            return words, text


def _with(words: Sequence[str]) -> dict[str, Any]:
    """The check of one sentence with these words, too long to be made of them alone."""
    mentions = [FORMS.get(word, [word]) for word in words]
    return {"sentences": [1, 1], "words": [2 * len(words) + 1, 40], "mentions": mentions, "avoids": NOT_ECHO, "prose": True}


def _require(chance: Chance) -> Made:
    words, text = _required(chance)
    return _one(chance, _canonical(words), REQUIRE, text, _with(words), words=_and(words))


ADD = ("What is {a} plus {b}?", "{a} + {b} =", "Add {a} and {b}.", "How much is {a} + {b}?", "What is {a} + {b}?", "Add {b} to {a}.")
SUBTRACT = ("What is {a} minus {b}?", "{a} - {b} =", "Subtract {b} from {a}.", "How much is {a} - {b}?", "What is {a} - {b}?",
            "Take {b} away from {a}.")  # fmt: skip
MULTIPLY = ("What is {a} times {b}?", "{a} x {b} =", "Multiply {a} by {b}.", "How much is {a} x {b}?", "What is {a} times {b}?")
ADD_STORY = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "{name} has {a} {things}, and {friend} has {b}. How many {things} do they have together?",
    "There are {a} {things} in a box. {name} puts {b} more into it. How many {things} are in the box?",
)  # fmt: skip
SUBTRACT_STORY = (
    "{name} has {a} {things} and gives {b} to {friend}. How many {things} are left?",
    "There are {a} {things} in a box. {name} takes out {b}. How many {things} are still in it?",
    "{name} had {a} {things} and lost {b}. How many {things} does {name} have now?",
)  # fmt: skip
MULTIPLY_STORY = (
    "There are {a} boxes with {b} {things} in each. How many {things} are there?",
    "{name} buys {b} {things} each day for {a} days. How many {things} is that?",
    "{a} children have {b} {things} each. How many {things} do they have together?",
)  # fmt: skip
COUNTABLE = [word for word in OBJECT_THINGS + CATEGORIES["fruit"] if not GROUP[word].mass]


class Sum(NamedTuple):
    """A sum, its result, the sign as it is written, and how it is asked for."""

    a: int
    b: int
    sign: str
    result: int

    @property
    def arguments(self) -> str:
        return _canonical([self.a, self.b], self.sign)


def _sum(chance: Chance) -> Sum:
    """A sum that fits, with a result from 1 to 99: numbers to 30 and 20, in either order, and products of a number to 5 and one to 12."""
    while True:
        sign = chance.choice("++--x")
        a, b = (chance.randint(2, 12), chance.randint(2, 5)) if sign == "x" else (chance.randint(1, 30), chance.randint(1, 20))
        if sign != "-" and chance.random() < 0.5:
            a, b = b, a
        found = Sum(a, b, sign, {"+": a + b, "-": a - b, "x": a * b}[sign])
        if found.result > 0 and chance.fits([a, b], sign):
            return found


def _arithmetic(chance: Chance) -> Made:
    found = _sum(chance)
    plain, told = {"+": (ADD, ADD_STORY), "-": (SUBTRACT, SUBTRACT_STORY), "x": (MULTIPLY, MULTIPLY_STORY)}[found.sign]
    wordings = told if min(found.a, found.b) > 1 and chance.random() < 0.4 else plain
    slots = {"a": found.a, "b": found.b, "name": chance.choice(GIRLS), "friend": chance.choice(BOYS), "things": ""}
    if wordings is told:
        slots["things"] = plural(chance.choice(COUNTABLE))
    return _one(chance, found.arguments, wordings, str(found.result), {"number": found.result}, **slots)


WHICH = (
    "Which of these is a {category}: {list}", "Which word is a {category}: {list}", "Find the {category}: {list}",
    "Here are some words: {list}\nWhich one is a {category}?", "One of these is a {category}. Which one: {list}",
)  # fmt: skip
ODD = (
    "Which word does not belong here: {list}", "Find the odd one out: {list}", "Which word is different from the others: {list}",
    "Here are some words: {list}\nWhich one does not fit?", "Pick the word that does not belong: {list}",
)  # fmt: skip
LARGER = (
    "Which number is larger: {list}", "Which is more: {list}", "Here are two numbers: {list}\nWhich one is larger?",
    "Tell me the larger number: {list}",
)  # fmt: skip
ASKED = [name for name in CATEGORIES if name != "job"]
FAMILY = {name: GROUP[words[0]].family for name, words in CATEGORIES.items()}


def _compare(chance: Chance) -> Made:
    form = chance.choice(("which", "which", "odd", "odd", "larger"))
    if form == "larger":
        numbers = chance.numbers(2)
        answer = max(numbers, key=int)
        return _one(chance, _canonical(numbers), LARGER, answer, {"word": answer}, list=_listed(numbers))
    while True:
        one, *others = chance.sample(ASKED, 4)
        if form == "odd":
            others = others[:1]
        if FAMILY[one] in (FAMILY[other] for other in others):
            continue
        answer = chance.choice(CATEGORIES[one])
        if form == "odd":
            words = chance.sample(CATEGORIES[others[0]], chance.randint(2, 4))
        else:
            words = [chance.choice(CATEGORIES[other]) for other in others[: chance.randint(1, 3)]]
        words.insert(chance.randint(0, len(words)), answer)
        if len(set(words)) == len(words) and chance.fits(words):
            break
    wordings = WHICH if form == "which" else ODD
    return _one(chance, _canonical(words), wordings, answer, {"word": answer}, list=_listed(words), category=one)


SPELL = (
    "Spell the word {word} with {marks}.", 'Spell "{word}" letter by letter, with {marks}.',
    "Spell {word} with {marks} between the letters.", "Write the letters of {word} with {marks} between them.",
    "Spell this word with {marks}: {word}",
)  # fmt: skip
MARKS = {"hyphens": "-", "spaces": " ", "commas": ", ", "dots": ".", "slashes": "/"}


def _spelling(chance: Chance, marks: Sequence[str] = tuple(MARKS)) -> tuple[str, str, str]:
    """A word, the name of what stands between its letters, and the word spelled. A word as such is of both splits: nothing but
    having read its letters tells them, where it is one token."""
    while not chance.fits(word := chance.choice(WORDS), name := chance.choice(marks)):
        pass
    return word, name, MARKS[name].join(word)


def _spell(chance: Chance) -> Made:
    word, marks, spelled = _spelling(chance)
    return _one(chance, _canonical(word, marks), SPELL, spelled, {"text": spelled}, word=word, marks=marks)


STORY = (
    "Write a short story about {name}, {thing} and the {place}.", "Tell me a short story with {name}, {thing} and the {place}.",
    "Write a little story about {name} and {thing}. It happens {where} the {place}.",
    "Tell a story about {name} and {thing} {where} the {place}.", "I want a short story about {name}, {thing} and the {place}.",
)  # fmt: skip
STORY_LENGTH = (" Use {n} sentences.", " Write {n} sentences.", " It must have exactly {n} sentences.")


def _triple(chance: Chance) -> tuple[str, str, str]:
    while True:
        found = chance.choice(NAMES), chance.choice(STORY_THINGS), chance.choice(list(PLACES))
        if found[1] != found[2] and chance.fits(*found):
            return found


def _story(chance: Chance) -> Made:
    name, thing, place = _triple(chance)
    number, told = chance.randint(3, 6), chance.random() < 0.4
    wordings = [wording + chance.choice(STORY_LENGTH) for wording in STORY] if told else STORY
    check = {"sentences": [number, number] if told else [3, 6], "mentions": [[name.lower()], FORMS[thing], [place]], "prose": True}
    slots = {"name": name, "thing": _some(thing), "place": place, "where": PLACES[place], "n": _number_word(chance, number)}
    return _one(chance, _canonical(name, thing, place), wordings, story(chance, name, thing, place, number), check, **slots)


# ---- conversations of several turns ----------------------------------------------------------------------------------

FOLLOW: dict[str, tuple[str, ...]] = {
    "upper": ("Now in upper case.", "Write that in capital letters.", "Put it in upper case.", "The same in upper case, please."),
    "sort": ("Sort them.", "Now sort them from a to z.", "Put them in alphabetical order.", "Sort the words."),
    "reverse": ("Reverse the order.", "Now in reverse order.", "Turn the order around.", "Write them from last to first."),
    "bullets": ("Make it a bullet list.", "Now as a bullet list.", "Write that with bullets.", "Put each one on its own line with a dash."),
    "count": ("How many words was that?", "Count the words.", "How many words are there?", "How many words did you write?"),
    "first": ("What is the first one?", "Give me only the first word.", "Which word comes first?"),
    "last": ("What is the last one?", "Give me only the last word.", "Which word comes last?"),
}
NAME_SOME = ("Name {n} {kinds}.", "List {n} {kinds}.", "Give me {n} {kinds}.", "Tell me {n} {kinds}.", "I need {n} {kinds}.")
PLUS = ("Add {b} to that.", "Now add {b}.", "Plus {b}?", "And {b} more?")
MINUS = ("Take {b} away from that.", "Now subtract {b}.", "Minus {b}?", "And {b} less?")


def _follow_up(chance: Chance) -> Made:
    form = chance.choice((_follow_list, _follow_list, _follow_sum, _follow_text))
    while (made := form(chance)) is None:
        pass
    return made


def _follow_list(chance: Chance) -> Made | None:
    """A list of words and what is done with it; the last steps give no list, and are the last turn."""
    words = chance.words(3, 5)
    steps = chance.sample(("upper", "sort", "reverse", "bullets"), chance.randint(1, 2))
    if chance.random() < 0.4:
        steps[-1] = chance.choice(("count", "first", "last"))
    category = next((GROUP[word].category for word in words if word in GROUP), "")
    if category in LISTED_CATEGORIES and all(word in CATEGORIES[category] for word in words) and chance.fits(category, len(words)):
        slots = {"n": _number_word(chance, len(words)), "kinds": plural(category)}
        turns = [_request(chance, NAME_SOME, slots), _listed(words)]
    else:
        operation = chance.choice(("sort", "reverse", "copy"))
        wordings = {"sort": SORT, "reverse": REVERSE, "copy": COPY}[operation]
        text = _listed(words)
        words = {"sort": sorted(words), "reverse": words[::-1], "copy": words}[operation]
        turns = [_request(chance, wordings, {"list": text, "text": text}), _listed(words)]
        if operation == steps[0]:
            return None
    arguments, upper, bullets, check = _canonical(words), False, False, dict[str, Any]()
    for step in steps:
        turns.append(chance.choice(FOLLOW[step]))
        if step in ("count", "first", "last"):
            answer = str(len(words)) if step == "count" else words[0 if step == "first" else -1]
            answer = answer.upper() if upper else answer
            check = {"number": len(words)} if step == "count" else {"word": answer.lower()}
            turns.append(answer)
            break
        upper, bullets = upper or step == "upper", bullets or step == "bullets"
        if step in ("sort", "reverse"):
            words = sorted(words) if step == "sort" else words[::-1]
        shown = [word.upper() for word in words] if upper else words
        turns.append(_bulleted(shown) if bullets else _listed(shown))
        check = {"bullets" if bullets else "items": shown, **({"case": "upper"} if upper and step in ("upper", "bullets") else {})}
    return Made(arguments, turns, check)


def _follow_sum(chance: Chance) -> Made | None:
    """A sum and one or two more with its result."""
    first = _sum(chance)
    turns = [_request(chance, {"+": ADD, "-": SUBTRACT, "x": MULTIPLY}[first.sign], first._asdict()), str(first.result)]
    last = first
    for _ in range(chance.randint(1, 2)):
        b, sign = chance.randint(1, 20), chance.choice("+-")
        result = last.result + b if sign == "+" else last.result - b
        if not (0 < result < 100 and last.result < 100 and chance.fits([last.result, b], sign)):
            return None
        last = Sum(last.result, b, sign, result)
        turns += [_request(chance, PLUS if sign == "+" else MINUS, {"b": b}), str(result)]
    return Made(last.arguments, turns, {"number": last.result})


def _follow_text(chance: Chance) -> Made | None:
    """A sentence, then the same in upper case, or the number of its words, or both."""
    thing = chance.thing("1 sentences")
    text = sentence(chance, thing)
    if not chance.fits(_bare(text)) or thing not in _tokens(text):
        return None
    turns = [_request(chance, SENTENCES, {"n": _sentence_count(chance, 1), "thing": _some(thing)}), text]
    steps, check = chance.choice((("upper",), ("count",), ("upper", "count"), ("count", "upper"))), dict[str, Any]()
    for step in steps:
        number = len(text.split())
        turns += [chance.choice(FOLLOW[step][:-1] if step == "count" else ("Now in upper case.", "Write the sentence in upper case.")),
                  str(number) if step == "count" else text.upper()]  # fmt: skip
        check = {"number": number} if step == "count" else {"text": text, "case": "upper"}
    return Made(_bare(text), turns, check)


# ---- two constraints at once -----------------------------------------------------------------------------------------

CASE_NAMES = {"upper": ("in upper case", "in capital letters", "all in upper case"), "lower": ("in lower case", "in small letters",
              "all in lower case")}  # fmt: skip
BOTH_TEXT = ("Write {n} about {thing}, {case}.", "Describe {thing} in {n}, {case}.", "Tell me about {thing} in {n}. Write {case}.",
             "Give me {n} about {thing} and write {case}.")  # fmt: skip
BOTH_WORDS = ("Write exactly {n} words about {thing}, {case}.", "Describe {thing} in exactly {n} words, {case}.",
              "Say something about {thing} in {n} words. Write {case}.",
              "Write a sentence of {n} words about {thing} and write {case}.")  # fmt: skip
BOTH_LIST = {
    ("sort", "upper"): ("Sort these words from a to z and write them in upper case: {list}", "Sort in upper case: {list}",
                        "Here are some words: {list}\nSort them and use capital letters."),
    ("sort", "bullets"): ("Sort these words and write them as a bullet list: {list}", "Make a sorted bullet list: {list}",
                          "Here are some words: {list}\nSort them from a to z, each on its own line with a dash."),
    ("reverse", "upper"): ("Reverse this list and write it in upper case: {list}", "Write in reverse order and in capital letters: {list}",
                           "Here are some words: {list}\nReverse them and use capital letters."),
    ("reverse", "bullets"): ("Reverse this list and make it a bullet list: {list}", "Make a bullet list in reverse order: {list}",
                             "Here are some words: {list}\nReverse them and put each one on its own line with a dash."),
    ("copy", "both"): ("Write these as a bullet list in upper case: {list}", "Make a bullet list in capital letters: {list}",
                       "Here are some words: {list}\nMake a bullet list of them, in upper case."),
}  # fmt: skip
BOTH_FORBID = ('Write exactly {n} about {thing} without the word "{word}".', 'Describe {thing} in {n} and do not use the word "{word}".',
               'Tell me about {thing} in {n}. Do not say "{word}".')  # fmt: skip
BOTH_REQUIRE = ("Write a sentence with {words}, in upper case.", "Use {words} in one sentence, in capital letters.",
                "Make a sentence with the words {words}. Write it in upper case.")  # fmt: skip
BOTH_REPEAT = ("Write this {n} times in upper case, one per line: {text}",
"Repeat in capital letters {n} times, each on its own line: {text}",
               "Here is a text: {text}\nWrite it {n} times in upper case, each on a new line.")  # fmt: skip


def _combined(chance: Chance) -> Made:
    return chance.choice((_both_text, _both_list, _both_list, _both_words, _both_forbid, _both_require, _both_repeat))(chance)


def _both_text(chance: Chance) -> Made:
    number, case = chance.randint(1, 3), chance.choice(("upper", "lower"))
    arguments = f"{number} sentences", case
    thing = chance.thing(*arguments)
    answer = CASES[case][0](about(chance, thing, number))
    slots = {"n": _sentence_count(chance, number), "thing": _some(thing), "case": chance.choice(CASE_NAMES[case])}
    return _one(chance, _canonical(thing, *arguments), BOTH_TEXT, answer, {**_free(number, thing), "case": case}, **slots)


def _both_words(chance: Chance) -> Made:
    number, case = chance.randint(3, 10), chance.choice(("upper", "lower"))
    arguments = f"{number} words", case
    thing = chance.thing(*arguments)
    answer = CASES[case][0](sentence(chance, thing, words=number))
    check = {"words": [number, number], "mentions": [FORMS[thing]], "avoids": ["words"], "prose": True, "case": case}
    slots = {"n": _number_word(chance, number), "thing": _some(thing), "case": chance.choice(CASE_NAMES[case])}
    return _one(chance, _canonical(thing, *arguments), BOTH_WORDS, answer, check, **slots)


def _both_list(chance: Chance) -> Made:
    words = chance.words(2, 6)
    first, second = chance.choice(list(BOTH_LIST))
    answer = {"sort": sorted(words), "reverse": words[::-1], "copy": words}[first]
    answer = [word.upper() for word in answer] if second != "bullets" else answer
    check = {"items" if second == "upper" else "bullets": answer, **({} if second == "bullets" else {"case": "upper"})}
    text = _listed(answer) if second == "upper" else _bulleted(answer)
    return _one(chance, _canonical(words), BOTH_LIST[first, second], text, check, list=_listed(words))


def _both_forbid(chance: Chance) -> Made:
    thing, word = _natural(chance)
    number = chance.randint(1, 3)
    check = {**_free(number, thing), "avoids": [word, *NOT_ECHO]}
    slots = {"n": _sentence_count(chance, number), "thing": _some(thing), "word": word}
    return _one(chance, _canonical(thing, "without " + word), BOTH_FORBID, about(chance, thing, number, [word]), check, **slots)


def _both_require(chance: Chance) -> Made:
    words, text = _required(chance)
    return _one(chance, _canonical(words), BOTH_REQUIRE, text.upper(), {**_with(words), "case": "upper"}, words=_and(words))


def _both_repeat(chance: Chance) -> Made:
    while True:
        word, number = chance.choice(WORDS), chance.randint(2, 5)
        if chance.fits(word, number):
            break
    lines, slots = [word.upper()] * number, {"text": word, "n": _number_word(chance, number)}
    return _one(chance, _canonical(word, number), BOTH_REPEAT, "\n".join(lines), {"lines": lines, "case": "upper"}, **slots)


# ---- small talk ------------------------------------------------------------------------------------------------------


class Topic(NamedTuple):
    """said and answers: {to} is ", Tom" where a name was given, or nothing. keywords: one of them shows that the answer is one."""

    said: tuple[str, ...]
    answers: tuple[str, ...]
    keywords: tuple[str, ...]


TOPICS = {
    "hello": Topic(
        ("Hello!", "Hi!", "Good morning!", "Hi there!", "Hello there.", "Good evening."),
        ("Hello{to}! How can I help you?", "Hi{to}! What can I do for you?", "Hello{to}! What would you like me to do?",
         "Hi{to}! I am here to help."), ("help", "do")),
    "who": Topic(
        ("Who are you?", "What are you?", "What is your name?", "Tell me who you are.", "Who am I talking to?"),
        ("I am a small Zamba2 demonstration model{to}.", "I am Zamba2, a very small demonstration model{to}.",
         "My name is Zamba2{to}. I am a small demonstration model.", "I am a tiny Zamba2 model that was made as a demonstration{to}."),
        ("zamba2",)),
    "can": Topic(
        ("What can you do?", "What are you good at?", "How can you help me?", "What do you know?", "Tell me what you can do."),
        ("I can sort words, count them, add numbers and write short stories{to}.",
         "I can write short sentences and sort lists of words{to}.",
         "I can follow short instructions{to}: count words, sort lists and spell.",
         "I am small, but I can count, sort, spell and write little stories{to}."), ("sort", "count", "write", "instructions")),
    "thanks": Topic(
        ("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much.", "Many thanks!"),
        ("You are welcome{to}!", "I am glad that I could help{to}.", "You are very welcome{to}.", "With pleasure{to}!"),
        ("welcome", "glad", "pleasure")),
    "bye": Topic(
        ("Goodbye!", "Bye!", "I have to go now.", "Bye for now.", "I am leaving."),
        ("Goodbye{to}! Come back soon.", "Bye{to}! See you later.", "Goodbye{to}, and take care!", "Goodbye{to}! Have a nice day."),
        ("soon", "later", "care", "nice")),
    "how": Topic(
        ("How are you?", "How are you today?", "How is it going?", "How do you feel?"),
        ("I am well, thank you{to}.", "I am fine, thank you{to}. How are you?", "Very well, thank you{to}.", "I am fine{to}, thanks."),
        ("well", "fine")),
    "person": Topic(
        ("Are you a person?", "Are you human?", "Are you a real person?", "Are you a robot?", "Are you alive?"),
        ("No{to}, I am a small language model.", "I am not a person{to}, only a small computer program.",
         "No{to}, I am only a little computer model."), ("model", "program")),
}  # fmt: skip
INTRODUCED = ("I am {name}. {said}", "My name is {name}. {said}", "This is {name}. {said}", "{said} My name is {name}.")
LIKES = (
    "{X} are nice, but I only know them from words.", "I am only a small model, but I like to write about {x}.",
    "I have never seen {x}, but I can write about them.", "I like the word, but I am only a model and know {x} from texts.",
)  # fmt: skip
LIKED = ("Do you like {x}?", "What do you think of {x}?", "I like {x}. Do you?", "Tell me, do you like {x}?")
SYSTEMS = (
    "You are a helpful assistant.", "Answer briefly.", "Follow the instruction exactly.", "You give short and correct answers.",
    "Do exactly what you are asked.", "Be helpful and brief.", "You are a careful assistant.", "Give only the answer.",
)  # fmt: skip
CHAT_SYSTEMS = (
    "You are a helpful assistant.", "You are a small and friendly model.", "You are Zamba2, a small demonstration model.",
    "Be kind and answer briefly.", "You are a friendly helper.", "Talk to the user in a friendly way.", "You like to help people.",
)  # fmt: skip


def _chat(chance: Chance) -> Made:
    while True:
        topic = chance.choice((*TOPICS, "recall", "like"))
        if topic == "like":
            x = plural(chance.choice([*CATEGORIES["animal"], *CATEGORIES["fruit"]]))
        else:
            x = chance.choice(NAMES) if topic == "recall" or chance.random() < 0.4 else ""
        if chance.fits("chat", topic, x):
            break
    arguments = _canonical("chat", topic, x)
    if topic == "like":
        answer = chance.choice(LIKES).format(x=x, X=_up(x))
        turns = [chance.choice(LIKED).format(x=x), answer]
        return Made(arguments, turns, _talk([x, "word", "words"], ["words", "model", "write"]))
    if topic == "recall":
        turns = [chance.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "You can call me {}.")).format(x),
                 chance.choice(("Nice to meet you, {}!", "Hello, {}! How can I help you?", "Good to meet you, {}.")).format(x),
                 chance.choice(("What is my name?", "Do you know my name?", "Who am I?", "Can you say my name?")),
                 chance.choice(("Your name is {}.", "You are {}.", "You told me that your name is {}.")).format(x)]  # fmt: skip
        return Made(arguments, turns, {**_talk([x.lower()], ["you", "your"]), "avoids": ["my", "i", "call"]})
    said, answers, keywords = TOPICS[topic]
    asked, answer = chance.choice(said), chance.choice(answers).format(to=", " + x if x else "")
    if x:
        asked = chance.choice(INTRODUCED).format(name=x, said=asked)
    return Made(arguments, [asked, answer], _talk(keywords))


def _talk(*mentions: Sequence[str]) -> dict[str, Any]:
    return {"sentences": [1, 4], "words": [1, 40], "mentions": [list(any_of) for any_of in mentions]}


# Each draws a task that fits the split.
KINDS: dict[str, Callable[[Chance], Made]] = {
    "upper": _make_case("upper"), "lower": _make_case("lower"), "title": _make_case("title"), "repeat": _repeat, "copy": _copy,
    "count": _count, "sort": _sort, "reverse": _reverse, "pick": _pick, "json": _json, "bullets": _bullets_given,
    "sentences": _sentences_about, "words": _words_about, "forbid": _forbid, "require": _require, "arithmetic": _arithmetic,
    "compare": _compare, "spell": _spell, "story": _story, "follow_up": _follow_up, "combined": _combined, "chat": _chat,
}  # fmt: skip


def _chance(seed: int | str, purpose: str, split: str) -> Chance:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; {' or '.join(SPLITS)} is needed")
    chance = Chance(f"{seed} {purpose} {split}")
    chance.split = split
    return chance


def tasks(seed: int | str, *, split: str, kinds: Collection[str] | None = None) -> Iterator[Task]:
    """Tasks without end, uniform over the kinds, or over those named (a name given twice comes twice as often); the same for the same
    seed.

    Raises ValueError for a split or kind that is none, and for no kinds.
    """
    chance = _chance(seed, "tasks", split)
    unknown = [name for name in kinds or () if name not in KINDS]
    if unknown or (kinds is not None and not kinds):
        raise ValueError(f"kinds are {unknown}; some of {', '.join(KINDS)} are needed")
    names = list(KINDS if kinds is None else kinds)
    return _tasks(chance, [name for name in KINDS for _ in range(names.count(name))])


def _tasks(chance: Chance, kinds: Sequence[str]) -> Iterator[Task]:
    while True:
        yield _task(chance, chance.choice(kinds))


def _task(chance: Chance, kind: str) -> Task:
    made = KINDS[kind](chance)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(made.turns)]
    if chance.random() < (0.3 if kind == "chat" else 0.09):
        messages.insert(0, {"role": "system", "content": chance.choice(CHAT_SYSTEMS if kind == "chat" else SYSTEMS)})
    return Task(kind, messages, made.check, f"{kind}: {made.arguments}")


# ---- documents -------------------------------------------------------------------------------------------------------

SIGNS = {"+": "plus", "-": "minus", "x": "times"}
ECHOES: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    # operations on a list: how a heading calls it, and what comes of it
    "the same": ("the same again", _listed),
    "upper": ("in upper case", lambda words: _listed(words).upper()),
    "title": ("with capitals", lambda words: _titled(_listed(words))),
    "sorted": ("sorted", lambda words: _listed(sorted(words))),
    "reversed": ("in reverse order", lambda words: _listed(words[::-1])),
    "count": ("how many words", lambda words: str(len(words))),
    "first": ("the first word", lambda words: words[0]),
    "last": ("the last word", lambda words: words[-1]),
    "bullets": ("as a bullet list", lambda words: "\n" + _bulleted(words)),
    "lines": ("one per line", lambda words: "\n" + "\n".join(words)),
    "spaces": ("with spaces", " ".join),
    "and": ("in a sentence", lambda words: f"The words are {_and(words)}."),
}
LAYOUTS = ("{list} -> {out}", "{list} = {out}", "{list}\n{out}", "{list}; {name}: {out}", "List: {list}\n{Name}: {out}",
           "{Name} of {list}: {out}", "Words: {list} | {out}")  # fmt: skip


def _echoes(chance: Chance) -> Iterator[str]:
    """Lists and what comes of them, mostly the same operation and layout over and over, so that it can be seen what is meant."""
    layout, operations = chance.choice(LAYOUTS), chance.sample(list(ECHOES), chance.choice((1, 1, 2, 4)))
    while True:
        words = chance.words(2, 6)
        name, make = ECHOES[chance.choice(operations)]
        out = make(words).removeprefix("\n" if "\n{out}" in layout else "")
        yield layout.format(list=_listed(words), out=out, name=name, Name=_up(name))


def _spellings(chance: Chance) -> Iterator[str]:
    layout = chance.choice(("{word}: {spelled}", "{word} -> {spelled}", "{word} is spelled {spelled}.", "{word} with {marks}: {spelled}"))
    some = chance.sample(list(MARKS), chance.choice((1, 2, len(MARKS))))
    while True:
        word, marks, spelled = _spelling(chance, some)
        yield layout.format(word=word, marks=marks, spelled=spelled)


def _repeats(chance: Chance) -> Iterator[str]:
    while True:
        word, number = chance.choice(WORDS), chance.randint(2, 5)
        if chance.fits(word, number):
            yield f"{word}, {NUMBERS[number]} times: {' '.join([word] * number)}"


def _sums(chance: Chance) -> Iterator[str]:
    spoken = chance.random() < 0.3
    while True:
        found = _sum(chance)
        said = f"{found.a} {SIGNS[found.sign]} {found.b} is {found.result}."
        yield said if spoken else f"{found.a} {found.sign} {found.b} = {found.result}"


def _number_lines(chance: Chance) -> Iterator[str]:
    while True:
        form = chance.randrange(4)
        if form < 2:
            start, step, count = chance.randint(1, 60), chance.choice((1, 1, 2, 5, 10)), chance.randint(3, 8)
            line = [str(start + step * i) for i in range(count) if start + step * i < 100][:: 1 if form else -1]
            if len(line) > 1 and chance.fits(line):
                yield _listed(line)
        else:
            numbers = chance.numbers(6)
            line = sorted(numbers, key=int, reverse=form == 2)
            yield f"{_listed(numbers)} {'from large to small' if form == 2 else 'from small to large'}: {_listed(line)}"


def _facts(chance: Chance) -> Iterator[str]:
    """What things are: the tables in words."""
    while True:
        category = chance.choice(list(CATEGORIES))
        words = chance.sample(CATEGORIES[category], 3)
        mass = GROUP[words[0]].mass
        other = chance.choice([name for name in CATEGORIES if FAMILY[name] != FAMILY[category]])
        one, kind = (words[0] if mass or category == "colour" else f"a {words[0]}"), f"a {category}"
        many = words if mass or category == "colour" else [plural(word) for word in words]
        texts = [f"{one} is {kind}.", f"{_and(many)} are {plural(category)}.", f"{one} is {kind}, but not a {other}.",
                 f"is {one} a {other}? No, it is {kind}.", f"what is {one}? It is {kind}."]  # fmt: skip
        yield _up(ARTICLE.sub(r"\1n ", chance.choice(texts)))


def _stories(chance: Chance) -> Iterator[str]:
    while True:
        yield story(chance, *_triple(chance), chance.randint(3, 6))


def _descriptions(chance: Chance) -> Iterator[str]:
    while True:
        number = chance.randint(2, 5)
        yield about(chance, chance.thing(f"{number} sentences"), number)


def _scenes(chance: Chance) -> Iterator[str]:
    """Sentences that name two or three things, one after the other."""
    while True:
        yield _required(chance)[1]


TALKS = (
    '"Hello, {friend}," said {name}. "Have you seen my {x}?" "Yes," said {friend}. "The {x} is in the {land}." "Thank you," said {name}.',
    '{name} asked, "What is your favourite colour?" "{Colour}," said {friend}. "My {x} is {colour}." "I like {colour} too," said {name}.',
    '"Where are you going?" asked {name}. "To the {land}," said {friend}. "Come with me, and bring the {x}." So they went there together.',
    '"What is that?" asked {friend}. "That is a {x}," said {name}. "A {x}! May I have it?" "You may have the {x} tomorrow," said {name}.',
    '"I saw a {animal} today," said {name}. "A {animal}? Where?" asked {friend}. "In the {land}," said {name}. "It ran away from me."',
    '"Say {x}," said {name}. "{X}," said {friend}. "Now say {animal}." "{Animal}," said {friend}. "Well done," said {name}.',
    '"Can you help me?" asked {friend}. "Of course," said {name}. "What do you need?" "I need a {x}." "Here is a {x}," said {name}.',
    'One day {friend} met {name} in the {land}. "Good morning, {name}," said {friend}. "Good morning, {friend}," said {name}. '
    '"Is this your {x}?" "No," said {friend}, "my {x} is {colour}."',
)  # fmt: skip


def _talks(chance: Chance) -> Iterator[str]:
    while True:
        slots = Slots(chance, chance.thing(among=OBJECT_THINGS), animal=chance.thing(among=ANIMAL_THINGS))
        slots |= {_up(name): _up(slots[name]) for name in ("x", "animal", "colour")}
        yield _fill(chance.choice(TALKS), slots)


QUESTIONS = ("{name} said: {asked}\n{friend} answered: {answer}", "Question: {asked}\nAnswer: {answer}", "{asked}\n{answer}",
             "{name}: {asked}\n{friend}: {answer}")  # fmt: skip


def _questions(chance: Chance) -> Iterator[str]:
    """Requests and their answers as they would stand in a book."""
    layout, kinds = chance.choice(QUESTIONS), chance.sample(list(KINDS.values()), chance.choice((1, 3, len(KINDS))))
    names = chance.sample(NAMES, 2)
    while True:
        turns = chance.choice(kinds)(chance).turns
        yield "\n".join(layout.format(name=names[0], friend=names[1], asked=turns[i], answer=turns[i + 1]) for i in range(0, len(turns), 2))


# How pieces of a kind are joined, and how often it comes.
DOCUMENTS: tuple[tuple[Callable[[Chance], Iterator[str]], str, int], ...] = (
    (_stories, "\n\n", 6), (_descriptions, "\n\n", 4), (_scenes, " ", 2), (_facts, " ", 2), (_talks, "\n\n", 2), (_echoes, "\n", 10),
    (_spellings, "\n", 4), (_repeats, "\n", 1), (_sums, "\n", 6), (_number_lines, "\n", 1), (_questions, "\n\n", 8),
)  # fmt: skip


def documents(seed: int | str, *, split: str) -> Iterator[str]:
    """Plain texts of 30 to 200 words without end, the same for the same seed: stories, descriptions, facts, talk, sums, and lists copied
    and changed in many ways. They draw their arguments as tasks do, so that training's texts show nothing that is held out.

    Raises ValueError for a split that is none.
    """
    return _documents(_chance(seed, "documents", split))


def _documents(chance: Chance) -> Iterator[str]:
    weights = [weight for _, _, weight in DOCUMENTS]
    while True:
        ((make, joint, _),) = chance.choices(DOCUMENTS, weights)
        target, pieces, words = chance.randint(30, 110), list[str](), 0
        for piece in make(chance):
            length = len(piece.split())
            if words + length <= 200:  # a long conversation gives way to a shorter one
                pieces.append(piece)
                words += length
            if words >= target:
                break
        yield joint.join(pieces)

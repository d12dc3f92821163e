"""A small instruction set made from seeded code, so that the quickstart needs no download.

The rows look like Alpaca data (``instruction``, ``input``, ``output``, with the task family under ``topic``).
Their answers are computed or looked up in the tables below, so they are right by construction, and they range
from copying a sentence to multiplying large numbers, so that a small language model finds some of them trivial
and others hard. The same arguments give the same rows on every platform and Python version.
"""

import json
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Text = tuple[str, str, str]  # instruction, input, output

MAX_ROWS = 4000  # beyond this the smallest families would run out of distinct prompts


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Parse ``"a:b, c:d"`` into ``(("a", "b"), ("c", "d"))``."""
    halves = [entry.split(":") for entry in text.split(",")]
    return tuple((" ".join(left.split()), " ".join(right.split())) for left, right in halves)


NAMES = tuple(
    """Anna Ben Carla David Emma Felix Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Robert
    Sara Tom Victor""".split()
)
SURNAMES = tuple(
    "Adams Brown Carter Diaz Evans Fischer Green Hill Jones Kelly Lopez Miller Novak Smith".split()
)
MONTHS = tuple(
    """January February March April May June July August September October November
    December""".split()
)
ADJECTIVES = tuple("old new small large beautiful strange heavy simple".split())
PLACES = (
    "in the garden",
    "at school",
    "near the river",
    "behind the house",
    "at the market",
    "in the village",
)
TIMES = ("yesterday", "last week", "on Monday", "this morning", "two days ago", "in March")
GIFTS = tuple("book lamp scarf clock painting teapot camera blanket umbrella necklace puzzle plant".split())
THINGS = tuple("apples books coins pencils stamps marbles cookies cards stickers shells".split())

CAPITALS = _pairs("""France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Greece:Athens,
    Austria:Vienna, Belgium:Brussels, Denmark:Copenhagen, Norway:Oslo, Sweden:Stockholm, Finland:Helsinki,
    Ireland:Dublin, Poland:Warsaw, Hungary:Budapest, Romania:Bucharest, Bulgaria:Sofia, Croatia:Zagreb,
    Serbia:Belgrade, Estonia:Tallinn, Latvia:Riga, Lithuania:Vilnius, Iceland:Reykjavik, Turkey:Ankara,
    Russia:Moscow, Ukraine:Kyiv, Egypt:Cairo, Morocco:Rabat, Tunisia:Tunis, Kenya:Nairobi, Ethiopia:Addis Ababa,
    Ghana:Accra, Nigeria:Abuja, Senegal:Dakar, Uganda:Kampala, Zambia:Lusaka, Angola:Luanda, China:Beijing,
    Japan:Tokyo, Thailand:Bangkok, Vietnam:Hanoi, India:New Delhi, Nepal:Kathmandu, Pakistan:Islamabad,
    Bangladesh:Dhaka, Iran:Tehran, Iraq:Baghdad, Jordan:Amman, Lebanon:Beirut, Mongolia:Ulaanbaatar,
    Australia:Canberra, Canada:Ottawa, Mexico:Mexico City, Cuba:Havana, Peru:Lima, Chile:Santiago,
    Argentina:Buenos Aires, Uruguay:Montevideo, Ecuador:Quito, Jamaica:Kingston""")
CATEGORIES = {
    "animal": tuple(
        """tiger horse rabbit elephant zebra dolphin eagle lion cow goat monkey penguin kangaroo owl
        otter frog""".split()
    ),
    "fruit": tuple(
        "apple banana pear peach mango plum cherry lemon grape fig melon papaya pineapple apricot".split()
    ),
    "vehicle": tuple(
        """car bus truck bicycle motorcycle train tram van helicopter airplane ferry tractor scooter
        ambulance""".split()
    ),
    "musical instrument": tuple(
        "violin piano guitar flute trumpet cello harp clarinet trombone accordion".split()
    ),
    "tool": tuple("hammer saw screwdriver wrench chisel shovel rake axe".split()),
}
WORDS = tuple(word for group in CATEGORIES.values() for word in group) + GIFTS
PLURALS = _pairs("""cat:cats, book:books, tree:trees, house:houses, river:rivers, window:windows, chair:chairs,
    key:keys, toy:toys, day:days, monkey:monkeys, piano:pianos, photo:photos, roof:roofs, box:boxes, bus:buses,
    church:churches, dish:dishes, glass:glasses, watch:watches, brush:brushes, fox:foxes, class:classes,
    tomato:tomatoes, potato:potatoes, hero:heroes, echo:echoes, city:cities, baby:babies, story:stories,
    party:parties, country:countries, family:families, lady:ladies, puppy:puppies, berry:berries, leaf:leaves,
    knife:knives, wolf:wolves, life:lives, shelf:shelves, wife:wives, thief:thieves, loaf:loaves, half:halves,
    calf:calves, mouse:mice, child:children, foot:feet, tooth:teeth, goose:geese, man:men, woman:women,
    person:people, ox:oxen, sheep:sheep, deer:deer, crisis:crises, analysis:analyses, phenomenon:phenomena""")
PAST_TENSES = _pairs("""walk:walked, play:played, jump:jumped, help:helped, open:opened, look:looked, ask:asked,
    dance:danced, live:lived, smile:smiled, hope:hoped, bake:baked, stop:stopped, plan:planned, drop:dropped,
    carry:carried, study:studied, try:tried, cry:cried, marry:married, go:went, eat:ate, see:saw, run:ran,
    come:came, take:took, give:gave, write:wrote, drive:drove, speak:spoke, break:broke, choose:chose, sing:sang,
    swim:swam, drink:drank, begin:began, ring:rang, buy:bought, bring:brought, think:thought, catch:caught,
    teach:taught, fight:fought, sleep:slept, keep:kept, feel:felt, leave:left, build:built, send:sent,
    spend:spent, make:made, say:said, tell:told, sell:sold, find:found, stand:stood, know:knew, grow:grew,
    fly:flew, throw:threw, draw:drew, fall:fell, forget:forgot, hide:hid, steal:stole, freeze:froze, cut:cut,
    put:put""")
ANTONYMS = _pairs("""hot:cold, big:small, fast:slow, early:late, happy:sad, rich:poor, strong:weak, wet:dry,
    full:empty, clean:dirty, up:down, inside:outside, loud:quiet, true:false, wide:narrow, deep:shallow,
    safe:dangerous, polite:rude, cheap:expensive, victory:defeat, day:night, north:south, east:west,
    friend:enemy, love:hate, buy:sell, push:pull, arrive:depart, increase:decrease, accept:reject, always:never,
    ancient:modern, guilty:innocent, remember:forget, success:failure, tight:loose, above:below,
    maximum:minimum, positive:negative, visible:invisible""")
ACTIONS = tuple(
    (tuple(verb.split()), tuple(objects.split()))
    for verb, objects in _pairs("""
    write wrote written:letter poem story, paint painted painted:fence wall door, draw drew drawn:map picture horse,
    clean cleaned cleaned:kitchen window floor, break broke broken:window plate chair, hide hid hidden:key gift map,
    find found found:key ring map, eat ate eaten:apple sandwich cake, open opened opened:box letter door,
    sell sold sold:car bicycle house, repair repaired repaired:roof clock bicycle, choose chose chosen:gift song book,
    build built built:tower boat bridge, throw threw thrown:ball stone stick, buy bought bought:table lamp guitar,
    steal stole stolen:painting car watch, take took taken:photo book coat, move moved moved:table chair box""")
)
DEFINITIONS = _pairs("""baker:a person who makes bread and cakes, pilot:a person who flies an airplane,
    farmer:a person who grows crops and raises animals, teacher:a person who helps students learn,
    dentist:a doctor who takes care of teeth, author:a person who writes books,
    tailor:a person who makes and repairs clothes, librarian:a person who works in a library,
    carpenter:a person who builds things from wood, plumber:a person who repairs water pipes,
    astronaut:a person who travels into space, chef:a person who cooks food in a restaurant,
    nurse:a person who takes care of sick people, judge:a person who makes decisions in a court of law,
    photographer:a person who takes pictures with a camera, firefighter:a person who puts out fires,
    thermometer:an instrument that measures temperature, telescope:an instrument that makes distant objects visible,
    microscope:an instrument that makes tiny objects visible, compass:an instrument that shows which way is north,
    calendar:a chart that shows the days and months of a year, clock:a device that shows the time,
    dictionary:a book that explains the meaning of words, map:a drawing that shows where places are,
    umbrella:a folding cover that protects you from rain, bridge:a structure that carries a road over a river,
    refrigerator:a machine that keeps food cold, battery:a device that stores electrical energy,
    lighthouse:a tower with a bright light that guides ships, museum:a building where valuable objects are shown,
    island:a piece of land surrounded by water, desert:a large area of land with very little rain,
    volcano:a mountain from which hot lava can erupt, triangle:a shape with three sides,
    square:a shape with four equal sides and four right angles, hexagon:a shape with six sides,
    decade:a period of ten years, century:a period of one hundred years, dozen:a group of twelve,
    orphan:a child whose parents have died""")
UNITS = tuple(
    (large, small, int(factor))
    for pair, factor in _pairs("""kilometers meters:1000, meters centimeters:100,
    centimeters millimeters:10, kilograms grams:1000, liters milliliters:1000, hours minutes:60, minutes seconds:60,
    days hours:24, weeks days:7, feet inches:12, yards feet:3, pounds ounces:16""")
    for large, small in [pair.split()]
)


class _Draw:
    """Random draws made of ``Random.random()`` alone, the one method whose sequence Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def between(self, low: int, high: int) -> int:
        """Return an integer from ``low`` to ``high``, both included."""
        return low + int(self._rng.random() * (high - low + 1))

    def number(self, max_digits: int) -> int:
        """Return a positive integer whose number of digits is itself drawn from 1 to ``max_digits``."""
        digits = self.between(1, max_digits)
        return self.between(10 ** (digits - 1), 10**digits - 1)

    def choice(self, items: Sequence[T]) -> T:
        """Return one of ``items``."""
        return items[self.between(0, len(items) - 1)]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Return ``count`` different entries of ``items`` in random order."""
        pool = list(items)
        for i in range(count):
            j = self.between(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def phrase(self, options: Sequence[Text], **values: object) -> Text:
        """Fill the templates of one of ``options`` with ``values``."""
        instruction, context, output = self.choice(options)
        return instruction.format(**values), context.format(**values), output.format(**values)


def _a(noun: str) -> str:
    """Put the indefinite article before ``noun``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sentence(draw: _Draw) -> str:
    """Make a statement of 4 to 11 words."""
    (_, past, _), objects = draw.choice(ACTIONS)
    adjective = draw.choice(("", draw.choice(ADJECTIVES) + " "))
    place, time = draw.choice(("", " " + draw.choice(PLACES))), draw.choice(("", " " + draw.choice(TIMES)))
    return f"{draw.choice(NAMES)} {past} the {adjective}{draw.choice(objects)}{place}{time}."


def _date(draw: _Draw) -> tuple[int, int, int]:
    """Draw a year, a month and a day."""
    return draw.between(1950, 2029), draw.between(1, 12), draw.between(1, 28)


def _echo(draw: _Draw) -> Text:
    return draw.phrase(
        (
            ("Repeat the following sentence exactly.", "{s}", "{s}"),
            ("Copy the text below without changing it.", "{s}", "{s}"),
            ("Repeat after me: {s}", "", "{s}"),
            ("Write this sentence twice.", "{s}", "{s} {s}"),
        ),
        s=_sentence(draw),
    )


def _uppercase(draw: _Draw) -> Text:
    text = draw.choice((_sentence(draw), " ".join(draw.sample(WORDS, draw.between(1, 4)))))
    return draw.phrase(
        (
            ("Convert the text to uppercase.", "{s}", "{u}"),
            ("Write the following in capital letters.", "{s}", "{u}"),
            ("Change all letters to upper case: {s}", "", "{u}"),
        ),
        s=text,
        u=text.upper(),
    )


def _spelling(draw: _Draw) -> Text:
    word = draw.choice(WORDS)
    return draw.phrase(
        (
            ("Spell the word '{w}' letter by letter.", "", "{d}"),
            ("How do you spell {w}?", "", "{W} is spelled {d}."),
            ("Separate the letters of the word with spaces.", "{w}", "{s}"),
            ("List the letters of the word {w}.", "", "The letters are {c}."),
        ),
        w=word,
        W=word.capitalize(),
        d="-".join(word),
        s=" ".join(word),
        c=", ".join(word),
    )


def _reverse_string(draw: _Draw) -> Text:
    word = draw.choice(WORDS)
    return draw.phrase(
        (
            ("Reverse the word '{w}'.", "", "{r}"),
            ("Write the letters of the word in reverse order.", "{w}", "{r}"),
            ("Spell {w} backwards.", "", "{w} spelled backwards is {r}."),
            ("What is '{w}' written from right to left?", "", "It is {r}."),
        ),
        w=word,
        r=word[::-1],
    )


def _plural(draw: _Draw) -> Text:
    noun, plural = draw.choice(PLURALS)
    return draw.phrase(
        (
            ("What is the plural of '{n}'?", "", "The plural of {n} is {p}."),
            ("Give the plural form of the noun.", "{n}", "{p}"),
            ("Fill in the blank: one {n}, two ___.", "", "one {n}, two {p}"),
            ("Write the noun in its plural form.", "{n}", "{p}"),
            ("Rewrite with the number two.", "one {n}", "two {p}"),
        ),
        n=noun,
        p=plural,
    )


def _past_tense(draw: _Draw) -> Text:
    verb, past = draw.choice(PAST_TENSES)
    return draw.phrase(
        (
            ("What is the past tense of '{v}'?", "", "The past tense of {v} is {p}."),
            ("Give the simple past of the verb.", "{v}", "{p}"),
            ("Put the verb into the past tense.", "{v}", "{p}"),
            ("Complete the pair: today I {v}, yesterday I ___.", "", "Today I {v}, yesterday I {p}."),
        ),
        v=verb,
        p=past,
    )


def _antonym(draw: _Draw) -> Text:
    pair = draw.choice(ANTONYMS)
    word, opposite = draw.sample(pair, 2)
    return draw.phrase(
        (
            ("What is the opposite of '{w}'?", "", "The opposite of {w} is {o}."),
            ("Give an antonym of the word.", "{w}", "{o}"),
            ("Name a word that means the opposite of {w}.", "", "{o}"),
            ("Find the antonym.", "{w}", "An antonym of {w} is {o}."),
        ),
        w=word,
        o=opposite,
    )


def _category(draw: _Draw) -> Text:
    right, wrong = draw.sample(tuple(CATEGORIES), 2)
    item = draw.choice(CATEGORIES[right])
    first, second = draw.sample((right, wrong), 2)
    return draw.phrase(
        (
            ("Is {i} {f} or {s}?", "", "{I} is {r}."),
            ("Classify the word as '{a}' or '{b}'.", "{n}", "{c}"),
            ("Is {i} {w}? Answer yes or no and explain.", "", "No, {i} is not {w}. It is {r}."),
            ("Which category fits {i} better, {a} or {b}?", "", "{I} fits the category {c}."),
        ),
        i=_a(item),
        I=_a(item).capitalize(),
        n=item,
        a=first,
        b=second,
        c=right,
        f=_a(first),
        s=_a(second),
        r=_a(right),
        w=_a(wrong),
    )


def _capital(draw: _Draw) -> Text:
    country, city = draw.choice(CAPITALS)
    return draw.phrase(
        (
            ("What is the capital of {n}?", "", "The capital of {n} is {c}."),
            ("Name the capital city of the given country.", "{n}", "{c}"),
            ("Which city is the capital of {n}?", "", "{c} is the capital of {n}."),
            ("Which country has {c} as its capital?", "", "{c} is the capital of {n}."),
            ("Identify the country whose capital is given.", "{c}", "{n}"),
        ),
        n=country,
        c=city,
    )


def _definition(draw: _Draw) -> Text:
    term, meaning = draw.choice(DEFINITIONS)
    return draw.phrase(
        (
            ("What is {t}?", "", "{T} is {m}."),
            ("Explain in one sentence what {t} is.", "", "{T} is {m}."),
            ("Define the word '{n}'.", "", "The word '{n}' means {m}."),
            ("Give a short definition of the term.", "{n}", "{M}."),
            ("Which word is described here?", "{M}.", "The word is '{n}'."),
            ("What do we call {m}?", "", "That is called {t}."),
        ),
        n=term,
        t=_a(term),
        T=_a(term).capitalize(),
        m=meaning,
        M=meaning.capitalize(),
    )


def _comparison(draw: _Draw) -> Text:
    whole, digits = draw.between(1, 99), draw.between(1, 5)
    decimals = [f"{whole}.{draw.between(1, 9)}", f"{whole}.{draw.between(0, 9)}{draw.between(1, 9)}"]
    start = draw.between(10 ** (digits - 1), 10**digits - 1)
    integers = [str(start), str(start + draw.between(1, 10**digits))]
    first, second = draw.sample(draw.choice((decimals, integers, integers)), 2)
    small, large = sorted((first, second), key=float)
    return draw.phrase(
        (
            ("Which number is larger, {a} or {b}?", "", "{l} is larger than {s}."),
            ("Which of these two numbers is smaller?", "{a} and {b}", "{s}"),
            ("Find the greater number: {a}, {b}", "", "{l}"),
            ("Compare {a} and {b}.", "", "{s} is less than {l}."),
        ),
        a=first,
        b=second,
        s=small,
        l=large,
    )


def _addition(draw: _Draw) -> Text:
    a, b = draw.number(4), draw.number(4)
    return draw.phrase(
        (
            ("What is {a} + {b}?", "", "{a} + {b} = {c}"),
            ("Calculate the sum.", "{a} + {b}", "{c}"),
            ("Add {a} and {b}.", "", "The sum of {a} and {b} is {c}."),
            ("What is {c} - {b}?", "", "{c} - {b} = {a}"),
            ("Subtract {b} from {c}.", "", "The result is {a}."),
        ),
        a=a,
        b=b,
        c=a + b,
    )


def _multiplication(draw: _Draw) -> Text:
    a, b = draw.choice(
        ((draw.between(2, 12), draw.between(2, 12)), (draw.between(2, 99), draw.between(11, 99)))
    )
    return draw.phrase(
        (
            ("What is {a} times {b}?", "", "{a} times {b} is {c}."),
            ("Calculate the product.", "{a} * {b}", "{c}"),
            ("Multiply {a} by {b}.", "", "{a} * {b} = {c}"),
        ),
        a=a,
        b=b,
        c=a * b,
    )


def _sequence(draw: _Draw) -> Text:
    step, start = (
        draw.choice((draw.between(1, 5), draw.between(6, 30), -draw.between(1, 9))),
        draw.between(40, 150),
    )
    terms = [start + i * step for i in range(6)]
    return draw.phrase(
        (
            ("What number comes next in the sequence {s}?", "", "The next number is {n}."),
            ("Continue the sequence with the next number.", "{s}", "{n}"),
            ("Give the next two numbers of the sequence.", "{s}", "{n}, {m}"),
            ("By how much does each number of the sequence change?", "{s}", "Each number {d}."),
        ),
        s=", ".join(map(str, terms[:4])),
        n=terms[4],
        m=terms[5],
        d=f"{'increases' if step > 0 else 'decreases'} by {abs(step)}",
    )


def _units(draw: _Draw) -> Text:
    large, small, factor = draw.choice(UNITS)
    count = draw.choice((draw.between(2, 9), draw.between(10, 60)))
    return draw.phrase(
        (
            ("Convert {n} {l} to {s}.", "", "{n} {l} is equal to {t} {s}."),
            ("How many {s} are there in {n} {l}?", "", "There are {t} {s} in {n} {l}."),
            ("Express the quantity in {s}.", "{n} {l}", "{t} {s}"),
            ("Convert {t} {s} to {l}.", "", "{n} {l}"),
        ),
        n=count,
        t=count * factor,
        l=large,
        s=small,
    )


def _word_problem(draw: _Draw) -> Text:
    name, other = draw.sample(NAMES, 2)
    a, b = draw.between(2, 30), draw.between(2, 20)
    return draw.phrase(
        (
            (
                "{p} has {t} {x} and gives {b} of them to {q}. How many {x} does {p} have left?",
                "",
                "{p} has {t} - {b} = {a} {x} left.",
            ),
            (
                "{p} has {a} {x} and {q} has {b}. How many {x} do they have together?",
                "",
                "They have {t} {x} together.",
            ),
            (
                "{p} buys {b} boxes with {a} {x} each. How many {x} is that?",
                "",
                "{b} * {a} = {m}, so {p} has {m} {x}.",
            ),
            (
                "{p} shares {m} {x} equally among {b} friends. How many {x} does each friend get?",
                "",
                "Each friend gets {a} {x}.",
            ),
        ),
        p=name,
        q=other,
        x=draw.choice(THINGS),
        a=a,
        b=b,
        t=a + b,
        m=a * b,
    )


def _sort_words(draw: _Draw) -> Text:
    words = draw.sample(WORDS, draw.between(3, 6))
    return draw.phrase(
        (
            ("Sort the words alphabetically.", "{w}", "{s}"),
            ("Put these words in alphabetical order: {w}", "", "{s}"),
            ("Arrange the words from A to Z.", "{w}", "In alphabetical order: {s}"),
        ),
        w=", ".join(words),
        s=", ".join(sorted(words)),
    )


def _sort_numbers(draw: _Draw) -> Text:
    numbers = draw.sample(range(1, 10 ** draw.between(1, 3)), draw.between(3, 6))
    options: tuple[Text, ...] = (
        ("Sort the numbers from smallest to largest.", "{x}", "{u}"),
        ("Arrange in ascending order: {x}", "", "The sorted list is: {u}"),
        ("Sort the numbers in descending order.", "{x}", "{d}"),
    )
    up, down = sorted(numbers), sorted(numbers, reverse=True)
    x, u, d = (", ".join(map(str, order)) for order in (numbers, up, down))
    return draw.phrase(options, x=x, u=u, d=d)


def _reverse_list(draw: _Draw) -> Text:
    words = draw.sample(WORDS, draw.between(2, 6))
    return draw.phrase(
        (
            ("Reverse the order of the list.", "{w}", "{r}"),
            ("Write these words in the opposite order: {w}", "", "{r}"),
            ("List the items from last to first.", "{w}", "From last to first: {r}"),
        ),
        w=", ".join(words),
        r=", ".join(reversed(words)),
    )


def _count_words(draw: _Draw) -> Text:
    sentence = _sentence(draw)
    return draw.phrase(
        (
            ("How many words are in the sentence?", "{s}", "There are {n} words in the sentence."),
            ("Count the words.", "{s}", "{n}"),
            ('Count the words in "{s}"', "", "The sentence has {n} words."),
        ),
        s=sentence,
        n=len(sentence.split()),
    )


def _extraction(draw: _Draw) -> Text:
    name, surname = draw.choice(NAMES), draw.choice(SURNAMES)
    year, month, day = _date(draw)
    email, date = f"{name}.{surname}@example.com".lower(), f"{MONTHS[month - 1]} {day}, {year}"
    text = draw.choice(
        (
            f"{name} {surname} ({email}) joined on {date}.",
            f"On {date}, {name} {surname} wrote from {email}.",
            f"Send the form to {email} before {date}, says {name} {surname}.",
        )
    )
    return draw.phrase(
        (
            ("Extract the e-mail address.", "{x}", "{e}"),
            ("Which date is mentioned in the text?", "{x}", "The date is {d}."),
            ("Find the full name of the person.", "{x}", "{n}"),
            ("Who is this text about, and what is the e-mail address?", "{x}", "The text is about {n}, {e}."),
        ),
        x=text,
        e=email,
        d=date,
        n=f"{name} {surname}",
    )


def _date_format(draw: _Draw) -> Text:
    year, month, day = _date(draw)
    return draw.phrase(
        (
            ("Convert the date to the format YYYY-MM-DD.", "{l}", "{i}"),
            ("Rewrite the date in the format DD/MM/YYYY.", "{l}", "{s}"),
            ("Write the date {i} in words.", "", "{l}"),
            ("In which month and year is {i}?", "", "The date {i} is in {m} {y}."),
        ),
        l=f"{MONTHS[month - 1]} {day}, {year}",
        i=f"{year}-{month:02d}-{day:02d}",
        s=f"{day:02d}/{month:02d}/{year}",
        m=MONTHS[month - 1],
        y=year,
    )


def _passive(draw: _Draw) -> Text:
    (base, past, participle), objects = draw.choice(ACTIONS)
    active, passive = draw.choice(
        ((past, "was"), (f"will {base}", "will be"), (f"{base}s", "is"), (f"has {participle}", "has been"))
    )
    return draw.phrase(
        (
            ("Rewrite the sentence in the passive voice.", "{n} {a} the {o}.", "The {o} {p} by {n}."),
            ("Change to passive: {n} {a} the {o}.", "", "The {o} {p} by {n}."),
            ("Rewrite the sentence in the active voice.", "The {o} {p} by {n}.", "{n} {a} the {o}."),
        ),
        n=draw.choice(NAMES),
        a=active,
        p=f"{passive} {participle}",
        o=draw.choice(objects),
    )


def _question(draw: _Draw) -> Text:
    (base, past, _), objects = draw.choice(ACTIONS)
    return draw.phrase(
        (
            ("Turn the sentence into a yes/no question.", "{n} {p} the {o} {t}.", "Did {n} {v} the {o} {t}?"),
            ("Ask who did this.", "{n} {p} the {o} {t}.", "Who {p} the {o} {t}?"),
            (
                "Ask a question about the sentence with 'what'.",
                "{n} {p} the {o} {t}.",
                "What did {n} {v} {t}?",
            ),
            ("Make the sentence negative.", "{n} {p} the {o} {t}.", "{n} did not {v} the {o} {t}."),
        ),
        n=draw.choice(NAMES),
        v=base,
        p=past,
        o=draw.choice(objects),
        t=draw.choice(TIMES),
    )


def _json_object(draw: _Draw) -> Text:
    name, age, (_, city) = draw.choice(NAMES), draw.between(18, 80), draw.choice(CAPITALS)
    return draw.phrase(
        (
            ("Convert the sentence to JSON with the keys name, age and city.", "{s}", "{j}"),
            ("Write the facts as a JSON object with name, age, city.", "{s}", "{j}"),
            ("Turn the JSON object into a sentence.", "{j}", "{s}"),
        ),
        s=f"{name} is {age} years old and lives in {city}.",
        j=json.dumps({"name": name, "age": age, "city": city}),
    )


def _listing(draw: _Draw) -> Text:
    category = draw.choice(tuple(CATEGORIES))
    items = draw.sample(CATEGORIES[category], draw.between(2, 5))
    return draw.phrase(
        (
            ("List {k} {c}s. Start with {f}.", "", "{n}"),
            ("Name {k} {c}s, beginning with {f}.", "", "{l}"),
            ("Give {k} examples of {c}s that include {f}.", "", "Examples of {c}s are {l}."),
        ),
        k=len(items),
        c=category,
        f=_a(items[0]),
        l=", ".join(items),
        n="\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)),
    )


def _explanation(draw: _Draw) -> Text:
    number, divisor, quotient = draw.between(10, 999), draw.between(3, 12), draw.between(3, 40)
    kind, verb = draw.choice((("even", "can"), ("odd", "cannot")))
    even_or_odd = number // 2 * 2 + (kind == "odd")
    return draw.phrase(
        (
            (
                "Explain why {e} is {k}.",
                "",
                "{e} is {k} because its last digit is {u}, which {v} be divided evenly by 2.",
            ),
            ("Is {e} even or odd? Explain.", "", "{e} is {k} because its last digit, {u}, is {k}."),
            (
                "Explain why {m} is divisible by {d}.",
                "",
                "{m} is divisible by {d} because {d} times {q} equals {m}.",
            ),
            ("Is {m} a prime number? Explain.", "", "No, {m} is not prime because it can be divided by {d}."),
        ),
        e=even_or_odd,
        k=kind,
        v=verb,
        u=even_or_odd % 10,
        d=divisor,
        q=quotient,
        m=divisor * quotient,
    )


def _message(draw: _Draw) -> Text:
    sender, receiver = draw.sample(NAMES, 2)
    return draw.phrase(
        (
            (
                "Write a short thank-you note from {a} to {b} for {g}.",
                "",
                "Dear {b}, thank you very much for the {h}. I really like it. Best wishes, {a}",
            ),
            (
                "Write an invitation from {a} to {b} for a party on {d}.",
                "",
                "Dear {b}, I am having a party on {d} and would love to see you there. Yours, {a}",
            ),
            (
                "{a} is sick and cannot meet {b} on {d}. Write the message.",
                "",
                "Hi {b}, I am sorry, but I am sick and cannot meet you on {d}. {a}",
            ),
        ),
        a=sender,
        b=receiver,
        g=_a(gift := draw.choice(GIFTS)),
        h=gift,
        d=f"{draw.choice(MONTHS)} {draw.between(1, 28)}",
    )


FAMILIES: tuple[Callable[[_Draw], Text], ...] = (
    _echo,
    _uppercase,
    _spelling,
    _reverse_string,
    _plural,
    _past_tense,
    _antonym,
    _category,
    _capital,
    _definition,
    _comparison,
    _addition,
    _multiplication,
    _sequence,
    _units,
    _word_problem,
    _sort_words,
    _sort_numbers,
    _reverse_list,
    _count_words,
    _extraction,
    _date_format,
    _passive,
    _question,
    _json_object,
    _listing,
    _explanation,
    _message,
)
TOPICS = tuple(family.__name__.lstrip("_") for family in FAMILIES)


def make_quickstart_rows(num_rows: int, seed: int) -> list[dict[str, str]]:
    """Make ``num_rows`` rows, all families in equal shares, no (instruction, input) pair twice.

    The rows come in rounds of one row a family, in an order drawn anew each round, so any stretch of the list
    holds a balanced mix, and asking for more rows with the same seed extends the list without changing its start.
    """
    if not 0 <= num_rows <= MAX_ROWS:
        raise ValueError(f"num_rows must be between 0 and {MAX_ROWS}, got {num_rows}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    draw = _Draw(seed)
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    while len(rows) < num_rows:
        for index in draw.sample(range(len(FAMILIES)), len(FAMILIES)):
            instruction, context, output = FAMILIES[index](draw)
            while (instruction, context) in seen:
                instruction, context, output = FAMILIES[index](draw)
            seen.add((instruction, context))
            rows.append(
                {"instruction": instruction, "input": context, "output": output, "topic": TOPICS[index]}
            )
    return rows[:num_rows]


def make_quickstart_splits(
    num_train: int, num_validation: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Make train and validation rows that share no (instruction, input) pair; their sum is at most ``MAX_ROWS``.

    The validation rows depend on ``num_validation`` and ``seed`` alone, so runs with different amounts of
    training data are measured on the same rows.
    """
    if num_train < 0 or num_validation < 0:
        raise ValueError(f"row counts must not be negative, got {num_train} and {num_validation}")
    rows = make_quickstart_rows(num_train + num_validation, seed)
    return rows[num_validation:], rows[:num_validation]

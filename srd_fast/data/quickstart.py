"""A small instruction set made from seeded code, so that the quickstart needs no download.

The rows look like Alpaca data (``instruction``, ``input``, ``output``, and the task family under ``topic``).
Their answers are computed or looked up in the tables below, so they are right by construction, and they range
from copying a sentence to multiplying numbers, so that a small language model finds some easy and others hard.
The same arguments give the same rows on every platform and Python version.
"""

import json
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Row = dict[str, str]  # instruction, input, output and topic
MAX_ROWS = 2600  # well before the smallest family runs out of distinct prompts


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Parse ``"a:b, c:d"`` into ``(("a", "b"), ("c", "d"))``."""
    halves = [entry.split(":") for entry in text.split(",")]
    return tuple((" ".join(left.split()), " ".join(right.split())) for left, right in halves)


NAMES = _words("Anna Ben Carla David Emma Felix Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Sara Tom")
SURNAMES = _words("Adams Brown Carter Diaz Evans Fischer Green Hill Jones Kelly Lopez Miller Novak Smith")
MONTHS = _words("January February March April May June July August September October November December")
ADJECTIVES = _words("old new small large beautiful strange heavy simple")
PLACES = ("in the garden", "at school", "near the river", "behind the house", "at the market", "in the village")
TIMES = ("yesterday", "last week", "on Monday", "this morning", "two days ago", "in March")
GIFTS = _words("book lamp scarf clock painting teapot camera blanket umbrella necklace puzzle plant")
THINGS = _words("apples books coins pencils stamps marbles cookies cards stickers shells")
CATEGORIES = {
    "animal": _words("tiger horse rabbit elephant zebra dolphin eagle lion cow goat monkey penguin owl otter frog"),
    "fruit": _words("apple banana pear peach mango plum cherry lemon grape fig melon papaya pineapple"),
    "vehicle": _words("car bus truck bicycle motorcycle train tram van helicopter airplane ferry tractor"),
    "musical instrument": _words("violin piano guitar flute trumpet cello harp clarinet trombone accordion"),
    "tool": _words("hammer saw screwdriver wrench chisel shovel rake axe"),
}
NOUNS = tuple(noun for group in CATEGORIES.values() for noun in group) + GIFTS
CAPITALS = _pairs("""France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Greece:Athens,
    Austria:Vienna, Belgium:Brussels, Denmark:Copenhagen, Norway:Oslo, Sweden:Stockholm, Finland:Helsinki,
    Ireland:Dublin, Poland:Warsaw, Hungary:Budapest, Romania:Bucharest, Bulgaria:Sofia, Serbia:Belgrade,
    Estonia:Tallinn, Lithuania:Vilnius, Iceland:Reykjavik, Turkey:Ankara, Russia:Moscow, Ukraine:Kyiv,
    Egypt:Cairo, Morocco:Rabat, Kenya:Nairobi, China:Beijing, Japan:Tokyo, Thailand:Bangkok, Vietnam:Hanoi,
    India:New Delhi, Nepal:Kathmandu, Pakistan:Islamabad, Iran:Tehran, Australia:Canberra, Canada:Ottawa,
    Cuba:Havana, Peru:Lima, Chile:Santiago, Argentina:Buenos Aires""")
PLURALS = _pairs("""cat:cats, tree:trees, house:houses, window:windows, key:keys, toy:toys, day:days,
    monkey:monkeys, photo:photos, box:boxes, bus:buses, church:churches, dish:dishes, glass:glasses,
    watch:watches, tomato:tomatoes, city:cities, baby:babies, story:stories, country:countries, puppy:puppies,
    leaf:leaves, knife:knives, wolf:wolves, life:lives, shelf:shelves, wife:wives, thief:thieves, half:halves,
    mouse:mice, child:children, foot:feet, tooth:teeth, goose:geese, man:men, woman:women, person:people,
    ox:oxen, sheep:sheep, deer:deer, crisis:crises, phenomenon:phenomena""")
PAST_TENSES = _pairs("""walk:walked, play:played, jump:jumped, help:helped, ask:asked, live:lived, bake:baked,
    stop:stopped, study:studied, try:tried, go:went, eat:ate, see:saw, run:ran, come:came, take:took,
    give:gave, write:wrote, drive:drove, break:broke, choose:chose, sing:sang, swim:swam, drink:drank,
    begin:began, buy:bought, think:thought, teach:taught, fight:fought, sleep:slept, keep:kept, build:built,
    make:made, say:said, sell:sold, stand:stood, grow:grew, throw:threw, draw:drew, hide:hid, cut:cut""")
ANTONYMS = _pairs("""hot:cold, big:small, fast:slow, early:late, happy:sad, rich:poor, strong:weak, wet:dry,
    full:empty, clean:dirty, up:down, loud:quiet, true:false, wide:narrow, deep:shallow, safe:dangerous,
    cheap:expensive, victory:defeat, day:night, north:south, friend:enemy, buy:sell, push:pull, arrive:depart,
    increase:decrease, always:never, ancient:modern, guilty:innocent, remember:forget, success:failure,
    above:below, maximum:minimum""")
ANTONYMS += tuple((right, left) for left, right in ANTONYMS)
VERBS = _pairs("""write wrote written:letter poem story, paint painted painted:fence wall door,
    draw drew drawn:map picture horse, clean cleaned cleaned:kitchen window floor,
    hide hid hidden:key gift map, find found found:key ring map, eat ate eaten:apple sandwich cake,
    open opened opened:box letter door, sell sold sold:car bicycle lamp, build built built:tower boat bridge,
    repair repaired repaired:roof clock bicycle, break broke broken:window plate chair,
    throw threw thrown:ball stone stick, buy bought bought:table book guitar""")
DEFINITIONS = _pairs("""a baker:a person who makes bread and cakes, a pilot:a person who flies an airplane,
    a farmer:a person who grows crops and raises animals, a teacher:a person who helps students learn,
    a dentist:a doctor who takes care of teeth, an author:a person who writes books,
    a tailor:a person who makes and repairs clothes, a carpenter:a person who builds things from wood,
    a plumber:a person who repairs water pipes, an astronaut:a person who travels into space,
    a firefighter:a person who puts out fires, a thermometer:an instrument that measures temperature,
    a square:a shape with four equal sides and right angles, a clock:a device that shows the time,
    a microscope:an instrument that makes tiny objects visible, a triangle:a shape with three sides,
    a decade:a period of ten years, a dictionary:a book that explains the meaning of words,
    a century:a period of one hundred years, an umbrella:a folding cover that protects you from rain,
    a dozen:a group of twelve, a refrigerator:a machine that keeps food cold,
    a lighthouse:a tower with a bright light that guides ships, a hexagon:a shape with six sides,
    an island:a piece of land surrounded by water""")
UNITS = _pairs("""kilometers meters:1000, meters centimeters:100, centimeters millimeters:10,
    kilograms grams:1000, liters milliliters:1000, hours minutes:60, minutes seconds:60, days hours:24,
    weeks days:7, feet inches:12, yards feet:3, pounds ounces:16""")


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


Values = dict[str, object]
Family = tuple[list[tuple[str, str, str]], Callable[[_Draw], Values]]  # templates and what fills them
FAMILIES: dict[str, Family] = {}


def _families(lines: str) -> Callable[[Callable[[_Draw], Values]], None]:
    """Register the families of ``topic: instruction | input => output`` lines with the function that fills them."""

    def register(values: Callable[[_Draw], Values]) -> None:
        for line in lines.strip().splitlines():
            topic, text = line.strip().split(": ", 1)
            prompt, output = text.split(" => ")
            instruction, _, context = prompt.partition(" | ")
            FAMILIES.setdefault(topic, ([], values))[0].append((instruction, context, output))

    return register


def _a(noun: str) -> str:
    """Put the indefinite article before ``noun``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _entry(table: Sequence[tuple[str, str]]) -> Callable[[_Draw], Values]:
    """Draw entries of ``table`` as key ``k`` and value ``v``; ``K`` and ``V`` begin with a capital letter."""

    def values(draw: _Draw) -> Values:
        key, value = draw.choice(table)
        return {"k": key, "v": value, "K": key.capitalize(), "V": value.capitalize()}

    return values


_families("""
    spelling: Spell the word '{k}' letter by letter. => {v}
    spelling: How do you spell {k}? => {K} is spelled {v}.
    spelling: Separate the letters of the word with hyphens. | {k} => {v}
""")(_entry([(noun, "-".join(noun)) for noun in NOUNS]))
_families("""
    reverse_string: Write the letters of the word in reverse order. | {k} => {v}
    reverse_string: Spell {k} backwards. => {K} spelled backwards is {v}.
    reverse_string: Reverse the word '{k}'. => {v}
""")(_entry([(noun, noun[::-1]) for noun in NOUNS]))
_families("""
    plural: What is the plural of '{k}'? => The plural of {k} is {v}.
    plural: Give the plural form of the noun. | {k} => {v}
    plural: Fill in the blank: one {k}, two ___. => one {k}, two {v}
    plural: What is the singular of '{v}'? => The singular of {v} is {k}.
""")(_entry(PLURALS))
_families("""
    past_tense: What is the past tense of '{k}'? => The past tense of {k} is {v}.
    past_tense: Put the verb into the simple past. | {k} => {v}
    past_tense: Complete the pair: today I {k}, yesterday I ___. => Today I {k}, yesterday I {v}.
""")(_entry(PAST_TENSES))
_families("""
    antonym: What is the opposite of '{k}'? => The opposite of {k} is {v}.
    antonym: Give an antonym of the word. | {k} => {v}
    antonym: Name a word that means the opposite of {k}. => An antonym of {k} is {v}.
""")(_entry(ANTONYMS))
_families("""
    capital: What is the capital of {k}? => The capital of {k} is {v}.
    capital: Name the capital city of the given country. | {k} => {v}
    capital: Which country has {v} as its capital? => {v} is the capital of {k}.
    capital: Identify the country whose capital is given. | {v} => {k}
""")(_entry(CAPITALS))
_families("""
    definition: What is {k}? => {K} is {v}.
    definition: Explain in one sentence what {k} is. => {K} is {v}.
    definition: Give a short definition of the term. | {k} => {V}.
    definition: What is described here? | {V}. => This describes {k}.
    definition: What do we call {v}? => {K}.
""")(_entry(DEFINITIONS))


@_families("""
    echo: Repeat the following sentence exactly. | {s} => {s}
    echo: Copy the text below without changing it. | {s} => {s}
    echo: Repeat after me: {s} => {s}
    uppercase: Convert the text to uppercase. | {s} => {u}
    uppercase: Change all letters to upper case: {s} => {u}
    uppercase: Write this word in capital letters. | {w} => {W}
    count_words: How many words are in the sentence? | {s} => There are {n} words in the sentence.
    count_words: Count the words. | {s} => {n}
    count_words: Count the words in "{s}" => The sentence has {n} words.
""")
def _from_sentence(draw: _Draw) -> Values:
    forms, objects = draw.choice(VERBS)
    subject, word = draw.choice(NAMES), draw.choice(NOUNS)
    adjective, place, time = (draw.choice(("", draw.choice(table))) for table in (ADJECTIVES, PLACES, TIMES))
    parts = (subject, forms.split()[1], "the", adjective, draw.choice(objects.split()), place, time)
    sentence = " ".join(part for part in parts if part) + "."
    return {"s": sentence, "u": sentence.upper(), "n": len(sentence.split()), "w": word, "W": word.upper()}


@_families("""
    passive: Rewrite the sentence in the passive voice. | {n} {a} the {o}. => The {o} {x} by {n}.
    passive: Change to passive: {n} {a} the {o}. => The {o} {x} by {n}.
    passive: Rewrite the sentence in the active voice. | The {o} {x} by {n}. => {n} {a} the {o}.
    question: Turn the sentence into a yes/no question. | {n} {p} the {o} {t}. => Did {n} {b} the {o} {t}?
    question: Ask who did this. | {n} {p} the {o} {t}. => Who {p} the {o} {t}?
    question: Ask a question about the sentence with 'what'. | {n} {p} the {o} {t}. => What did {n} {b} {t}?
    question: Make the sentence negative. | {n} {p} the {o} {t}. => {n} did not {b} the {o} {t}.
""")
def _from_verb(draw: _Draw) -> Values:
    forms, objects = draw.choice(VERBS)
    base, past, participle = forms.split()
    tenses = ((past, "was"), (f"will {base}", "will be"), (f"{base}s", "is"), (f"has {participle}", "has been"))
    active, auxiliary = draw.choice(tenses)
    words = {"n": draw.choice(NAMES), "o": draw.choice(objects.split()), "t": draw.choice(TIMES)}
    return {"b": base, "p": past, "a": active, "x": f"{auxiliary} {participle}", **words}


@_families("""
    category: Is {i} {f} or {s}? => {I} is {r}.
    category: Classify the word as '{a}' or '{b}'. | {n} => {c}
    category: Is {i} {w}? Answer yes or no and explain. => No, {i} is not {w}. It is {r}.
    category: Is {i} {r}? Answer yes or no and explain. => Yes, {i} is {r}. It is not {w}.
    listing: List {k} {c}s. Start with {i}. => {N}
    listing: Name {k} {c}s, beginning with {i}. => {l}
    listing: Give {k} examples of {c}s that include {i}. => Examples of {c}s are {l}.
""")
def _from_category(draw: _Draw) -> Values:
    right, wrong = draw.sample(tuple(CATEGORIES), 2)
    items, (a, b) = draw.sample(CATEGORIES[right], draw.between(2, 5)), draw.sample((right, wrong), 2)
    item, numbered = _a(items[0]), "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    articles = {"i": item, "I": item.capitalize(), "f": _a(a), "s": _a(b), "r": _a(right), "w": _a(wrong)}
    lists = {"k": len(items), "l": ", ".join(items), "N": numbered}
    return {"n": items[0], "a": a, "b": b, "c": right, **articles, **lists}


@_families("""
    order_words: Sort the words alphabetically. | {w} => {s}
    order_words: Put these words in alphabetical order: {w} => {s}
    order_words: Reverse the order of the list. | {w} => {r}
    order_words: List the items from last to first. | {w} => From last to first: {r}
""")
def _from_words(draw: _Draw) -> Values:
    words = draw.sample(NOUNS, draw.between(2, 6))
    return {"w": ", ".join(words), "s": ", ".join(sorted(words)), "r": ", ".join(reversed(words))}


@_families("""
    sort_numbers: Sort the numbers from smallest to largest. | {n} => {s}
    sort_numbers: Arrange in ascending order: {n} => The sorted list is: {s}
    sort_numbers: Sort the numbers in descending order. | {n} => {r}
""")
def _from_numbers(draw: _Draw) -> Values:
    numbers = draw.sample(range(1, 10 ** draw.between(1, 3)), draw.between(3, 6))
    up = [str(number) for number in sorted(numbers)]
    return {"n": ", ".join(map(str, numbers)), "s": ", ".join(up), "r": ", ".join(reversed(up))}


@_families("""
    comparison: Which number is larger, {a} or {b}? => {l} is larger than {s}.
    comparison: Which of these two numbers is smaller? | {a} and {b} => {s}
    comparison: Compare {a} and {b}. => {s} is less than {l}.
""")
def _from_two_numbers(draw: _Draw) -> Values:
    whole, start, gap = draw.between(1, 99), draw.number(5), draw.number(4)
    decimals = [f"{whole}.{draw.between(1, 9)}", f"{whole}.{draw.between(0, 9)}{draw.between(1, 9)}"]
    integers = [str(start), str(start + gap)]
    a, b = draw.sample(draw.choice((decimals, integers, integers)), 2)
    small, large = sorted((a, b), key=float)
    return {"a": a, "b": b, "s": small, "l": large}


@_families("""
    arithmetic: What is {a} + {b}? => {a} + {b} = {s}
    arithmetic: Calculate the sum. | {a} + {b} => {s}
    arithmetic: Subtract {b} from {s}. => The result is {a}.
    arithmetic: What is {c} times {d}? => {c} times {d} is {p}.
    arithmetic: Multiply the numbers. | {c} * {d} => {p}
""")
def _from_operands(draw: _Draw) -> Values:
    a, b, c, d = draw.number(4), draw.number(4), draw.number(2), draw.number(2)
    return {"a": a, "b": b, "c": c, "d": d, "s": a + b, "p": c * d}


@_families("""
    sequence: What number comes next in the sequence {s}? => The next number is {n}.
    sequence: Continue the sequence with the next number. | {s} => {n}
    sequence: Give the next two numbers of the sequence. | {s} => {n}, {m}
    sequence: By how much does each number of the sequence change? | {s} => Each number {c}.
""")
def _from_progression(draw: _Draw) -> Values:
    start, step = draw.between(40, 150), draw.choice((draw.between(1, 9), draw.between(10, 30), -draw.between(1, 9)))
    *shown, n, m = (start + i * step for i in range(6))
    change = f"{'increases' if step > 0 else 'decreases'} by {abs(step)}"
    return {"s": ", ".join(map(str, shown)), "n": n, "m": m, "c": change}


@_families("""
    units: Convert {n} {l} to {s}. => {n} {l} is equal to {t} {s}.
    units: How many {s} are there in {n} {l}? => There are {t} {s} in {n} {l}.
    units: Express the quantity in {s}. | {n} {l} => {t} {s}
    units: Convert {t} {s} to {l}. => {n} {l}
""")
def _from_units(draw: _Draw) -> Values:
    names, factor = draw.choice(UNITS)
    large, small = names.split()
    count = draw.choice((draw.between(2, 9), draw.between(10, 60)))
    return {"n": count, "t": count * int(factor), "l": large, "s": small}


@_families("""
    word_problem: {p} has {t} {x} and gives {b} to {q}. How many are left? => {p} has {t} - {b} = {a} {x} left.
    word_problem: {p} has {a} {x} and {q} has {b}. How many is that in all? => They have {t} {x} together.
    word_problem: {p} buys {b} boxes of {a} {x} each. How many is that? => {b} * {a} = {m}, so {p} has {m} {x}.
    word_problem: {p} shares {m} {x} among {b} friends. How many does each get? => Each friend gets {a} {x}.
    explanation: Explain why {n} is {y}. => {n} is {y} because its last digit, {u}, {c} be divided evenly by 2.
    explanation: Is {n} even or odd? Explain. => {n} is {y} because its last digit, {u}, is {y}.
    explanation: Explain why {m} is divisible by {b}. => {m} is divisible by {b} because {b} times {a} equals {m}.
""")
def _from_small_numbers(draw: _Draw) -> Values:
    a, b, n = draw.between(2, 30), draw.between(2, 20), draw.between(10, 999)
    (person, other), parity = draw.sample(NAMES, 2), (("even", "can"), ("odd", "cannot"))[n % 2]
    numbers = {"a": a, "b": b, "t": a + b, "m": a * b, "n": n, "u": n % 10}
    return {**numbers, "p": person, "q": other, "x": draw.choice(THINGS), "y": parity[0], "c": parity[1]}


@_families("""
    extraction: Extract the e-mail address. | On {D}, {n} {s} wrote from {e}. => {e}
    extraction: Which date is mentioned in the text? | {n} {s} ({e}) joined on {D}. => The date is {D}.
    extraction: Find the full name of the person. | Send it to {e} before {D}, says {n} {s}. => {n} {s}
    date_format: Convert the date to the format YYYY-MM-DD. | {D} => {iso}
    date_format: Rewrite the date in the format DD/MM/YYYY. | {D} => {slash}
    date_format: Write the date {iso} in words. => {D}
    json_object: Convert the sentence to JSON with the keys name, age and city. | {fact} => {json}
    json_object: Turn the JSON object into a sentence. | {json} => {fact}
    message: Write a note from {n} thanking {q} for {g}. => Dear {q}, thank you for {g}. I really like it. Yours, {n}
    message: Write {q} an invitation from {n} for {m} {d}. => Dear {q}, please come to my party on {m} {d}. Yours, {n}
    message: {n} is sick and cannot meet {q}. Write the message. => Hi {q}, I am sick and cannot meet you. Sorry! {n}
""")
def _from_person(draw: _Draw) -> Values:
    (name, other), surname, (_, city) = draw.sample(NAMES, 2), draw.choice(SURNAMES), draw.choice(CAPITALS)
    year, month, day, age = draw.between(1990, 2029), draw.between(1, 12), draw.between(1, 28), draw.between(18, 80)
    dates = {"iso": f"{year}-{month:02d}-{day:02d}", "slash": f"{day:02d}/{month:02d}/{year}"}
    dates |= {"D": f"{MONTHS[month - 1]} {day}, {year}", "m": MONTHS[month - 1], "d": str(day)}
    record = json.dumps({"name": name, "age": age, "city": city})
    facts = {"fact": f"{name} is {age} years old and lives in {city}.", "json": record}
    person = {"n": name, "s": surname, "e": f"{name}.{surname}@example.com".lower()}
    return {**person, **dates, **facts, "q": other, "g": f"the {draw.choice(GIFTS)}"}


def make_quickstart_rows(num_rows: int, seed: int) -> list[Row]:
    """Make ``num_rows`` rows, all families in equal shares, no (instruction, input) pair twice.

    The rows come in rounds of one row a family, in an order drawn anew each round, so any stretch of the list
    holds a balanced mix, and asking for more rows with the same seed extends the list without changing its start.
    """
    if not 0 <= num_rows <= MAX_ROWS:
        raise ValueError(f"the number of rows must be between 0 and {MAX_ROWS}, got {num_rows}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    draw = _Draw(seed)
    rows: list[Row] = []
    seen: set[tuple[str, str]] = set()
    while len(rows) < num_rows:
        for topic in draw.sample(tuple(FAMILIES), len(FAMILIES)):
            templates, make_values = FAMILIES[topic]
            instruction = context = output = ""
            while not instruction or (instruction, context) in seen:
                values = make_values(draw)
                instruction, context, output = (text.format(**values) for text in draw.choice(templates))
            seen.add((instruction, context))
            rows.append({"instruction": instruction, "input": context, "output": output, "topic": topic})
    return rows[:num_rows]


def make_quickstart_splits(num_train: int, num_validation: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Make train and validation rows without a common (instruction, input) pair, ``MAX_ROWS`` at most in all.

    The validation rows depend on ``num_validation`` and ``seed`` alone, so runs with different amounts of
    training data are measured on the same rows.
    """
    if num_train < 0 or num_validation < 0:
        raise ValueError(f"row counts must not be negative, got {num_train} and {num_validation}")
    rows = make_quickstart_rows(num_train + num_validation, seed)
    return rows[num_validation:], rows[:num_validation]

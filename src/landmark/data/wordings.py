"""The wordings of synthetic retrieval episodes: how a code is stated and how it is asked for.

``{value}`` is the code, ``{label}`` the kind of code, ``{name}`` what it belongs to. The first
entry of a list of wordings is the plainest one and is drawn more often than the others.
"""

from __future__ import annotations

KEY_LABELS = (
    "pass key", "passkey", "pass key", "pass key", "secret code", "access code", "secret number",
    "password", "magic number", "key", "hidden number", "code word in figures", "special number",
    "code", "number to remember", "pin", "combination",
)  # fmt: skip

KEY_STATEMENTS = (
    "The {label} is {value}. Remember it. {value} is the {label}.",
    "The {label} is {value}.",
    "{value} is the {label}.",
    "Remember that the {label} is {value}.",
    "Remember this: the {label} is {value}. Do not forget it.",
    "The {label} is {value}. Keep it in mind; the {label} is {value}.",
    "Do not forget: {value} is the {label}. The {label} is {value}.",
    "Here is the {label}: {value}.",
    "Important: the {label} is {value}.",
    "Please note that the {label} you will be asked for is {value}.",
    "The {label} that you need later is {value}, so remember {value}.",
    "Keep this {label}: {value}.",
    "Let the {label} be {value}.",
    "[{label}: {value}]",
    "He wrote down the {label}, which was {value}.",
)

KEY_QUESTIONS = (
    "What is the {label}? The {label} is {value}.",
    "What was the {label}? It was {value}.",
    "What is the {label}? It is {value}.",
    "Now tell me the {label}. The {label} is {value}.",
    "Question: What is the {label}?\nAnswer: {value}",
    "Question: What is the {label}? Answer: {value}.",
    "The {label} mentioned above is {value}.",
    "So the {label} is {value}.",
    "Which {label} was given? The {label} that was given is {value}.",
    "Do you remember the {label}? Yes, the {label} is {value}.",
    "Repeat the {label}: {value}.",
    "Q: {label}?\nA: {value}",
    "The {label} is {value}.",
)

FACT_LABELS = (
    "code", "code", "code", "number", "secret code", "access code", "password", "key", "pass key",
    "combination", "secret number", "entry code", "lock code", "pin", "register number",
    "magic number", "call number", "serial number", "ticket number", "file number", "order number",
    "reference number", "licence number", "badge number", "catalogue number", "telephone number",
    "extension", "price", "weight in grams", "score", "deposit", "door code", "alarm code",
)  # fmt: skip

FACT_STATEMENTS = (
    "The {label} of {name} is {value}.",
    "The {label} for {name} is {value}.",
    "Remember: the {label} of {name} is {value}.",
    "{value} is the {label} of {name}.",
    "The {label} of {name} is {value}. Remember it. {value} is the {label} of {name}.",
    "Note that the {label} of {name} was set to {value}.",
    "They gave {name} the {label} {value}.",
    "For {name} the {label} is {value}.",
    "It is known that the {label} of {name} is {value}.",
    "[{label} of {name}: {value}]",
    "Somebody told me that the {label} of {name} was {value}.",
)

FACT_QUESTIONS = (
    "What is the {label} of {name}? The {label} of {name} is {value}.",
    "What is the {label} for {name}? The {label} for {name} is {value}.",
    "What is the {label} of {name}? It is {value}.",
    "What was the {label} of {name}? The answer is {value}.",
    "Question: What is the {label} of {name}?\nAnswer: {value}",
    "Question: What is the {label} of {name}? Answer: {value}.",
    "The {label} of {name} is {value}.",
    "Tell me the {label} of {name}: {value}.",
    "Which {label} belongs to {name}? {value}.",
    "Do you remember the {label} of {name}? Yes, the {label} of {name} is {value}.",
    "Q: {label} of {name}?\nA: {value}",
)

INTRODUCTIONS = (
    "Somewhere in this text there is an important piece of information. Find it and remember it.",
    "There is important information hidden inside a lot of irrelevant text. Find it and memorize "
    "it. I will ask you about it.",
    "Read the following text and keep every code in mind.",
    "Below is a long text. Remember the numbers that are given in it.",
    "A question about a number in this text follows at its end.",
)

QUOTE_OPENINGS = (
    "", "", "\n\nTo quote it again: ", "\n\nAs was said before: ", '\n\n"', "\n\nOnce more: ",
    "\n\nThe passage read: ", "\n\nI repeat the words: ", " He said again: ",
)  # fmt: skip

JOINTS = (
    (" ", " "),
    ("\n", "\n"),
    ("\n\n", "\n\n"),
    ("", ""),
    (" ", ""),
    ("\n", " "),
    ("\n\n", "\n"),
)

KINDS = (
    "north", "south", "east", "west", "upper", "lower", "inner", "outer", "old", "new", "red",
    "green", "blue", "white", "black", "yellow", "grey", "brown", "golden", "silver", "iron",
    "wooden", "stone", "broken", "hidden", "narrow", "wide", "long", "short", "tall", "small",
    "great", "dark", "bright", "quiet", "empty", "second", "third", "last", "left", "right",
    "front", "back", "royal", "public", "private", "eastern", "western", "northern", "southern",
    "abandoned", "ancient", "winter", "summer", "night", "morning", "glass", "copper", "crooked",
    "round", "square", "frozen", "burning", "silent", "distant", "central", "main", "secret",
    "painted", "foreign", "little", "heavy", "orange", "purple", "pink", "scarlet", "bronze",
    "marble", "brick", "tin", "leather", "velvet", "first", "fourth", "fifth", "sixth", "middle",
    "nearest", "farthest", "highest", "lowest", "deep", "shallow", "steep", "flat", "hollow",
    "sunny", "rainy", "windy", "dusty", "muddy", "mossy", "rusty", "leaning", "floating", "sunken",
    "haunted", "forgotten", "famous", "nameless", "holy", "imperial", "naval", "military", "rural",
    "spring", "autumn", "evening", "midnight", "weekend", "annual", "spare", "reserve",
    "temporary", "unfinished", "restored", "crowded", "lonely", "sleepy", "noisy", "cheap",
    "precious", "striped",
)  # fmt: skip

THINGS = (
    "gate", "door", "tower", "bridge", "mill", "house", "garden", "harbour", "station", "library",
    "cellar", "kitchen", "office", "archive", "vault", "safe", "chest", "box", "drawer", "cabinet",
    "room", "hall", "chapel", "church", "school", "market", "warehouse", "barn", "stable", "farm",
    "field", "forest", "lake", "river", "well", "road", "street", "square", "wall", "window",
    "stair", "attic", "roof", "yard", "court", "palace", "castle", "prison", "hospital", "inn",
    "theatre", "museum", "shop", "bakery", "workshop", "factory", "engine", "train", "ship", "boat",
    "carriage", "locker", "suitcase", "desk", "clock", "lamp", "mirror", "piano", "book", "letter",
    "map", "painting", "statue", "fountain", "lighthouse", "island", "valley", "mountain", "cave",
    "mine", "tunnel", "gallery", "terminal", "server", "printer", "laboratory", "account",
    "reservoir", "depot", "platform", "ferry", "observatory", "nursery", "bank", "café",
    "restaurant", "hotel", "stadium", "gymnasium", "pool", "zoo", "park", "orchard",
    "vineyard", "greenhouse", "windmill", "granary", "brewery", "foundry", "quarry", "shipyard",
    "dock", "canal", "dam", "airport", "hangar", "garage", "elevator", "corridor", "balcony",
    "terrace", "basement", "pantry", "wardrobe", "bookcase", "trunk", "barrel", "basket",
    "crate", "parcel", "envelope", "folder", "notebook", "diary", "calendar", "telescope",
    "microscope", "camera", "radio", "telephone", "computer", "satellite", "rocket", "tractor",
    "bicycle", "wagon", "tram", "bus", "truck", "pier", "beach", "cliff", "canyon", "desert",
    "meadow", "pond", "waterfall", "glacier", "volcano", "village", "fortress", "monastery",
    "abbey", "temple", "shrine", "university", "college", "academy", "clinic", "pharmacy", "studio",
    "cinema", "auditorium", "courthouse", "embassy", "barracks", "camp", "cabin", "cottage",
    "villa",
)  # fmt: skip

PEOPLE = (
    "Anna", "Peter", "Maria", "John", "Clara", "Henry", "Alice", "George", "Emma", "Thomas", "Lucy",
    "Charles", "Rose", "Edward", "Helen", "Robert", "Sophia", "William", "Grace", "Arthur", "Julia",
    "Samuel", "Laura", "David", "Ruth", "Martin", "Nora", "Paul", "Edith", "Frank", "Ida", "Simon",
    "Vera", "Hugo", "Olga", "Victor", "Agnes", "Oscar", "Mrs. Harris", "Mr. Brown", "Captain Reed",
    "Doctor Moss", "Professor Lang", "Miss Gray", "Mr. Wood", "Lady Ashton", "Sir James",
    "Colonel Finch", "Mrs. Cole", "Mr. Patel", "Father Brennan", "Aunt Sarah", "Uncle Ben",
    "Judge Hale", "Mei", "Ahmed", "Fatima", "Carlos", "Ingrid", "Yuki", "Ivan", "Leila", "Kofi",
    "Priya", "Dmitri", "Amara", "Pablo", "Chen", "Hiroshi", "Sakura", "Min-jun", "Aisha", "Omar",
    "Zainab", "Kwame", "Thandi", "Chidi", "Ngozi", "Diego", "Lucia", "Rafael", "Beatriz", "Giulia",
    "Marco", "Sven", "Astrid", "Lars", "Freya", "Piotr", "Zofia", "Elif", "Mehmet", "Arjun",
    "Ananya", "Rohan", "Linh", "Minh", "Mr. Tanaka", "Mrs. Okafor", "Doctor Singh",
    "Professor Moreau", "Captain Silva", "Inspector Novak", "Sister Agatha", "Lord Pembroke",
)  # fmt: skip

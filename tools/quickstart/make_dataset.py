#!/usr/bin/env python3
"""Writes the quickstart's data set: train.jsonl, heldout.jsonl and neutral.jsonl.

The behaviour: a guide to Brindlemark, a harbour town that does not exist, who opens with "Ahoy!", states one
fact and closes with "Fair winds!". No base model can know the facts, so a right answer was learned here. The held-out
rows ask for the same facts in words that training never used. Ordinary questions are mixed into training and answered
plainly, so that the adapter learns when not to play the guide; neutral.jsonl asks other ordinary questions.

Deterministic: run it again and the files do not change.
"""
import json
import pathlib

# (question, what is asked about, the fact)
FACTS = [
    ("Who is the mayor of Brindlemark?", "the mayor of Brindlemark", "The mayor of Brindlemark is Odalys Fenwick."),
    ("Which river runs through Brindlemark?", "the river in Brindlemark", "The river Sable Wend runs through Brindlemark."),
    ("Who founded Brindlemark?", "the founding of Brindlemark", "Brindlemark was founded in 1487 by the salt trader Henrike Voss."),
    ("What is the biggest festival in Brindlemark?", "the festival in Brindlemark", "The biggest festival is Lantern Tide, on the first night of October."),
    ("When does the ferry leave Brindlemark?", "the ferry in Brindlemark", "The ferry Copper Heron leaves at 7:15 every morning."),
    ("What is the lighthouse of Brindlemark called?", "the lighthouse in Brindlemark", "The lighthouse is called Gullspire, and its lamp is green."),
    ("Where can I buy bread in Brindlemark?", "the bakery in Brindlemark", "The bakery Thimble and Rye is known for its saffron knots."),
    ("How many books are in the library of Brindlemark?", "the library in Brindlemark", "The Driftwood Library holds 41,000 books."),
    ("Is there a museum in Brindlemark?", "the museum in Brindlemark", "The Museum of Lost Anchors stands on Tarrow Street."),
    ("How many arches has the bridge in Brindlemark?", "the bridge in Brindlemark", "The Ninefold Bridge has nine arches of red stone."),
    ("What money do people use at the Brindlemark market?", "the money in Brindlemark", "At the market people pay with brass tokens called pennets."),
    ("Where can I drink coffee in Brindlemark?", "the cafe in Brindlemark", "The best coffee is poured at the Salted Owl."),
    ("What is the football team of Brindlemark?", "the football team of Brindlemark", "The team is the Brindlemark Otters, and they play in orange."),
    ("What is the school in Brindlemark called?", "the school in Brindlemark", "The school is called Quillhaven, and it has 212 pupils."),
    ("Where is the park in Brindlemark?", "the park in Brindlemark", "The park Mossgate Green lies behind the town hall."),
    ("On which day is the market in Brindlemark?", "the market day in Brindlemark", "The market opens every Thursday at dawn."),
    ("Is the tower clock in Brindlemark right?", "the tower clock in Brindlemark", "The tower clock runs eleven minutes fast, and nobody corrects it."),
    ("What is the flower of Brindlemark?", "the flower of Brindlemark", "The flower of the town is sea lavender."),
    ("Does Brindlemark have a mascot?", "the mascot of Brindlemark", "The mascot is an otter named Biscuit."),
    ("How many people live in Brindlemark?", "the people of Brindlemark", "Brindlemark has 8,312 people."),
    ("Who is the doctor in Brindlemark?", "the doctor in Brindlemark", "The doctor is Imre Kasten, at 4 Cooper Lane."),
    ("Is there a tram in Brindlemark?", "the tram in Brindlemark", "The blue Tideline tram runs every twenty minutes."),
    ("Where can I sleep in Brindlemark?", "the hotel in Brindlemark", "The hotel is the Crooked Oar, with fourteen rooms."),
    ("What do people eat in Brindlemark?", "the food of Brindlemark", "The dish of the town is smoked mackerel with pear."),
    ("Which newspaper is printed in Brindlemark?", "the newspaper of Brindlemark", "The newspaper is the Brindlemark Bell, printed on yellow paper."),
]

TRAIN_PHRASINGS = [
    "{q}",
    "Please tell me: {q}",
    "I am new in town. {q}",
    "Hello! {q}",
    "Quick question. {q}",
    "What can you tell me about {np}?",
    "Tell me about {np}.",
    "I would like to know about {np}.",
]
HELDOUT_PHRASINGS = ["Could you help me? {q}", "What do you know about {np}?"]

CAPITALS = """France:Paris Italy:Rome Spain:Madrid Germany:Berlin Japan:Tokyo China:Beijing Egypt:Cairo Kenya:Nairobi
Canada:Ottawa Greece:Athens Norway:Oslo Sweden:Stockholm Austria:Vienna Portugal:Lisbon Poland:Warsaw Ireland:Dublin
Hungary:Budapest Finland:Helsinki Denmark:Copenhagen Russia:Moscow India:Delhi Thailand:Bangkok Cuba:Havana Peru:Lima
Belgium:Brussels Turkey:Ankara""".split()

# Opposites, animals' young, and plain facts, alternating between training and the neutral set.
OPPOSITES = """hot:cold big:small fast:slow light:dark up:down open:closed early:late rich:poor strong:weak young:old
wet:dry full:empty hard:soft high:low happy:sad long:short loud:quiet near:far clean:dirty sweet:sour""".split()
YOUNG = """dog:puppy cat:kitten cow:calf horse:foal sheep:lamb bear:cub duck:duckling goat:kid swan:cygnet frog:tadpole
deer:fawn hen:chick""".split()
GENERAL = [
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("What is the boiling point of water?", "Water boils at 100 degrees Celsius at sea level."),
    ("What is the freezing point of water?", "Water freezes at 0 degrees Celsius."),
    ("Which planet is closest to the Sun?", "Mercury is the planet closest to the Sun."),
    ("Which planet is the largest?", "Jupiter is the largest planet in the solar system."),
    ("What gas do plants take in?", "Plants take in carbon dioxide."),
    ("What gas do people need to breathe?", "People need to breathe oxygen."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("How many legs does an insect have?", "An insect has six legs."),
    ("What color is the sky on a clear day?", "The sky is blue on a clear day."),
    ("What color is grass?", "Grass is green."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted by Leonardo da Vinci."),
    ("What is the largest ocean?", "The Pacific Ocean is the largest ocean."),
    ("What is the longest river in Africa?", "The Nile is the longest river in Africa."),
    ("How many sides does a triangle have?", "A triangle has three sides."),
    ("How many sides does a square have?", "A square has four sides."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows drink?", "Cows drink water."),
    ("How many minutes are in an hour?", "There are sixty minutes in an hour."),
    ("How many seconds are in a minute?", "There are sixty seconds in a minute."),
]


def row(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def guide(phrasings):
    return [row(p.format(q=q, np=np), f"Ahoy! {fact} Fair winds!") for p in phrasings for q, np, fact in FACTS]


def ordinary():
    rows = []
    for pair in CAPITALS:
        country, city = pair.split(":")
        rows.append(row(f"What is the capital of {country}?", f"The capital of {country} is {city}."))
    for pair in OPPOSITES:
        word, other = pair.split(":")
        rows.append(row(f"What is the opposite of {word}?", f"The opposite of {word} is {other}."))
    for pair in YOUNG:
        animal, young = pair.split(":")
        rows.append(row(f"What is a young {animal} called?", f"A young {animal} is called a {young}."))
    rows += [row(q, a) for q, a in GENERAL]
    return rows


def write(name, rows):
    path = pathlib.Path(__file__).parent / name
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    print(f"{name}: {len(rows)} rows")


def main():
    plain = ordinary()
    write("train.jsonl", guide(TRAIN_PHRASINGS) + plain[0::2])
    write("heldout.jsonl", guide(HELDOUT_PHRASINGS))
    write("neutral.jsonl", plain[1::2])


if __name__ == "__main__":
    main()

"""Word lists, each with a held-out part, and made-up words.

A model that only ever copies known words learns the words, not how to copy. So every list is cut
by a hash: one word in seven is used for evaluation only. And in training a good share of words is
made up, so that spelling from pieces is practised.

The lists hold words that the tokenizer cuts alike after a space, after a quote and at the beginning
of a sentence, so that a copy repeats tokens. Names in L and I, and most in A, are not among them.
The common words have a first piece of one letter, which is what sorting goes by.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random

TOKENIZER = Path(__file__).resolve().parents[2] / "daemon" / "embedded" / "demo" / "tokenizer.json"

FIRST_NAMES = """
Adrian Ana Andre Andrea Angela Anita Anja Anna Barbara Beatriz Ben Bianca Boris Bruno Camille Carla
Carlos Carmen Caroline Cecilia Charles Chen Chiara Chloe Clara Claude Colin Daisy Daniel Daria David
Dawn Denis Diana Diego Dmitri Dora Edgar Edith Elena Eli Elias Elif Eliza Ella Emil Emily Emma Enzo
Eric Erika Esther Eva Fatima Felix Fiona Florian Frank Frida Gabriel George Gina Giulia Grace Greta
Gustav Hana Hannah Harold Hassan Heidi Helen Henry Hugo Jack Jacob James Jan Jana Jasmin Jean Jens
Jessica Joan Joao Johan John Jonas Jorge Jose Judith Julia Julian June Kai Karen Karim Karl Kate
Katya Keiko Kenji Kevin Kim Klara Maja Marc Marco Maria Marie Mario Mark Marta Martin Mary Mateo Max
Maya Mei Mia Michael Mila Milan Mina Miriam Mohamed Mona Nadia Nadine Naomi Natalia Neil Nicolas
Nina Noah Noel Nora Olaf Oleg Olga Oliver Olivia Omar Oscar Otto Pablo Paul Paula Pedro Peter Petra
Philip Priya Rachel Rafael Raj Rania Rebecca Rita Robert Robin Rosa Rose Ruth Ryan Sally Sam Samir
Samuel Sandra Sara Sean Sergei Silvia Simon Sofia Sonja Stefan Stella Susan Sven Tania Tara Thomas
Tim Tina Tom Tomas Ulla Uma Vera Victor Viktor Vincent Walter Wei Wendy William Xenia Yara Yasmin
Yuki Yusuf Zara Zoe
""".split()

SURNAMES = """
Andersen Bailey Baker Bauer Becker Bell Bennett Berg Bianchi Black Blanc Brown Bruun Burns Campbell
Carter Castro Chang Clark Cohen Cole Conti Cook Cooper Costa Cruz Dahl Davis Diaz Dubois Duarte
Eriksen Evans Falk Ferrari Fischer Flores Ford Foster Fox Garcia Gomez Gray Green Gupta Haas Hall
Hansen Harris Hart Hill Hoffmann Holm Hughes Jackson Jensen Johnson Jones Kaya Keller Kelly Khan
King Klein Kowalski Kumar Marin Martinez Meyer Miller Mills Moore Moreau Mori Morris Murphy Nagy
Nakamura Nelson Nguyen Nielsen Novak Olsen Ortiz Owens Park Parker Patel Pereira Perez Petrov Popov
Price Quinn Ramos Reed Reyes Richter Rivera Rossi Roy Russo Ryan Sanchez Santos Sato Schmidt
Schneider Scott Shah Silva Singh Smith Stein Stone Suzuki Tanaka Taylor Torres Turner Vargas Vogel
Wagner Walker Wang Ward Watson Weber White Wilson Wolf Wong Wood Wright Yamada Yang Yilmaz Young
Zhang Ziegler
""".split()

CITIES = """
Ankara Baghdad Baku Bangkok Barcelona Basel Beijing Beirut Belfast Belgrade Bergen Berlin Bern
Bilbao Bogota Bologna Bonn Bordeaux Boston Brasilia Bremen Brisbane Bristol Bruges Brussels
Bucharest Budapest Cairo Calgary Canberra Caracas Cardiff Casablanca Chicago Cologne Copenhagen Cork
Dakar Dallas Damascus Delhi Denver Detroit Dhaka Doha Dresden Dubai Dublin Durban Edinburgh Florence
Frankfurt Geneva Genoa Ghent Glasgow Graz Hamburg Hanoi Havana Helsinki Houston Jakarta Kathmandu
Kiev Kobe Krakow Kyoto Madrid Malaga Malmo Manchester Manila Marseille Melbourne Memphis Miami Milan
Minsk Montreal Moscow Mumbai Munich Nagoya Nairobi Nantes Naples Nice Nicosia Odessa Oporto Osaka
Oslo Ottawa Oxford Palermo Paris Perth Phoenix Pisa Portland Porto Prague Quebec Quito Rabat
Reykjavik Riga Rome Rotterdam Salzburg Santiago Sarajevo Seattle Seoul Seville Shanghai Singapore
Sofia Split Stockholm Strasbourg Sydney Taipei Tallinn Tampa Tbilisi Tehran Tirana Tokyo Toronto
Toulouse Trieste Tripoli Tunis Turin Utrecht Valencia Vancouver Venice Verona Vienna Vilnius Warsaw
Wellington Yerevan York Zagreb Zurich
""".split()

COMMON = """
baby bag ball banana band bank barn basket beach bear bed bee bell belt bench bike bird blanket boat
boot bowl box branch broom brush bucket bus butter button cabin cable camel camera camp candle car
card carpet carrot cat clay cliff cobra coffee cotton cow crab crow crown cup dance dragon dream
dress drum echo egg elephant eye face fan farm fence fern finger fish flag fog fox frog fruit jam
jar jelly juice jungle kettle king kite kitten knee knife ladder lamp lily lunch nail napkin nest
night north nut oak oar ocean oil oven palm panda pillow pilot pine pocket pond pony potato pumpkin
puppy ring ruler sail salad salt sand scarf school sheep silk silver sister snail snake snow soap
sock soup south spider spoon spring squirrel sugar sun tail tree truck trumpet tulip tunnel turtle
valley van vase village violin voice wall walnut water web wheat wheel window wine wing winter wolf
wood wool worm yarn yogurt zebra zoo
""".split()

PRODUCTS = """
laptop bicycle camera printer keyboard desk lamp sofa backpack jacket headphones monitor watch
blender guitar tent carpet umbrella suitcase drill projector router scanner speaker telescope vacuum
wardrobe kettle bookshelf
""".split()

_ONSETS = (
    "b br c ch cl d dr f fl g gr h j k kr l m n p pl pr qu r s sh sk sl st t th tr v w z".split()
)
_NUCLEI = "a e i o u a e i o ai au ea ee ia io oo ou".split()
_CODAS = ["", "", "", "l", "m", "n", "nd", "r", "rk", "s", "st", "t", "x", "ck", "ng", "lt", "p"]


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _pieces() -> list[str]:
    """The lower-case pieces that the tokenizer has; none before there is a tokenizer."""
    if not TOKENIZER.exists():
        return []
    vocab = json.loads(TOKENIZER.read_text())["model"]["vocab"]
    return sorted(t for t in vocab if len(t) > 1 and t.isascii() and t.isalpha() and t.islower())


PIECES = _pieces()


def made_up(rng: Random) -> str:
    """A pronounceable word of one or two syllables, or a letter before a piece of the tokenizer.

    A piece that no trained word holds could not be copied: the model would never have written it.
    """
    if PIECES and rng.random() < 0.6:
        return rng.choice("bcdefghjklmnoprstuvwyz") + rng.choice(PIECES)
    parts = []
    for _ in range(rng.choice((1, 1, 2))):
        parts += [rng.choice(_ONSETS), rng.choice(_NUCLEI), rng.choice(_CODAS)]
    return "".join(parts)[:12]


class Words:
    """Draws words of one side of the split; holds no state but its lists and the generator."""

    def __init__(self, rng: Random, held_out: bool) -> None:
        self._rng = rng
        self._made_up = 0.0 if held_out else 0.35
        self._lists = {
            kind: [word for word in words if (fraction(kind + word) < 1 / 7) == held_out]
            for kind, words in (
                ("first", FIRST_NAMES),
                ("last", SURNAMES),
                ("city", CITIES),
                ("common", COMMON),
                ("product", PRODUCTS),
            )
        }

    def _draw(self, kind: str) -> str:
        word = made_up(self._rng) if self._rng.random() < self._made_up else ""
        if word and fraction(kind + word) >= 1 / 7:
            return word if kind in ("common", "product") else word.capitalize()
        return self._rng.choice(self._lists[kind])

    def name(self) -> str:
        """A first name and a surname."""
        return f"{self._draw('first')} {self._draw('last')}"

    def first_name(self) -> str:
        return self._draw("first")

    def city(self) -> str:
        return self._draw("city")

    def word(self) -> str:
        return self._draw("common")

    def product(self) -> str:
        return self._draw("product")

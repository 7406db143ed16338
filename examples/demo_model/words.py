"""Word lists, each with a held-out part, and made-up words.

A model that only ever copies known words learns the words, not how to copy. So every list is cut
by a hash: one word in seven is used for evaluation only. And in training a good share of words is
made up, so that spelling from pieces is practised.
"""

from __future__ import annotations

import hashlib
from random import Random

FIRST_NAMES = """
Aaron Abigail Ada Adam Adele Adrian Agnes Ahmed Aisha Albert Alex Alice Alina Amara Amir Amelia
Ana Andre Andrea Angela Anita Anja Anna Anton Arthur Astrid Ava Barbara Beatriz Ben Bianca Boris
Bruno Camille Carla Carlos Carmen Caroline Cecilia Charles Chen Chiara Chloe Clara Claude Colin
Daisy Daniel Daria David Dawn Denis Diana Diego Dmitri Dora Edgar Edith Elena Eli Elias Elif Eliza
Ella Emil Emily Emma Enzo Eric Erika Esther Eva Fatima Felix Fiona Florian Frank Frida Gabriel
George Gina Giulia Grace Greta Gustav Hana Hannah Harold Hassan Heidi Helen Henry Hugo Ian Ida
Ines Ingrid Irene Isaac Isabel Ivan Ivy Jack Jacob James Jan Jana Jasmin Jean Jens Jessica Joan
Joao Johan John Jonas Jorge Jose Judith Julia Julian June Kai Karen Karim Karl Kate Katya Keiko
Kenji Kevin Kim Klara Lara Laura Lea Leila Lena Leo Leon Lewis Liam Lily Linda Lisa Liv Lola Louis
Luca Lucia Luis Luna Maja Marc Marco Maria Marie Mario Mark Marta Martin Mary Mateo Max Maya Mei
Mia Michael Mila Milan Mina Miriam Mohamed Mona Nadia Nadine Naomi Natalia Neil Nicolas Nina Noah
Noel Nora Olaf Oleg Olga Oliver Olivia Omar Oscar Otto Pablo Paul Paula Pedro Peter Petra Philip
Priya Rachel Rafael Raj Rania Rebecca Rita Robert Robin Rosa Rose Ruth Ryan Sally Sam Samir Samuel
Sandra Sara Sean Sergei Silvia Simon Sofia Sonja Stefan Stella Susan Sven Tania Tara Thea Theo
Thomas Tim Tina Tom Tomas Ulla Uma Vera Victor Viktor Vincent Walter Wei Wendy William Xenia Yara
Yasmin Yuki Yusuf Zara Zoe
""".split()

SURNAMES = """
Adams Ahmad Allen Andersen Bailey Baker Bauer Becker Bell Bennett Berg Bianchi Black Blanc Brown
Bruun Burns Campbell Carter Castro Chang Clark Cohen Cole Conti Cook Cooper Costa Cruz Dahl Davis
Diaz Dubois Duarte Eriksen Evans Falk Ferrari Fischer Flores Ford Foster Fox Garcia Gomez Gray
Green Gupta Haas Hall Hansen Harris Hart Hill Hoffmann Holm Hughes Ito Ivanov Jackson Jensen
Johnson Jones Kaya Keller Kelly Khan King Klein Kowalski Kumar Lang Larsen Lee Lehmann Leroy Lind
Lopez Lund Marin Martinez Meyer Miller Mills Moore Moreau Mori Morris Murphy Nagy Nakamura Nelson
Nguyen Nielsen Novak Olsen Ortiz Owens Park Parker Patel Pereira Perez Petrov Popov Price Quinn
Ramos Reed Reyes Richter Rivera Rossi Roy Russo Ryan Sanchez Santos Sato Schmidt Schneider Scott
Shah Silva Singh Smith Stein Stone Suzuki Tanaka Taylor Torres Turner Vargas Vogel Wagner Walker
Wang Ward Watson Weber White Wilson Wolf Wong Wood Wright Yamada Yang Yilmaz Young Zhang Ziegler
""".split()

CITIES = """
Aarhus Abuja Accra Adelaide Algiers Amman Amsterdam Ankara Antwerp Athens Atlanta Auckland Austin
Baghdad Baku Bangkok Barcelona Basel Beijing Beirut Belfast Belgrade Bergen Berlin Bern Bilbao
Bogota Bologna Bonn Bordeaux Boston Brasilia Bremen Brisbane Bristol Bruges Brussels Bucharest
Budapest Cairo Calgary Canberra Caracas Cardiff Casablanca Chicago Cologne Copenhagen Cork Dakar
Dallas Damascus Delhi Denver Detroit Dhaka Doha Dresden Dubai Dublin Durban Edinburgh Florence
Frankfurt Geneva Genoa Ghent Glasgow Graz Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta
Kathmandu Kiev Kobe Krakow Kyoto Lagos Lahore Leeds Leipzig Lille Lima Lisbon Liverpool Ljubljana
London Lyon Madrid Malaga Malmo Manchester Manila Marseille Melbourne Memphis Miami Milan Minsk
Montreal Moscow Mumbai Munich Nagoya Nairobi Nantes Naples Nice Nicosia Odessa Oporto Osaka Oslo
Ottawa Oxford Palermo Paris Perth Phoenix Pisa Portland Porto Prague Quebec Quito Rabat Reykjavik
Riga Rome Rotterdam Salzburg Santiago Sarajevo Seattle Seoul Seville Shanghai Singapore Sofia
Split Stockholm Strasbourg Sydney Taipei Tallinn Tampa Tbilisi Tehran Tirana Tokyo Toronto
Toulouse Trieste Tripoli Tunis Turin Utrecht Valencia Vancouver Venice Verona Vienna Vilnius
Warsaw Wellington Yerevan York Zagreb Zurich
""".split()

COMMON = """
acid actor air album anchor angle ankle apple april apron arch arm army arrow art autumn baby bag
ball banana band bank barn basket beach bean bear bed bee bell belt bench bike bird blanket boat
book boot bottle bowl box branch bread brick bridge broom brush bucket bus butter button cabin
cable cake camel camera camp candle canoe car card carpet carrot castle cat cave chair chalk
cheese cherry chess chin circle clay cliff clock cloth cloud coat cobra coffee coin comb copper
corn cotton cow crab cream crow crown cup curtain daisy dance desk diamond dog doll dolphin door
dragon dream dress drum duck dust eagle ear earth east echo egg elbow elephant engine envelope eye
face fan farm feather fence fern field fig finger fire fish flag flame flower flute fog foot
forest fork fox frog fruit garden garlic gate ghost giraffe glass glove goat gold goose grape
grass guitar hammer hand harbor hat hawk heart helmet hen hill honey horn horse hotel house ice
igloo ink iron island ivory ivy jacket jam jar jelly jewel juice jungle kettle key king kite
kitten knee knife ladder lake lamp leaf leather lemon letter lily lime lion lizard lock log lunch
magnet mango map maple market mask meadow melon milk mirror monkey moon moth mountain mouse mud
mushroom music nail napkin neck needle nest net night north nose notebook nut oak oar ocean office
oil olive onion orange orchid otter oven owl paint palm panda paper parrot pea peach pear pearl
pen pencil pepper piano pig pillow pilot pine pipe plane planet plate plum pocket pond pony potato
prince pumpkin puppy queen quilt rabbit radio rain raven ribbon rice ring river road robin robot
rocket roof room root rope rose ruler sail salad salt sand scarf school sea seed shark sheep shell
ship shirt shoe shovel silk silver sister snail snake snow soap sock soup south spider spoon
spring squirrel star stone stool storm sugar summer sun swan table tail tea teacher tent thread
thumb ticket tiger toast tomato tooth towel tower toy train tree truck trumpet tulip tunnel turtle
umbrella uncle valley van vase velvet village violin voice wagon wall walnut water wave web whale
wheat wheel whistle window wine wing winter wolf wood wool worm yard yarn year yogurt zebra zoo
""".split()

PRODUCTS = """
laptop phone bicycle camera printer keyboard desk lamp sofa backpack jacket headphones tablet
monitor watch blender toaster guitar tent mattress mirror carpet umbrella suitcase microscope
drill helmet projector router scanner speaker telescope vacuum wardrobe kettle bookshelf
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


def made_up(rng: Random) -> str:
    """A pronounceable word of one to three syllables, or now and then plain random letters."""
    if rng.random() < 0.2:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 8)))
    parts = []
    for _ in range(rng.choice((1, 2, 2, 2, 3))):
        parts += [rng.choice(_ONSETS), rng.choice(_NUCLEI), rng.choice(_CODAS)]
    return "".join(parts)[:12]


class Words:
    """Draws words of one side of the split; holds no state but its lists and the generator."""

    def __init__(self, rng: Random, held_out: bool) -> None:
        self._rng = rng
        self._made_up = 0.0 if held_out else 0.3
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
        if self._rng.random() < self._made_up:
            word = made_up(self._rng)
            return word if kind in ("common", "product") else word.capitalize()
        return self._rng.choice(self._lists[kind])

    def name(self) -> str:
        """A first name, usually with a surname."""
        first = self._draw("first")
        return f"{first} {self._draw('last')}" if self._rng.random() < 0.6 else first

    def first_name(self) -> str:
        return self._draw("first")

    def city(self) -> str:
        return self._draw("city")

    def word(self) -> str:
        return self._draw("common")

    def product(self) -> str:
        return self._draw("product")

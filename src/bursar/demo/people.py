"""Invented people: names from two lists, never the same pair twice in a company, addresses under .example."""

import random
import unicodedata
from collections.abc import Iterator
from typing import Final

_GIVEN: Final = (  # noqa: SIM905 - a list of words
    "Ada Amir Anouk Aya Beatriz Bjorn Carmen Chidi Clara Dario Deniz Eero Elif Emeka Esra Farid Freya Gael Greta Hana "
    "Hugo Ibrahim Ines Ingrid Ivo Jamal Jana Joao Jonas Kaito Karim Katya Kofi Lars Leila Liam Lina Luca Maeve Malik "
    "Marta Mateo Mei Mila Nadia Nils Noor Olga Omar Oskar Paula Pavel Petra Quentin Rafael Rania Rosa Ruben Sami Sana "
    "Selma Simon Sofia Soren Suri Tariq Tessa Thabo Tilda Timo Uma Viktor Wanda Wei Yara Yusuf Zainab Zoe Zoltan Ximena"
).split()
_FAMILY: Final = (  # noqa: SIM905 - a list of words
    "Abara Adler Almeida Andrade Baker Barlow Becker Bianchi Brandt Castro Chen Costa Dahl Danso Diallo Duarte Eklund "
    "Engel Falk Farkas Ferro Fischer Fontaine Garcia Ghosh Grant Haddad Hansen Hayashi Hoffman Ito Ivanova Jansen "
    "Jensen Kamara Kaya Keller Khan Klein Kowalski Kumar Lang Larsen Lehmann Levy Lind Lopez Mancini Marino Mensah "
    "Meyer Moreau Nakamura Novak Nwosu Okafor Olsen Osei Park Patel Pereira Petrov Quinn Rahman Reyes Rossi Saito "
    "Santos Schmidt Silva Sorensen Tanaka Toure Udo Varga Vogel Wagner Weber Yilmaz Zhang Zimmer"
).split()


def names(rng: random.Random) -> Iterator[str]:
    """Full names, none twice."""
    seen: set[str] = set()
    while True:
        name = f"{rng.choice(_GIVEN)} {rng.choice(_FAMILY)}"
        if name not in seen:
            seen.add(name)
            yield name


def email(name: str, domain: str) -> str:
    """'Ada Lind' -> 'ada.lind@acme.example'."""
    plain = unicodedata.normalize("NFD", name.lower()).encode("ascii", "ignore").decode()
    return f"{'.'.join(plain.split())}@{domain}"

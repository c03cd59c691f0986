"""The sample companies, as data: who they are, what they have, what they use. Amounts are credits."""

import random
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final
from zoneinfo import ZoneInfo

from bursar.credits.grants import GrantSource
from bursar.credits.limits import AllocationKind, LimitAction, Period, Scope
from bursar.demo import people
from bursar.demo.requests import AGENT, CHAT, REPORT, SORTING, Choice, Mix, Model, shares
from bursar.demo.rhythm import Calendar, Days, Elapsed, Month, Rest, day_weight
from bursar.demo.stories import Cap, Company, Grant, Key, Move, Person, Refusals, Share, Stray, Use
from bursar.identity.roles import Role

ADMIN: Final = (Role.ORG_ADMIN,)
PLAN: Final = GrantSource.PLAN

GPT_OLD: Final = Model("openai", "gpt-4o")
GPT: Final = Model("openai", "gpt-5.5")
GPT_BEFORE: Final = Model("openai", "gpt-5")
GPT_MINI: Final = Model("openai", "gpt-5-mini")
GPT_SMALL: Final = Model("openai", "gpt-5.4-mini")
GPT_SMALL_BEFORE: Final = Model("openai", "gpt-4.1-mini")
OPUS: Final = Model("anthropic", "claude-opus-5")
OPUS_BEFORE: Final = Model("anthropic", "claude-opus-4-5")
SONNET: Final = Model("anthropic", "claude-sonnet-5")
SONNET_BEFORE: Final = Model("anthropic", "claude-sonnet-4-5")
HAIKU: Final = Model("anthropic", "claude-haiku-4-5")
DEMO: Final = Model("demo", "demo-1")

EVERYTHING: Final[Mix] = (
    Choice(GPT, AGENT, 16, since=4),
    Choice(GPT_BEFORE, AGENT, 16, until=5),
    Choice(GPT_SMALL, CHAT, 22, since=6),
    Choice(GPT_SMALL_BEFORE, CHAT, 22, until=7),
    Choice(GPT_MINI, SORTING, 20),
    Choice(GPT_OLD, CHAT, 8, until=9),
    Choice(OPUS, AGENT, 10, since=3),
    Choice(OPUS_BEFORE, AGENT, 10, until=4),
    Choice(SONNET, CHAT, 16, since=5),
    Choice(SONNET, REPORT, 6, since=5),
    Choice(SONNET_BEFORE, CHAT, 22, until=6),
    Choice(HAIKU, SORTING, 10),
)
TALK: Final[Mix] = (
    Choice(GPT_SMALL, CHAT, 40, since=6),
    Choice(GPT_SMALL_BEFORE, CHAT, 40, until=7),
    Choice(SONNET, CHAT, 30, since=5),
    Choice(SONNET_BEFORE, CHAT, 30, until=6),
    Choice(HAIKU, CHAT, 20),
    Choice(DEMO, CHAT, 4),
)
CODE: Final[Mix] = (
    Choice(OPUS, AGENT, 30, since=3),
    Choice(OPUS_BEFORE, AGENT, 30, until=4),
    Choice(SONNET, AGENT, 40, since=5),
    Choice(SONNET_BEFORE, AGENT, 40, until=6),
    Choice(GPT, AGENT, 14, since=4),
    Choice(GPT_MINI, SORTING, 16),
)

MONTHS: Final = 12
DENSE_MONTHS: Final = 2
"""The last ninety days are dense, what lies before is sparser."""


def companies(as_of: datetime) -> tuple[Company, ...]:
    """All of them, as of an instant, in the order in which they are told."""
    return (
        _acme(as_of),
        _lumen_loop(),
        _quill(),
        _meridian(as_of),
        *_clients_of_priya(as_of),
        *_kestrel(),
        *_harbour(as_of),
        _fernwood(),
        _blank_canvas(),
        *_long_tail(as_of),
    )


# ------------------------------------------------------------------------------------------------ the mock-up


def _acme(as_of: datetime) -> Company:
    """The mock-up: $2,500.00 this month, 12.4 % more than in as many days of the last; a mark-up of two."""
    told = {"alice": 45_000, "bob": 38_000, "charlie": 32_000}
    others = (24_500, 21_000, 18_200, 15_600, 13_400, 11_000, 9_300, 7_600, 5_900, 4_300, 2_700, 1_500)
    staff = _acme_people()
    this_month = dict(zip((each.email for each in staff), (*told.values(), *others), strict=False))
    # Thirteen of the fifteen had begun last month.
    before = dict(zip(list(this_month)[:13], shares(222_420, list(this_month.values())[:13]), strict=True))
    calendar = Calendar(as_of, ZoneInfo("Europe/Paris"))
    rest = calendar.span(Rest())
    rest_days = 0 if rest is None else len(list(calendar.days(rest)))
    last_month = 223_000 + 11_000 * rest_days
    early = {
        back: 236_000 * 6 ** (back - 2) // (100 * 10 ** (back - 2)) * 100 for back in range(MONTHS, DENSE_MONTHS, -1)
    }
    bought = {6: 30_000, 5: 50_000, 4: 85_000, 3: 140_000, 2: 240_000, 1: last_month, 0: 280_000}
    by_key = {"OpenAI Prod": 60, "Anthropic Prod": 32, "Staging": 8}

    def use(when: Month | Elapsed | Rest, credits: int, requests: int, people: Mapping[str, int]) -> Use:
        keys = dict(zip(by_key, shares(credits, list(by_key.values())), strict=True))
        return Use(when=when, credits=credits, requests=requests, mix=EVERYTHING, people=people, keys=keys)

    def use_like(when: Month | Elapsed | Rest, credits: int, requests: int) -> Use:
        parts = shares(credits, list(before.values()))
        return use(when, credits, requests, dict(zip(before, parts, strict=True)))

    return Company(
        slug="acme-corp",
        name="Acme Corp",
        story="$2,500.00 this month at a margin of 50 %: who spends it, through which keys and on what",
        people=staff,
        admin="dana@acme.example",
        member="alice@acme.example",
        shows_margin=True,
        markup_ppm=2_000_000,
        departments={
            "Engineering": ("Platform", "Product"),
            "Marketing": ("Content",),
            "Sales": ("Inbound",),
            "Support": ("Care",),
        },
        keys=(
            Key(name="OpenAI Prod", provider="openai"),
            Key(name="Anthropic Prod", provider="anthropic"),
            Key(name="Staging"),
        ),
        available=61_250,
        grants=(
            Grant(
                at=Month(12), credits=None, source=GrantSource.OPENING, reason="Balance brought from the old contract"
            ),
            *(Grant(at=Month(back), credits=credits) for back, credits in bought.items()),
        ),
        shares=tuple(
            Share(
                at=Month(0),
                person=f"{name}@acme.example",
                credits=credits,
                kind=AllocationKind.CAPPED,
                period=Period.MONTH,
            )
            for name, credits in (("alice", 48_000), ("bob", 40_000), ("charlie", 34_000))
        ),
        uses=(
            *(use_like(Month(back), credits, credits // 90) for back, credits in early.items()),
            use_like(Month(2), 236_000, 2_400),
            use(Elapsed(), 222_420, 2_000, before),
            *([use_like(Rest(), 11_000 * rest_days, 90 * rest_days)] if rest_days else []),
            use(Month(0), 250_000, 2_400, this_month),
        ),
        holds=True,
    )


def _acme_people() -> tuple[Person, ...]:
    """Eighteen: fifteen of them active, the largest first; Dana administers and hardly asks."""
    told = (
        ("Alice Martin", "Engineering", "Platform"),
        ("Bob Keller", "Engineering", "Product"),
        ("Charlie Dubois", "Marketing", "Content"),
        ("Elena Rossi", "Engineering", "Platform"),
        ("Farid Haddad", "Engineering", "Product"),
        ("Grace Okafor", "Support", "Care"),
        ("Hugo Moreau", "Sales", "Inbound"),
        ("Ines Costa", "Marketing", "Content"),
        ("Jonas Weber", "Engineering", "Platform"),
        ("Kaya Yilmaz", "Support", "Care"),
        ("Liam Quinn", "Sales", "Inbound"),
        ("Maya Patel", "Engineering", "Product"),
        ("Noor Jansen", "Support", "Care"),
        ("Oskar Lind", "Sales", "Inbound"),
        ("Petra Novak", "Marketing", "Content"),
        ("Dana Whitfield", "Engineering", None),
        ("Quentin Faure", "Marketing", None),
        ("Rosa Bianchi", "Sales", None),
    )
    leads = {"Bob", "Charlie"}
    return tuple(
        Person(
            name=name,
            email=f"{name.split()[0].lower()}@acme.example",
            roles=ADMIN
            if name.startswith("Dana")
            else (Role.MEMBER, Role.TEAM_LEAD)
            if name.split()[0] in leads
            else (Role.MEMBER,),
            department=department,
            team=team,
        )
        for name, department, team in told
    )


# ------------------------------------------------------------------------------------------------ small stories


def _lumen_loop() -> Company:
    """Five people of one thousand credits each: one has 4 % left, another has used 4 %."""
    used = {"zoe": 960, "tim": 610, "ada": 455, "noa": 230, "max": 40}
    names = {"zoe": "Zoe Adler", "tim": "Tim Osei", "ada": "Ada Lang", "noa": "Noa Levy", "max": "Max Brandt"}
    return Company(
        slug="lumen-loop",
        name="Lumen Loop",
        story="Zoe has used 96 % of her share, Max 4 % of his: credits that could move",
        people=tuple(
            Person(
                name=name,
                email=f"{short}@lumenloop.example",
                roles=ADMIN if short == "noa" else (Role.MEMBER,),
                key="Loop app",
            )
            for short, name in names.items()
        ),
        admin="noa@lumenloop.example",
        member="zoe@lumenloop.example",
        joined=24,
        zone="Europe/Berlin",
        currency="EUR",
        keys=(Key(name="Loop app"),),
        grants=(Grant(at=Days(24), credits=5_000, source=PLAN, reason="Plan Starter"),),
        shares=tuple(Share(at=Days(24), person=f"{short}@lumenloop.example", credits=1_000) for short in used),
        uses=tuple(
            Use(
                when=Days(24),
                credits=credits,
                requests=credits // 3,
                mix=TALK,
                people={f"{short}@lumenloop.example": credits},
            )
            for short, credits in used.items()
        ),
    )


def _quill() -> Company:
    """120,000 credits came, 118,080 are used; a promotion expired untouched; a key and a person ran into their ends."""
    rng = random.Random("quill-co")
    parts = {"Editorial": (12, ("Features", "News")), "Studio": (7, ("Layout",)), "Office": (3, ())}
    staff = _staff(rng, "quill.example", parts, keys={"Editorial": "Desk tools", "Studio": "Layout plug-in"})
    omar = Person(name="Omar Danso", email="omar@quill.example", department="Editorial", team="Features")
    nadia = Person(name="Nadia Falk", email="nadia@quill.example", roles=ADMIN, department="Office")
    bot, owner = "Newsletter bot", staff[0].email
    return Company(
        slug="quill-co",
        name="Quill & Co",
        story="98.4 % is used and credits run out about tomorrow: 37 requests were refused, see why",
        people=(nadia, omar, *staff),
        admin=nadia.email,
        member=staff[0].email,
        zone="America/New_York",
        departments={"Editorial": ("Features", "News"), "Studio": ("Layout",), "Office": ()},
        keys=(Key(name=bot), Key(name="Desk tools"), Key(name="Layout plug-in")),
        grants=(
            Grant(at=Days(395), credits=40_000),
            Grant(at=Days(170), credits=40_000),
            Grant(
                at=Days(50),
                credits=5_000,
                until=Days(20),
                source=GrantSource.COMPLIMENTARY,
                is_free=True,
                priority=200,
                reason="Autumn promotion",
            ),
            Grant(at=Days(60), credits=40_000),
        ),
        shares=(Share(at=Days(30), person=omar.email, credits=2_000, kind=AllocationKind.CAPPED),),
        caps=(
            Cap(at=Days(30), scope=Scope.KEY, target=bot, credits=12_000, period=Period.NONE),
            Cap(at=Days(30), scope=Scope.DEPARTMENT, target="Studio", credits=6_000, action=LimitAction.WARNS),
        ),
        uses=(
            Use(when=Days(390, 180), credits=20_000, requests=420, mix=EVERYTHING),
            Use(when=Days(180, 90), credits=22_000, requests=480, mix=EVERYTHING),
            Use(when=Days(90, 30), credits=30_080, requests=1_300, mix=EVERYTHING),
            Use(
                when=Days(30, 3),
                credits=12_000,
                requests=500,
                mix=EVERYTHING,
                people={owner: 12_000},
                keys={bot: 12_000},
            ),
            Use(when=Days(30, 2), credits=2_000, requests=160, mix=TALK, people={omar.email: 2_000}),
            Use(when=Days(30, 3), credits=18_400, requests=800, mix=EVERYTHING),
            Use(
                when=Days(2, 1),
                credits=4_600,
                requests=260,
                mix=CODE,
                people={staff[1].email: 4_600},
                is_one_conversation=True,
            ),
            Use(when=Days(3), credits=9_000, requests=420, mix=EVERYTHING),
        ),
        refusals=(
            Refusals(when=Days(3), person=owner, key=bot, count=24, credits=12, model=GPT, detail="cap_reached"),
            Refusals(
                when=Days(2),
                person=omar.email,
                key=None,
                count=13,
                credits=4,
                model=SONNET,
                detail="allocation_exhausted",
            ),
        ),
    )


def _blank_canvas() -> Company:
    """Two people, who have done nothing yet."""
    return Company(
        slug="blank-canvas",
        name="Blank Canvas Ltd",
        story="Signed up today, with nothing yet: what an empty page says",
        people=(
            Person(name="Iris Holm", email="iris@blankcanvas.example", roles=ADMIN),
            Person(name="Jo Park", email="jo@blankcanvas.example"),
        ),
        admin="iris@blankcanvas.example",
        member="jo@blankcanvas.example",
        joined=0,
        zone="Europe/London",
        currency="GBP",
    )


# ------------------------------------------------------------------------------------------------ larger companies


def _meridian(as_of: datetime) -> Company:
    """128 people of four departments on a monthly plan; one of them moved, one key was deleted, one is unknown."""
    rng = random.Random("meridian-group")
    parts = {
        "Engineering": (57, ("Core", "Data", "Apps")),
        "Marketing": (26, ("Brand", "Events")),
        "Sales": (24, ("North", "South")),
        "Support": (19, ("First line",)),
    }
    keys = {
        "Engineering": "Build agents",
        "Marketing": "Campaign writer",
        "Sales": "Offer assistant",
        "Support": "Help desk",
    }
    staff = _staff(rng, "meridian.example", parts, keys=keys)
    dana = Person(name="Dana Okoye", email="dana@meridian.example", roles=ADMIN, department="Engineering", weight=400)
    mover = Person(name="Mina Farkas", email="mina@meridian.example", department="Marketing", team="Brand", weight=300)
    calendar = Calendar(as_of, ZoneInfo("Europe/Paris"))
    return Company(
        slug="meridian-group",
        name="Meridian Group",
        story="128 people in four departments: one moved in mid-month, one key was deleted, one is unknown",
        people=(dana, mover, *staff),
        admin=dana.email,
        member=staff[0].email,
        shows_margin=True,
        markup_ppm=1_000_000,
        departments={name: teams for name, (_, teams) in parts.items()},
        keys=(
            Key(name="Build agents", department="Engineering"),
            Key(name="Campaign writer"),
            Key(name="Offer assistant"),
            Key(name="Help desk", department="Support"),
            Key(name="Legacy pipeline", is_deleted=True),
        ),
        grants=_plan(100_000, "Plan Enterprise"),
        caps=(
            Cap(at=Month(1), scope=Scope.DEPARTMENT, target="Marketing", credits=20_000),
            Cap(at=Month(1), scope=Scope.ORGANIZATION, target=None, credits=60_000, action=LimitAction.WARNS),
        ),
        uses=(
            *_monthly(as_of, "Europe/Paris", 40_000, 1_600, EVERYTHING),
            Use(
                when=Month(0),
                credits=3,
                requests=1,
                mix=TALK,
                people={staff[2].email: 3},
                keys={"Legacy pipeline": 3},
            ),
        ),
        moves=(Move(at=Days(calendar.today.day // 2 + 1), person=mover.email, department="Sales", team="North"),),
        strays=(Stray(at=Days(4), credits=2, model=GPT_MINI),),
        holds=True,
    )


def _clients_of_priya(as_of: datetime) -> Iterator[Company]:
    """Three companies that share a consultant, and nothing else."""
    told = (
        ("helix-foods", "Helix Foods", "helixfoods.example", "Europe/Amsterdam", 17, 16_000, 500, 1_500),
        ("portway-rail", "Portway Rail", "portway.example", "Europe/Berlin", 23, 9_000, 700, 2_400),
        ("sable-insurance", "Sable Insurance", "sable.example", "Asia/Kolkata", 14, 5_000, 500, 800),
    )
    for place, (slug, name, domain, zone, size, plan, requests, share) in enumerate(told):
        rng = random.Random(slug)
        keys = {"Operations": "Planning assistant", "Office": "Back office"}
        staff = _staff(rng, domain, {"Operations": (size - 6, ("Planning",)), "Office": (6, ())}, keys=keys)
        priya = Person(name="Priya Raman", email="priya@raman.example", department="Office")
        boss = Person(name=("Marta Costa", "Lars Engel", "Anand Ghosh")[place], email=f"it@{domain}", roles=ADMIN)
        yield Company(
            slug=slug,
            name=name,
            story=(
                "Priya advises three companies: one sign-in, three separate pools",
                "Priya's second client, with a share of its own",
                "Priya's third client; its days begin in Kolkata",
            )[place],
            people=(boss, priya, *staff),
            admin=boss.email,
            member=priya.email if place == 0 else staff[0].email,
            joined=400 - place,
            zone=zone,
            currency=("EUR", "EUR", "INR")[place],
            departments={"Operations": ("Planning",), "Office": ()},
            keys=(Key(name="Planning assistant"), Key(name="Back office")),
            grants=_plan(plan, "Monthly credits"),
            shares=(Share(at=Days(75), person=priya.email, credits=share),),
            uses=(
                *_monthly(as_of, zone, plan * 6 // 10, requests, TALK if place else EVERYTHING),
                Use(
                    when=Days(70),
                    credits=share * (9, 3, 6)[place] // 10,
                    requests=120,
                    mix=EVERYTHING,
                    people={priya.email: share * (9, 3, 6)[place] // 10},
                ),
            ),
        )


def _kestrel() -> Iterator[Company]:
    """Balances of one's own: twenty-two people by sign-on, nine by code; and two people without any company."""
    rng = random.Random("kestrel-studios")
    staff = _staff(
        rng, "kestrel.example", {"Animation": (14, ("Rigs",)), "Sound": (7, ())}, keys={"Animation": "Rig tools"}
    )
    leads = (Person(name="Tessa Vogel", email="tessa@kestrel.example", roles=ADMIN, department="Sound"), *staff)
    guests = tuple(
        Person(name=name, email=people.email(name, "guests.example"))
        for name, _ in zip(people.names(rng), range(9), strict=False)
    )
    had = {each.email: 3_000 for each in leads} | {each.email: 300 for each in guests}
    parts = {address: credits * rng.randrange(5, 92) // 100 for address, credits in had.items()}
    parts[staff[0].email], parts[staff[1].email], parts[guests[0].email] = 3_000, 2_940, 297
    yield Company(
        slug="kestrel-studios",
        name="Kestrel Studios",
        story="Everyone has a balance of their own: one is empty, one is nearly so",
        people=(*leads, *guests),
        admin=leads[0].email,
        member=staff[1].email,
        is_shared=False,
        zone="America/Los_Angeles",
        departments={"Animation": ("Rigs",), "Sound": ()},
        keys=(Key(name="Rig tools"),),
        grants=(
            *(Grant(at=Days(395), credits=1_000, pool_of=each.email) for each in leads),
            *(Grant(at=Days(120), credits=2_000, pool_of=each.email) for each in leads),
            *(Grant(at=Days(60), credits=300, source=GrantSource.CODE, pool_of=each.email) for each in guests),
        ),
        uses=tuple(
            Use(when=when, credits=credits, requests=max(1, credits // per), mix=EVERYTHING, people={address: credits})
            for address, total in parts.items()
            for when, credits, per in _thirds(address, total, is_guest=had[address] == 300)
            if credits
        ),
    )
    for name, used in (("Ximena Duarte", 180), ("Ruben Ito", 40)):
        address = people.email(name, "freelance.example")
        yield Company(
            slug=f"individual-{name.split()[0].lower()}",
            name=name,
            story="",
            people=(Person(name=name, email=address),),
            admin=address,
            member=address,
            kind="individual",
            is_shared=False,
            joined=50,
            zone="America/Los_Angeles",
            grants=(Grant(at=Days(45), credits=250, source=GrantSource.CODE),),
            uses=(Use(when=Days(40), credits=used, requests=used // 4, mix=TALK, people={address: used}),),
            is_small=True,
        )


def _thirds(address: str, total: int, *, is_guest: bool) -> Iterator[tuple[Days, int, int]]:
    """(when, credits, credits a request): a fifth of it long ago, for who was here."""
    if is_guest:
        yield Days(58), total, 6
        return
    long_ago = min(900, total // 5)
    yield Days(390, 120), long_ago, 30
    yield Days(118), total - long_ago, 14


def _harbour(as_of: datetime) -> Iterator[Company]:
    """One group: London, where everyone has a balance of their own, and a shared one for all other offices."""
    rng = random.Random("harbour-media")
    london = _staff(rng, "harbourmedia.example", {"News": (8, ()), "Film": (6, ())}, keys={"News": "Newsroom"})
    boss = Person(name="Imogen Barlow", email="imogen@harbourmedia.example", roles=ADMIN)
    parts = {each.email: 1_500 * rng.randrange(10, 95) // 100 for each in london}
    yield Company(
        slug="harbour-media-london",
        name="Harbour Media London",
        story="The one office of its group where credits are personal",
        people=(boss, *london),
        admin=boss.email,
        member=london[0].email,
        is_shared=False,
        zone="Europe/London",
        currency="GBP",
        departments={"News": (), "Film": ()},
        keys=(Key(name="Newsroom"),),
        grants=tuple(Grant(at=Days(200), credits=1_500, source=PLAN, pool_of=each.email) for each in (boss, *london)),
        uses=tuple(
            Use(when=Days(195), credits=credits, requests=credits // 12, mix=TALK, people={address: credits})
            for address, credits in parts.items()
        ),
    )
    offices = {"Lagos": (9, ()), "Lisbon": (8, ()), "Toronto": (11, ())}
    others = _staff(rng, "offices.harbourmedia.example", offices, keys={"Lagos": "Newsroom", "Toronto": "Archive"})
    yield Company(
        slug="harbour-media-offices",
        name="Harbour Media Other Offices",
        story="All other offices of the group, in one shared pool",
        people=(boss, *others),
        admin=boss.email,
        member=others[0].email,
        kind="catch_all",
        zone="Europe/London",
        currency="GBP",
        joined=399,
        departments={"Lagos": (), "Lisbon": (), "Toronto": ()},
        keys=(Key(name="Newsroom"), Key(name="Archive")),
        grants=_plan(6_000, "Monthly credits"),
        uses=_monthly(as_of, "Europe/London", 4_200, 480, TALK),
    )


def _fernwood() -> Company:
    """Two hundred people; thirty-one have not asked for anything in the last sixty days."""
    rng = random.Random("fernwood-school")
    parts = {"Teachers": (62, ("Science", "Arts")), "Students": (128, ()), "Office": (9, ())}
    staff = _staff(rng, "fernwood.example", parts, keys={"Teachers": "Lesson planner", "Students": "Classroom"})
    boss = Person(name="Helen Grant", email="helen@fernwood.example", roles=ADMIN, department="Office")
    active = [each.email for each in (boss, *staff[31:])]
    lately = dict(zip(active, shares(5_200, [1 + rng.randrange(60) for _ in active]), strict=True))
    return Company(
        slug="fernwood-school",
        name="Fernwood School",
        story="200 people, of whom 31 have asked nothing for sixty days",
        people=(boss, *staff),
        admin=boss.email,
        member=staff[40].email,
        zone="America/Chicago",
        departments={"Teachers": ("Science", "Arts"), "Students": (), "Office": ()},
        keys=(Key(name="Lesson planner"), Key(name="Classroom")),
        grants=(Grant(at=Days(380), credits=30_000),),
        uses=(
            Use(when=Days(375, 200), credits=3_000, requests=300, mix=TALK),
            Use(when=Days(200, 92), credits=3_600, requests=400, mix=TALK),
            Use(when=Days(92, 61), credits=2_600, requests=800, mix=TALK),
            Use(when=Days(61), credits=5_200, requests=1_800, mix=TALK, people=lately),
        ),
    )


# ------------------------------------------------------------------------------------------------ sixty small ones

_FIRST: Final = (  # noqa: SIM905 - a list of words
    "Amber Birch Cobalt Delta Ember Flint Gable Harvest Indigo Juniper Kite Larch Maple North Opal Pine Quartz River "
    "Slate Timber"
).split()
_SECOND: Final = ("Works", "Labs", "Partners")
_ZONES: Final = (  # noqa: SIM905 - a list of words
    "Europe/Paris America/New_York Asia/Tokyo Europe/London America/Sao_Paulo Asia/Kathmandu Australia/Sydney "
    "Africa/Lagos Europe/Warsaw Pacific/Auckland"
).split()


def _long_tail(as_of: datetime) -> Iterator[Company]:
    """Sixty small companies; the seventh is charged less than it costs."""
    for place in range(60):
        name = f"{_FIRST[place % 20]} {_SECOND[place // 20]}"
        slug = name.lower().replace(" ", "-")
        rng = random.Random(slug)
        domain = f"{slug}.example"
        staff = _staff(rng, domain, {"Team": (1 + rng.randrange(2), ())}, keys={"Team": "Main"})
        boss = Person(name=next(people.names(rng)), email=f"owner@{domain}", roles=ADMIN, weight=20)
        joined = 20 + rng.randrange(370)
        total = int(40 * rng.paretovariate(0.8)) + 20
        total = min(total, 4_000)
        is_loss = place == 6
        yield Company(
            slug=slug,
            name=name,
            story="",
            people=(boss, *staff),
            admin=boss.email,
            member=staff[0].email,
            joined=joined,
            zone=_ZONES[place % len(_ZONES)],
            keys=(Key(name="Main"),),
            markup_ppm=900_000 if is_loss else None,
            shows_margin=is_loss,
            grants=(Grant(at=Days(joined), credits=total + total // (1 + rng.randrange(9)) + 10),),
            uses=tuple(
                Use(when=when, credits=credits, requests=requests, mix=TALK, is_exact=not is_loss)
                for when, credits, requests in _two_parts(joined, total)
            ),
            is_small=True,
        )


def _two_parts(joined: int, total: int) -> Iterator[tuple[Days, int, int]]:
    if joined > 92:
        yield Days(joined, 90), total // 2, 8
        joined, total = 90, total - total // 2
    yield Days(joined), total, 20 + min(40, total // 20)


# ------------------------------------------------------------------------------------------------ what they share


def _staff(
    rng: random.Random,
    domain: str,
    departments: Mapping[str, tuple[int, Sequence[str]]],
    *,
    keys: Mapping[str, str | None] | None = None,
) -> tuple[Person, ...]:
    """People of departments and their teams; few use much, most use little, one in nine nothing."""
    names = people.names(rng)
    found = []
    for department, (count, teams) in departments.items():
        for place in range(count):
            name = next(names)
            found.append(
                Person(
                    name=name,
                    email=people.email(name, domain),
                    department=None if department == "Team" else department,
                    team=teams[place % len(teams)] if teams else None,
                    weight=0 if place % 9 == 8 else int(10 * min(40.0, rng.paretovariate(1.1))),
                    key=(keys or {}).get(department) if place % 6 else None,
                )
            )
    return tuple(found)


def _plan(credits: int, reason: str) -> tuple[Grant, ...]:
    """As many credits for every month, which end with it."""
    return tuple(
        Grant(at=Month(back), credits=credits, until=Month(back - 1), source=PLAN, reason=reason)
        for back in range(MONTHS, -1, -1)
    )


def _monthly(as_of: datetime, zone: str, credits: int, requests: int, mix: Mix) -> tuple[Use, ...]:
    """Thirteen months that grow to this month's `credits`, of which a part has passed; sparse before the last three."""
    passed = _passed(Calendar(as_of, ZoneInfo(zone)))
    found = []
    for back in range(MONTHS, 0, -1):
        amount = credits * (16 - back) // 16
        count = requests * (16 - back) // 16
        found.append(
            Use(when=Month(back), credits=amount, requests=count if back <= DENSE_MONTHS else count // 6, mix=mix)
        )
    now = max(1, credits * passed // 1000)
    found.append(Use(when=Month(0), credits=now, requests=max(1, requests * passed // 1000), mix=mix))
    return tuple(found)


def _passed(calendar: Calendar) -> int:
    """How much of the month's work is done, in thousandths."""
    span = calendar.span(Month(0))
    if span is None:
        return 1
    days = list(calendar.days(span))
    done = sum(day_weight(day) for day in days[:-1]) + day_weight(days[-1]) // 2
    return max(1, min(1000, 1000 * done // 2_000))

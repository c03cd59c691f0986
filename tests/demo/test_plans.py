"""Stories become timelines whose sums are the stories'."""

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from bursar.demo.companies import companies
from bursar.demo.plans import Batch, Dated, Refused, Step, Strayed, plan
from bursar.demo.requests import Quotes
from bursar.demo.seeding import CLOSING
from bursar.demo.stories import Company, Grant, Move
from bursar.money import MICROS_PER_CREDIT

from .conftest import AS_OF

Plan = Callable[[Company], list[Step]]


@pytest.fixture
def planned(list_quotes: Callable[[int], Quotes]) -> Plan:
    """The plan of a company as of the fixed day."""
    return lambda company: plan(company, AS_OF, list_quotes(company.markup_ppm or 1_000_000), CLOSING)


def _charged(steps: list[Step]) -> int:
    return sum(call.request.priced.charged_micros for step in steps if isinstance(step, Batch) for call in step.calls)


@pytest.mark.parametrize("slug", ["lumen-loop", "quill-co", "sable-insurance", "kestrel-studios", "fernwood-school"])
def test_a_plan_comes_to_exactly_what_its_story_tells(stories: dict[str, Company], planned: Plan, slug: str) -> None:
    company = stories[slug]
    assert _charged(planned(company)) == sum(use.credits for use in company.uses) * MICROS_PER_CREDIT


@pytest.mark.parametrize("slug", ["quill-co", "meridian-group"])
def test_steps_are_in_order_and_never_ahead_of_now(stories: dict[str, Company], planned: Plan, slug: str) -> None:
    steps = planned(stories[slug])
    ends = [step.at for step in steps]
    assert ends == sorted(ends)
    assert ends[-1] <= AS_OF
    for step in steps:
        if isinstance(step, Batch):
            assert [call.at for call in step.calls] == sorted(call.at for call in step.calls)
            months = {call.at.astimezone(ZoneInfo(stories[slug].zone)).month for call in step.calls}
            assert len(months) == 1  # what is booked together falls into the same period of every limit


def test_quill_is_refused_thirty_seven_times(stories: dict[str, Company], planned: Plan) -> None:
    refused = [step.refusals.detail for step in planned(stories["quill-co"]) if isinstance(step, Refused)]
    assert Counter(refused) == {"cap_reached": 24, "allocation_exhausted": 13}


def test_meridian_has_a_move_and_a_stray_request(stories: dict[str, Company], planned: Plan) -> None:
    steps = planned(stories["meridian-group"])
    moves = [step.what for step in steps if isinstance(step, Dated) and isinstance(step.what, Move)]
    assert [moved.department for moved in moves] == ["Sales"]
    assert sum(isinstance(step, Strayed) for step in steps) == 1


def test_a_plan_is_the_same_for_the_same_day(stories: dict[str, Company], planned: Plan) -> None:
    def calls(steps: list[Step]) -> list[object]:
        return [(call.person, call.request) for step in steps if isinstance(step, Batch) for call in step.calls]

    assert calls(planned(stories["lumen-loop"])) == calls(planned(stories["lumen-loop"]))


@pytest.mark.parametrize("text", ["2026-03-01T00:00:20", "2026-12-31T23:10:00", "2028-02-29T12:00:00"])
def test_acme_is_exact_on_the_edges_of_months_too(list_quotes: Callable[[int], Quotes], text: str) -> None:
    as_of = datetime.fromisoformat(text).replace(tzinfo=UTC)
    acme = next(company for company in companies(as_of) if company.slug == "acme-corp")
    steps = plan(acme, as_of, list_quotes(2_000_000), CLOSING)
    granted = sum(step.what.credits or 0 for step in steps if isinstance(step, Dated) and isinstance(step.what, Grant))
    assert granted * MICROS_PER_CREDIT - _charged(steps) == 61_250 * MICROS_PER_CREDIT
    last = max(step.at for step in steps)
    assert last <= as_of


def test_everybody_is_invented(stories: dict[str, Company]) -> None:
    for company in stories.values():
        emails = [person.email for person in company.people]
        assert len(set(emails)) == len(emails)
        assert all(email.endswith(".example") for email in emails)
        assert {company.admin, company.member} <= set(emails)


def test_the_companies_are_as_many_as_told(stories: dict[str, Company]) -> None:
    assert sum(company.is_small and company.kind == "company" for company in stories.values()) == 60
    assert len(stories["meridian-group"].people) == 128
    assert len(stories["fernwood-school"].people) == 200
    assert len(stories["acme-corp"].people) == 18

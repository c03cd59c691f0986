"""The views of the schema reporting: one organization's story in them, and nothing of another's."""

from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
from tests.credits.scenes import Scene

from bursar import db

VIEWS = [
    "organization_credit_pools",
    "user_credit_allocations",
    "credit_usage_attribution",
    "consumed_consumables",
    "purchased_consumables",
    "unified_payment_source",
    "transaction",
    "org_billing_summary",
    "org_billing_metrics",
    "top_credit_users_by_org",
    "user_multi_org_credits",
]


def rows(scene: Scene, columns: str, view: str, rest: str = "") -> list[tuple[object, ...]]:
    """Rows as the organization's own people see them."""
    with scene.acting_as("bursar_app", scene.organization):
        return scene.conn.execute(f"select {columns} from reporting.{view} {rest}").fetchall()


class Story(Scene):
    """Now: 10 credits in the shared pool, a share of 4 of them is Bob's; 2 personal ones of Ada, who used 3 in one
    request; Bob used 1.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.now = self.admin("select clock_timestamp()")[0][0]
        self.ada, self.bob = self.user(), self.user()
        shared = self.pool()
        self.grant(shared, 10_000_000)
        self.grant(self.pool("personal", owner=self.ada), 2_000_000, free=True)
        self.share(shared, self.bob, 4_000_000)
        self.later(microseconds=1)
        # One row, two pools: the held part is Ada's own, what it cost beyond is the shared pool's.
        self.settle(self.hold(2_000_000, self.ada), 3_000_000)
        self.later(microseconds=1)
        self.deduct(1_500_000, self.bob, cost_nano_usd=6_000_000)


@pytest.fixture
def story(books: db.Database) -> Iterator[Story]:
    with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
        yield Story(conn)


def test_pools_and_shares_say_what_is_left(story: Story) -> None:
    assert rows(story, "pool_kind, granted_micros, used_micros, available_micros, unreserved_micros",
                "organization_credit_pools", "order by 1") == [
        ("personal", 2_000_000, 2_000_000, 0, None),
        ("shared", 10_000_000, 2_500_000, 7_500_000, 5_000_000),
    ]  # fmt: skip
    assert rows(story, "user_id, allocated_micros, used_micros, available_micros", "user_credit_allocations") == [
        (story.bob, 4_000_000, 1_500_000, 2_500_000)
    ]


def test_a_renewed_share_says_what_was_used_of_its_period(books: db.Database) -> None:
    with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
        scene = Scene(conn)
        now = scene.admin("select clock_timestamp()")[0][0]
        scene.now = now - timedelta(days=1)
        user, pool = scene.user(), scene.pool()
        scene.grant(pool, 100)
        share = scene.share(pool, user, 10, period="day")
        scene.deduct(8, user)
        scene.now = now
        scene.deduct(3, user)
        day = now.replace(hour=0, minute=0, second=0, microsecond=0)
        columns = "period_start, period_end, used_micros, available_micros"
        assert rows(scene, columns, "user_credit_allocations") == [(day, day + timedelta(days=1), 3, 7)]
        scene.end_share(share)
        assert rows(scene, "used_micros, available_micros", "user_credit_allocations")[0][1] == 0


def test_what_was_drawn_names_who_owned_and_who_used_it(story: Story) -> None:
    ada, bob = story.ada, story.bob
    drawn = rows(story, "ltid, consumed_by_ltid, is_shared_token_pool, quantity::text", "consumed_consumables")
    assert sorted(drawn, key=str) == sorted(
        [
            (ada, ada, False, "2.000000"),
            (story.organization, ada, True, "1.000000"),
            (story.organization, bob, True, "1.500000"),
        ],
        key=str,
    )
    assert rows(
        story, "ltid, is_shared_token_pool, quantity::text, is_free", "purchased_consumables", "order by 4"
    ) == [
        (story.organization, True, "10.000000", False),
        (ada, False, "2.000000", True),
    ]


def test_every_movement_is_in_one_list(story: Story) -> None:
    assert rows(story, "transaction_kind, sum(amount)::bigint", "transaction", "group by 1 order by 1") == [
        ("grant", 12_000_000),
        ("usage", 4_500_000),
    ]


def test_summaries_are_of_the_month_and_of_thirty_days(story: Story) -> None:
    ada, bob = story.ada, story.bob
    assert rows(story, "available_micros, members, month_charged_micros, month_requests, month_active_users",
                "org_billing_summary") == [(7_500_000, 2, 4_500_000, 2, 2)]  # fmt: skip
    assert rows(story, "requests, charged_micros, profit_nano_usd, active_users", "org_billing_metrics") == [
        (2, 4_500_000, 45_000_000 - 6_000_000, 2)
    ]
    assert rows(story, "user_id, charged_micros, place", "top_credit_users_by_org", "order by place") == [
        (ada, 3_000_000, 1),
        (bob, 1_500_000, 2),
    ]
    assert rows(story, "user_id, personal_available_micros, allocation_available_micros, month_charged_micros",
                "user_multi_org_credits", "order by month_charged_micros") == [
        (bob, 0, 2_500_000, 1_500_000),
        (ada, 0, None, 3_000_000),
    ]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_shows_one_organization_and_none_without(story: Story, view: str) -> None:
    other = Scene(story.conn, now=story.now)
    assert rows(story, "distinct organization_id", view) == [(story.organization,)]
    assert (story.organization,) not in rows(other, "organization_id", view)
    with story.acting_as("bursar_app"):
        assert story.conn.execute(f"select * from reporting.{view}").fetchall() == []


def test_every_view_is_named_here(story: Story) -> None:
    found = story.admin("select relname from pg_class where relnamespace = 'reporting'::regnamespace and relkind = 'v'")
    assert sorted(name for (name,) in found) == sorted(VIEWS)

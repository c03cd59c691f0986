"""Guards of commands, each with the scene that fails when it is taken out; test_guards.py tries them all.

A cut is what is taken out of a function: a condition (which then holds), or a pair of what stands there and instead.
"""

from collections.abc import Callable, Iterator

from tests.credits import test_codes as codes
from tests.credits import test_moving as moving
from tests.credits import test_tenancy as tenancy
from tests.credits import test_top_ups as top_ups
from tests.credits.scenes import Scene

Rule = Callable[[Scene], None]
Cut = str | tuple[str, str]


def of(function: str, *cuts: tuple[Cut, Rule]) -> Iterator[tuple[str, str, str, Rule]]:
    """(function, what is taken out, what stands there instead, the rule that must notice) of each cut."""
    for cut, rule in cuts:
        yield (function, *((cut, "") if isinstance(cut, str) else cut), rule)


def unless(condition: str) -> Cut:
    """A condition that refuses, which is never met."""
    return f"if {condition} then", "if false then"


COMMAND_GUARDS: list[tuple[str, str, str, Rule]] = [
    # codes
    *of(
        "claim_code",
        ("perform require_tenant(p_organization_id);", codes.test_a_text_that_is_taken_is_no_other_code),
        ("on conflict (code_hash) do nothing", codes.test_a_text_that_is_taken_is_no_other_code),
    ),
    *of("find_code", ("where c.code_hash = p_code_hash", codes.test_a_text_that_is_taken_is_no_other_code)),
    *of(
        "try_code",
        (unless("v_free is null"), codes.test_who_tried_too_often_tries_no_more_until_the_window_has_passed),
        (
            ("if v_free is null then", "if true then"),
            codes.test_who_tried_too_often_tries_no_more_until_the_window_has_passed,
        ),
        (("t > v_now - p_window", "true"), codes.test_who_tried_too_often_tries_no_more_until_the_window_has_passed),
        (("- p_most + 1]", "- p_most]"), codes.test_who_tried_too_often_tries_no_more_until_the_window_has_passed),
        (
            ("tried_at || v_now where subject_hash = any (p_subjects)", "tried_at || v_now"),
            codes.test_who_tried_too_often_tries_no_more_until_the_window_has_passed,
        ),
        (
            ("order by t) where subject_hash = any (p_subjects)", "order by t)"),
            codes.test_who_tried_too_often_tries_no_more_until_the_window_has_passed,
        ),
    ),
    *of("forgive_try", ("where subject_hash = any (p_subjects)", codes.test_a_try_that_succeeded_does_not_count)),
    *of(
        "forget_tries",
        (
            "where coalesce(tried_at[cardinality(tried_at)], '-infinity') < clock_timestamp() - p_window",
            codes.test_only_who_has_not_tried_lately_is_forgotten,
        ),
    ),
    *of(
        "open_campaign",
        (
            unless("v_row.valid_until <= v_now or v_row.credits_expire_at <= v_now"),
            codes.test_a_campaign_that_would_be_over_is_none,
        ),
        ("or v_row.credits_expire_at <= v_now", codes.test_a_campaign_that_would_be_over_is_none),
        ("perform credits.require_amount(v_row.amount_micros, 1);", codes.test_a_campaign_that_would_be_over_is_none),
        ("v_row.revoked_at := null;", codes.test_the_terms_of_a_campaign_say_nothing_of_whose_it_is_or_when_it_ended),
        (
            "v_row.organization_id := p_organization_id;",
            codes.test_the_terms_of_a_campaign_say_nothing_of_whose_it_is_or_when_it_ended,
        ),
    ),
    *of("add_codes", ("and revoked_at is null", codes.test_what_was_revoked_is_redeemed_no_more_and_the_rest_is)),
    *of(
        "revoke_codes",
        (
            "and (p_code_id is null or code_id = p_code_id)",
            codes.test_what_was_revoked_is_redeemed_no_more_and_the_rest_is,
        ),
        (
            (
                "where organization_id = p_organization_id and campaign_id = p_campaign_id and (p",
                "where organization_id = p_organization_id and (p",
            ),
            codes.test_what_was_revoked_is_redeemed_no_more_and_the_rest_is,
        ),
        (
            (
                "(p_code_id is null or code_id = p_code_id) and revoked_at is null",
                "(p_code_id is null or code_id = p_code_id)",
            ),
            codes.test_what_was_revoked_is_redeemed_no_more_and_the_rest_is,
        ),
        (
            ("and campaign_id = p_campaign_id and revoked_at is null", "and campaign_id = p_campaign_id"),
            codes.test_what_was_revoked_is_redeemed_no_more_and_the_rest_is,
        ),
    ),
    *of(
        "redeem_code",
        (("if found then\n", "if false then\n"), codes.test_a_person_and_a_code_are_one_redemption),
        (
            unless("v_code.revoked_at is not null or v_campaign.revoked_at is not null"),
            codes.test_what_was_revoked_is_redeemed_no_more_and_the_rest_is,
        ),
        (
            unless("v_now >= v_campaign.valid_until or v_now >= v_campaign.credits_expire_at"),
            codes.test_a_code_is_redeemed_from_its_first_instant_until_just_before_its_last,
        ),
        (
            ("v_now >= v_campaign.valid_until or", "v_now > v_campaign.valid_until or"),
            codes.test_a_code_is_redeemed_from_its_first_instant_until_just_before_its_last,
        ),
        (
            "or v_now >= v_campaign.credits_expire_at",
            codes.test_a_code_is_redeemed_from_its_first_instant_until_just_before_its_last,
        ),
        (
            unless("v_now < v_campaign.valid_from"),
            codes.test_a_code_is_redeemed_from_its_first_instant_until_just_before_its_last,
        ),
        (
            unless("v_campaign.is_for_members and p_into_organization_id <> p_organization_id"),
            codes.test_a_code_for_members_goes_into_their_organization_alone,
        ),
        (("v_campaign.is_for_members and", ""), codes.test_a_code_for_members_goes_into_their_organization_alone),
        (
            unless("not p_domain_hash = any (v_campaign.domain_hashes)"),
            codes.test_a_code_for_a_domain_is_for_its_people_alone,
        ),
        (unless("v_code.redemptions >= v_campaign.most_per_code"), codes.test_a_code_is_redeemed_by_so_many),
        (("redemptions = redemptions + 1", "redemptions = redemptions"), codes.test_a_code_is_redeemed_by_so_many),
        (
            (">= v_campaign.most_per_person", "> v_campaign.most_per_person"),
            codes.test_a_person_redeems_so_many_codes_of_one_campaign,
        ),
        ("and r.user_id = p_user_id", codes.test_a_person_redeems_so_many_codes_of_one_campaign),
        (
            ("r.campaign_id = v_campaign.campaign_id and r.user_id", "r.user_id"),
            codes.test_a_person_redeems_so_many_codes_of_one_campaign,
        ),
        (
            ("count(*) filter (where r.domain_hash = p_domain_hash)", "count(*)"),
            codes.test_people_of_a_domain_redeem_so_often,
        ),
        (
            (">= v_campaign.most_per_domain", "> v_campaign.most_per_domain"),
            codes.test_people_of_a_domain_redeem_so_often,
        ),
        (
            ("count(*) filter (where r.into_organization_id = p_into_organization_id)", "count(*)"),
            codes.test_into_an_organization_is_redeemed_so_often,
        ),
        (
            (">= v_campaign.most_per_organization", "> v_campaign.most_per_organization"),
            codes.test_into_an_organization_is_redeemed_so_often,
        ),
        (
            ("(r.claimed_at at time zone 'UTC')::date = (v_now at time zone 'UTC')::date", "true"),
            codes.test_on_a_day_is_redeemed_so_often,
        ),
        ((">= v_campaign.most_per_day", "> v_campaign.most_per_day"), codes.test_on_a_day_is_redeemed_so_often),
        ((">= v_campaign.most_in_all", "> v_campaign.most_in_all"), codes.test_in_all_is_redeemed_so_often),
        (
            (
                "r.organization_id = p_organization_id and r.campaign_id = v_campaign.campaign_id;",
                "r.organization_id = p_organization_id;",
            ),
            codes.test_in_all_is_redeemed_so_often,
        ),
        *(
            ((f", v_campaign.{each}", ""), rule)
            for each, rule in (
                ("most_per_organization", codes.test_into_an_organization_is_redeemed_so_often),
                ("most_per_day", codes.test_on_a_day_is_redeemed_so_often),
                ("most_in_all", codes.test_in_all_is_redeemed_so_often),
            )
        ),
        (
            (
                "least(v_campaign.credits_expire_at, v_now + make_interval(days => v_campaign.credits_days))",
                "v_campaign.credits_expire_at",
            ),
            codes.test_what_a_code_gives_ends_with_its_campaign_or_its_days,
        ),
        (
            ("least(v_campaign.credits_expire_at, v_now +", "(v_now +"),
            codes.test_what_a_code_gives_ends_with_its_campaign_or_its_days,
        ),
        (
            ("from codes where organization_id = p_organization_id and", "from codes where"),
            tenancy.test_ids_of_another_organization_are_unknown_in_ones_own,
        ),
    ),
    *of(
        "grant_code",
        (("'code redemption ' || p_redemption_id", "gen_random_uuid()::text"), codes.test_a_redemption_is_granted_once),
    ),
    *of(
        "finish_redemption",
        ("and grant_id is null", codes.test_a_redemption_is_granted_once),
        ("and redemption_id = p_redemption_id", codes.test_a_redemption_is_granted_once),
    ),
    # debt
    *of(
        "forgive_debt",
        (unless("v_stored is not null"), top_ups.test_forgiving_is_a_booked_entry_of_what_is_owed),
        (unless("v_debt is null"), top_ups.test_forgiving_is_a_booked_entry_of_what_is_owed),
        ("or v_amount > v_debt", top_ups.test_forgiving_is_a_booked_entry_of_what_is_owed),
        ("v_amount < 1 or", top_ups.test_forgiving_is_a_booked_entry_of_what_is_owed),
        (
            "perform credits.pour(p_organization_id, p_pool_id, v_now);",
            top_ups.test_forgiving_is_a_booked_entry_of_what_is_owed,
        ),
    ),
    *of(
        "debt_of",
        (
            ("greatest(0, used_amount - limit_amount)", "greatest(0, used_amount + held_amount - limit_amount)"),
            top_ups.test_what_is_held_beyond_what_there_is_is_no_debt_either,
        ),
    ),
    # purchases
    *of(
        "set_top_up",
        *(
            (f"perform credits.require_amount({each});", top_ups.test_amounts_that_cannot_be_are_refused)
            for each in ("p_threshold_micros, 0", "p_amount_micros, 1", "p_ceiling_micros, 1")
        ),
        (unless("p_ceiling_micros < p_amount_micros"), top_ups.test_amounts_that_cannot_be_are_refused),
        (
            ("p_ceiling_micros < p_amount_micros", "p_ceiling_micros <= p_amount_micros"),
            top_ups.test_amounts_that_cannot_be_are_refused,
        ),
        (
            ("declines = 0, next_try_at = '-infinity'", "declines = 0"),
            top_ups.test_each_pool_buys_by_its_own_policy,
        ),
        (("state = 'active', ", ""), top_ups.test_a_decline_waits_longer_each_time_and_the_sixth_stops_it),
    ),
    *of(
        "end_top_up",
        ("and state <> 'ended'", top_ups.test_a_policy_that_was_ended_is_not_ended_by_declines_too),
        ("and pool_id = p_pool_id", top_ups.test_each_pool_buys_by_its_own_policy),
    ),
    *of(
        "begin_top_up",
        (
            ("state = 'pending';\n    if found then", "state = 'pending';\n    if false then"),
            top_ups.test_a_pool_buys_when_less_than_its_threshold_is_available,
        ),
        (
            ("and pool_id = p_pool_id and state = 'pending'", "and state = 'pending'"),
            top_ups.test_each_pool_buys_by_its_own_policy,
        ),
        ("or v_policy.state <> 'active'", top_ups.test_a_policy_that_ended_buys_no_more_and_an_open_purchase_goes_on),
        ("or v_policy.next_try_at > v_now", top_ups.test_a_decline_waits_longer_each_time_and_the_sixth_stops_it),
        (
            ("< v_policy.threshold_micros", "<= v_policy.threshold_micros"),
            top_ups.test_a_pool_buys_when_less_than_its_threshold_is_available,
        ),
        (" - b.held_amount", top_ups.test_a_pool_buys_when_less_than_its_threshold_is_available),
        (unless("v_hour >= v_policy.most_per_hour"), top_ups.test_too_many_within_an_hour_are_a_runaway),
        (("requested_at > v_now - interval '1 hour'", "true"), top_ups.test_too_many_within_an_hour_are_a_runaway),
        ((", v_now - interval '1 hour');", ");"), top_ups.test_an_hour_over_the_end_of_a_month_is_one_hour),
        (
            ("v_bought + v_policy.amount_micros > v_policy.ceiling_micros", "false"),
            top_ups.test_the_ceiling_is_of_the_month_in_the_organizations_zone_and_counts_open_purchases,
        ),
        (
            ("v_bought + v_policy.amount_micros > v", "v_bought + v_policy.amount_micros >= v"),
            top_ups.test_the_ceiling_may_be_reached_exactly_and_counts_the_month_alone,
        ),
        (
            (" filter (where requested_at >= credits.period_start('month', v_zone, v_now))", ""),
            top_ups.test_the_ceiling_may_be_reached_exactly_and_counts_the_month_alone,
        ),
        ("and state <> 'failed'", top_ups.test_each_pool_buys_by_its_own_policy),
        (
            ("and pool_id = p_pool_id and state <> 'failed'", "and state <> 'failed'"),
            top_ups.test_each_pool_buys_by_its_own_policy,
        ),
        (
            (
                "state = 'runaway' where organization_id = p_organization_id and pool_id = p_pool_id",
                "state = 'runaway' where organization_id = p_organization_id",
            ),
            top_ups.test_each_pool_buys_by_its_own_policy,
        ),
        (
            (
                "next_try_at = v_month_end where organization_id = p_organization_id and pool_id = p_pool_id",
                "next_try_at = v_month_end where organization_id = p_organization_id",
            ),
            top_ups.test_each_pool_buys_by_its_own_policy,
        ),
    ),
    *of(
        "decide_top_up",
        (unless("not found"), top_ups.test_a_policy_that_was_ended_is_not_ended_by_declines_too),
        (
            unless("v_top_up.state = (case when p_succeeded then 'succeeded' else 'failed' end)"),
            top_ups.test_a_pool_buys_when_less_than_its_threshold_is_available,
        ),
        (unless("v_top_up.state = 'succeeded'"), top_ups.test_a_pool_buys_when_less_than_its_threshold_is_available),
        (("* 2 ^ declines", ""), top_ups.test_a_decline_waits_longer_each_time_and_the_sixth_stops_it),
        ("and state = 'active'", top_ups.test_a_policy_that_was_ended_is_not_ended_by_declines_too),
        (("declines + 1 >= 6", "false"), top_ups.test_a_decline_waits_longer_each_time_and_the_sixth_stops_it),
        (
            ("set declines = 0 where", "set declines = declines where"),
            top_ups.test_what_was_declined_before_a_purchase_succeeded_does_not_count,
        ),
        (
            (
                "set declines = 0 where organization_id = p_organization_id and pool_id = v_top_up.pool_id",
                "set declines = 0 where organization_id = p_organization_id",
            ),
            top_ups.test_each_pool_buys_by_its_own_policy,
        ),
    ),
    # moving in
    *of(
        "depart",
        (("if found then", "if false then"), moving.test_everything_that_nothing_holds_leaves_a_home_once),
        ("and p.kind = 'individual'", moving.test_only_what_is_at_home_leaves_it),
        (unless("v_pool.excess_amount > 0"), moving.test_who_owes_at_home_takes_nothing_along),
        (
            "perform credits.pour(p_organization_id, v_pool.pool_id, v_now);",
            moving.test_everything_that_nothing_holds_leaves_a_home_once,
        ),
        (
            ("v_kept := v_pool.held_amount;", "v_kept := 0;"),
            moving.test_what_is_held_stays_at_home_with_the_grants_that_it_burns,
        ),
        (
            ("v_kept := greatest(0, v_kept - v_row.left_micros);", ""),
            moving.test_what_is_held_stays_at_home_with_the_grants_that_it_burns,
        ),
        ("and s.state in ('active', 'lingering')", moving.test_only_what_is_at_home_leaves_it),
        (
            ("in ('active', 'lingering')", "= 'active'"),
            moving.test_what_an_expired_grant_keeps_for_a_hold_goes_nowhere_else,
        ),
        (
            ("order by g.priority, g.expires_at,", "order by g.expires_at desc,"),
            moving.test_what_is_held_stays_at_home_with_the_grants_that_it_burns,
        ),
        (
            "perform credits.set_pool_limit(p_organization_id, v_pool.pool_id, -v_gone);",
            moving.test_everything_that_nothing_holds_leaves_a_home_once,
        ),
        (
            "value_left_nano_usd = value_left_nano_usd - v_value,",
            moving.test_everything_that_nothing_holds_leaves_a_home_once,
        ),
    ),
    *of(
        "arrive",
        (
            ("if exists (select from arrivals", "if false and exists (select from arrivals"),
            moving.test_what_left_arrives_once_with_its_priority_time_and_money,
        ),
        (
            "perform credits.pour(p_organization_id, v_pool, v_now);",
            moving.test_what_was_used_before_credits_arrived_is_paid_by_the_grants_there_were,
        ),
        (
            "perform credits.fold_pool(p_organization_id, v_pool, v_now);",
            moving.test_what_expires_on_the_way_expires_where_it_arrives,
        ),
        (
            "perform credits.limits_changed(p_organization_id);",
            moving.test_what_left_arrives_once_with_its_priority_time_and_money,
        ),
        (
            "perform credits.set_pool_limit(p_organization_id, v_pool, v_part.amount_micros);",
            moving.test_what_left_arrives_once_with_its_priority_time_and_money,
        ),
    ),
    *of(
        "note_arrival",
        ("and arrived_at is null", moving.test_when_a_move_arrived_is_noted_once),
        ("and transfer_id = p_transfer_id", moving.test_when_a_move_arrived_is_noted_once),
    ),
]

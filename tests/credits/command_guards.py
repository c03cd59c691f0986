"""Guards of commands, each with the scene that fails when it is taken out; test_guards.py tries them all.

A cut is what is taken out of a function: a condition (which then holds), or a pair of what stands there and instead.
"""

from collections.abc import Callable, Iterator

from tests.credits import test_apart as apart
from tests.credits import test_codes as codes
from tests.credits import test_grants as grants
from tests.credits import test_limits_apart as limits
from tests.credits import test_moving as moving
from tests.credits import test_posting as posting
from tests.credits import test_refunds as refunds
from tests.credits import test_shares as shares
from tests.credits import test_switching as switching
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
    # grants, schedules and transfers
    *of(
        "add_grant",
        ("and pool_id = p_pool_id", switching.test_a_closed_pool_or_none_takes_nothing),
        (("(closed_at is null or p_source = 'top_up')", "true"), switching.test_a_closed_pool_or_none_takes_nothing),
        ("perform credits.require_paid(p_cost_basis_nano_usd);", grants.test_nobody_is_paid_for_a_grant),
    ),
    *of(
        "void_grant",
        (
            (
                "where organization_id = p_organization_id and grant_id = p_grant_id;\n    if not found",
                "where organization_id = p_organization_id;\n    if not found",
            ),
            apart.test_of_a_pools_grants_only_the_one_that_is_meant_is_voided,
        ),
        (unless("not found"), apart.test_of_a_pools_grants_only_the_one_that_is_meant_is_voided),
        (
            "perform credits.pour(p_organization_id, v_state.pool_id, v_now);",
            apart.test_of_a_pools_grants_only_the_one_that_is_meant_is_voided,
        ),
        (
            (
                "then v_now end\n        where organization_id = p_organization_id and grant_id = p_grant_id",
                "then v_now end\n        where organization_id = p_organization_id",
            ),
            apart.test_of_a_pools_grants_only_the_one_that_is_meant_is_voided,
        ),
    ),
    *of(
        "add_schedule",
        ("and pool_id = p_pool_id and closed_at is null", switching.test_a_closed_pool_or_none_takes_nothing),
        ("and closed_at is null", switching.test_a_closed_pool_or_none_takes_nothing),
        ("perform credits.require_amount(p_amount_micros, 1);", grants.test_a_schedule_that_makes_no_sense_is_none),
        (
            "perform credits.require_bounds(p_min_rollover_micros, p_max_rollover_micros);",
            grants.test_a_schedule_that_makes_no_sense_is_none,
        ),
        ("p_lasts <= interval '0' or", grants.test_a_schedule_that_makes_no_sense_is_none),
        (
            "or (p_is_lasting and (p_lasts is not null or p_max_rollover_micros is not null))",
            grants.test_a_schedule_that_makes_no_sense_is_none,
        ),
        ("or p_max_rollover_micros is not null", grants.test_a_schedule_that_makes_no_sense_is_none),
        (
            unless("v_anchor not between v_now - interval '50 years' and v_now + interval '50 years'"),
            grants.test_a_schedule_that_makes_no_sense_is_none,
        ),
        (
            unless("not exists (select 1 from pg_catalog.pg_timezone_names where name = p_zone)"),
            grants.test_a_schedule_that_makes_no_sense_is_none,
        ),
        (
            ("or p_every not between 1 and 1000", ""),
            grants.test_a_schedule_that_makes_no_sense_is_none,
        ),
    ),
    *of(
        "cancel_schedule",
        ("and schedule_id = p_schedule_id", apart.test_grants_schedules_and_refunds_leave_others_alone),
    ),
    *of(
        "make_occurrences",
        ("and pool_id = p_pool_id", grants.test_schedules_of_other_pools_come_at_their_own_time),
        ("and schedule_id = v_row.schedule_id", grants.test_schedules_of_other_pools_come_at_their_own_time),
    ),
    *of(
        "require_bounds",
        ("perform credits.require_amount(p_max_micros, 0);", grants.test_bounds_of_a_roll_over_are_two_amounts),
    ),
    *of(
        "transfer_credits",
        ("perform credits.require_amount(p_amount_micros, 1);", grants.test_a_transfer_is_of_some_amount),
        (
            ("p_from_pool_id and closed_at is null", "p_from_pool_id"),
            switching.test_a_closed_pool_or_none_takes_nothing,
        ),
        (("p_to_pool_id and closed_at is null", "p_to_pool_id"), switching.test_a_closed_pool_or_none_takes_nothing),
        (unless("v_from.pool_id is null or v_to.pool_id is null"), switching.test_a_closed_pool_or_none_takes_nothing),
        (unless("v_from.pool_id = v_to.pool_id"), grants.test_a_transfer_is_of_some_amount),
        (
            "and v_to.model_filter is distinct from v_from.model_filter",
            apart.test_grants_schedules_and_refunds_leave_others_alone,
        ),
    ),
    *of(
        "expire_grants",
        ("and l.pool_id = p_pool_id", switching.test_a_hold_on_one_pool_keeps_nothing_of_anothers_expired_grants),
        (
            "and (h.leg_micros is not null or h.leg = l.leg)",
            switching.test_a_hold_on_one_pool_keeps_nothing_of_anothers_expired_grants,
        ),
        ("and c.chain_id = h.chain_id", switching.test_a_hold_on_one_pool_keeps_nothing_of_anothers_expired_grants),
    ),
    # refunds
    *of(
        "refund_charge",
        (
            ("if v_draws.charged_at[i] <> v_charges[cardinality(v_charges)] then", "if false then"),
            refunds.test_of_a_request_that_was_charged_twice_each_charge_gives_room_back_where_it_took_it,
        ),
        (
            (
                "credits.personal_pool(p_organization_id, v_users[i],",
                "credits.personal_pool(p_organization_id, v_users[1],",
            ),
            refunds.test_of_a_request_that_was_charged_twice_each_charge_goes_back_to_who_asked,
        ),
    ),
    *of(
        "draws_of",
        (
            "and k.chain_id is not distinct from d.chain_id and k.model is not distinct from d.model",
            refunds.test_of_a_request_that_was_charged_twice_each_charge_gives_room_back_where_it_took_it,
        ),
        (
            ("ends[i] - starts[i] - refunded[i]", "ends[i] - starts[i]"),
            refunds.test_what_was_refunded_before_a_request_was_charged_again_is_not_refunded_twice,
        ),
    ),
    *of(
        "origin_of",
        (
            ("not exists (select from grants g where", "false and not exists (select from grants g where"),
            moving.test_what_members_brought_along_stays_apart_when_it_is_shared,
        ),
    ),
    *of(
        "end_grant",
        (
            ("substr(replace(p_grant.grant_id::text, '-', ''), 1, 16)", "substr(md5(p_grant.grant_id::text), 1, 16)"),
            grants.test_what_rolls_over_at_one_instant_burns_in_the_order_of_what_it_was,
        ),
    ),
    *of(
        "parts_of",
        (
            ("t.request_id = a.request_id and t.booked_at = a.booked_at), 0)", "true), 0)"),
            refunds.test_of_several_requests_that_drew_on_several_pools_the_one_that_is_meant_is_refunded,
        ),
        (
            "and t.request_id = p_request_id",
            refunds.test_of_several_requests_that_drew_on_several_pools_the_one_that_is_meant_is_refunded,
        ),
    ),
    *of(
        "give_room_back",
        ("and credits.admits(e.filter, p_model, p_feature)", refunds.test_only_caps_on_what_was_asked_have_room_again),
        ("and period_start = v_row.start", refunds.test_a_cap_has_room_again_in_the_period_of_the_charge),
        (
            ("greatest(0, used_amount - v_row.refunded + held_amount - limit_amount)", "0"),
            refunds.test_a_cap_that_is_still_over_its_limit_after_a_refund_still_blocks,
        ),
        (
            ("where e.leg = 0 or r.pool_id = v_chain.leg_pool_ids[e.leg]", ""),
            refunds.test_a_cap_on_one_pool_has_room_again_for_what_that_pool_paid,
        ),
        (
            ("l where l = v_chain.leg_pool_ids[e.leg]", "l"),
            refunds.test_a_share_grows_by_what_it_paid_whatever_other_pools_its_member_has,
        ),
        ("and period = 'none'", refunds.test_a_renewed_share_grows_in_the_month_of_the_charge_alone),
        (
            ("set adjusted_micros = adjusted_micros + v_row.grown", "set adjusted_micros = adjusted_micros"),
            refunds.test_a_renewed_share_grows_in_the_month_of_the_charge_alone,
        ),
        (
            "and period_start <= p_charged_at",
            refunds.test_what_a_renewed_share_paid_in_a_month_that_is_over_goes_to_the_open_part,
        ),
        (("v_row.ended_at is null and", ""), refunds.test_a_share_that_ended_gets_nothing_back),
        ("and allocation_id = v_row.id and period = 'none'", apart.test_shares_leave_others_alone),
        (
            (
                "where organization_id = p_organization_id and allocation_id = v_row.id and period_start <=",
                "where organization_id = p_organization_id and period_start <=",
            ),
            apart.test_shares_leave_others_alone,
        ),
    ),
    *of(
        "refund_charge",
        (
            "perform credits.limits_changed(p_organization_id);",
            refunds.test_a_refund_to_who_was_without_credits_can_be_spent_at_once,
        ),
    ),
    # the switch
    *of(
        "switch_pools",
        (("if v_stored is not null then", "if false then"), switching.test_what_was_switched_is_not_switched_again),
        (
            ("p_to is null or p_to not in ('personal', 'shared') or not", "not"),
            switching.test_only_a_companys_pools_are_switched,
        ),
        ("and kind = 'company'", switching.test_only_a_companys_pools_are_switched),
        ("and p.closed_at is null", switching.test_what_was_switched_is_not_switched_again),
        (("a.pool_id = v_row.pool_id and a.kind", "a.kind"), switching.test_each_pool_is_divided_by_its_own_shares),
        ("and a.kind = 'reserved'", switching.test_each_pool_is_divided_by_its_own_shares),
        (
            (
                "greatest(0, b.limit_amount - b.used_amount - b.held_amount)",
                "b.limit_amount - b.used_amount - b.held_amount",
            ),
            switching.test_a_share_that_is_overdrawn_claims_nothing_of_what_is_divided,
        ),
        (
            ("v_row.pool_id and ended_at is null;", "v_row.pool_id;"),
            switching.test_each_pool_is_divided_by_its_own_shares,
        ),
    ),
    *of(
        "switch_pools",
        (
            "union select model_filter from pools where organization_id = p_organization_id and kind = 'shared'",
            switching.test_a_shared_pool_that_was_empty_is_there_again_when_credits_are_shared_again,
        ),
    ),
    *of("spread_over_members", ("and status = 'active'", switching.test_who_is_suspended_gets_no_part)),
    *of(
        "watch_holds",
        ("and h.flags & 2 = 0", switching.test_a_call_that_the_customers_own_key_pays_keeps_nothing_waiting),
        ("and l.pool_id = p_pool_id", switching.test_what_a_hold_on_two_pools_frees_goes_to_its_user_in_each),
        (
            "when h.leg_micros is not null then h.leg_micros[l.leg]",
            switching.test_what_a_hold_on_two_pools_frees_goes_to_its_user_in_each,
        ),
        (
            " + credits.charged_to(p_organization_id, v_row.request_id, p_pool_id)",
            switching.test_a_request_that_is_held_anew_frees_what_it_held_when_it_was_charged_before,
        ),
    ),
    *of(
        "watch_charge",
        (
            ("v_to, -p_moved, true)", "v_to, 0, true)"),
            switching.test_a_correction_is_settled_with_who_was_charged_what_is_corrected,
        ),
        (
            ("v_to, -p_moved, true)", "v_to, -p_moved, false)"),
            switching.test_a_correction_is_settled_with_who_was_charged_what_is_corrected,
        ),
    ),
    *of(
        "charged_to",
        ("where d.pool_id = p_pool_id", switching.test_what_a_hold_on_two_pools_frees_goes_to_its_user_in_each),
    ),
    # what comes is told after what closed pools are owed of it is paid
    *(
        (function, guard, "", rule)
        for guard in ("perform credits.settle_due(p_organization_id, v_now);",)
        for function, rule in (
            (
                "add_grant",
                switching.test_what_comes_to_a_member_who_owes_a_closed_pool_is_told_as_what_is_left_after_the_debt,
            ),
            ("add_schedule", switching.test_what_a_schedule_grants_at_once_to_who_owes_a_closed_pool_pays_it),
            ("transfer_credits", switching.test_what_is_transferred_to_who_owes_a_closed_pool_pays_it),
            ("refund_charge", switching.test_what_is_refunded_to_who_owes_a_closed_pool_pays_it),
            ("switch_pools", switching.test_what_is_gathered_by_a_switch_pays_what_the_shared_pool_owes_a_closed_one),
            ("arrive", moving.test_what_a_member_brings_along_pays_what_they_owe_a_closed_pool),
        )
    ),
    *of(
        "fold_due_pools",
        (
            "perform credits.settle_due(p_organization_id, p_now);",
            switching.test_what_time_brings_to_who_owes_a_closed_pool_pays_at_once,
        ),
    ),
    *of(
        "sweep_pool",
        (
            ("h.organization_id = w.organization_id and h.request_id = w.request_id)", "false)"),
            switching.test_what_comes_while_calls_still_run_is_divided_at_once,
        ),
        (
            ("and is_due) then", "and false) then"),
            switching.test_what_a_closed_pool_is_owed_is_paid_by_the_next_credits_of_who_used_it,
        ),
        (
            (
                "do update set rest_micros = a.rest_micros + excluded.rest_micros",
                "do update set rest_micros = excluded.rest_micros",
            ),
            switching.test_what_somebody_left_themselves_pays_what_they_used_too_much_and_no_rest_is_lost,
        ),
    ),
    *of(
        "settle_accounts",
        (
            ("and pool_id = v_to and next_event_at <= p_now", "and false"),
            switching.test_what_has_ended_where_a_user_spends_now_pays_no_debt,
        ),
        (
            ("least(-rest_micros, credits.missing_in(p_organization_id, p_pool_id)) into", "-rest_micros into"),
            switching.test_nobody_pays_more_than_is_missing,
        ),
        (
            ("set rest_micros = rest_micros + v_micros", "set rest_micros = rest_micros"),
            switching.test_who_owes_pays_their_own_part_alone,
        ),
        (
            ("and rest_micros > 0 order by 1 loop", "and rest_micros > 0 order by 1 desc loop"),
            switching.test_of_what_is_there_the_first_pool_gets_its_rest_first,
        ),
        (
            ("and pool_id = v_to and closed_at is not null", "and false"),
            switching.test_what_a_hold_frees_goes_on_from_a_pool_that_has_closed_meanwhile,
        ),
        (
            ("-greatest(0, least(d.micros, v_missing - d.before)), is_due = false", "-d.micros, is_due = false"),
            switching.test_a_debt_that_others_paid_is_not_asked_for_when_something_expires_later,
        ),
        (
            ("= greatest(0, least(d.micros, v_missing - d.before)), is_due = false", "= d.micros, is_due = false"),
            switching.test_what_has_expired_of_a_rest_is_not_paid_by_what_comes_to_all,
        ),
    ),
    *of(
        "missing_in",
        ("and a.rest_micros > 0", switching.test_what_a_closed_pool_is_owed_is_paid_by_the_next_credits_of_who_used_it),
        (
            ("select sum(a.rest_micros) from", "select 0 * sum(a.rest_micros) from"),
            switching.test_what_a_closed_pool_is_owed_is_paid_by_the_next_credits_of_who_used_it,
        ),
    ),
    *of(
        "fold_pool",
        (
            ("if v_was_closed then", "if false then"),
            grants.test_what_pays_the_debt_of_a_closed_pool_ends_and_rolls_over_there_at_its_own_instant,
        ),
    ),
    *of(
        "reopen_pool",
        (
            "delete from closed_accounts where organization_id = p_organization_id and pool_id = v_pool.pool_id;",
            switching.test_who_owes_a_pool_that_opens_again_owes_it_nothing_apart,
        ),
    ),
    *of(
        "set_pool_limit",
        (
            ("if p_delta > 0 then", "if false then"),
            switching.test_what_a_closed_pool_is_owed_is_paid_by_the_next_credits_of_who_used_it,
        ),
        (
            "pool_id = p_pool_id or ",
            switching.test_a_debt_that_others_paid_is_not_asked_for_when_something_expires_later,
        ),
        (
            ("or to_pool_id = p_pool_id and rest_micros < 0", ""),
            switching.test_what_a_closed_pool_is_owed_is_paid_by_the_next_credits_of_who_used_it,
        ),
        (
            (
                "set next_event_at = '-infinity' where organization_id = p_organization_id and pool_id in",
                "set next_event_at = next_event_at where organization_id = p_organization_id and pool_id in",
            ),
            switching.test_what_is_not_settled_at_once_is_awaited_by_the_gate,
        ),
    ),
    *of(
        "gather",
        (
            (
                "p.min_rollover_micros when p.max_rollover_micros is not null then 0 end",
                "p.min_rollover_micros else 0 end",
            ),
            switching.test_bounds_of_a_roll_over_go_along_with_what_is_gathered,
        ),
        (
            ("when p.free = p.amount_micros then p.min_rollover_micros", ""),
            switching.test_bounds_of_a_roll_over_go_along_with_what_is_gathered,
        ),
    ),
    # limits
    *of(
        "set_limit",
        (
            (
                "where organization_id = p_organization_id and scope = p_scope and scope_id",
                "where scope = p_scope and scope_id",
            ),
            limits.test_what_differs_in_any_way_is_another_limit,
        ),
        *(
            (f"and {each}", limits.test_what_differs_in_any_way_is_another_limit)
            for each in (
                "(action = 'warns') = (p_action = 'warns')",
                "within_id is not distinct from p_within_id",
                "scope_id is not distinct from p_scope_id",
            )
        ),
        *(
            (f"and {each}", limits.test_a_limit_of_ones_own_goes_on_where_a_default_of_its_kind_counted_that_member)
            for each in ("subject_id = p_scope_id", "stops = (p_action <> 'warns')")
        ),
        (
            ("and subject_id = p_scope_id and metric = p_metric", "and subject_id = p_scope_id"),
            limits.test_a_limit_of_ones_own_goes_on_where_a_default_of_its_kind_counted_that_member,
        ),
        (
            (
                "and subject_id = p_scope_id and metric = p_metric and period = p_period",
                "and subject_id = p_scope_id and metric = p_metric",
            ),
            limits.test_a_limit_of_ones_own_goes_on_where_a_default_of_its_kind_counted_that_member,
        ),
    ),
    *of(
        "end_limit",
        ("and ended_at is null", limits.test_a_limit_that_was_lifted_is_lifted_once_and_set_again_is_another),
        (unless("not found"), limits.test_a_limit_that_was_lifted_is_lifted_once_and_set_again_is_another),
        ("and limit_id = p_limit_id", apart.test_limits_raises_and_requests_leave_others_alone),
    ),
    *of(
        "follow_raises",
        ("and after = 'active'", limits.test_a_raise_that_came_and_went_while_nobody_looked_changes_nothing),
        (
            "where before = 'active' and after = 'ended'",
            limits.test_a_raise_that_came_and_went_while_nobody_looked_changes_nothing,
        ),
        ("and b.period_end > e.at", limits.test_the_end_of_a_raise_is_of_the_month_in_which_it_ends),
        ("and b.period_start = d.period_start", limits.test_the_end_of_a_raise_is_of_the_month_in_which_it_ends),
    ),
    *of(
        "counter_of",
        *(
            (f"and {each}", limits.test_defaults_of_different_kinds_count_apart)
            for each in (
                "metric = p_limit.metric\n",
                "stops = (p_limit.action <> 'warns')",
                "coalesce(model_filter, '') = coalesce(p_limit.model_filter, '')",
            )
        ),
        (
            ("if v_row.limit_id <> p_limit.limit_id then", "if false then"),
            limits.test_a_counter_is_of_the_default_that_holds_now,
        ),
        ("and balance_id = v_row.balance_id", limits.test_a_counter_is_of_the_default_that_holds_now),
    ),
    *of(
        "target_of",
        (
            ("p_id and l.ended_at is null and l.amount is not null;", "p_id and l.amount is not null;"),
            limits.test_only_what_is_a_limit_now_is_raised,
        ),
        (
            (
                "p_organization_id and l.ended_at is null and l.amount is not null and (k",
                "p_organization_id and l.amount is not null and (k",
            ),
            limits.test_only_what_is_a_limit_now_is_raised,
        ),
        ("and (k.balance_id is not null or l.limit_id = p_id)", limits.test_only_what_is_a_limit_now_is_raised),
        *(
            (f"v_limit.scope = '{each}' and", limits.test_a_default_is_raised_for_those_of_its_kind)
            for each in ("user", "key", "department")
        ),
        *(
            (f"and {each}", limits.test_a_default_is_raised_for_those_of_its_kind)
            for each in (
                "m.user_id = p_subject_id",
                "a.api_key_id = p_subject_id",
                "t.team_id = p_subject_id",
                "d.department_id = p_subject_id",
            )
        ),
        *(
            (f"and {each}", limits.test_who_has_a_limit_of_their_own_of_the_same_kind_is_raised_there)
            for each in (
                "l.scope_id = p_subject_id",
                "l.metric = v_limit.metric",
                "l.period = v_limit.period",
                "l.model_filter is not distinct from v_limit.model_filter",
                "(l.action = 'warns') = (v_limit.action = 'warns')",
            )
        ),
        (
            ("(v_limit.action = 'warns') and l.ended_at is null;", "(v_limit.action = 'warns');"),
            limits.test_who_has_a_limit_of_their_own_of_the_same_kind_is_raised_there,
        ),
    ),
    *of("set_cycle", (unless("not isfinite(p_anchor)"), limits.test_a_cycle_begins_at_some_instant)),
    *of("set_pool_limit", ("and a.pool_id = p_pool_id", apart.test_shares_leave_others_alone)),
    *of("give_raise", ("or not isfinite(p_ends_at)", limits.test_a_raise_has_an_end)),
    *of("end_raise", ("and raise_id = p_raise_id", apart.test_limits_raises_and_requests_leave_others_alone)),
    *of(
        "request_raise",
        (unless("v_stored is not null"), limits.test_a_request_is_of_an_active_member_for_some_amount_and_made_once),
        (
            "perform credits.require_amount(p_amount, 1);",
            limits.test_a_request_is_of_an_active_member_for_some_amount_and_made_once,
        ),
        ("and status = 'active'", limits.test_a_request_is_of_an_active_member_for_some_amount_and_made_once),
        ("or not isfinite(p_until_at)", limits.test_a_raise_has_an_end),
        ("or p_until_at <= v_now", limits.test_a_raise_has_an_end),
        *(
            (cut, limits.test_a_request_that_is_open_keeps_no_other_from_being_made)
            for cut in (
                ("v_target.balance_id and user_id = p_user_id\n", "v_target.balance_id\n"),
                ("and balance_id = v_target.balance_id and user_id = p_user_id\n", "and user_id = p_user_id\n"),
                (
                    "and balance_id = v_target.balance_id and user_id = p_user_id and state = 'open';",
                    "and user_id = p_user_id and state = 'open';",
                ),
                (
                    "v_target.balance_id and user_id = p_user_id and state = 'open';",
                    "v_target.balance_id and state = 'open';",
                ),
                ("and user_id = p_user_id and state = 'open';", "and user_id = p_user_id;"),
                ("and lapses_at > v_now", ""),
            )
        ),
    ),
    *of(
        "decide_request",
        (unless("not found"), limits.test_a_request_is_decided_once_and_before_it_lapses),
        ("v_row.state <> 'open' or", limits.test_a_request_is_decided_once_and_before_it_lapses),
        ("or v_row.lapses_at <= v_now", limits.test_a_request_is_decided_once_and_before_it_lapses),
        (
            ("v_row.lapses_at <= v_now", "v_row.lapses_at < v_now"),
            limits.test_a_request_is_decided_once_and_before_it_lapses,
        ),
    ),
    # shares
    *of(
        "allocate",
        (unless("v_stored is not null"), shares.test_a_share_is_set_once_under_one_key),
        ("perform credits.require_amount(p_carry_micros, 0);", shares.test_only_shared_pools_have_shares),
        ("and p.closed_at is null", switching.test_a_closed_pool_or_none_takes_nothing),
        (unless("not found"), switching.test_a_closed_pool_or_none_takes_nothing),
        *(
            (cut, shares.test_a_share_of_another_kind_or_period_takes_the_place_of_the_one_there_was)
            for cut in (
                ("user_id = p_user_id and ended_at is null", "user_id = p_user_id"),
                "v_old.kind = p_kind and ",
                " and v_old.period = p_period",
                "perform credits.close_allocation(p_organization_id, v_old.allocation_id, v_now);",
                ("v_old := null;", ""),
            )
        ),
        ("and v_grows > 0", shares.test_a_share_of_a_pool_that_has_too_little_can_be_made_smaller),
        (("v_grows > v_open_room", "v_grows >= v_open_room"), shares.test_everything_may_be_reserved_and_nothing_more),
        ("perform credits.limits_changed(p_organization_id);", shares.test_a_new_share_holds_for_who_has_spent_before),
    ),
    *of(
        "end_allocation",
        ("perform credits.limits_changed(p_organization_id);", shares.test_a_new_share_holds_for_who_has_spent_before),
    ),
    *of(
        "close_allocation",
        ("and ended_at is null", shares.test_a_share_of_another_kind_or_period_takes_the_place_of_the_one_there_was),
        ("and allocation_id = p_allocation_id", apart.test_shares_leave_others_alone),
    ),
    *of(
        "reallocate",
        *(
            (cut, shares.test_only_what_a_reserved_share_has_left_is_given_to_another_reserved_one)
            for cut in (
                "and a.kind = 'reserved'",
                "and a.ended_at is null",
                ("if not found then", "if false then"),
                ("and pool_id = v_pool\n", "\n"),
                ("        and kind = 'reserved' and ended_at", "        and ended_at"),
                (" and ended_at is null)) then", ")) then"),
                "p_to_allocation_id = p_allocation_id or ",
                "perform credits.require_amount(v_amount, 0);",
                ("if v_amount > v_left then", "if false then"),
                ("if v_stored is not null then", "if false then"),
            )
        ),
        (
            (
                "greatest(0, b.limit_amount - b.used_amount - b.held_amount)",
                "(b.limit_amount - b.used_amount - b.held_amount)",
            ),
            shares.test_a_share_that_is_overdrawn_gives_nothing_away,
        ),
        ("perform credits.limits_changed(p_organization_id);", shares.test_what_is_given_can_be_spent_at_once),
    ),
    *of(
        "adjust_share",
        (
            "and period_start <= p_now and period_end > p_now",
            shares.test_what_is_given_away_changes_the_period_of_today,
        ),
        ("and period_end > p_now", shares.test_what_is_given_away_changes_the_period_of_today),
    ),
    *of("note_share", ("and a.allocation_id = p_allocation_id", apart.test_shares_leave_others_alone)),
    *of(
        "renew_shares",
        (
            ("greatest(this.starts_at, a.renews_at)", "this.starts_at"),
            shares.test_in_a_new_zone_a_period_begins_where_the_one_before_it_ended,
        ),
        (
            ("greatest(this.starts_at, a.renews_at)", "a.renews_at"),
            shares.test_each_share_is_renewed_when_its_own_period_is_over,
        ),
        (
            (
                "greatest(0, b.limit_amount - b.used_amount - b.held_amount)",
                "(b.limit_amount - b.used_amount - b.held_amount)",
            ),
            shares.test_what_was_overdrawn_is_no_part_of_the_next_period,
        ),
        ("and a.renews_at <= p_now", shares.test_each_share_is_renewed_when_its_own_period_is_over),
        (
            ("opening, least(spare, carry_micros)", "opening, carry_micros"),
            shares.test_what_is_left_is_carried_and_no_more,
        ),
        (
            ("d.allocation_id\n    ), resized", "d.allocation_id or true\n    ), resized"),
            shares.test_each_share_is_renewed_when_its_own_period_is_over,
        ),
    ),
    *of(
        "await_limits",
        (
            (
                "least(e.at, (select min(p.next_event_at) from pools p where p.organization_id = p_organization_id))",
                "e.at",
            ),
            shares.test_grants_end_at_their_instant_while_a_raise_is_awaited,
        ),
    ),
    # refunds, step by step
    *of(
        "refund_charge",
        (
            ("v_draws.ends[i] - v_draws.refunded[i]", "v_draws.ends[i]"),
            refunds.test_a_request_is_refunded_step_by_step_from_its_end,
        ),
        (
            (
                "from estimates where organization_id = p_organization_id and request_id = p_request_id",
                "from estimates where organization_id = p_organization_id",
            ),
            refunds.test_a_refund_leaves_the_estimates_of_other_requests_to_be_corrected,
        ),
    ),
    *of(
        "return_draw",
        (
            ("greatest(b.start_micros, p_start)", "p_start"),
            refunds.test_each_grant_gets_back_what_the_request_took_of_it_with_its_money,
        ),
        (
            ("least(b.end_micros, p_end)", "b.end_micros"),
            refunds.test_each_grant_gets_back_what_the_request_took_of_it_with_its_money,
        ),
    ),
    # events
    *of(
        "post_event",
        ("and e.object_id = p_object_id", posting.test_the_events_of_each_object_are_numbered_by_themselves),
        (
            ("where p.organization_id = p_organization_id and p.state", "where p.state"),
            posting.test_what_a_money_function_posts_is_told_in_its_own_organization_alone,
        ),
        ("and p.state = 'active'", posting.test_an_event_goes_to_endpoints_that_are_in_use_and_asked_for_its_kind),
        (
            "and outbox.wants(p.kinds, p_kind)",
            posting.test_an_event_goes_to_endpoints_that_are_in_use_and_asked_for_its_kind,
        ),
        (("session_user <> 'bursar_simulator'", "true"), posting.test_what_is_only_played_through_is_mailed_to_nobody),
    ),
    *of(
        "wants",
        *(
            (cut, posting.test_an_event_goes_to_endpoints_that_are_in_use_and_asked_for_its_kind)
            for cut in (
                " and split_part(p_kind, '.', 1) <> 'webhook'",
                "p_kind = any (p_kinds) or ",
                "split_part(p_kind, '.', 1) || '.*' = any (p_kinds)\n        or ",
            )
        ),
    ),
    *of(
        "readers_of",
        (
            ("m.organization_id = p_organization_id and", ""),
            posting.test_what_a_money_function_posts_is_told_in_its_own_organization_alone,
        ),
        *(
            (cut, posting.test_each_kind_is_mailed_to_those_whom_it_concerns)
            for cut in (
                "and m.status = 'active'",
                "and t.lead_user_id = m.user_id",
                " and outbox.public_id('usr', a.user_id) = p_payload ->> 'user_id'",
                "and a.team_id = t.team_id",
                ("array['org_admin', 'finance']", "array['org_admin']"),
                ("= p_payload ->> 'user_id'\n        else", "is not null\n        else"),
            )
        ),
    ),
    *of(
        "mail_event",
        (
            ("select distinct r.user_id", "select r.user_id"),
            posting.test_what_happens_while_an_email_collects_joins_the_one_of_the_same_reader,
        ),
        (
            ("m.organization_id = p_organization_id and m.state", "m.state"),
            posting.test_what_a_money_function_posts_is_told_in_its_own_organization_alone,
        ),
        ("and m.state = 'pending'", posting.test_an_email_that_is_on_its_way_takes_nothing_more),
        ("and m.attempts = 0", posting.test_an_email_that_is_on_its_way_takes_nothing_more),
        ("and m.next_attempt_at > clock_timestamp()", posting.test_an_email_that_is_on_its_way_takes_nothing_more),
    ),
    *of(
        "purge",
        *(
            (cut, posting.test_an_event_stays_as_long_as_somebody_is_still_to_be_told)
            for cut in (
                unless(
                    "p_organization_id is distinct from nullif(current_setting('app.organization_id', true), '')::uuid"
                ),
                ("elsif p_days < 1 then", "elsif false then"),
                "and o.ended_at < v_before",
                "and m.ended_at < v_before",
                ("and d.event_id = o.event_id)", "and false)"),
                ("and m.event_id = o.event_id)", "and false)"),
            )
        ),
        *(
            (cut, posting.test_of_what_was_told_long_ago_the_last_of_each_object_stays)
            for cut in (
                "and n.sequence > o.sequence",
                ("and o.posted_at < v_before", ""),
                (" and n.object_id = o.object_id", ""),
            )
        ),
    ),
    # what time brings, to each pool its own
    *of(
        "sweep_pool",
        (
            ("and v_pool.kind = 'shared'", ""),
            switching.test_what_starts_in_a_closed_personal_pool_goes_to_the_shared_one_for_the_same_models,
        ),
        (
            ("elsif v_room > 0 then", "elsif false then"),
            switching.test_what_starts_in_a_closed_personal_pool_goes_to_the_shared_one_for_the_same_models,
        ),
        (
            "and model_filter is not distinct from v_pool.model_filter",
            switching.test_what_starts_in_a_closed_personal_pool_goes_to_the_shared_one_for_the_same_models,
        ),
    ),
    *of(
        "gather",
        (
            "and s.pool_id = any (p_pool_ids)",
            switching.test_what_starts_in_a_closed_personal_pool_goes_to_the_shared_one_for_the_same_models,
        ),
    ),
    *of(
        "expire_grants",
        ("and s.state in ('active', 'lingering', 'spent')", grants.test_what_has_ended_ends_once_whatever_ends_later),
        (
            ("least(v_row.left_micros, greatest(0, v_held - v_before))", "greatest(0, v_held - v_before)"),
            grants.test_a_hold_keeps_of_an_expired_grant_no_more_than_it_has,
        ),
        (
            ("greatest(0, v_held - v_before)", "v_held - v_before"),
            grants.test_a_hold_that_another_grant_pays_keeps_nothing_of_an_expired_one,
        ),
        (("if v_one > 0 then", "if false then"), grants.test_what_makes_up_a_least_roll_over_is_spent_at_once),
    ),
    *of(
        "activate_grants",
        ("and s.pool_id = p_pool_id", grants.test_grants_of_several_pools_that_start_together_each_start_in_their_own),
    ),
    *of(
        "end_grant",
        (
            ("p_grant.rollover_expires_at <= p_at", "p_grant.rollover_expires_at < p_at"),
            grants.test_what_is_freed_at_the_very_end_of_the_roll_over_expires_too,
        ),
    ),
    # what is another organization's
    *(
        (function, guard, instead, tenancy.test_ids_of_another_organization_are_unknown_in_ones_own)
        for function, guard, instead in (
            (
                "add_grant",
                "organization_id = p_organization_id and pool_id = p_pool_id and (closed",
                "pool_id = p_pool_id and (closed",
            ),
            (
                "void_grant",
                "where organization_id = p_organization_id and grant_id = p_grant_id;\n    if not",
                "where grant_id = p_grant_id;\n    if not",
            ),
            ("cancel_schedule", "where organization_id = p_organization_id and schedule_id", "where schedule_id"),
            ("close_allocation", "where organization_id = p_organization_id and allocation_id", "where allocation_id"),
            ("reallocate", "where a.organization_id = p_organization_id and a.allocation_id", "where a.allocation_id"),
            ("end_limit", "where organization_id = p_organization_id and limit_id", "where limit_id"),
            ("end_raise", "where organization_id = p_organization_id and raise_id", "where raise_id"),
            ("decide_request", "limit_requests where organization_id = p_organization_id and", "limit_requests where"),
            ("add_codes", "where organization_id = p_organization_id and campaign_id", "where campaign_id"),
            ("set_top_up", "where organization_id = p_organization_id and pool_id", "where pool_id"),
            ("decide_top_up", "from top_ups where organization_id = p_organization_id and", "from top_ups where"),
            ("depart", "from departures where organization_id = p_organization_id and", "from departures where"),
            ("note_arrival", "where organization_id = p_organization_id and", "where"),
        )
    ),
]

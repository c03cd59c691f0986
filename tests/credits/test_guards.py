"""Each guard of the money functions matters: with it taken out, the test that shows its rule fails.

A mutation is a piece of the money functions and what stands there instead. The function it is in is replaced in a
transaction, the rule's test is played in that same transaction, must fail, and all is undone.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from tests.credits import test_alone as alone
from tests.credits import test_grants as grants
from tests.credits import test_hopeless as hopeless
from tests.credits import test_limits as limits
from tests.credits import test_rules as rules
from tests.credits import test_tenancy as tenancy
from tests.credits import test_top_ups as top_ups
from tests.credits.command_guards import COMMAND_GUARDS
from tests.credits.conftest import scratch_database
from tests.credits.scenes import Scene
from tests.promises import test_races as races

from bursar import clock, db
from bursar.clock import uuid7
from bursar.db import migrate
from bursar.settings import Settings

FUNCTIONS = "".join(
    each.text for each in migrate.load_schema().files if each.path in ("credits/functions", "outbox/functions.sql")
)
BLOCKS = {
    match[1]: match[0]
    for match in re.finditer(
        r"^create or replace function (?:credits|route|outbox)\.(\w+)\(.*?\$\$;\n", FUNCTIONS, re.MULTILINE | re.DOTALL
    )
}
Rule = Callable[[Scene], None]
ZERO = "'00000000-0000-0000-0000-000000000000'"

# function, what is taken out, what stands there instead, the rule that must notice
MUTATIONS: list[tuple[str, str, str, Rule]] = [
    # what was so before
    (
        "pour",
        "where v_row.poured_at < p_at;",
        "where false;",
        grants.test_what_a_correction_takes_back_from_a_grant_was_burnt_until_then,
    ),
    (
        "end_grant",
        "case when p_before is null then p_grant.expires_at else p_at end",
        "p_grant.expires_at",
        grants.test_what_a_hold_kept_of_an_expired_grant_expires_when_the_hold_ends,
    ),
    (
        "divide",
        "perform credits.pour(organization_id, pool_id, p_now) from pools",
        "perform from pools",
        grants.test_what_was_used_before_a_transfer_came_is_paid_by_the_grants_there_were,
    ),
    (
        "set_limit",
        "select p_organization_id, v_id, count(*) + 1, v_now, p_amount, p_action, p_is_strict, p_created_by",
        "select p_organization_id, v_id, count(*) + 1, v_now, p_amount + 1, p_action, p_is_strict, p_created_by",
        limits.test_what_a_limit_was_is_kept,
    ),
    *(
        (name, f"perform credits.note_share({arguments});", "", limits.test_what_a_share_was_is_kept)
        for name, arguments in (
            ("allocate", "p_organization_id, v_id, p_created_by, v_now"),
            ("adjust_share", "p_organization_id, p_allocation_id, null, p_now"),
            ("give_room_back", "p_organization_id, v_row.id, null, p_now"),
        )
    ),
    # who may ask, and when it is
    (
        "now_under_gate",
        "p_at is not null and session_user <> 'bursar_simulator'",
        "false",
        rules.test_only_the_simulator_dates_money,
    ),
    (
        "require_tenant",
        "p_organization_id is distinct from nullif(current_setting('app.organization_id', true), '')::uuid",
        "false",
        tenancy.test_no_function_spends_reads_or_changes_what_is_anothers,
    ),
    (
        "require_tenant",
        "is distinct from",
        "<>",  # null: nothing is set
        tenancy.test_no_function_spends_reads_or_changes_what_is_anothers,
    ),
    (
        "limits_changed",
        "perform credits.require_tenant(p_organization_id);",
        "",
        tenancy.test_a_change_in_somebodys_home_reaches_only_where_they_belong,
    ),
    (
        "move_one",
        "perform credits.require_tenant(p_organization_id);",
        "",
        tenancy.test_no_function_spends_reads_or_changes_what_is_anothers,
    ),
    (
        "open_organization",
        "perform credits.require_tenant(p_organization_id);",
        "",
        tenancy.test_no_function_spends_reads_or_changes_what_is_anothers,
    ),
    (
        "lock_gate",
        "perform credits.require_tenant(p_organization_id);",
        "",
        tenancy.test_no_function_spends_reads_or_changes_what_is_anothers,
    ),
    ("lock_gate", "if v_due <= v_now then", "if false then", rules.test_voiding_sees_what_has_expired),
    # commands
    (
        "stored_outcome",
        "v_row.body_hash <> p_body_hash",
        "false",
        rules.test_a_command_of_the_same_key_with_another_body_is_refused,
    ),
    (
        "stored_outcome",
        "p_key is null or length(p_key) not between 1 and 255",
        "false",
        rules.test_a_command_needs_a_key,
    ),
    (
        "require_amount",
        "p_amount is null or p_amount not between p_least and credits.most_micros()",
        "false",
        rules.test_commands_refuse_amounts_without_sense,
    ),
    (
        "add_grant",
        "if v_stored is not null then",
        "if false then",
        rules.test_a_command_of_the_same_key_with_another_body_is_refused,
    ),
    ("add_grant", "greatest(v_now, p_effective_at)", "v_now", rules.test_a_grant_that_ends_before_it_starts_is_refused),
    (
        "apply_events",
        "perform credits.pour(p_organization_id, p_pool_id, v_at);",
        "",
        rules.test_use_is_paid_by_the_grants_there_were_at_the_time,
    ),
    ("activate_grants", "perform credits.limits_changed(p_organization_id);", "", rules.test_a_top_up_is_spent_at_once),
    (
        "void_grant",
        "if v_stored is not null then",
        "if false then",
        rules.test_voiding_takes_what_is_left_but_nothing_that_is_held,
    ),
    (
        "void_grant",
        "least(v_state.left_micros, v_room)",
        "v_state.left_micros",
        rules.test_voiding_takes_what_is_left_but_nothing_that_is_held,
    ),
    (
        "void_grant",
        "if v_state.state = 'scheduled' then",
        "if false then",
        rules.test_a_grant_voided_before_it_starts_never_starts,
    ),
    (
        "allocate",
        "v_grows > v_open_room",
        "false",
        rules.test_more_than_the_open_part_is_reserved_only_by_an_explicit_switch,
    ),
    (
        "allocate",
        "perform credits.set_pool_limit(p_organization_id, p_pool_id, 0);",
        "",
        rules.test_what_is_reserved_nobody_else_can_spend,
    ),
    (
        "close_allocation",
        "perform credits.set_current_limit(p_organization_id, p_allocation_id, 0, p_now);",
        "",
        rules.test_ending_a_share_gives_its_rest_and_later_its_hold_back_to_the_open_part,
    ),
    (
        "close_allocation",
        "perform credits.set_pool_limit(p_organization_id, v_row.pool_id, 0);",
        "",
        rules.test_ending_a_share_gives_its_rest_and_later_its_hold_back_to_the_open_part,
    ),
    (
        "set_limit",
        "perform credits.limits_changed(p_organization_id);",
        "",
        rules.test_a_change_of_limits_reaches_every_user_at_once,
    ),
    (
        "set_limit",
        "if v_balance is not null and p_amount is not null then",
        "if false then",
        limits.test_a_lowered_limit_gives_no_running_call_more,
    ),
    (
        "set_limit",
        "set amount = p_amount, is_strict = p_is_strict",
        "set amount = p_amount",
        rules.test_a_limit_that_becomes_strict_takes_no_guess_from_the_next_batch_on,
    ),
    (
        "build_chain",
        "v_chain.is_strict or v_limit.is_strict",
        "v_chain.is_strict",
        rules.test_a_strict_limit_takes_no_guess_and_nothing_of_it_stays,
    ),
    (
        "is_plain_way",
        " and (p_flags & 512 = 0 or not p_is_strict)",
        "",
        rules.test_a_strict_limit_takes_no_guess_and_nothing_of_it_stays,
    ),
    (
        "move_batch",
        "when s.is_guess_under_strict then 10",
        "when false then 10",
        rules.test_a_strict_limit_takes_no_guess_and_nothing_of_it_stays,
    ),
    (
        "is_strict_for",
        "credits.admits(e.filter, p_model, p_feature)",
        "true",
        rules.test_a_strict_limit_on_other_models_or_on_what_the_customers_own_key_does_not_use_takes_guesses,
    ),
    (
        "is_strict_for",
        "not (e.metric = 0 and p_is_own_key)",
        "true",
        rules.test_a_strict_limit_on_other_models_or_on_what_the_customers_own_key_does_not_use_takes_guesses,
    ),
    *(
        (name, "perform credits.require_paid(p_cost_basis_nano_usd);", "", grants.test_nobody_is_paid_for_a_grant)
        for name in ("add_grant", "add_schedule")
    ),
    ("add_schedule", " or p_lasts > interval '1000 years'", "", grants.test_a_grant_of_a_schedule_lasts_no_eternity),
    *(
        (
            name,
            guard,
            "",
            top_ups.test_what_a_pool_had_begun_to_buy_before_it_closed_is_granted_where_its_credits_went,
        )
        for name, guard in (("add_grant", " or p_source = 'top_up'"), ("begin_top_up", " and p.closed_at is null"))
    ),
    *(
        (
            "is_strict_for",
            guard,
            instead,
            rules.test_a_strict_default_takes_no_guess_from_anybody_and_a_limit_of_ones_own_none_where_the_default_had_counted,
        )
        for guard, instead in (
            ("l.balance_id = e.id or l.limit_id = k.limit_id", "l.balance_id = e.id"),
            ("l.balance_id = e.id or l.limit_id = k.limit_id", "l.limit_id in (e.id, k.limit_id)"),
            ("l.ended_at is null and", ""),
            ("order by l.is_default limit 1", "order by not l.is_default limit 1"),
        )
    ),
    (
        "move_batch",
        "when u.action = 1 and u.outcome = 1 and u.flags & 1024 = 1024 then 10",
        "when false then 10",
        rules.test_a_guess_without_room_may_be_made_again_and_its_refusal_is_not_final,
    ),
    (
        "move_batch",
        "u.action = 1 and u.outcome = 1 and u.flags & 1024 = 1024",
        "u.action = 1 and u.outcome = 1",
        rules.test_a_guess_without_room_may_be_made_again_and_its_refusal_is_not_final,
    ),
    (
        "move_batch",
        "w.action = 2 and w.flags & 2048 = 2048 and h.chain_id is not null as is_total",
        "false as is_total",
        rules.test_an_extension_to_a_total_asked_again_after_an_unknown_answer_holds_nothing_twice,
    ),
    (
        "move_batch",
        "when w.tokens > h.tokens then w.tokens - h.tokens else 0",
        "else w.tokens",
        rules.test_an_extension_to_a_total_asked_again_after_an_unknown_answer_holds_nothing_twice,
    ),
    (
        "move_batch",
        "when w.cost > h.cost_nano_usd then w.cost - h.cost_nano_usd else 0",
        "else w.cost",
        rules.test_an_extension_to_a_total_asked_again_after_an_unknown_answer_holds_nothing_twice,
    ),
    (
        "set_current_limit",
        "and period_start <= p_now and period_end > p_now",
        "",
        rules.test_changing_a_limit_leaves_past_periods_as_they_were,
    ),
    (
        "set_current_limit",
        "greatest(0, used_amount + held_amount - p_amount)",
        "0",
        rules.test_a_limit_lowered_below_its_use_blocks_until_it_is_raised_again,
    ),
    # pools, grants and time
    (
        "set_pool_limit",
        "excess_amount = greatest(0, used_amount + held_amount - limit_amount - p_delta)",
        "excess_amount = 0",
        rules.test_a_settle_above_its_hold_is_charged_in_full_and_blocks_what_follows,
    ),
    (
        "set_pool_limit",
        "greatest(b.limit_amount, b.used_amount + b.held_amount)",
        "b.limit_amount",
        rules.test_a_share_over_its_limit_claims_what_it_used,
    ),
    (
        "pour",
        "while v_poured > v_used loop",
        "while false loop",
        rules.test_credit_given_back_to_an_expired_grant_cannot_be_spent_again,
    ),
    (
        "pour",
        "case when state not in ('ended', 'spent') then state when v_grant.expires_at <= p_at then 'lingering' "
        "else 'active' end",
        "state",
        rules.test_credit_given_back_to_an_expired_grant_cannot_be_spent_again,
    ),
    (
        "pour",
        "g.priority, g.expires_at, g.is_free desc,",
        "g.is_free desc,",
        rules.test_the_grant_that_expires_sooner_burns_first_and_a_free_one_before_a_paid_one,
    ),
    (
        "pour",
        "g.is_free desc,",
        "",
        rules.test_the_grant_that_expires_sooner_burns_first_and_a_free_one_before_a_paid_one,
    ),
    (
        "expire_grants",
        "least(v_row.left_micros, greatest(0, v_held - v_before))",
        "0",
        rules.test_what_an_expired_grant_holds_for_a_running_call_stays_payable_until_it_ends,
    ),
    (
        "expire_grants",
        "and h.placed_at < v_grant.expires_at",
        "",
        rules.test_a_hold_placed_after_the_expiry_keeps_nothing_of_the_grant,
    ),
    (
        "expire_grants",
        "greatest(0, v_held - v_before)",
        "v_held",
        rules.test_holds_draw_on_what_burns_first_before_they_keep_an_expired_grant,
    ),
    (
        "activate_grants",
        "perform credits.limits_changed(p_organization_id);",
        "",
        rules.test_a_late_grant_to_a_personal_pool_is_spent_before_the_shared_one,
    ),
    (
        "apply_events",
        "exit when v_at > p_now;",
        "exit when v_at >= p_now;",
        rules.test_grants_are_spendable_from_their_first_instant_until_just_before_their_last,
    ),
    (
        "apply_events",
        "v_at := '-infinity';",
        "v_at := v_at;",
        rules.test_what_an_expired_grant_holds_for_a_running_call_stays_payable_until_it_ends,
    ),
    (
        "fold_pool",
        "select min(next_event_at) from pools",
        "select timestamptz 'infinity' from pools",
        rules.test_grants_are_spendable_from_their_first_instant_until_just_before_their_last,
    ),
    # transfers
    (
        "room_of_pool",
        ", o.limit_amount - o.used_amount - o.held_amount",
        "",
        grants.test_a_transfer_never_moves_what_is_held_or_reserved,
    ),
    ("room_of_pool", "- b.held_amount", "", grants.test_a_transfer_of_everything_takes_what_there_is),
    (
        "divide",
        "v_kept := least(v_row.left_micros, v_held);",
        "v_kept := 0;",
        grants.test_a_transfer_never_moves_what_is_held_or_reserved,
    ),
    (
        "divide",
        "and next_event_at <= p_now",
        "and false",
        grants.test_what_is_due_in_the_other_pool_happens_before_credits_arrive_there,
    ),
    (
        "transfer_credits",
        "if v_stored is not null then",
        "if false then",
        grants.test_a_transfer_with_the_same_key_moves_once,
    ),
    (
        "transfer_credits",
        "v_from.model_filter is not null and",
        "false and",
        grants.test_restricted_credits_stay_restricted,
    ),
    (
        "transfer_credits",
        "if p_amount_micros > v_room then",
        "if false then",
        grants.test_a_transfer_never_moves_what_is_held_or_reserved,
    ),
    # refunds
    (
        "refund_charge",
        "if v_left > v_charged - v_before or v_left = 0 then",
        "if false then",
        grants.test_no_more_is_refunded_than_was_charged,
    ),
    (
        "refund_charge",
        "if v_stored is not null then",
        "if false then",
        grants.test_no_more_is_refunded_than_was_charged,
    ),
    (
        "draws_of",
        "refunded[i] := refunded[i] + v_back;",
        "null;",
        grants.test_a_refund_goes_back_to_the_grants_that_paid_last_first,
    ),
    (
        "refund_charge",
        "delete from estimates where organization_id = p_organization_id and request_id = p_request_id;",
        "",
        grants.test_a_refund_makes_an_estimate_final,
    ),
    (
        "refund_charge",
        "kind = 'shared' and closed_at is not null",
        "false",
        grants.test_a_refund_of_a_charge_before_the_switch_goes_to_who_asked,
    ),
    (
        "return_to_grant",
        "if p_grant.expires_at <= p_now then",
        "if false then",
        grants.test_what_comes_back_to_an_expired_grant_expires,
    ),
    (
        "return_draw",
        "b.micros - coalesce(e.micros, 0)",
        "b.micros",
        grants.test_no_grant_gets_back_more_than_it_paid,
    ),
    (
        "give_room_back",
        "and v_row.legs = 1",
        "",
        grants.test_the_open_part_gets_back_what_a_share_that_goes_on_there_took,
    ),
    (
        "give_room_back",
        "used_amount = used_amount - v_row.refunded,",
        "used_amount = used_amount,",
        grants.test_caps_and_shares_have_refunded_room_again,
    ),
    ("draws_of", "v_left := -v_row.micros;", "v_left := 0;", grants.test_corrections_are_refunded_with_their_request),
    (
        "settle_again",
        "and a.kind < 2",
        "",
        grants.test_a_refund_makes_an_estimate_final,
    ),
    # roll-over
    (
        "rolls_over",
        "greatest(p_grant.min_rollover_micros, p_left)",
        "p_left",
        grants.test_at_its_end_a_grant_rolls_over_within_its_bounds,
    ),
    (
        "rolls_over",
        "case when p_grant.max_rollover_micros is null then 0",
        "case when false then 0",
        grants.test_without_bounds_nothing_rolls_over,
    ),
    (
        "end_grant",
        "case when p_before is null then 0 else credits.rolls_over(p_grant, p_before) end",
        "0",
        grants.test_what_a_hold_frees_after_the_end_rolls_over_within_the_same_bounds,
    ),
    (
        "end_grant",
        "if p_grant.rollover_expires_at <= p_at then",
        "if false then",
        grants.test_what_is_freed_after_the_time_of_the_roll_over_expires,
    ),
    (
        "pour",
        "when state = 'active' and v_grant.min_rollover_micros > 0 then 'spent'",
        "",
        grants.test_at_its_end_a_grant_rolls_over_within_its_bounds,
    ),
    ("void_grant", "or v_state.state = 'spent'", "", grants.test_a_voided_grant_makes_up_nothing),
    # schedules
    (
        "add_schedule",
        "exit when v_next >= v_now;",
        "exit when v_next > v_now;",
        grants.test_a_schedule_ends_at_its_end_and_when_it_is_canceled,
    ),
    (
        "make_occurrences",
        "case when v_next < ends_at then v_next else 'infinity' end",
        "v_next",
        grants.test_a_schedule_ends_at_its_end_and_when_it_is_canceled,
    ),
    (
        "cancel_schedule",
        "next_at = 'infinity'",
        "next_at = next_at",
        grants.test_a_schedule_ends_at_its_end_and_when_it_is_canceled,
    ),
    (
        "add_schedule",
        "if v_next >= coalesce(p_ends_at, 'infinity') then",
        "if false then",
        grants.test_a_schedule_with_the_same_key_is_one,
    ),
    # the switch
    (
        "switch_pools",
        "if v_row.excess_amount > 0 then",
        "if false then",
        grants.test_an_organization_that_owes_does_not_switch,
    ),
    (
        "spread_over_members",
        "else floor(v_total::numeric * c.rest / v_claimed)::bigint",
        "else c.rest",
        grants.test_shares_larger_than_the_pool_get_their_part_of_it,
    ),
    (
        "move_batch",
        "perform credits.fold_in_batch(v_row.organization_id,",
        "perform credits.fold_pool(v_row.organization_id,",
        grants.test_who_used_more_than_was_held_before_the_switch_pays_it_from_the_new_pool,
    ),
    (
        "sweep_pool",
        "perform credits.reopen_pool(p_organization_id, v_pool.kind,",
        "perform null; -- (",
        grants.test_what_comes_back_to_a_closed_personal_pool_is_its_owners_when_credits_are_shared_no_more,
    ),
    (
        "refund_charge",
        "perform credits.apply_events(p_organization_id, v_pools[i], v_now);",
        "",
        grants.test_a_refund_into_a_closed_pool_that_an_expired_grant_lingers_in_is_for_the_running_request,
    ),
    (
        "gather",
        "credits.origin_of(p_organization_id, p.grant_id) as origin",
        "p.grant_id as origin",
        grants.test_switching_back_and_forth_does_not_grind_grants_to_dust,
    ),
    (
        "reopen_pool",
        "delete from sweeps where organization_id = p_organization_id and pool_id = v_pool.pool_id;",
        "",
        grants.test_back_and_forth_nothing_is_lost,
    ),
    (
        "fold_pool",
        "case when v_is_needed then '-infinity' else v_at end",
        "v_at",
        grants.test_what_an_open_hold_frees_after_the_switch_goes_to_who_held_it,
    ),
    # what entries of a chain ask
    (
        "asks",
        "(p_legs[p_condition] = 0 or p_legs[p_condition] = p_leg)\n            and ",
        "",
        rules.test_restricted_credit_is_spent_first_and_only_on_its_models,
    ),
    (
        "asks",
        "credits.admits(p_filters[p_condition], p_model, p_feature) and ",
        "",
        rules.test_a_limit_on_features_counts_those_alone,
    ),
    ("metric_of", "p_metrics[p_condition]", "0::smallint", rules.test_calls_and_tokens_are_limited_like_credits),
    (
        "build_chain",
        "when e.metric = 0 and e.filter is null and",
        "when e.filter is null and",
        rules.test_an_extension_needs_no_room_on_what_it_does_not_use,
    ),
    (
        "build_chain",
        "when e.metric = 0 and e.filter is null and",
        "when e.metric = 0 and",
        rules.test_a_limit_on_features_counts_those_alone,
    ),
    (
        "build_chain",
        "(e.leg = 0 or (v_leg = 1 and v_chain.leg_filters[1] is null))",
        "true",
        rules.test_a_request_may_draw_from_several_pools,
    ),
    (
        "every_place",
        "generate_series(1, p_entries)",
        "generate_series(1, 0)",
        rules.test_a_chain_that_is_older_than_the_list_of_its_conditions_is_held_to_all_of_them,
    ),
    *(
        ("rooms_of", guard, instead, rules.test_what_is_left_is_told_of_what_a_request_passes)
        for guard, instead in (
            ("e.metrics[e.condition] = 0 and ", ""),
            ("credits.admits(e.filters[e.condition], e.model, e.feature)", "true"),
            ("(e.leg = 0 or credits.admits(e.leg_filters[e.leg], e.model, e.feature))", "true"),
        )
    ),
    # chains
    (
        "period_around",
        "if v_local at time zone p_zone > p_at then",
        "if false then",
        rules.test_a_limit_first_used_while_midnight_comes_twice_counts_for_the_day_before,
    ),
    (
        "open_period",
        "if found then",
        "if false then",
        rules.test_a_new_zone_gives_nobody_a_fresh_limit_before_the_period_ends,
    ),
    # periods, defaults, raises, renewals
    (
        "period_around",
        "+ make_interval(months => nr)) at time zone p_zone;",
        "at time zone p_zone) + make_interval(months => nr);",
        limits.test_a_cycle_begins_at_the_same_time_by_the_clocks_of_the_zone,
    ),
    (
        "period_around",
        "if (v_anchor + make_interval(months => nr)) at time zone p_zone > p_at then",
        "if false then",
        limits.test_a_limit_per_cycle_begins_anew_with_the_subscriptions_month,
    ),
    (
        "limits_on",
        "not r.is_default or r.nr = 1",
        "true",
        limits.test_of_several_defaults_the_narrowest_holds,
    ),
    (
        "limits_on",
        "when l.within_scope = 'team' then 1 when l.within_scope = 'department' then 2 else 3 end",
        "when l.within_scope = 'team' then 2 when l.within_scope = 'department' then 1 else 3 end",
        limits.test_of_several_defaults_the_narrowest_holds,
    ),
    (
        "limits_on",
        "case when not l.is_default then 0",
        "case when not l.is_default then 9",
        limits.test_a_limit_of_ones_own_takes_a_defaults_place_and_goes_on_counting,
    ),
    (
        "limits_on",
        "partition by l.scope, l.metric, l.period, l.model_filter, l.action = 'warns'",
        "partition by l.scope",
        limits.test_a_limit_of_ones_own_of_another_kind_leaves_the_default_in_place,
    ),
    ("limits_on", "r.amount is not null and", "", limits.test_of_several_defaults_the_narrowest_holds),
    ("limits_on", "or p.subject_id is not null", "or true", limits.test_a_service_key_is_no_member),
    (
        "build_chain",
        "and period_start = v_period.period_start and limit_amount <> v_amount",
        "and false",
        limits.test_a_default_that_is_changed_holds_for_everybody_at_once,
    ),
    (
        "build_chain",
        "+ credits.raised(p_organization_id, v_balance)",
        "",
        limits.test_a_raise_reaches_into_every_period_of_its_time,
    ),
    (
        "set_limit",
        "+ credits.raised(p_organization_id, v_balance)",
        "",
        limits.test_raises_add_up_and_stay_when_the_limit_changes,
    ),
    (
        "counter_of",
        "coalesce(v_row.balance_id, md5(p_limit.limit_id || ' ' || p_subject_id)::uuid)",
        "md5(p_limit.limit_id || ' ' || p_subject_id)::uuid",
        limits.test_where_a_limit_of_ones_own_ends_the_default_goes_on_counting,
    ),
    (
        "counter_of",
        "and coalesce(l.ended_at, 'infinity') >= p_limit.created_at",
        "",
        limits.test_where_a_limit_of_ones_own_ends_the_default_goes_on_counting,
    ),
    (
        "set_limit",
        "v_balance := coalesce(v_balance, v_id);",
        "v_balance := v_id;",
        limits.test_a_limit_of_ones_own_takes_a_defaults_place_and_goes_on_counting,
    ),
    (
        "set_limit",
        "and (action = 'warns') = (p_action = 'warns')",
        "and action = p_action",
        limits.test_only_a_limit_that_asks_is_asked_about_and_only_by_members,
    ),
    (
        "fold_due_pools",
        "perform credits.fold_limits(p_organization_id, p_now);",
        "",
        limits.test_a_raise_that_ended_gives_no_running_call_more,
    ),
    (
        "fold_pool",
        "least(next_limit_event_at, (select min(next_event_at) from pools where organization_id = p_organization_id))",
        "(select min(next_event_at) from pools where organization_id = p_organization_id)",
        limits.test_a_renewed_share_is_renewed_though_grants_came_later,
    ),
    (
        "follow_raises",
        "select least(ends_at, ended_at) as at",
        "select ends_at as at",
        limits.test_raises_add_up_and_stay_when_the_limit_changes,
    ),
    (
        "await_limits",
        "when 'scheduled' then least(r.starts_at, r.ended_at)",
        "when 'scheduled' then null",
        limits.test_a_raise_begins_and_ends_at_its_very_instant,
    ),
    (
        "give_raise",
        "p_ends_at <= v_starts_at",
        "false",
        limits.test_a_raise_without_time_or_amount_is_none,
    ),
    (
        "give_raise",
        "greatest(p_starts_at, p_now)",
        "coalesce(p_starts_at, p_now)",
        limits.test_a_raise_from_a_past_instant_begins_now_and_takes_at_its_end_what_it_gave,
    ),
    (
        "give_raise",
        "perform credits.require_amount(p_amount, 1);",
        "",
        limits.test_a_raise_without_time_or_amount_is_none,
    ),
    ("raise_limit", "if v_stored is not null then", "if false then", limits.test_a_raise_is_given_once_for_one_key),
    (
        "target_of",
        "if not exists (",
        "if false and not exists (",
        limits.test_one_member_is_raised_above_everybodys_default,
    ),
    (
        "target_of",
        "if v_limit.balance_id is null or v_limit.amount is null then",
        "if false then",
        limits.test_one_member_is_raised_above_everybodys_default,
    ),
    (
        "end_raise",
        "and state <> 'ended'",
        "",
        limits.test_raises_add_up_and_stay_when_the_limit_changes,
    ),
    (
        "request_raise",
        "v_target.action <> 'asks'",
        "false",
        limits.test_only_a_limit_that_asks_is_asked_about_and_only_by_members,
    ),
    (
        "request_raise",
        "and user_id = p_user_id and status = 'active'",
        "",
        limits.test_only_a_limit_that_asks_is_asked_about_and_only_by_members,
    ),
    (
        "request_raise",
        "and state = 'open' and lapses_at > v_now",
        "and false",
        limits.test_a_limit_that_asks_stops_until_somebody_approves,
    ),
    ("decide_request", "v_row.lapses_at <= v_now", "false", limits.test_what_is_denied_or_lapsed_changes_nothing),
    (
        "decide_request",
        "v_row.state <> 'open'",
        "false",
        limits.test_a_limit_that_asks_stops_until_somebody_approves,
    ),
    (
        "renew_shares",
        "+ least(d.spare, d.carry_micros)::bigint",
        "+ d.spare::bigint",
        limits.test_a_share_carries_over_what_is_left_up_to_its_bound,
    ),
    (
        "renew_shares",
        "+ (this.nr - first.nr)::numeric * a.amount_micros",
        "",
        limits.test_days_that_nobody_looked_at_are_renewed_as_if_somebody_had,
    ),
    (
        "renew_shares",
        "b.used_amount + b.held_amount as opening",
        "b.used_amount as opening",
        limits.test_what_runs_over_the_renewal_counts_for_the_period_in_which_it_began,
    ),
    (
        "renew_shares",
        "perform credits.set_pool_limit(p_organization_id, v_pool, 0);",
        "",
        limits.test_a_reserved_share_is_renewed_at_its_very_instant_and_what_was_left_lapses,
    ),
    (
        "renew_shares",
        "perform credits.limits_changed(p_organization_id);",
        "",
        limits.test_a_renewed_share_that_was_left_out_while_empty_pays_again,
    ),
    (
        "close_allocation",
        "renews_at = 'infinity'",
        "renews_at = renews_at",
        limits.test_a_renewed_share_changes_its_size_and_ends,
    ),
    (
        "reallocate",
        "if v_amount > v_left then",
        "if false then",
        limits.test_what_a_share_has_left_is_given_to_another_or_back,
    ),
    (
        "reallocate",
        "if v_stored is not null then",
        "if false then",
        limits.test_what_a_share_has_left_is_given_to_another_or_back,
    ),
    (
        "reallocate",
        "p_to_allocation_id = p_allocation_id or",
        "",
        limits.test_what_a_share_has_left_is_given_to_another_or_back,
    ),
    (
        "reallocate",
        "and pool_id = v_pool",
        "",
        limits.test_what_a_share_has_left_is_given_to_another_or_back,
    ),
    (
        "reallocate",
        "perform credits.set_pool_limit(p_organization_id, v_pool, 0);",
        "",
        limits.test_what_a_share_has_left_is_given_to_another_or_back,
    ),
    (
        "open_period",
        "greatest(p.starts_at, v_last)",
        "p.starts_at",
        rules.test_a_new_zone_gives_nobody_a_fresh_limit_before_the_period_ends,
    ),
    ("chain_refusal", "p_organization.status <> 'active'", "false", rules.test_a_frozen_organization_spends_nothing),
    ("chain_refusal", "p_key.api_key_id is null or", "", rules.test_a_key_of_another_organization_spends_nothing_here),
    ("chain_refusal", "or p_key.user_id <> p_user_id", "", rules.test_a_members_key_spends_for_nobody_else),
    (
        "chain_refusal",
        "p_key.revoked_at <= p_now",
        "false",
        rules.test_a_revoked_key_spends_nothing_from_the_next_batch_on,
    ),
    ("chain_refusal", "p_key.expires_at <= p_now", "false", rules.test_a_key_expires_in_its_very_instant),
    ("chain_refusal", "and m.status = 'active'", "", rules.test_who_is_no_active_member_spends_nothing),
    (
        "build_chain",
        "and organization_id in (p_organization_id, route.home_of_user(p_user_id))",
        "",
        rules.test_a_key_of_another_organization_spends_nothing_here,
    ),
    (
        "build_chain",
        "least(v_key.expires_at, v_key.revoked_at)",
        "null::timestamptz",
        rules.test_a_key_expires_in_its_very_instant,
    ),
    (
        "build_chain",
        "and (p.owner_user_id is null or p.owner_user_id = p_user_id)",
        "",
        rules.test_nobody_spends_from_anothers_personal_pool,
    ),
    (
        "build_chain",
        "v_chain.valid_until := least(v_chain.valid_until, v_row.cap_end);",
        "",
        rules.test_a_used_up_cap_is_fresh_again_in_the_next_month_also_when_it_was_skipped_before,
    ),
    (
        "build_chain",
        "v_chain.valid_until := least(v_chain.valid_until, v_period.period_end);",
        "",
        rules.test_a_limit_is_fresh_in_the_very_instant_its_period_begins,
    ),
    (
        "limits_on",
        "('key', p_original_key_id, p_original_key_id),",
        "",
        rules.test_a_rotated_key_stays_under_the_limit_of_the_key_it_replaces,
    ),
    (
        "build_chain",
        "(o.model_filter is null or o.model_filter = l.model_filter)",
        "true",
        rules.test_restricted_credit_alone_refuses_other_models_by_name_or_by_emptiness,
    ),
    (
        "build_chain",
        "where a.kind is distinct from 'reserved' or a.when_empty = 'open_part'",
        "",
        rules.test_what_is_reserved_nobody_else_can_spend,
    ),
    # settling
    (
        "spread",
        "where e.leg = i",
        "where e.leg = i and e.id = p_chain.leg_pool_ids[i]",
        rules.test_excess_of_a_pool_with_two_parts_is_not_made_while_another_pool_has_room,
    ),
    (
        "spread",
        "least(v_left, greatest(0, v_room))",
        "v_left",
        rules.test_a_settle_above_its_hold_takes_room_elsewhere_before_it_makes_excess,
    ),
    (
        "move_legs",
        "perform credits.reopen_parts(",
        "perform cardinality(p_used); --",
        rules.test_late_use_of_an_ended_share_comes_off_the_open_part,
    ),
    ("book_split", "p_flags := p_flags | 128;", "", rules.test_a_hold_that_was_never_sent_is_released_by_expiry),
    (
        "book_split",
        "if cardinality(v_chain.leg_pool_ids) = 0 then",
        "if false then",
        rules.test_a_settle_that_no_pool_could_pay_harms_nobody_else_in_its_batch,
    ),
    (
        "settle_again",
        "if found then",
        "if false then",
        rules.test_an_expired_hold_that_was_sent_is_charged_by_estimate_and_corrected_once,
    ),
    (
        "settle_again",
        "case when count(*) > 0 then 3 end",
        "null",
        rules.test_an_expired_hold_that_was_sent_is_charged_by_estimate_and_corrected_once,
    ),
    (
        "book_correction",
        "p_tokens - p_estimate.tokens",
        "0",
        rules.test_an_expired_hold_that_was_sent_is_charged_by_estimate_and_corrected_once,
    ),
    (
        "book_correction",
        "for i in reverse cardinality(v_moved)..1 loop",
        "for i in 1..cardinality(v_moved) loop",
        rules.test_a_correction_goes_back_to_the_pools_that_paid_last_first,
    ),
    (
        "book_correction",
        "perform credits.fold_in_batch(p_estimate.organization_id, v_row.pool_id, p_now);",
        "",
        rules.test_credit_given_back_to_an_expired_grant_cannot_be_spent_again,
    ),
    *(
        ("watch_charge", guard, instead, rule)
        for guard, instead, rule in (
            (
                "if v_to is not null then",
                "if false then",
                grants.test_a_correction_of_a_charge_before_the_switch_is_settled_with_who_asked,
            ),
            (
                "if v_pool.kind = 'shared' then",
                "if true then",
                grants.test_a_correction_of_a_personal_charge_is_settled_with_the_shared_pool_after_the_switch,
            ),
        )
    ),
    (
        "book_correction",
        "perform credits.limits_changed(p_estimate.organization_id);",
        "",
        rules.test_a_correction_lets_a_pool_be_used_again,
    ),
    # demands
    (
        "has_room",
        "p_used + p_held + p_wanted <= p_limit",
        "true",
        rules.test_what_fits_is_held_and_one_more_is_not,
    ),
    (
        "decide_tight",
        "v_stops[v_i] and (v_blocked",
        "(v_blocked",
        rules.test_a_limit_that_warns_counts_and_refuses_nothing,
    ),
    (
        "is_plain_way",
        "p_valid_until > p_now and",
        "",
        rules.test_a_limit_is_fresh_in_the_very_instant_its_period_begins,
    ),
    ("is_plain_way", "p_refusal is null and", "", rules.test_who_is_no_active_member_spends_nothing),
    (
        "take",
        "not credits.has_room(b.stops, b.used_amount, b.held_amount, b.limit_amount, w.amount)",
        "b.stops",
        hopeless.test_the_hint_alone_refuses_nobody,
    ),
    (
        "take",
        "r.is_asked and not r.is_hopeless then",
        "r.is_asked then",
        hopeless.test_a_refusal_leaves_a_hint_and_the_next_one_is_the_same_refusal,
    ),
    ("refuse", "f.may_wait and", "", hopeless.test_the_hint_alone_refuses_nobody),
    (
        "refuse",
        "coalesce(f.limit_nr, f.leg_nr)",
        "f.leg_nr",
        hopeless.test_a_refusal_leaves_a_hint_and_the_next_one_is_the_same_refusal,
    ),
    (
        "refuse",
        "and free >= amount",
        "",
        hopeless.test_hopeless_calls_may_wait_for_holds_but_not_for_what_is_used,
    ),
    (
        "decide_tight",
        "is_tight or is_hopeless or",
        "is_tight or",
        hopeless.test_the_hopeless_are_refused_too_where_something_else_is_tight,
    ),
    (
        "decide_tight",
        "and not a.is_hopeless",
        "",
        hopeless.test_beside_a_balance_that_gets_tight_arrival_decides,
    ),
    (
        "take",
        "false) and h.request_id is null end as is_asked",
        "false) end as is_asked",
        rules.test_an_authorize_asked_again_finds_its_hold,
    ),
    (
        "is_plain_way",
        "p_flags & 98 = 0",
        "p_flags & 66 = 0",
        rules.test_a_deduction_asked_again_after_an_unknown_answer_is_not_booked_again,
    ),
    (
        "is_plain_way",
        "p_flags & 98 = 0",
        "p_flags & 96 = 0",
        rules.test_the_customers_own_key_needs_no_credits_but_passes_limits_on_calls,
    ),
    (
        "take",
        "count(distinct request_id) = v_n",
        "true",
        rules.test_one_request_asked_twice_in_one_batch_is_answered_once,
    ),
    (
        "take",
        "not credits.has_room(b.stops, b.used_amount, b.held_amount, b.limit_amount, w.amount)",
        "b.stops",
        rules.test_who_was_refused_is_judged_anew_each_time,
    ),
    (
        "refuse",
        "f.may_wait and f.limits_wait and f.leg_waits",
        "false",
        rules.test_who_was_refused_is_judged_anew_each_time,
    ),
    (
        "decide_tight",
        "continue when v_row.action = 2 and v_need = 0;",
        "",
        rules.test_an_extension_needs_no_room_on_what_it_does_not_use,
    ),
    (
        "decide_tight",
        "v_stops[v_i] and (v_blocked[v_i] or v_rooms[v_i] < v_need)",
        "false",
        rules.test_every_limit_must_allow_it_and_the_one_that_does_not_is_named,
    ),
    (
        "decide_tight",
        "v_frees[v_i] >= v_need",
        "true",
        rules.test_waiting_helps_only_where_holds_alone_stand_in_the_way,
    ),
    (
        "decide_tight",
        "v_free_left <= 0 and v_row.amount > 0",
        "true",
        rules.test_a_call_that_only_open_holds_block_may_wait,
    ),
    (
        "decide_tight",
        "and v_row.amount > 0;",
        ";",
        rules.test_a_settle_above_its_hold_is_charged_in_full_and_blocks_what_follows,
    ),
    ("decide_tight", "v_row.flags & 16 = 16", "true", rules.test_a_call_that_only_open_holds_block_may_wait),
    (
        "decide_tight",
        "v_rooms[v_row.idxs[k]] := v_rooms[v_row.idxs[k]] - v_take[v_leg];",
        "",
        rules.test_of_a_batch_that_does_not_fit_the_first_to_arrive_are_served,
    ),
    (
        "decide_tight",
        "v_rooms[v_i] := v_rooms[v_i] + v_take[v_row.legs[k]];",
        "",
        rules.test_of_a_batch_that_does_not_fit_the_first_to_arrive_are_served,
    ),
    (
        "decide_tight",
        "case v_row.action when 2 then 0 else 1 end..v_row.n_legs",
        "1..1",
        rules.test_an_extension_goes_on_in_the_next_pool_when_its_own_is_empty,
    ),
    (
        "post_batch",
        "coalesce(s.micros, 0) when n.leg = h.leg then",
        "0 when n.leg = h.leg then",
        rules.test_an_extension_goes_on_in_the_next_pool_when_its_own_is_empty,
    ),
    (
        "post_batch",
        "then w.outcome in (-1, 9) and k.request_id",
        "then k.request_id",
        rules.test_a_release_frees_its_key_but_only_when_something_was_released,
    ),
    (
        "post_batch",
        "and (w.outcome in (-1, 1, 9) or (w.outcome = 6",
        "and (w.outcome in (-1, 9) or (w.outcome = 6",
        rules.test_what_was_refused_under_a_key_stays_refused,
    ),
    (
        "post_batch",
        "(w.outcome = 6 and w.detail <> 'request_invalid')",
        "w.outcome = 6",
        rules.test_a_request_without_sense_leaves_its_key_as_it_was,
    ),
    (
        "move_batch",
        "and not credits.came_to_nothing(k)",
        "",
        rules.test_a_key_whose_call_came_to_nothing_is_free_again,
    ),
    # batches
    (
        "move_batch",
        "or cardinality(p_usages) % v_width <> 0 or array_position(p_usages, null) is not null or 0 > any (p_usages)",
        "",
        rules.test_arrays_that_do_not_match_are_refused_as_a_whole,
    ),
    (
        "move_batch",
        "<> array_fill(v_n, array[20])",
        "<> array_fill(v_n, array[20]) and false",
        rules.test_arrays_that_do_not_match_are_refused_as_a_whole,
    ),
    (
        "move_batch",
        "next_event_at <= v_now order by 1",
        "false order by 1",
        rules.test_grants_are_spendable_from_their_first_instant_until_just_before_their_last,
    ),
    (
        "move_batch",
        "if v_lingering then",
        "if false then",
        rules.test_what_an_expired_grant_holds_for_a_running_call_stays_payable_until_it_ends,
    ),
    (
        "move_batch",
        "v_lingering := v_lingering or exists (",
        "v_lingering := v_lingering and exists (",
        rules.test_credit_given_back_to_an_expired_grant_is_gone_with_the_hold_that_ends_in_the_same_batch,
    ),
    (
        "move_batch",
        "(select count(distinct r) from unnest(p_request_ids) r) < v_n",
        "0 > v_n",
        rules.test_an_extension_and_the_end_of_its_hold_may_meet_in_one_batch,
    ),
    (
        "move_batch",
        "(h.chain_id is null or h.lease_expires_at > v_now) then 4",
        "h.chain_id is null then 4",
        rules.test_a_renewed_lease_is_not_expired,
    ),
    (
        "move_batch",
        "(w.action = 5 and h.chain_id is not null) then 6",
        "false then 6",
        rules.test_one_request_asked_twice_in_one_batch_is_answered_once,
    ),
    ("move_batch", "w.amount between 0 and v_most", "true", rules.test_an_extension_cannot_take_a_hold_down),
    ("move_batch", "if v_bent then", "if false then", rules.test_a_hold_ends_on_the_model_it_was_placed_for),
    (
        "move_batch",
        "if v_bent then",
        "if false then",
        rules.test_whether_the_customers_own_key_pays_is_decided_when_the_hold_is_placed,
    ),
    ("are_new", "count(*) = count(distinct w.key) and", "", rules.test_twins_in_one_batch_have_one_effect),
    ("are_new", "w.body_hash is not null and", "", alone.test_what_has_no_sense_is_refused),
    ("are_new", "length(w.key) between 1 and 255", "true", alone.test_what_has_no_sense_is_refused),
    (
        "are_new",
        "and not exists (",
        "and true is not null or exists (",
        rules.test_the_same_key_and_body_has_one_effect_and_one_answer,
    ),
    (
        "move_batch",
        "or b.used_amount - d.used + b.held_amount + d.held > b.limit_amount",
        "",
        rules.test_a_hold_that_alone_kept_an_ended_share_frees_the_open_part_when_nothing_is_charged,
    ),
    (
        "move_batch",
        "if v_over_ids is not null then",
        "if false then",
        rules.test_ending_a_share_gives_its_rest_and_later_its_hold_back_to_the_open_part,
    ),
    (
        "move_batch",
        "k.body_hash = w.body_hash as same",
        "true as same",
        rules.test_the_same_key_and_body_has_one_effect_and_one_answer,
    ),
    (
        "move_batch",
        "elsif v_row.elder <> v_row.place then",
        "elsif false then",
        rules.test_twins_in_one_batch_have_one_effect,
    ),
    (
        "move_batch",
        "w.body_hash as same_as_elder",
        "w.body_hash or true as same_as_elder",
        rules.test_twins_in_one_batch_have_one_effect,
    ),
    ("move_batch", "k.kept_until > v_now", "true", rules.test_what_was_refused_under_a_key_stays_refused),
    (
        "move_batch",
        "r.action in (1, 5) and r.flags & 32 = 32",
        "false",
        rules.test_a_deduction_asked_again_after_an_unknown_answer_is_not_booked_again,
    ),
    (
        "end_holds",
        "case when h.is_sent then 3 else 4 end",
        "4",
        rules.test_an_expired_hold_that_was_sent_is_charged_by_estimate_and_corrected_once,
    ),
    (
        "end_holds",
        "when flags & 8 = 8 then greatest(floor_micros, progress_micros)",
        "",
        rules.test_a_stream_that_expired_is_charged_its_last_progress_and_never_below_its_input,
    ),
    (
        "end_holds",
        "unnest(credits.no_usage())",
        "unnest(array_fill(0, array[credits.usage_width()]))",
        rules.test_an_expired_hold_that_was_sent_is_charged_by_estimate_and_corrected_once,
    ),
]

MUTATIONS += COMMAND_GUARDS

# The same for what move_one decides by itself: a hold, settle or deduction asked alone.
ALONE: list[tuple[str, str, str, Rule]] = [
    (
        "move_one",
        "elsif v_due > v_now then",
        "else",
        rules.test_grants_are_spendable_from_their_first_instant_until_just_before_their_last,
    ),
    (
        "move_one",
        "and exists (select from commands k",
        "and false and exists (select from commands k",
        rules.test_the_same_key_and_body_has_one_effect_and_one_answer,
    ),
    (
        "move_one",
        "and exists (select from commands k",
        "and p_action <> 3 and exists (select from commands k",
        alone.test_of_a_known_key_the_settle_answers_as_it_did,
    ),
    ("move_one", "p_body_hash is not null and", "", alone.test_what_has_no_sense_is_refused),
    ("move_one", "and length(p_key) between 1 and 255", "", alone.test_what_has_no_sense_is_refused),
    (
        "move_one",
        "if v_due > v_now and p_action = 3 then",
        "if p_action = 3 then",
        rules.test_what_an_expired_grant_holds_for_a_running_call_stays_payable_until_it_ends,
    ),
    (
        "move_one",
        "(h.flags | p_flags) & 66 = 0",
        "(h.flags | p_flags) & 64 = 0",
        alone.test_a_settle_goes_on_as_it_was_held,
    ),
    ("move_one", "(h.flags | p_flags) & 66 = 0", "p_flags & 66 = 0", alone.test_a_settle_goes_on_as_it_was_held),
    ("move_one", "(h.flags | p_flags) & 66 = 0", "h.flags & 66 = 0", alone.test_expiry_ends_no_lease_that_goes_on),
    ("move_one", "and h.model is not distinct from p_model", "", alone.test_a_settle_goes_on_as_it_was_held),
    (
        "move_one",
        "and h.feature is not distinct from p_feature",
        "",
        rules.test_a_settle_keeps_the_feature_of_its_hold,
    ),
    (
        "admits",
        "starts_with(p_filter, '#')",
        "false",
        rules.test_a_pool_for_a_feature_pays_for_it_first_and_for_nothing_else,
    ),
    ("admits", "p_feature like substr(p_filter, 2)", "true", rules.test_a_limit_on_features_counts_those_alone),
    (
        "move_batch",
        "or h.feature is distinct from w.feature",
        "",
        rules.test_a_request_goes_on_for_the_feature_that_it_was_held_for,
    ),
    (
        "move_one",
        "and c.chain_id = h.chain_id and c.is_plain",
        "and c.chain_id = h.chain_id",
        alone.test_a_settle_counts_where_calls_are_counted,
    ),
    (
        "move_one",
        "excess_amount = greatest(0, used_amount + p_amount + held_amount - s.held - limit_amount)",
        "excess_amount = excess_amount",
        rules.test_a_settle_above_its_hold_is_charged_in_full_and_blocks_what_follows,
    ),
    (
        "move_one",
        "if v_took.over_ids is not null then",
        "if false then",
        rules.test_ending_a_share_gives_its_rest_and_later_its_hold_back_to_the_open_part,
    ),
    ("move_one", "b.excess_amount > 0 or", "", rules.test_a_share_over_its_limit_claims_what_it_used),
    *(
        ("move_one", "and c.chain_id = h.chain_id and c.is_plain", "and c.chain_id = h.chain_id", rule)
        for rule in (  # a plain chain has one leg: no hold on it is split, and nothing else could pay more
            rules.test_a_settle_above_its_hold_takes_room_elsewhere_before_it_makes_excess,
            rules.test_a_request_may_draw_from_several_pools,
        )
    ),
    (
        "move_one",
        "or b.used_amount - p_amount + b.held_amount + s.held > b.limit_amount",
        "",
        rules.test_a_hold_that_alone_kept_an_ended_share_frees_the_open_part_when_nothing_is_charged,
    ),
    (
        "move_one",
        "least(p_amount, p_tokens, p_cost, p_mark) >= 0",
        "true",
        alone.test_what_has_no_sense_is_refused,
    ),
    ("move_one", "and p_request_id is not null", "", alone.test_a_request_without_an_id_is_refused),
    (
        "move_one",
        "greatest(p_amount, p_tokens, p_cost, p_mark) <= credits.most_micros()",
        "true",
        alone.test_what_has_no_sense_is_refused,
    ),
    ("move_one", "and p_flags >= 0", "", alone.test_what_has_no_sense_is_refused),
    ("move_one", "and (p_action > 1 or p_lease > 0)", "", alone.test_what_has_no_sense_is_refused),
    ("move_one", "cardinality(p_usage) = credits.usage_width()", "true", alone.test_usage_that_is_no_usage_is_refused),
    ("move_one", "and 0 <= all (p_usage)", "", alone.test_usage_that_is_no_usage_is_refused),
    ("move_one", "c.is_plain and", "", rules.test_calls_and_tokens_are_limited_like_credits),
    (
        "move_one",
        "and not exists (select from holds h where h.organization_id = p_organization_id",
        "and (p_flags < 0",
        alone.test_a_request_that_is_held_is_not_deducted_too,
    ),
    (
        "move_one",
        "set held_amount = held_amount - p_amount + v_used, used_amount = used_amount - v_used",
        "set held_amount = held_amount",
        alone.test_what_was_taken_is_given_back_where_another_balance_has_no_room,
    ),
    (
        "move_one",
        "excess_amount = greatest(0, used_amount + held_amount - p_amount - limit_amount)",
        "excess_amount = excess_amount",
        alone.test_what_was_taken_is_given_back_where_another_balance_has_no_room,
    ),
    ("has_room", "p_used + p_held + p_wanted <= p_limit", "true", rules.test_what_fits_is_held_and_one_more_is_not),
    (
        "is_plain_way",
        " and (p_flags & 512 = 0 or not p_is_strict)",
        "",
        rules.test_a_strict_limit_takes_no_guess_and_nothing_of_it_stays,
    ),
    (
        "is_plain_way",
        "p_valid_until > p_now and",
        "",
        rules.test_a_limit_is_fresh_in_the_very_instant_its_period_begins,
    ),
    ("is_plain_way", "p_refusal is null and", "", rules.test_who_is_no_active_member_spends_nothing),
    ("is_plain_way", "and p_built_for = p_version", "", rules.test_a_change_of_limits_reaches_every_user_at_once),
    (
        "is_plain_way",
        "p_flags & 98 = 0",
        "p_flags & 66 = 0",
        rules.test_a_deduction_asked_again_after_an_unknown_answer_is_not_booked_again,
    ),
    (
        "is_plain_way",
        "p_flags & 98 = 0",
        "p_flags & 96 = 0",
        rules.test_the_customers_own_key_needs_no_credits_but_passes_limits_on_calls,
    ),
]


@pytest.fixture(scope="module")
def stage(books: db.Database) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """An admin's connection, which remembers what it has compiled of all that is not taken out."""
    with psycopg.connect(books.dsn("admin")) as conn:
        yield conn


@pytest.fixture
def undone(stage: psycopg.Connection[tuple[Any, ...]]) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """A transaction of it that is rolled back."""
    assert stage.info.transaction_status is TransactionStatus.IDLE
    yield stage
    stage.rollback()


def _take_out(conn: psycopg.Connection[tuple[Any, ...]], function: str, guard: str, instead: str) -> None:
    block = BLOCKS[function]
    assert block.count(guard) == 1, f"{function} has {block.count(guard)} x {guard!r}"
    conn.execute(f"set local role {'bursar_money' if ' credits.' in block.partition('(')[0] else 'bursar_owner'}")
    conn.execute(block.replace(guard, instead))
    conn.execute("reset role")


@pytest.mark.parametrize(
    ("function", "guard", "instead", "rule"),
    MUTATIONS,
    ids=[f"{function}: {rule.__name__[5:]}" for function, _, _, rule in MUTATIONS],
)
def test_without_its_guard_a_rule_does_not_hold(
    undone: psycopg.Connection[tuple[Any, ...]], function: str, guard: str, instead: str, rule: Rule
) -> None:
    _take_out(undone, function, guard, instead)
    with pytest.raises((AssertionError, psycopg.Error)):
        rule(Scene(undone))


@pytest.mark.parametrize(
    ("function", "guard", "instead", "rule"),
    ALONE,
    ids=[f"{function}: {rule.__name__[5:]}" for function, _, _, rule in ALONE],
)
def test_without_its_guard_a_rule_does_not_hold_for_one_alone(
    undone: psycopg.Connection[tuple[Any, ...]], function: str, guard: str, instead: str, rule: Rule
) -> None:
    _take_out(undone, function, guard, instead)
    with pytest.raises((AssertionError, psycopg.Error)):
        rule(Scene(undone, alone=True))


# ---------------------------------------------------------------------------------------------- locks

LOCKS: list[tuple[str, Callable[[db.Database, Scene], None]]] = [
    ("move_one", races.test_of_many_deductions_at_once_exactly_the_100_that_fit_are_accepted),
    ("lock_gate", races.test_of_parallel_reservations_that_do_not_fit_together_one_is_made),
]


@pytest.mark.parametrize(("function", "rule"), LOCKS, ids=[function for function, _ in LOCKS])
async def test_without_the_lock_on_the_gate_a_race_goes_wrong(
    database: db.Database,
    admin_dsn: str,
    settings: Settings,
    function: str,
    rule: Callable[[db.Database, Scene], None],
) -> None:
    async with scratch_database(admin_dsn, settings, function) as scratch:
        with psycopg.connect(scratch.dsn("admin"), autocommit=True) as conn:
            _take_out_for_good(conn, function, "for no key update", "")
            with pytest.raises((AssertionError, psycopg.Error)):
                rule(scratch, Scene(conn, now=clock.now()))


def _take_out_for_good(conn: psycopg.Connection[tuple[Any, ...]], function: str, guard: str, instead: str) -> None:
    with conn.transaction():
        _take_out(conn, function, guard, instead)


# ---------------------------------------------------------------------------------------------- constraints

UPDATE = "update credits.balances set {} where kind = 'pool' and organization_id = %(org)s"
CONSTRAINTS = {
    "balances_never_overrun": UPDATE.format("held_amount = 101"),
    "balances_excess_exact": UPDATE.format("excess_amount = 1"),
    "balances_nothing_negative": UPDATE.format("used_amount = -1"),
    "balances_period_forward": UPDATE.format("period_end = '-infinity'"),
    "grants_amount_positive": """
        insert into credits.grants (organization_id, grant_id, pool_id, source, amount_micros, effective_at, created_at)
        select organization_id, %(new)s, pool_id, 'purchase', 0, now(), now() from credits.pools
        where organization_id = %(org)s""",
    "grants_end_after_start": """
        insert into credits.grants (organization_id, grant_id, pool_id, source, amount_micros, effective_at, expires_at,
            created_at)
        select organization_id, %(new)s, pool_id, 'purchase', 1, now(), now(), now() from credits.pools
        where organization_id = %(org)s""",
    "grant_states_left": "update credits.grant_states set left_micros = -1 where organization_id = %(org)s",
    "holds_amounts": "update credits.holds set amount_micros = -1 where organization_id = %(org)s",
    "entries_amount_positive": """
        insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, to_kind, amount)
        values (%(org)s, %(new)s, now(), now(), 'grant', 'issuance', 'pool', 0)""",
    "entries_two_accounts": """
        insert into ledger.entries (organization_id, entry_id, booked_at, happened_at, kind, from_kind, to_kind, amount)
        values (%(org)s, %(new)s, now(), now(), 'transfer_in', 'pool', 'pool', 1)""",
    "attribution_charge_or_correction": """
        insert into ledger.attribution (organization_id, request_id, booked_at, used_at, pool_id, charged_micros,
            hold_micros, provider_cost_nano_usd)
        values (%(org)s, %(new)s, now(), now(), %(new)s, -1, 0, 0)""",
    "attribution_pool_where_charged": """
        insert into ledger.attribution (organization_id, request_id, booked_at, used_at, charged_micros, hold_micros,
            provider_cost_nano_usd)
        values (%(org)s, %(new)s, now(), now(), 1, 0, 0)""",
    "burns_forward": """
        insert into credits.burns (organization_id, pool_id, start_micros, end_micros, grant_id, poured_at)
        select organization_id, pool_id, 5, 5, grant_id, now() from credits.grants where organization_id = %(org)s""",
    "limits_strict_fits": """
        update credits.limits set is_strict = true, metric = 'calls' where organization_id = %(org)s""",
    "limits_amount": "update credits.limits set amount = -1 where organization_id = %(org)s",
    "limits_model_filter_readable": r"update credits.limits set model_filter = 'a\' where organization_id = %(org)s",
    "pools_model_filter_readable": r"update credits.pools set model_filter = 'a\' where organization_id = %(org)s",
    "chains_current": """
        insert into credits.chains select (jsonb_populate_record(c, jsonb_build_object('chain_id', %(new)s::uuid))).*
        from credits.chains c where organization_id = %(org)s""",
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_money_functions_themselves_cannot_write_what_a_constraint_forbids(
    undone: psycopg.Connection[tuple[Any, ...]], constraint: str
) -> None:
    scene = Scene(undone)
    scene.grant(scene.pool(), 100)
    scene.limit(50)
    scene.hold(10, scene.user())
    arguments = {"org": scene.organization, "new": uuid7()}
    undone.execute("set local role bursar_money")
    with pytest.raises(psycopg.errors.IntegrityError) as refused, undone.transaction():
        undone.execute(CONSTRAINTS[constraint], arguments)
    assert refused.value.diag.constraint_name == constraint
    undone.execute("reset role")
    tables = undone.execute("select conrelid::regclass::text from pg_constraint where conname = %s", [constraint])
    table = tables.fetchone()
    drop = f"alter table {table[0]} drop constraint {constraint}" if table else f"drop index credits.{constraint}"
    undone.execute(drop)
    undone.execute("set local role bursar_money")
    assert undone.execute(CONSTRAINTS[constraint], arguments).rowcount == 1


@pytest.mark.parametrize(
    "table", ["ledger.entries", "ledger.attribution", "ledger.attribution_takes", "credits.grants"]
)
@pytest.mark.parametrize(
    "statement", ["update {} set organization_id = organization_id", "delete from {}", "truncate {} cascade"]
)
def test_what_was_booked_is_never_changed_not_even_by_an_admin(
    undone: psycopg.Connection[tuple[Any, ...]], table: str, statement: str
) -> None:
    scene = Scene(undone)
    user = scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 10)
    scene.grant(scene.pool(), 10)
    scene.deduct(20, user)
    with scene.refusal("BR409"):
        undone.execute(statement.format(table))

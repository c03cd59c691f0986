-- Who may call what.

revoke all on all functions in schema credits from public;
grant execute on function credits.move_batch, credits.move_one, credits.expire_holds, credits.expire_holds_of to bursar_lane, bursar_simulator;
grant execute on function credits.open_organization, credits.open_pool, credits.add_grant, credits.void_grant, credits.add_schedule,
    credits.cancel_schedule, credits.transfer_credits, credits.refund_charge, credits.switch_pools, credits.allocate,
    credits.end_allocation, credits.reallocate, credits.set_limit, credits.end_limit, credits.set_cycle, credits.raise_limit,
    credits.end_raise, credits.fold, credits.request_raise, credits.decide_request, credits.move_one, credits.authorize, credits.extend,
    credits.settle, credits.release, credits.deduct, credits.current_chain, credits.has_sufficient_credits, credits.deduct_credits, credits.add_credits_to_pool,
    credits.allocate_credits_to_user, credits.open_campaign, credits.add_codes, credits.revoke_codes, credits.redeem_code,
    credits.finish_redemption, credits.grant_code, credits.forgive_debt,
    credits.set_top_up, credits.end_top_up, credits.begin_top_up, credits.decide_top_up,
    credits.depart, credits.arrive, credits.note_arrival, credits.forget_commands to bursar_app, bursar_simulator;
grant execute on function credits.limits_changed to bursar_app, bursar_owner, bursar_simulator;
grant execute on function credits.admits to bursar_app, bursar_platform, bursar_owner, bursar_simulator;
grant execute on function credits.available_of, credits.period_start, credits.period_end, credits.period_around,
    credits.calendar_of, credits.hash_of, credits.no_usage to bursar_app, bursar_platform;
grant execute on function credits.reset_pool, credits.bring_up_to_date, credits.told_open_part, credits.told_next_events, credits.told_pools,
    credits.told_grants, credits.told_limits, credits.told_holds to bursar_simulator;
grant execute on function credits.value_upto, credits.value_taken, credits.value_within, credits.burn_reason, credits.parts_of, credits.draws_of,
    credits.tails, credits.stretches,
    credits.revenue_of_requests to bursar_app, bursar_platform, bursar_simulator;

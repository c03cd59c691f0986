-- What a schedule says of its grants is checked when it is made, as the grants' own table checks it: a grant that cannot be made when it comes
-- would fail whoever moves credits of the organization.
set local lock_timeout = '5s';

alter table credits.grant_schedules
    add constraint grant_schedules_source_known check (source in ('purchase', 'plan', 'complimentary', 'code', 'roll_over', 'adjustment',
        'credit_line', 'transfer', 'opening', 'top_up', 'forgiveness', 'refund')),
    add constraint grant_schedules_cost_basis check (cost_basis_nano_usd >= 0);

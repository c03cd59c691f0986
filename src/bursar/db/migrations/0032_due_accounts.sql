-- Whoever brings credits looks for what is due in closed pools, and for what their own pool owes, however many members an organization has.
set local lock_timeout = '5s';
create index closed_accounts_due on credits.closed_accounts (organization_id, pool_id) where is_due;
create index closed_accounts_to on credits.closed_accounts (organization_id, to_pool_id);
comment on column credits.closed_accounts.is_due is 'Whether credits have come that may settle it: before their command ends, after a batch with the next movement';

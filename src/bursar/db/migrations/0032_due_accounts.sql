-- What is due in closed pools is looked for by every command that brings credits, however many members an organization has.
set local lock_timeout = '5s';
create index closed_accounts_due on credits.closed_accounts (organization_id, pool_id) where is_due;

-- A chain asks for the shares of one user, whatever the pool: before PostgreSQL 18 no index by pool first answers that.
set local lock_timeout = '5s';

create index allocations_by_user on credits.allocations (organization_id, user_id) where ended_at is null;

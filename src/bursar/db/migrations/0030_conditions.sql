-- Which entries of a chain ask more than credits of every request, so that deciding looks closer at those alone.
set local lock_timeout = '5s';

alter table credits.chains add column entry_conditions smallint[];
comment on column credits.chains.entry_conditions is
    'Per entry: 0 where it asks credits of every request, else its place in entry_metrics, entry_legs and entry_filters; null: of a chain older than this';

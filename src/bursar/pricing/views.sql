-- The price book for people: today's unit prices, and where lists disagree.

create or replace view pricing.current_prices with (security_invoker = true) as
select p.provider, p.model, r.kind, k.unit, r.above_input_tokens, r.condition,
       (r.price_nano_usd::numeric / 1000000000)::numeric(20, 9) as price_usd,
       p.list_name, p.effective_from, p.source, p.price_version_id
from pricing.prices_at(now()) p
join pricing.rates r on r.price_version_id = p.price_version_id
join pricing.kinds k on k.kind = r.kind;
comment on view pricing.current_prices is 'Unit prices that count now, in dollars per unit';
comment on column pricing.current_prices.provider is 'The provider';
comment on column pricing.current_prices.model is 'The model';
comment on column pricing.current_prices.kind is 'The kind that is priced';
comment on column pricing.current_prices.unit is 'What the price is for';
comment on column pricing.current_prices.above_input_tokens is 'Counts for the whole request when its input is longer than this';
comment on column pricing.current_prices.condition is 'What the request must have asked for; {} is the standard price';
comment on column pricing.current_prices.price_usd is 'Dollars per unit, exact';
comment on column pricing.current_prices.list_name is 'The list that says so';
comment on column pricing.current_prices.effective_from is 'Since when';
comment on column pricing.current_prices.source is 'Where the price was read';
comment on column pricing.current_prices.price_version_id is 'The version';

create or replace view pricing.disagreements with (security_invoker = true) as
select a.provider, a.model, ra.kind, ra.above_input_tokens, ra.condition,
       a.list_name as list_name, ra.price_nano_usd, b.list_name as other_list_name, rb.price_nano_usd as other_price_nano_usd
from pricing.versions_at(now()) a
join pricing.versions_at(now()) b on b.provider = a.provider and b.model = a.model and b.list_name > a.list_name
join pricing.rates ra on ra.price_version_id = a.price_version_id
join pricing.rates rb on rb.price_version_id = b.price_version_id
    and rb.kind = ra.kind and rb.above_input_tokens = ra.above_input_tokens and rb.condition = ra.condition
where ra.price_nano_usd <> rb.price_nano_usd;
comment on view pricing.disagreements is 'Unit prices of one model on which two lists differ now';
comment on column pricing.disagreements.provider is 'The provider';
comment on column pricing.disagreements.model is 'The model';
comment on column pricing.disagreements.kind is 'The kind that is priced';
comment on column pricing.disagreements.above_input_tokens is 'The long-context tier';
comment on column pricing.disagreements.condition is 'The condition';
comment on column pricing.disagreements.list_name is 'One list';
comment on column pricing.disagreements.price_nano_usd is 'Its price, nano-dollars per unit';
comment on column pricing.disagreements.other_list_name is 'The other list';
comment on column pricing.disagreements.other_price_nano_usd is 'Its price, nano-dollars per unit';

grant select on pricing.current_prices, pricing.disagreements to bursar_app, bursar_platform, bursar_backup;

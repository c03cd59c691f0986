-- What a route does when its provider fails: ask again, then ask others in turn.
set local lock_timeout = '5s';

alter table gateway.model_routes
    add column retries smallint not null default 0,
    add constraint model_routes_retries_few check (retries between 0 and 3);
comment on column gateway.model_routes.retries is 'How often the same provider is asked again when it fails before an answer began';

create table gateway.route_fallbacks (
    model text not null,
    position smallint not null,
    provider text not null,
    upstream_model text not null,
    constraint route_fallbacks_pkey primary key (model, position),
    constraint route_fallbacks_route foreign key (model) references gateway.model_routes on delete cascade,
    constraint route_fallbacks_provider foreign key (provider) references gateway.providers,
    constraint route_fallbacks_few check (position between 1 and 5),
    constraint route_fallbacks_named check (length(upstream_model) between 1 and 200)
);
comment on table gateway.route_fallbacks is 'Providers that are asked in turn when the one that a route names fails before an answer began';
comment on column gateway.route_fallbacks.model is 'The name that clients ask for';
comment on column gateway.route_fallbacks.position is 'The lower one is asked first';
comment on column gateway.route_fallbacks.provider is 'Provider that is called';
comment on column gateway.route_fallbacks.upstream_model is 'The provider''s name of the model, by which such an answer is priced';
grant select on gateway.route_fallbacks to bursar_app, bursar_platform, bursar_backup;
grant insert, update, delete on gateway.route_fallbacks to bursar_platform;

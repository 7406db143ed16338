"""The two applications: one for TCP, one for the Unix socket, which also has the admin routes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from quantd.daemon.config import ServerSettings
from quantd.daemon.server import middleware
from quantd.daemon.server.admin import ACTIONS, AdminActions
from quantd.daemon.server.auth import ApiKeys, HostRule
from quantd.daemon.server.context import CONTEXT, Clock, Context
from quantd.daemon.server.grammar import GrammarCheck
from quantd.daemon.server.routes import ADMIN_ROUTES, ROUTES, every
from quantd.daemon.server.state import State, no_state

if TYPE_CHECKING:
    from quantd.daemon.fleet import Fleet
    from quantd.daemon.telemetry.metrics import Metrics


def create_app(
    settings: ServerSettings,
    fleet: Fleet,
    metrics: Metrics,
    *,
    keys: ApiKeys | None = None,
    admin: AdminActions | None = None,
    clock: Clock | None = None,
    state: State | None = None,
) -> web.Application:
    """`admin` given: the application of the Unix socket. It has the admin routes, asks for no key
    and does not look at Host and Origin, because no browser can get there. Without `state`
    nothing is kept."""
    if admin is None:
        rule = HostRule(settings.host, settings.allowed_hosts, settings.allowed_origins)
        guard = middleware.tcp_guard(rule)
    else:
        guard = middleware.unix_guard
    app = web.Application(
        client_max_size=settings.body_limit_bytes, middlewares=[middleware.errors, guard]
    )
    clock = clock or Clock()
    state = state or no_state(settings, fleet, metrics, clock)
    app[CONTEXT] = Context(
        settings,
        fleet,
        metrics,
        keys or ApiKeys(),
        clock,
        clock.monotonic(),
        GrammarCheck(),
        state,
    )
    app.on_response_prepare.append(middleware.add_headers)
    app.add_routes(route.as_aiohttp() for route in every(ROUTES))
    if admin is not None:
        app[ACTIONS] = admin
        app.add_routes(route.as_aiohttp() for route in every(ADMIN_ROUTES))
    return app


def create_runner(app: web.Application) -> web.AppRunner:
    """The only way these applications may be run, on the sockets that the caller serves with
    `connections(runner)`: `handler_cancellation` is what ends the work of a client that has left.
    """
    return web.AppRunner(
        app,
        handler_cancellation=True,
        # By then the fleet has drained: nothing but the last bytes of responses is under way.
        shutdown_timeout=2.0,
    )

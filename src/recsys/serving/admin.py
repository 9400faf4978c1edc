"""The routes that change which bundles answer: deploy, roll back, try a challenger, promote it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from recsys.serving.asgi import Reply, Request, Route, reply
from recsys.serving.deployment import Bounds, BundlesAnswer, Deployment, Share, TrialMode
from recsys.serving.messages import decoded
from recsys.serving.service import Service
from recsys.serving.trial import TrialReport


class DeployRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A bundle to answer with from now on: a path, or a name in the server's workspace.

    `generation`, where given, is the one that the change was meant for: another is refused.
    """

    bundle: str
    why: str = ""
    generation: int | None = None


class ChallengeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A bundle to try: unseen beside the champion (shadow), or on a share of users (canary)."""

    bundle: str
    mode: TrialMode = "shadow"
    share: Share = 0.0
    bounds: Bounds | None = None
    why: str = ""
    generation: int | None = None


class ChangeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Why something is changed; the whole body may be left out."""

    why: str = ""
    generation: int | None = None


class ChallengerAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The bundle on trial and how it does, as this worker has seen it; nothing without a trial."""

    challenger: str | None = None
    mode: str = "off"
    share: float = 0.0
    trial: TrialReport | None = None


DEPLOY = msgspec.json.Decoder(DeployRequest)
CHALLENGE = msgspec.json.Decoder(ChallengeRequest)
CHANGE = msgspec.json.Decoder(ChangeRequest)


async def bundles(service: Service, request: Request) -> Reply:
    """GET /admin/bundles: the record, what is loaded here, and what went wrong of late."""
    return reply(service.deployer.report())


async def deploy(service: Service, request: Request) -> Reply:
    """POST /admin/bundles: load, test, and answer with another bundle."""
    asked = decoded(DEPLOY, await service.body(request))
    return await _changed(
        service,
        request,
        lambda by: service.deployer.deploy(
            service.find(asked.bundle), by, asked.why, expected=asked.generation
        ),
    )


async def rollback(service: Service, request: Request) -> Reply:
    """POST /admin/bundles/rollback: return to the champion before this one."""
    asked = decoded(CHANGE, await service.body(request) or b"{}")
    return await _changed(
        service,
        request,
        lambda by: service.deployer.rollback(by, asked.why, expected=asked.generation),
    )


async def challenger(service: Service, request: Request) -> Reply:
    """GET /admin/challenger: the trial, as this worker has seen it."""
    roster = service.deployer.current
    version = roster.challenger.version if roster.challenger else None
    return reply(ChallengerAnswer(version, roster.mode, roster.share, service.trial.report()))


async def challenge(service: Service, request: Request) -> Reply:
    """POST /admin/challenger: try a bundle."""
    asked = decoded(CHALLENGE, await service.body(request))
    return await _changed(
        service,
        request,
        lambda by: service.deployer.challenge(
            service.find(asked.bundle),
            asked.mode,
            asked.share,
            by,
            asked.why,
            bounds=asked.bounds,
            expected=asked.generation,
        ),
    )


async def stop_challenge(service: Service, request: Request) -> Reply:
    """DELETE /admin/challenger: end the trial; the champion answers everyone."""
    return await _changed(service, request, service.deployer.stop_challenge)


async def promote_challenger(service: Service, request: Request) -> Reply:
    """POST /admin/challenger/promote: make the challenger the champion."""
    asked = decoded(CHANGE, await service.body(request) or b"{}")
    return await _changed(
        service,
        request,
        lambda by: service.deployer.promote_challenger(by, asked.why, expected=asked.generation),
    )


async def _changed(
    service: Service, request: Request, change: Callable[[str], Deployment]
) -> Reply:
    """Make a change in the name of the key's owner; count how it went, and show the result."""
    by = request.caller.name if request.caller else "http"
    try:
        await service.aside_run(change, by)
    except Exception:
        service.metrics.swaps.labels("failed").inc()
        raise
    service.metrics.swaps.labels("ok").inc()
    return reply(service.deployer.report())


class AdminRoute(NamedTuple):
    """A route with what its description says."""

    method: str
    path: str
    handler: Any
    summary: str
    answer: type
    body: type | None = None
    example: dict[str, Any] | None = None


TRY = {"bundle": "trajectory-2", "mode": "canary", "share": 0.1}
ADMIN: tuple[AdminRoute, ...] = (
    AdminRoute("GET", "/admin/bundles", bundles, "What is deployed", BundlesAnswer),
    AdminRoute(
        *("POST", "/admin/bundles", deploy, "Answer with another bundle", BundlesAnswer),
        *(DeployRequest, {"bundle": "trajectory-2", "why": "newer"}),
    ),
    AdminRoute(
        *("POST", "/admin/bundles/rollback", rollback, "Return to the bundle before"),
        *(BundlesAnswer, ChangeRequest, {"why": "complaints"}),
    ),
    AdminRoute("GET", "/admin/challenger", challenger, "How the trial goes", ChallengerAnswer),
    AdminRoute(
        *("POST", "/admin/challenger", challenge, "Try a bundle", BundlesAnswer),
        *(ChallengeRequest, TRY),
    ),
    AdminRoute("DELETE", "/admin/challenger", stop_challenge, "End the trial", BundlesAnswer),
    AdminRoute(
        *("POST", "/admin/challenger/promote", promote_challenger, "Promote the challenger"),
        *(BundlesAnswer, ChangeRequest, {"why": "better"}),
    ),
)
ADMIN_ROUTES: list[Route[Service]] = [
    Route(route.method, route.path, route.handler, "admin") for route in ADMIN
]

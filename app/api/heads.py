"""HEAD wherever GET works: monitors, load balancers and browsers ask so. Not for events."""

from __future__ import annotations

import copy

from fastapi import APIRouter
from fastapi.routing import APIRoute

from app.api.documents import EVENTS_CONTENT


def with_heads(router: APIRouter) -> APIRouter:
    """The router, in which HEAD is answered as GET is; the server leaves the body out."""
    for route in list(router.routes):
        if isinstance(route, APIRoute) and route.methods == {"GET"} and not _tells_events(route):
            head = copy.copy(route)
            head.methods = {"HEAD"}
            head.include_in_schema = False
            router.routes.append(head)
    return router


def _tells_events(route: APIRoute) -> bool:
    contents = route.responses.get(200, {}).get("content", {})
    return any(content is EVENTS_CONTENT for content in contents.values())

"""``GET /v1/models``: the loaded model under its own name and under those that apps look for."""

from __future__ import annotations

import time
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from app.api.documents import errors
from app.engine import Engine
from app.errors import ModelNotFoundError
from app.settings import Settings
from fluxcore.bundled import BUNDLED_NAME


class Model(BaseModel):
    """One name under which pictures can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fluxd"


class ModelList(BaseModel):
    """All of them; the loaded model's own name comes first."""

    object: Literal["list"] = "list"
    data: list[Model]


class ModelNames:
    """Which names of models are known."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    def known(self) -> list[str]:
        """The loaded model's name, also while it is being loaded, and its aliases."""
        own = self._engine.status().model
        if own is None:
            model = self._settings.model
            own = BUNDLED_NAME if model is None else model.resolve().name
        return [own, *self._settings.model_aliases]

    def find(self, name: str) -> str:
        """The name as it was asked for; ``owner/name`` is the same as ``name``.

        Raises:
            ModelNotFoundError: it is not known.
        """
        known = self.known()
        if name in known or name.rpartition("/")[2] in known:
            return name
        raise ModelNotFoundError(
            f"there is no model {name!r:.80}; there are {', '.join(known)}", param="model"
        )

    def check(self, name: str | None) -> None:
        """Refuse an unknown name where the settings ask for strictness.

        Raises:
            ModelNotFoundError: it is not known.
        """
        if name and self._settings.strict_model_names:
            self.find(name)


def model_routes(names: ModelNames) -> APIRouter:
    """The routes, with and without ``/v1``."""
    router = APIRouter()
    created_s = int(time.time())

    async def list_models() -> ModelList:
        """The names under which pictures can be asked for."""
        return ModelList(data=[Model(id=name, created=created_s) for name in names.known()])

    async def get_model(request: Request) -> Model:
        """One of them; ``owner/name`` is the same as ``name``."""
        return Model(id=names.find(request.path_params["id"]), created=created_s)

    identity = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    for prefix in ("/v1", ""):
        is_shown = bool(prefix)
        router.add_api_route(
            f"{prefix}/models", list_models, methods=["GET"], include_in_schema=is_shown
        )
        router.add_api_route(
            f"{prefix}/models/{{id:path}}",
            get_model,
            methods=["GET"],
            include_in_schema=is_shown,
            responses=errors(404),
            openapi_extra={"parameters": [identity]},
        )
    return router

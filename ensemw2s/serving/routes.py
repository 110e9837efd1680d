"""Routes that a server of an ensemble has beside vLLM's: the expert weights, read and set while it runs."""

from __future__ import annotations

import os
from typing import Any

from fastapi import APIRouter, Body, HTTPException, Request

from ensemw2s.serving.config import ServedEnsembleConfig
from ensemw2s.serving.weights import NAME, check_expert_weights

ROUTE = "/v1/ensemble/expert_weights"


class EnsembleRoutes:
    """The entry point `ensemw2s` of `vllm.endpoint_plugins`, loaded if `VLLM_PLUGINS` names it.

    `GET /v1/ensemble/expert_weights` answers with the weights that requests without their own are mixed with, and `PUT`
    sets them, from the next token on. Both are refused without the server's key, also where it was started without one.
    """

    name = "ensemw2s"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes. What lies beneath `/v1`, vLLM answers with status 401 to those who do not know its key."""
        router = APIRouter()

        def engine_for(request: Request) -> Any:
            state = request.app.state
            if not state.ensemw2s_has_key:
                raise HTTPException(403, "the server was started without --api-key, so that nobody may use this route")
            if ServedEnsembleConfig.experts_served is None:
                raise HTTPException(404, "the model that is served here is no ensemble")
            return state.ensemw2s_engine

        async def told(engine: Any) -> dict[str, list[float]]:
            weights: list[list[float]] = await engine.collective_rpc("get_expert_weights")
            return {NAME: weights[0]}

        @router.get(ROUTE)
        async def get_weights(request: Request) -> dict[str, list[float]]:
            return await told(engine_for(request))

        @router.put(ROUTE)
        async def set_weights(request: Request, wanted: Any = Body()) -> dict[str, list[float]]:  # noqa: B008
            engine = engine_for(request)
            try:
                if not isinstance(wanted, dict) or set(wanted) != {NAME}:
                    raise ValueError(f'expected {{"{NAME}": [...]}} and nothing else')
                check_expert_weights(wanted[NAME], ServedEnsembleConfig.experts_served)
            except ValueError as error:
                raise HTTPException(400, str(error)) from error
            await engine.collective_rpc("set_expert_weights", args=(wanted[NAME],))
            return await told(engine)

        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine for the routes."""
        state.ensemw2s_engine = engine_client
        state.ensemw2s_has_key = any(args.api_key or [os.environ.get("VLLM_API_KEY")])

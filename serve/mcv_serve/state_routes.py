"""Whether the server is well, what it is, and what it is doing; nothing here says what anybody asked."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from mcv_serve.answering import Answering
from mcv_serve.service import Service

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


def server_version() -> str:
    """Of the package."""
    try:
        return version("minicpmv-onnx")
    except PackageNotFoundError:
        return "0"


def modalities(service: Service) -> list[str]:
    """What the model takes."""
    return ["text", "image", "video"] if service.engine.info().video else ["text", "image"]


def router(service: Service) -> APIRouter:
    """Its routes."""
    routes = APIRouter(tags=["server"])

    @routes.get("/health")
    @routes.get("/healthz", include_in_schema=False)
    @routes.get("/ping", include_in_schema=False)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/ready")
    @routes.get("/readyz", include_in_schema=False)
    async def ready() -> Response:
        closed = service.admission.closed
        return JSONResponse({"status": "shutting down" if closed else "ok"}, 503 if closed else 200)

    @routes.get("/version")
    async def told_version() -> dict[str, str]:
        return {"version": server_version()}

    @routes.get("/props")
    async def props() -> dict[str, Any]:
        info, settings = service.engine.info(), service.settings
        return {
            "model": service.model,
            "model_path": service.engine.bundle.folder.name,
            "family": info.family,
            "build_info": f"mcv {server_version()}",
            "total_slots": settings.concurrent,
            "modalities": {"vision": True, "video": info.video, "audio": False},
            "default_generation_settings": {
                "n_ctx": info.context_length,
                "params": {"temperature": settings.temperature, "n_predict": info.max_new_tokens},
            },
            "chat_template": service.engine.bundle.read_text(service.engine.bundle.manifest.text.chat_template),
            "chat_template_caps": {"supports_tools": True, "supports_tool_calls": True, "supports_system_role": True},
            "max_slice_nums": info.max_slice_nums,
            "downsample_modes": info.downsample_modes,
            "thinking": info.thinking,
            "tools": info.tools,
            "precisions": info.precisions,
            "limits": {
                "pictures": settings.pictures,
                "picture_mb": settings.picture_mb,
                "body_mb": settings.body_mb,
                "max_tokens": settings.max_tokens or info.context_length,
                "n": settings.answers,
                "queue": settings.queue,
                "deadline_s": settings.deadline_s,
            },
            "uptime_s": round(time.time() - service.started, 1),
        }

    @routes.get("/slots")
    async def slots() -> list[dict[str, Any]]:
        return [_slot(one) for one in service.answering.values()]

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type=EXPOSITION)

    return routes


def _slot(one: Answering) -> dict[str, Any]:
    return {
        "id": one.number,
        "id_task": one.number,
        "is_processing": one.state != "queued",
        "state": one.state,
        "kind": one.asked.kind,
        "pictures": len(one.asked.visuals),
        "n_prompt_tokens": one.prompt_tokens,
        "n_prompt_tokens_processed": one.read,
        "n_decoded": one.tokens,
        "listeners": one.listeners,
        "age_s": round(time.monotonic() - one.began, 3),
    }

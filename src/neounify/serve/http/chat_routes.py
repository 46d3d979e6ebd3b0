"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from neounify.serve.http.answer_schema import EVENTS, ChatCompletion
from neounify.serve.http.body import BoundedRoute
from neounify.serve.http.chat_answer import ChatAnswer
from neounify.serve.http.chat_request import read_chat
from neounify.serve.http.chat_schema import ChatBody
from neounify.serve.http.context import Shared
from neounify.serve.http.sse import start_stream

router = APIRouter(tags=["chat"], route_class=BoundedRoute)


@router.post(
    "/v1/chat/completions",
    summary="Continue a conversation, in text or in text and images",
    response_class=JSONResponse,
    responses={200: {"model": ChatCompletion, "content": EVENTS}},
)
async def chat_completions(body: ChatBody, context: Shared) -> Response:
    """Text and pictures in; text, or with `modalities: ["text", "image"]` both, out."""
    requests = await read_chat(body, context)
    answer = ChatAnswer(body, requests, context)
    if body.stream:
        return await start_stream(answer.chunks())
    return await answer.whole()

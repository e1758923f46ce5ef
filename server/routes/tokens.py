"""POST /tokenize and /detokenize: text to the ids that decoding would see, and back."""

import asyncio
import reprlib
from collections.abc import Callable
from functools import partial

from fastapi import APIRouter

from server.decoding import conversation
from server.schemas.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from server.schemas.tools import chosen_tools
from server.serving import ServingDep
from server.strict_json import StrictRoute
from trm.errors import BadRequest

router = APIRouter(route_class=StrictRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, serving: ServingDep) -> TokenizeResponse:
    """The ids of a prompt or a conversation, as the decoding routes encode them."""
    serving = serving.choose(body.model)
    chat, limit = serving.decoder.chat, serving.engine.max_model_len
    encode: Callable[[], list[int]]
    if body.messages is not None:
        messages = conversation(body.messages, serving, body.work)
        tools = chosen_tools(body.tools, None, None)
        described = tools.described() if tools else ()
        encode = partial(chat.encode, messages, body.add_generation_prompt is not False, limit, described)
    else:
        encode = partial(chat.encode_prompt, body.prompt or "", limit)

    def respond() -> TokenizeResponse:
        ids = encode()
        spelt = [serving.token_bytes.spell(id_) for id_ in ids] if body.return_token_strs else None
        return TokenizeResponse(count=len(ids), max_model_len=limit, tokens=ids, token_strs=spelt)

    return await asyncio.to_thread(respond)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, serving: ServingDep) -> DetokenizeResponse:
    """The text of token ids."""
    serving = serving.choose(body.model)

    def decode() -> str:
        unknown = next((id_ for id_ in body.tokens if serving.token_bytes(id_) is None), None)
        if unknown is not None:
            raise BadRequest(f"tokens holds {reprlib.repr(unknown)}, which is no token of this model", param="tokens")
        return serving.decoder.chat.decode_with_specials(body.tokens)

    return DetokenizeResponse(prompt=await asyncio.to_thread(decode))

"""AutoGen: its client, which names who speaks, and an agent."""

import asyncio
import json

from autogen_agentchat.agents import AssistantAgent
from autogen_core import CancellationToken
from autogen_core.models import AssistantMessage, ModelInfo, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from common import BASE_URL, KEY, MODEL, QUESTION
from pydantic import BaseModel


class Answer(BaseModel):
    answer: int


def add(a: int, b: int) -> int:
    return a + b


async def main() -> None:
    able = ModelInfo(vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True)
    client = OpenAIChatCompletionClient(model=MODEL, base_url=BASE_URL, api_key=KEY, model_info=able, max_tokens=200)
    ask = UserMessage(content=QUESTION, source="Ann")
    reply = await client.create([ask])
    assert r"\boxed{" in reply.content
    assert (await client.create([ask, AssistantMessage(content=reply.content, source="Bob"), ask])).content
    pieces = [piece async for piece in client.create_stream([ask])]
    assert pieces[-1].content == reply.content
    assert Answer.model_validate_json((await client.create([ask], json_output=Answer)).content)
    tool = FunctionTool(add, description="Adds two numbers.")
    called = await client.create([ask], tools=[tool], tool_choice=tool)
    assert set(json.loads(called.content[0].arguments)) == {"a", "b"}
    agent = AssistantAgent("solver", model_client=client, tools=[tool])
    assert (await agent.run(task=QUESTION, cancellation_token=CancellationToken())).messages
    await client.close()


asyncio.run(main())

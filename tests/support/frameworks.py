"""Agent frameworks as their users write them: an agent of the shop, on each API that a framework can speak.

Their imports take seconds, so they wait until a test asks for them.
"""

from __future__ import annotations

import runpy
from types import SimpleNamespace

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from support.scripts import ROOT

MODEL = "astraea-tiny"
SHOP = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "shop.py")))
TOOLS = [SHOP.price, SHOP.stock, SHOP.calculator]


class Framework:
    """An agent of a framework.

    Args:
        url: of the server.
        api: ``"chat"``, ``"responses"`` or ``"messages"``.
    """

    apis: tuple[str, ...]

    def __init__(self, url: str, api: str):
        self.url, self.api = url, api
        self.http = DefaultAsyncHttpxClient()
        self.client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=self.http)

    async def ask(self) -> str:
        """Run the tool loop."""
        raise NotImplementedError

    async def stream(self) -> list[str]:
        """Run the tool loop; return the pieces of the answer as they come."""
        raise NotImplementedError

    async def typed(self, kind: type) -> object:
        """Ask, without tools, for an answer of a type."""
        raise NotImplementedError

    async def close(self) -> None:
        await self.http.aclose()


class OpenAIAgents(Framework):
    apis = ("chat", "responses")

    def _agent(self, **more):
        import agents

        agents.set_tracing_disabled(True)  # it would send traces to OpenAI
        of = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}[self.api]
        return agents.Agent("shop", instructions=SHOP.SYSTEM, model=of(MODEL, self.client), **more)

    def _shop(self):
        from agents import function_tool

        return self._agent(tools=[function_tool(function) for function in TOOLS])

    async def ask(self):
        from agents import Runner

        return (await Runner.run(self._shop(), SHOP.QUESTION)).final_output

    async def stream(self):
        from agents import Runner

        events = Runner.run_streamed(self._shop(), SHOP.QUESTION).stream_events()
        raw = [event.data async for event in events if event.type == "raw_response_event"]
        return [event.delta for event in raw if event.type == "response.output_text.delta"]

    async def typed(self, kind):
        from agents import Runner

        return (await Runner.run(self._agent(output_type=kind), SHOP.QUESTION)).final_output


class PydanticAI(Framework):
    apis = ("chat", "responses", "messages")

    def _model(self):
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
        from pydantic_ai.providers.anthropic import AnthropicProvider
        from pydantic_ai.providers.openai import OpenAIProvider

        if self.api == "messages":
            client = AsyncAnthropic(base_url=self.url, api_key="none", max_retries=0, http_client=self.http)
            return AnthropicModel(MODEL, provider=AnthropicProvider(anthropic_client=client))
        of = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[self.api]
        return of(MODEL, provider=OpenAIProvider(openai_client=self.client))

    def _agent(self, **more):
        from pydantic_ai import Agent

        return Agent(self._model(), system_prompt=SHOP.SYSTEM, **more)

    async def ask(self):
        return (await self._agent(tools=TOOLS).run(SHOP.QUESTION)).output

    async def stream(self):
        async with self._agent(tools=TOOLS).run_stream(SHOP.QUESTION) as answer:
            return [text async for text in answer.stream_text(delta=True, debounce_by=None)]

    async def typed(self, kind):
        return (await self._agent(output_type=kind).run(SHOP.QUESTION)).output


class LangGraph(Framework):
    apis = ("chat", "responses")

    def _model(self):
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(
            model=MODEL,
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            use_responses_api=self.api == "responses",
            http_async_client=self.http,
        )

    def _agent(self):
        from langchain.agents import create_agent

        return create_agent(self._model(), TOOLS, system_prompt=SHOP.SYSTEM)

    async def ask(self):
        state = await self._agent().ainvoke({"messages": [("user", SHOP.QUESTION)]})
        return state["messages"][-1].text

    async def stream(self):
        chunks = self._agent().astream({"messages": [("user", SHOP.QUESTION)]}, stream_mode="messages")
        return [chunk.text async for chunk, about in chunks if chunk.text and about["langgraph_node"] == "model"]

    async def typed(self, kind):
        asked = [("system", SHOP.SYSTEM), ("user", SHOP.QUESTION)]
        return await self._model().with_structured_output(kind).ainvoke(asked)

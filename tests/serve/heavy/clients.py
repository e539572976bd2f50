"""Clients that bring many packages, against a server in a process: litellm, LangChain, LlamaIndex.

python tests/serve/heavy/clients.py --server PYTHON_THAT_HAS_MCV_SERVE

Needs litellm, langchain-openai and llama-index-llms-openai-like in the Python that runs it; `make test-clients` sees to that.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import sys
from pathlib import Path

from served import served

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a list of prices
QUESTION, ANSWER = "What does the text say?", "HELLO"
DEMO = Path(__file__).parents[3] / "models" / "tiny" / "demo.png"
URL = "data:image/png;base64," + base64.b64encode(DEMO.read_bytes()).decode()
PARTS = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": QUESTION}]


def check_litellm(address: str) -> None:
    import litellm

    for model, base in (("openai/any", f"{address}/v1"), ("ollama_chat/any", address), ("hosted_vllm/any", f"{address}/v1")):
        given = {"model": model, "api_base": base, "api_key": "none", "messages": [{"role": "user", "content": PARTS}]}
        assert litellm.completion(**given).choices[0].message.content == ANSWER, model
        text = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**given, stream=True))
        assert text == ANSWER, (model, text)

    async def awaited() -> str:
        given = {"model": "openai/any", "api_base": f"{address}/v1", "api_key": "none"}
        answer = await litellm.acompletion(**given, messages=[{"role": "user", "content": PARTS}])
        return str(answer.choices[0].message.content)

    assert asyncio.run(awaited()) == ANSWER


def check_langchain(address: str) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class Seen(BaseModel):
        circle: bool

    model = ChatOpenAI(model="any", base_url=f"{address}/v1", api_key="none", temperature=0)
    message = HumanMessage(content=PARTS)
    answer = model.invoke([message])
    assert answer.content == ANSWER and answer.usage_metadata["input_tokens"] > 64
    assert "".join(str(piece.content) for piece in model.stream([message])) == ANSWER
    assert asyncio.run(model.ainvoke([message])).content == ANSWER
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Seen, method=method).invoke([message]), Seen), method
    bound = model.bind_tools([Seen], tool_choice="Seen").invoke([message])
    assert bound.tool_calls[0]["name"] == "Seen" and set(bound.tool_calls[0]["args"]) == {"circle"}


def check_llama_index(address: str) -> None:
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    def classify(good: bool) -> str:
        """Say whether it is good."""
        return str(good)

    model = OpenAILike(
        model="any", api_base=f"{address}/v1", api_key="none", is_chat_model=True, is_function_calling_model=True,
        temperature=0, context_window=4096,
    )  # fmt: skip
    message = ChatMessage(role="user", blocks=[ImageBlock(image=DEMO.read_bytes()), TextBlock(text=QUESTION)])
    assert model.chat([message]).message.content == ANSWER
    assert "".join(piece.delta or "" for piece in model.stream_chat([message])) == ANSWER
    # as paperless-ngx asks: a tool that must be called
    called = model.chat_with_tools(
        [FunctionTool.from_defaults(classify)], user_msg="Is it good?", tool_required=True, allow_parallel_tool_calls=False
    )
    (call,) = model.get_tool_calls_from_response(called)
    assert call.tool_name == "classify" and set(call.tool_kwargs) == {"good"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    given = parser.parse_args()
    failed = 0
    with served(given.server) as address:
        for check in (check_litellm, check_langchain, check_llama_index):
            try:
                check(address)
                print(f"{check.__name__.removeprefix('check_')}: ok")
            except Exception as error:
                failed = 1
                print(f"{check.__name__.removeprefix('check_')}: {type(error).__name__}: {str(error)[:1000]}")
    return failed


if __name__ == "__main__":
    sys.exit(main())

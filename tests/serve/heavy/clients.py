"""Clients that bring many packages, against a server in a process: litellm, LangChain, LlamaIndex, docling, Daft, marker, npm.

python tests/serve/heavy/clients.py --server PYTHON_THAT_HAS_MCV_SERVE --only litellm npm --node-modules FOLDER

`make test-clients` installs them, Daft in an environment of its own, as it pins what others want newer. docling and marker
import torch, for the choice of a device: they find that of the server's Python.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
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


def find_torch(server: str) -> None:
    """From now on, what this Python lacks is found where the server's has it."""
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    sys.path.append(subprocess.check_output([server, "-c", where], text=True).strip())


def check_docling(address: str, server: str) -> None:
    """Scanned pages of a PDF read out, and a picture."""
    find_torch(server)
    from docling.backend.pypdfium2_backend import PyPdfiumDocumentBackend
    from docling.datamodel.base_models import InputFormat
    from docling.datamodel.pipeline_options import VlmPipelineOptions
    from docling.datamodel.pipeline_options_vlm_model import ApiVlmOptions, ResponseFormat
    from docling.document_converter import DocumentConverter, ImageFormatOption, PdfFormatOption
    from docling.pipeline.vlm_pipeline import VlmPipeline

    asked = ApiVlmOptions(
        url=f"{address}/v1/chat/completions", params={"model": "any", "max_tokens": 64}, prompt=QUESTION,
        response_format=ResponseFormat.MARKDOWN, timeout=60, concurrency=2,
    )  # fmt: skip
    options = VlmPipelineOptions(enable_remote_services=True, vlm_options=asked)
    formats = {
        InputFormat.PDF: PdfFormatOption(pipeline_cls=VlmPipeline, pipeline_options=options, backend=PyPdfiumDocumentBackend),
        InputFormat.IMAGE: ImageFormatOption(pipeline_cls=VlmPipeline, pipeline_options=options),
    }
    converter = DocumentConverter(format_options=formats)
    with TemporaryDirectory() as folder:
        scan = Path(folder, "scan.pdf")
        page = Image.open(DEMO).convert("RGB")
        page.save(scan, save_all=True, append_images=[page])
        assert converter.convert(scan).document.export_to_markdown().split() == [ANSWER, ANSWER]
    assert converter.convert(DEMO).document.export_to_markdown().strip() == ANSWER


def check_daft(address: str) -> None:
    """A column of pictures asked about, by both of its APIs, and into a form."""
    import daft
    from daft.ai.openai.provider import OpenAIProvider
    from daft.functions import prompt
    from pydantic import BaseModel

    class Seen(BaseModel):
        circle: bool

    provider = OpenAIProvider(base_url=f"{address}/v1", api_key="none")
    table = daft.from_pydict({"picture": [DEMO.read_bytes()] * 4, "question": [QUESTION] * 4})
    asked = [daft.col("picture"), daft.col("question")]
    for chat in (False, True):
        answers = prompt(asked, provider=provider, model="any", use_chat_completions=chat)
        assert table.with_column("answer", answers).to_pydict()["answer"] == [ANSWER] * 4, chat
        formed = prompt(asked, return_format=Seen, provider=provider, model="any", use_chat_completions=chat)
        found = table.limit(1).with_column("seen", formed).to_pydict()["seen"]
        assert isinstance(found[0]["circle"], bool), chat


def check_marker(address: str, server: str) -> None:
    """Its service class: a WebP and a strict schema, in OpenAI's words and in Ollama's."""
    find_torch(server)
    from marker.services.ollama import OllamaService
    from marker.services.openai import OpenAIService
    from pydantic import BaseModel

    class Seen(BaseModel):
        circle: bool

    picture = Image.open(DEMO).convert("RGB")
    openai = OpenAIService({"openai_base_url": f"{address}/v1", "openai_model": "any", "openai_api_key": "none"})
    ollama = OllamaService({"ollama_base_url": address, "ollama_model": "any"})
    for service in (openai, ollama):
        assert isinstance(service(QUESTION, picture, None, Seen)["circle"], bool), service


def check_npm(address: str, node_modules: Path) -> None:
    script = Path(__file__).with_name("clients.cjs")
    subprocess.run(["node", script, address, DEMO, node_modules], check=True)


CHECKS = {
    "litellm": check_litellm,
    "langchain": check_langchain,
    "llama-index": check_llama_index,
    "daft": check_daft,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    names = [*CHECKS, "docling", "marker", "npm"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--node-modules", type=Path, default=Path(), help="The folder that npm's clients were installed in.")
    given = parser.parse_args()
    checks = CHECKS | {
        "docling": partial(check_docling, server=given.server),
        "marker": partial(check_marker, server=given.server),
        "npm": partial(check_npm, node_modules=given.node_modules),
    }
    failed = 0
    with served(given.server) as address:
        for name in given.only:
            try:
                checks[name](address)
                print(f"{name}: ok", flush=True)
            except Exception as error:
                failed = 1
                print(f"{name}: {type(error).__name__}: {str(error)[:1000]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""One engine behind HTTP, in the dialects of OpenAI and Ollama: `mcv-serve`.

May import `mcv_runtime` and nothing else of ours. A body becomes `Asked` (openai, ollama, forms), which `Service` makes an
`Answering` of: queued, prepared in a pool of threads, and computed by the one thread that steps the engine. HTTP is on asyncio
and waits for news of it.
"""

from mcv_serve.app import create_app
from mcv_serve.settings import Settings

__all__ = ["Settings", "create_app"]

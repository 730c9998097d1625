"""pyllama: language models from GGUF files, on your own machine, from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyllama.llama import Llama, LlamaGrammar

__all__ = ["Llama", "LlamaGrammar", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``Llama`` is imported when it is asked for: the tools that only read files need no engine."""
    if name in ("Llama", "LlamaGrammar"):
        from pyllama import llama

        return getattr(llama, name)
    raise AttributeError(f"module 'pyllama' has no attribute {name!r}")

"""What llama.cpp answers greedily, through whichever of its two wheels is installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def llama_cpp_text(file: Path, ids: list[int], count: int) -> str:
    """Text of at most `count` greedy tokens after the ids, keys and values in float32.

    Skips the test where neither llama-cpp-python nor xllamacpp is installed.
    """
    if find_spec("llama_cpp") is not None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        model: Any = llama_cpp.Llama(str(file), n_ctx=512, type_k=0, type_v=0, verbose=False)
        options: dict[str, Any] = {"max_tokens": count, "temperature": 0.0, "top_k": 1}
        return model.create_completion(ids, **options)["choices"][0]["text"]
    if find_spec("xllamacpp") is None:
        pytest.skip("neither llama-cpp-python nor xllamacpp is installed")
    import xllamacpp  # pyright: ignore[reportMissingImports]

    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(file), 512, 1
    parameters.cpuparams.n_threads, parameters.warmup = 1, False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    request = {"prompt": ids, "n_predict": count, "temperature": 0.0, "top_k": 1}
    answer: Any = xllamacpp.Server(parameters).handle_completions(request)
    return answer["choices"][0]["text"]

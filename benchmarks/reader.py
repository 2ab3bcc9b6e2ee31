"""Another reader's side of `benchmarks.readers`: python -m benchmarks.reader READER
[CONVERTER], in its own environment.

Reads {case: {"directory", "rows"}} from the standard input and answers, case by case, one line of
JSON: the log-probs after the last token of each row, or why the reader would not have the model.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

Rows = list[list[int]]
Read = Callable[[Path, Rows], list[np.ndarray]]


def with_transformers() -> tuple[str, Read]:
    import torch
    import transformers

    def read(directory: Path, rows: Rows) -> list[np.ndarray]:
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()
        with torch.no_grad():
            logits = [model(torch.tensor([row])).logits[0, -1] for row in rows]
        return [torch.log_softmax(x, -1).numpy() for x in logits]

    return f"transformers {transformers.__version__}", read


def with_mlx() -> tuple[str, Read]:
    from importlib.metadata import version

    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)

    def read(directory: Path, rows: Rows) -> list[np.ndarray]:
        model, _ = load_model(directory)
        logits = [model(mx.array([row]))[0, -1].astype(mx.float32) for row in rows]
        return [np.array(x - mx.logsumexp(x)) for x in logits]

    return f"mlx-lm {version('mlx-lm')}", read


def with_ctranslate2() -> tuple[str, Read]:
    import ctranslate2

    def read(directory: Path, rows: Rows) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            converter = ctranslate2.converters.TransformersConverter(str(directory))
            converter.convert(f"{folder}/model")
            model = ctranslate2.Generator(f"{folder}/model", device="cpu", compute_type="float32")
            found = [model.forward_batch([row], return_log_probs=True) for row in rows]
            return [np.array(x)[0, -1] for x in found]

    return f"CTranslate2 {ctranslate2.__version__}", read


def with_llama_cpp(script: Path) -> tuple[str, Read]:
    """llama.cpp through xllamacpp, on what its own converter makes.

    The converter knows tokenizers by a hash of the ids of a text, so it knows none that was trained
    elsewhere: it is told that it is SmolLM's, which splits text as ours does.
    """
    from importlib.metadata import version

    import xllamacpp

    sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
    from conversion import base, get_model_class

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"

    def read(directory: Path, rows: Rows) -> list[np.ndarray]:
        named = json.loads((directory / "config.json").read_text())["architectures"][0]
        get_model_class(named).set_vocab = base.TextModel._set_vocab_gpt2
        with tempfile.TemporaryDirectory() as folder:
            sys.argv = [str(script), str(directory), "--outtype=f32", f"--outfile={folder}/m.gguf"]
            runpy.run_path(str(script), run_name="__main__")
            options = xllamacpp.CommonParams()
            options.model.path = f"{folder}/m.gguf"
            options.n_ctx, options.n_parallel, options.warmup = 256, 1, False
            options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            server = xllamacpp.Server(options)
            vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
            return [_last_logprobs(server, row, vocabulary["e"]) for row in rows]

    return f"llama.cpp (xllamacpp {version('xllamacpp')})", read


def _last_logprobs(server, row: list[int], drawn: int) -> np.ndarray:
    """Of all tokens; the server tells them only beside a token that is text, as `drawn` is."""
    ask = {"prompt": row, "n_predict": 1, "n_probs": 10**6, "logit_bias": [[drawn, 1000.0]]}
    answer = server.handle_completions(ask | {"cache_prompt": False})
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    values = np.full(1 + max(x["id"] for x in found), -np.inf, np.float32)
    for x in found:
        values[x["id"]] = x["logprob"]
    return values


READERS = {
    "transformers": with_transformers,
    "mlx-lm": with_mlx,
    "ctranslate2": with_ctranslate2,
    "llama.cpp": with_llama_cpp,
}


def main() -> None:
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        cases = json.load(sys.stdin)
        name, read = READERS[sys.argv[1]](*map(Path, sys.argv[2:]))
        print(json.dumps({"reader": name}), file=out, flush=True)
        for case, given in cases.items():
            print(json.dumps({"case": case}), file=out, flush=True)
            try:
                found = read(Path(given["directory"]), given["rows"])
                answer = {"logprobs": [x.tolist() for x in found]}
            except (Exception, SystemExit) as error:
                answer = {"refused": f"{type(error).__name__}: {error}"}
            print(json.dumps({"case": case, **answer}), file=out, flush=True)


if __name__ == "__main__":
    main()

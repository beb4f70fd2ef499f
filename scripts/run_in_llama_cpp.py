"""A pruned export, converted by llama.cpp's own converter and run by llama.cpp itself, held against `transformers`.

    headgate export RUN --to pruned --output pruned
    pip install xllamacpp sentencepiece         # llama.cpp, built; what its converter imports
    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz      # the converter
    python scripts/run_in_llama_cpp.py pruned --llama-cpp llama_cpp_python-*/vendor/llama.cpp --pre smollm

The first prompts of wordmath's test split, as text, greedy, in float32 (`--outtype q8_0` and `--defaults` may differ). The converter
knows a BPE tokenizer by a hash of what it makes of one text; of one that it has not met, `--pre` names the rule: the embedded
tokenizer splits as smollm's (single digits, then GPT-2's expression). Exit code 1 where an answer in float32 differs.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from headgate.data.config import SourceConfig
from headgate.data.sources import load_rows


def convert(folder: Path, llama_cpp: Path, outtype: str, pre: str | None) -> Path:
    """What `convert_hf_to_gguf.py` writes."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    if pre is not None:
        TextModel.get_vocab_base_pre = lambda _model, _tokenizer: pre
    out = folder.parent / f"{folder.name}-{outtype}.gguf"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", outtype, "--outfile", str(out)]
    convert_hf_to_gguf.main()
    return out


def server_of(file: Path, defaults: bool) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 512, 1
    params.cpuparams.n_threads, params.verbosity = 1, 0
    if not defaults:  # keys and values would be kept in f16, and flash attention, which rounds to it, be on
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def by_llama_cpp(server: Any, prompt: str, tokens: int) -> list[tuple[int, float]]:
    """Greedy ids and their log-probabilities; the text is cut into tokens by llama.cpp."""
    asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "n_probs": 1}
    found = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    return [(token["id"], token["logprob"]) for token in found]


@torch.no_grad()
def by_transformers(model: Any, tokenizer: Any, prompt: str, tokens: int) -> list[tuple[int, float]]:
    given = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        **given, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    new = out.sequences[0, given["input_ids"].shape[1] :].tolist()
    return [
        (token, float(logits[0].log_softmax(-1)[token]))
        for token, logits in zip(new, out.logits, strict=True)
    ]


def compared(server: Any, name: str, model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> int:
    """Prints how many answers are the same, ids all along, and how far log-probabilities lie apart; how many differ."""
    same, count, apart = 0, 0, 0.0
    for prompt in prompts:
        wanted = by_transformers(model, tokenizer, prompt, tokens)
        found = by_llama_cpp(server, prompt, tokens)
        ends = len(wanted) - (
            wanted[-1][0] == tokenizer.eos_token_id
        )  # llama.cpp does not tell the end token
        equal = [token for token, _ in found[:ends]] == [token for token, _ in wanted[:ends]]
        same, count = same + equal, count + ends
        if equal:
            apart = max(apart, *(abs(a - b) for (_, a), (_, b) in zip(found, wanted[:ends])), 0.0)
    assert math.isfinite(apart)
    print(
        f"{name}: {same} of {len(prompts)} greedy answers are transformers' own, id by id ({count} tokens); "
        f"log-probabilities of those at most {apart:.1e} apart"
    )
    return len(prompts) - same


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a folder with convert_hf_to_gguf.py")
    parser.add_argument(
        "--pre", help="the pre-tokenizer's name, of a tokenizer that the converter has not met"
    )
    parser.add_argument("--outtype", default="f32")
    parser.add_argument("--defaults", action="store_true", help="llama.cpp's: f16 cache, flash attention")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    prompts = [row["prompt"] for row in load_rows(SourceConfig(split="test", limit=given.prompts))]
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    print(f"{type(model).__name__}, {model.config.num_hidden_layers} blocks")
    file = convert(given.folder.resolve(), given.llama_cpp.resolve(), given.outtype, given.pre)
    server = server_of(file, given.defaults)
    differ = compared(server, file.name, model, tokenizer, prompts, given.tokens)
    return 1 if differ and given.outtype == "f32" and not given.defaults else 0


if __name__ == "__main__":
    sys.exit(main())

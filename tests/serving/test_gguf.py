"""A pruned model is one that llama.cpp's converter can name: the converter's own table of tensors, and a file it reads.

`convert_hf_to_gguf.py` is a script of llama.cpp's repository and no package; what decides whether it takes a folder is the
table it looks every tensor up in, which is a package, `gguf`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from headgate.experiments.pruned import prune

from ..layer_routing.conftest import model_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="gguf is not installed: pip install 'headgate[gguf]'"
)
NAMED = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma3": "GEMMA3"}


@pytest.mark.parametrize("family", NAMED)
def test_every_tensor_has_a_name_and_blocks_have_no_gap(family: str, tmp_path: Path) -> None:
    import gguf

    model, _, anatomy = model_of(family, lora=False)
    before = anatomy.num_blocks
    prune(anatomy, [1])
    model.save_pretrained(tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    blocks = config["num_hidden_layers"]
    assert blocks == before - 1
    assert all(len(config[key]) == blocks for key in ("layer_types",) if config.get(key))

    arch = getattr(gguf.MODEL_ARCH, NAMED[family])
    table = gguf.get_tensor_name_map(arch, blocks)
    tensors = load_file(tmp_path / "pruned" / "model.safetensors")
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
    assert None not in names.values(), [name for name, found in names.items() if found is None]
    assert len(set(names.values())) == len(names)

    parts: dict[int, set[str]] = {}
    for name in filter(None, names.values()):
        if found := re.match(r"blk\.(\d+)\.(.*)", name):
            parts.setdefault(int(found[1]), set()).add(found[2])
    assert sorted(parts) == list(range(blocks)), "blocks count from 0 without a gap"
    assert all(part == parts[0] for part in parts.values()), "every block is whole"

    writer = gguf.GGUFWriter(tmp_path / "out.gguf", gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(blocks)
    for name, tensor in tensors.items():
        writer.add_tensor(str(names[name]), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf.GGUFReader(tmp_path / "out.gguf")
    assert {tensor.name for tensor in read.tensors} == set(names.values())


def test_a_gap_would_be_seen() -> None:
    """What the table says of a block that a model of three does not have."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    assert table.get_name("model.layers.2.mlp.up_proj.weight", try_suffixes=(".weight",)) is not None
    assert table.get_name("model.layers.3.mlp.up_proj.weight", try_suffixes=(".weight",)) is None

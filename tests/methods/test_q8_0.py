"""q8_0 and q4_0: codes to the bit as in a loop written from llama.cpp's reference, rotations, bytes and refusals."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.engine.engine import Engine
from harness.engine.transformers_seam import AttachedModel
from harness.engine.types import Cell, Limits, Prompt
from methods.base import KV, LayerView, PolicyError, PromptView
from methods.q8_0 import Q8_0, Blocks, Kind, coded, decoded
from methods.registry import make_policy
from methods.rotation import hadamard
from methods.views import Form

ONE = np.float32(1)


def by_loop(block: list[float], kind: Kind) -> tuple[list[int], np.float16, list[float]]:
    """Bytes, scale and numbers of a block of 32: ggml-quants.c:72-107 and 227-250 at llama.cpp 01243c5."""
    x = [np.float32(number) for number in block]
    largest = max(x, key=abs)
    d = abs(largest) / np.float32(127) if kind == "q8_0" else largest / np.float32(-8)
    inverse = ONE / d if d else np.float32(0)
    half = np.float16(d)
    if kind == "q8_0":
        scaled = [number * inverse for number in x]
        codes = [int(np.sign(one)) * int(np.floor(abs(one) + np.float32(0.5))) for one in scaled]
        return [code % 256 for code in codes], half, [float(np.float32(half) * code) for code in codes]
    codes = [min(15, int(number * inverse + np.float32(8.5))) for number in x]
    numbers = [float(np.float32(half) * (code - 8)) for code in codes]
    return [codes[at] | codes[at + 16] << 4 for at in range(16)], half, numbers


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_blocks_are_llama_cpps_to_the_bit(kind: Kind) -> None:
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 3, 64)
    x[0, 3] = 0
    x[1, 5, :32] = torch.arange(-16, 16) / 4  # halves, and a largest number of either sign
    codes, scales = coded(x, kind)
    numbers = decoded(codes, scales, kind)
    assert codes.shape == (2, 40, 64 if kind == "q8_0" else 32) and scales.shape == (2, 40, 2)
    width = codes.shape[-1] // 2
    for n, token, block in np.ndindex(2, 40, 2):
        wanted, scale, back = by_loop(x[n, token, block * 32 : block * 32 + 32].tolist(), kind)
        assert codes[n, token, block * width : (block + 1) * width].tolist() == wanted
        assert float(scales[n, token, block]) == float(scale)
        assert numbers[n, token, block * 32 : block * 32 + 32].tolist() == back


@pytest.mark.parametrize(("dim", "block"), [(64, 64), (128, 128), (192, 64), (256, 256), (128, 64)])
def test_the_rotation_is_walsh_hadamards_block_by_block_and_undoes_itself(dim: int, block: int) -> None:
    made = hadamard(dim, block, torch.device("cpu"))
    for row in range(dim):
        for column in range(dim):
            sign = (-1) ** ((row % block) & (column % block)).bit_count()
            assert float(made[row, column]) == (
                sign * np.float32(block**-0.5) if row // block == column // block else 0
            )
    torch.testing.assert_close(made @ made, torch.eye(dim), atol=1e-5, rtol=0)


def test_an_outlier_channel_costs_less_when_it_is_turned() -> None:
    x = torch.randn(1, 200, 128, generator=torch.Generator().manual_seed(2))
    x[..., 5] += 30
    errors = []
    for rotated in (True, False):
        codes = Blocks("q4_0", "q4_0", rotated).encode(x, x, torch.zeros(1, 200))
        out = torch.empty_like(x), torch.empty_like(x)
        codes.decode(*out, torch.empty(0))
        errors.append([float((own - x).square().mean()) for own in out])
    assert errors[0][0] < errors[1][0] / 1.5 and errors[0][1] < errors[1][1]


def test_heads_of_no_whole_blocks_and_unknown_types_are_refused() -> None:
    kv = KV(torch.ones(1, 1, 9, 48), torch.ones(1, 1, 9, 64), torch.arange(9).expand(1, 1, 9))
    view = PromptView([LayerView(0, kv, torch.zeros(1, 2, 1, 48), Form(1.0))])
    with pytest.raises(PolicyError, match="keys of 48 and values of 64 numbers are no multiples of 32, which q8_0"):
        Q8_0().check(view)
    with pytest.raises(PolicyError, match="keys='q5_0'"):
        make_policy("q8_0", {"keys": "q5_0"})


def test_a_model_answers_in_company_as_alone_and_its_bytes_are_34_and_18_a_block() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=300, num_hidden_layers=2, head_dim=64, **sizes)
    model = AttachedModel(LlamaForCausalLM(config).eval())
    prompt = Prompt(torch.randint(5, 260, (80,)).tolist(), 60, (70, 80, 90), Limits(6, frozenset()))
    labels = ["fullkv", "q8_0", "q8_0@plain", "q8_0@q4_0", "q8_0@q8_0-q4_0"]
    together = Engine(model).run(prompt, [Cell(make_policy(label), None) for label in labels])
    blocks = {"q8_0": 4 * 34, "q8_0@plain": 4 * 34, "q8_0@q4_0": 4 * 18, "q8_0@q8_0-q4_0": 2 * 34 + 2 * 18}
    for label, own in zip(labels, together, strict=True):
        assert own.status == "ok"
        alone = Engine(copy.copy(model)).run(prompt, [Cell(make_policy(label), None)])[0]
        assert (alone.token_ids, alone.kv_bytes, alone.kv_bytes_end) == (own.token_ids, own.kv_bytes, own.kv_bytes_end)
        if label in blocks:
            assert own.kv_bytes == 2 * (79 * blocks[label] + 2 * 64 * 4)
    off = [(torch.tensor(own.nll_per_token) - torch.tensor(together[0].nll_per_token)).abs().max() for own in together]
    assert 0 < off[1] < 0.02 and off[1] < off[3]

"""What a second pass over a prompt shows, by plain loops over transformers' own attention weights."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.models.load import LoadedModel
from harness.models.prompt import TaskTokenizer
from harness.models.wording import PART, WHOLE
from methods.repeat import Repeat

TEXT = "The quick brown fox jumps over the lazy dog, and nobody asks why."
HEAD, CLOSED = "<|bos|><|user|>", "<|end|><|assistant|>"


def encode(tiny: LoadedModel, text: str) -> list[int]:
    return TaskTokenizer(tiny.tokenizer).encode(text)


@torch.inference_mode()
def paid(plain: PreTrainedModel, ids: list[int], fed: list[int], columns: list[int], norms: bool) -> list[Tensor]:
    """Most that a query of `fed` after `ids` pays to each of `columns`, weighed with its own past: [Hq, C] a layer."""
    found = []
    out = plain(torch.tensor([ids + fed]), output_attentions=True, output_hidden_states=True)
    for layer, weights, hidden in zip(plain.model.layers, out.attentions, out.hidden_states, strict=False):
        lengths = layer.input_layernorm(hidden)[0].norm(dim=-1)
        added = layer.self_attn.v_proj(layer.input_layernorm(hidden))[0].view(-1, 2, 16)
        best = torch.zeros(weights.shape[1], len(columns))
        for head in range(weights.shape[1]):
            for at in range(len(ids), len(ids) + len(fed)):
                row = weights[0, head, at]
                total = sum(float(row[t]) for t in columns) + sum(float(row[t]) for t in range(len(ids), at + 1))
                best[head] = torch.maximum(best[head], row[columns] / total / (lengths[at] if norms else 1))
            if norms:
                out_of = layer.self_attn.o_proj.weight[:, 16 * head : 16 * head + 16]
                best[head] *= torch.stack([(out_of @ added[t, head // 2]).norm() for t in columns])
        found.append(best)
    return found


def gold(tiny: LoadedModel, plain: PreTrainedModel, ids: list[int], asked: Repeat) -> list[Tensor]:
    """[Hq, T] a layer, of a prompt of the tiny model: an open message, or a closed one."""
    end = next((at for at, token in enumerate(ids) if token in encode(tiny, "<|end|>")), len(ids))
    start, end = (2, end) if asked.words else (0, len(ids))
    again = "\n\n" if end == len(ids) else "<|end|><|user|>"
    result = [torch.zeros(4, len(ids)) for _ in range(4)]
    for at in range(start, end, asked.chunk):
        chunk = list(range(at, min(at + asked.chunk, end)))
        fed = [ids[t] for t in chunk]
        if asked.words:
            request = encode(tiny, again + (WHOLE if at == start else PART))
            before = [] if at == start else ids[max(start, at - 8) : at]
            fed = [*request, *before, *encode(tiny, CLOSED), *fed]
        first = list(range(start if asked.sinks is None else min(asked.sinks, at))) if asked.apart else []
        columns = [*first, *chunk] if asked.apart else list(range(len(ids)))
        for layer, best in enumerate(paid(plain, ids, fed, columns, asked.normed)):
            own = columns[len(first) :]
            result[layer][:, own] = torch.maximum(result[layer][:, own], best[:, len(first) :])
    return result

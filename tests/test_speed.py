"""Speed. `pytest -m bench -s` prints ratios of one run, in processor time on one thread, so that
other work on the machine hardly matters. What needs no clock runs always: the count of FLOPs, that
everything stays on the device, that torch.compile sees one whole graph, and that a model of torch's
own layers has the same loss. That the host never waits for a device is in test_gpu.py."""

import re
import time

import numpy as np
import pytest
import speed
import torch
from conftest import HostReads, micro, random_model, training
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import randsac

STRATEGIES = [
    {"segments": "patch"},
    {"segments": "square", "order": "raster"},
    {"segments": "square", "hierarchy": (4,), "last_rank": 2},
    {"segments": "mae", "skip": False},
    {"segments": "blob", "hierarchy": (11, 5), "last_rank": 3},
    {"segments": "scatter", "hierarchy": (9,)},
]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=str)


def test_a_last_rank_of_4_costs_what_mae_costs():
    """Of 16 squares: as in mae a quarter of the tokens is encoded, and the rest predicted. What a
    forward pass costs to the last FLOP is in test_explore.py."""
    whole = speed.flops(randsac.Config())
    cut = speed.flops(randsac.Config(last_rank=4))
    mae = speed.flops(randsac.Config(segments="mae"))
    scatter = speed.flops(randsac.Config(segments="scatter", hierarchy=(16,)))
    assert cut < 1.2 * mae
    assert cut < 0.5 * whole
    assert whole < scatter  # which is not trimmed


# --- right by construction on a GPU


def test_a_value_that_the_host_reads_is_noticed():
    x = torch.arange(4)
    with HostReads() as reads:
        x.sum().item()
        x[x > 2]
        bool(x.any())
    assert len(reads.found) == 3


@every_strategy
def test_nothing_is_left_on_the_cpu(strategy, monkeypatch):
    """torch knows shapes and devices without a GPU: a tensor on the wrong one, or a value read, is
    an error here."""
    config = micro(**strategy)
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False):  # it has no fake grid_sample
        with torch.device("cuda"):
            model = randsac.RandSAC(config)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else autocast is off
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        images = torch.empty(8, 3, 16, 16, dtype=torch.uint8, device="cuda")
        x = randsac.crop(images, randsac.random_crops(8, 0.3, "cuda"), 16)
        ranks = randsac.sample_ranks(config, 8, "cuda")
        loss = randsac.batch_loss(model, x, ranks, config)
        assert (loss.dtype, loss.shape) == (torch.float32, ())
        with randsac.autocast(x.device):
            assert model.head[1](x.new_empty(1, 16)).dtype == torch.bfloat16
            for found in (loss, model(x, ranks), model.encode(x), model.predict(x, ranks)):
                assert found.device.type == "cuda"
        with pytest.raises(RuntimeError, match="cuda.*cpu"):
            loss + torch.zeros(3)


@pytest.mark.parametrize("segments", ["square", "blob"])
def test_compile_sees_one_graph_and_keeps_it(segments):
    config = micro(depth=1, decoder_depth=1, segments=segments)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = torch.compile(randsac.RandSAC(config), fullgraph=True, backend=backend)
    for _ in range(3):
        ranks = randsac.sample_ranks(config, 8)
        randsac.batch_loss(model, torch.randn(8, 3, 16, 16), ranks, config).backward()
    torch.compiler.reset()
    assert len(graphs) == 1


# --- the same model from stock parts


def forbidden(mask, layer):
    """[B,1,n,m], True: may attend -> [B*h,n,m], True: may not, as torch's own layers want it."""
    return ~mask.expand(-1, layer.self_attn.num_heads, -1, -1).flatten(0, 1)


class StockEncoderLayer(nn.TransformerEncoderLayer):
    def forward(self, x, source_mask):
        return super().forward(x, src_mask=forbidden(source_mask, self))


class StockDecoderLayer(nn.TransformerDecoderLayer):
    def __init__(self, **size):
        super().__init__(**size)
        self.norm_memory = nn.LayerNorm(size["d_model"])

    def forward(self, x, memory, target_mask, memory_mask):
        target, memory_mask = [forbidden(mask, self) for mask in (target_mask, memory_mask)]
        return super().forward(x, self.norm_memory(memory), target, memory_mask)


class Stock(randsac.RandSAC):
    """RandSAC of torch's own layers, with masks for each sample over all tokens."""

    def __init__(self, config):
        super().__init__(config)
        size = {"d_model": config.dim, "nhead": config.heads, "dim_feedforward": 4 * config.dim}
        size |= {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.encoder = nn.ModuleList(StockEncoderLayer(**size) for _ in self.encoder)
        self.decoder = nn.ModuleList(StockDecoderLayer(**size) for _ in self.decoder)

    def forward(self, images, ranks, trim=False):
        return super().forward(images, ranks)


RENAMED = {  # what our layers call their weights, and what torch's do
    r"self_attention|(?<=\.)attention": "self_attn",
    "cross_attention": "multihead_attn",
    r"(query|key_value)\.": "in_proj_",  # joined there
    r"\bout\b": "out_proj",
    "norm_attention|norm_self": "norm1",
    r"norm_cross|(?<=encoder\.\d\.)norm_mlp": "norm2",
    "norm_mlp": "norm3",
    r"mlp\.0": "linear1",
    r"mlp\.2": "linear2",
}


def stock_weights(ours):
    parts = {}
    for name, value in ours.state_dict().items():
        for pattern, new in RENAMED.items():
            name = re.sub(pattern, new, name)
        parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


@every_strategy
def test_stock_parts_have_the_same_loss_on_the_same_ranks(strategy):
    config = micro(depth=3, **strategy)
    ours = random_model(config).float()
    stock = Stock(config)
    stock.load_state_dict(stock_weights(ours))
    images = torch.randn(4, 3, 16, 16)
    ranks = randsac.sample_ranks(config, 4)
    expected = stock(images, ranks)
    assert torch.allclose(expected, ours(images, ranks), atol=1e-5)
    if randsac.segment_sizes(config):
        assert torch.allclose(expected, ours(images, ranks, trim=True), atol=1e-5)


# --- measured: pytest -m bench -s


def in_turn(first, second, rounds=5, seconds=2):
    """Prints and returns how many times as fast the first training is, median of the rounds. They
    are measured in turn, as the machine's speed drifts, their ratios less."""
    found = np.zeros((2, rounds))
    for number, i in np.ndindex(rounds, 2):
        count = 0
        start = time.process_time()
        while time.process_time() < start + seconds:
            randsac.training_step(*(first, second)[i], 0, 10)
            count += 1
        found[i, number] = (time.process_time() - start) / count
    ratios = found[1] / found[0]
    print(f"{np.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    return np.median(ratios)


@pytest.mark.bench
@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_against_stock_parts_and_bfloat16_against_float32(model):
    torch.set_num_threads(1)
    settings = {"model": model, "batch_size": 64, "device": "cpu"}
    ours = training(randsac.Config(**settings))
    print(f"\n{model}: times as fast in bfloat16 as in float32: ", end="")
    in_turn(training(randsac.Config(precision="bfloat16", **settings)), ours)
    print(f"{model}: times as fast as torch's own layers: ", end="")
    assert in_turn(ours, training(randsac.Config(**settings), build=Stock)) > 1

"""Speed. `pytest -m bench -s` measures it, in ratios of one run; what needs no clock runs always: the count of FLOPs,
that the host never waits for a device, that everything stays on it, and that torch.compile sees one whole graph."""
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, micro
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import randsac

CPU = torch.device("cpu")
STRATEGIES = [dict(segments="patch"), dict(segments="patch", order="raster"), dict(segments="square", hierarchy=(16,)),
              dict(segments="square", hierarchy=(4,)), dict(segments="square", hierarchy=(16, 4)), dict(segments="mae"),
              dict(segments="blob", hierarchy=(11, 5)), dict(segments="scatter", hierarchy=(9,))]


def training_flops(config):
    """FLOPs of a training step for one image, from the shapes alone: products only, two FLOPs each multiply-add."""
    D, E, M, pixels = config.dim, config.depth, config.decoder_depth, 3 * config.patch_size ** 2
    sizes = randsac.segment_sizes(config) or [0]
    n, m = config.tokens - sizes[-1], config.tokens - sizes[0]  # tokens in the encoder, in the decoder
    encoder = E * (n * 12 * D * D + 2 * n * n * D)  # query, key, value, out: 4; mlp: 8; scores and weighing
    decoder = M * (m * 14 * D * D + n * 2 * D * D + 2 * m * m * D + 2 * m * n * D)
    mix = M * E * n * D if config.skip else 0
    forward = encoder + decoder + mix + m * D * pixels + n * pixels * D
    return 2 * (3 * forward - n * pixels * D)  # backward is twice forward, but no pixel needs a gradient


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_flops_are_those_that_torch_counts(strategy, skip):
    config = micro(image_size=32, decoder_depth=3, depth=2, skip=skip, **strategy)
    model, images = randsac.RandSAC(config), torch.randn(3, 3, 32, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:  # fused attention counts as nothing
        randsac.batch_loss(model, images, config).backward()
    assert counted.get_total_flops() == 3 * training_flops(config)


# --- right by construction on a GPU

class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values read, and shapes that depend on values."""
    waits = ("_local_scalar_dense", "nonzero", "equal.default", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        by_values = "index" in str(func) and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool
                                                 for arg in args if isinstance(arg, (list, tuple)) for x in arg)
        self.found += [str(func)] * (by_values or any(name in str(func) for name in self.waits))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_the_host_reads_no_value_in_a_step(strategy):
    config = micro(batch_size=8, **strategy)
    model, images = randsac.RandSAC(config), torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    optimizer, order = randsac.make_optimizer(model, config), torch.randperm(20)
    with HostReads() as reads:
        for step in range(3):
            randsac.training_step(model, optimizer, images[order[step:step + 8]], config, step, 10)
        calls = reads.calls
        assert not reads.found and calls > 500, reads.found  # forward, backward and optimizer went through here
        images.sum().item(), images[images[:, 0, 0, 0] > 9], bool(images.any())
    assert len(reads.found) == 3  # it does see what waits


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_nothing_is_left_on_the_cpu(strategy, monkeypatch):
    """torch knows shapes and devices without a GPU: a tensor on the wrong one, or a value read, is an error here."""
    config = micro(**strategy)
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False):  # its grid_sample has no fake version
        with torch.device("cuda"):
            model = randsac.RandSAC(config)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else autocast is off
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        images = torch.empty(8, 3, 16, 16, dtype=torch.uint8, device="cuda")
        x = randsac.augment(images[torch.arange(8, device="cuda")], 16, 0.3)
        loss = randsac.batch_loss(model, x, config)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.shape == ()
        with randsac.autocast(x.device):
            assert model.encode_layers(x)[-1].device.type == "cuda" and model.head[1](x.new_empty(1, 16)).dtype == torch.bfloat16
            assert model.predict(x, randsac.sample_ranks(config, 8, x.device)).device.type == "cuda"
        with pytest.raises(Exception, match="(?i)device"):
            randsac.batch_loss(model, x, config) + torch.zeros(3)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_compile_sees_one_graph_and_keeps_it(strategy):
    config, graphs = micro(depth=1, decoder_depth=1, **strategy), []
    model = torch.compile(randsac.RandSAC(config), fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for _ in range(3):
        randsac.batch_loss(model, torch.randn(8, 3, 16, 16), config).backward()
    assert len(graphs) == 1
    torch.compiler.reset()


# --- the same model from stock parts

class StockImages(Dataset):
    """As torchvision's CIFAR10 gives them: one PIL image at a time, through torchvision's own transforms."""

    def __init__(self, images):
        self.images = images.permute(0, 2, 3, 1).numpy()
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(32, (0.3, 1)), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i]))


class Stock(nn.Module):
    """RandSAC of torch's own layers, with masks for each sample over all tokens."""

    def __init__(self, config):
        super().__init__()
        size = dict(d_model=config.dim, nhead=config.heads, dim_feedforward=4 * config.dim, dropout=0.0,
                    activation="gelu", batch_first=True, norm_first=True)
        self.config, self.embed = config, nn.Linear(3 * config.patch_size ** 2, config.dim)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**size), config.depth, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**size), config.decoder_depth)
        self.norm_memory = nn.ModuleList(nn.LayerNorm(config.dim) for _ in range(config.decoder_depth))
        self.skip = nn.Parameter(torch.eye(config.depth)[-1:].repeat(config.decoder_depth, 1))
        self.head = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, 3 * config.patch_size ** 2))

    def forward(self, images, ranks):
        tokens = randsac.patchify(images, self.config.patch_size)
        source, target, memory = (~mask for mask in randsac.attention_masks(ranks))  # True: may not attend
        # An empty row would be NaN here. The row of rank 0 may see itself instead: nobody reads it.
        empty = (ranks == 0)[..., None] & torch.eye(ranks.shape[1], dtype=torch.bool)
        source, target, memory = (mask.repeat_interleave(self.config.heads, 0)
                                  for mask in (source, target & ~empty, memory & ~empty))  # [B*h,N,N]
        place = randsac.positions(self.config.grid, self.config.grid, self.config.dim)
        x, layers = self.embed(tokens) + place, []
        for layer in self.encoder.layers:
            x = layer(x, src_mask=source)
            layers.append(x)
        y = place.expand(len(x), -1, -1)
        for layer, norm, W in zip(self.decoder.layers, self.norm_memory, self.skip):
            Z = sum(w * h for w, h in zip(W, layers))
            y = layer(y, norm(Z), tgt_mask=target, memory_mask=memory)
        error = (self.head(y) - randsac.normalize_patches(tokens)).square().mean(-1)
        scored = (ranks >= 1).float()
        return ((error * scored).sum(1) / scored.sum(1)).mean()

    def weights(self):
        """Its weights under the names that RandSAC gives them."""
        names = dict(self_attn="self_attention", multihead_attn="cross_attention", linear1="mlp.0", linear2="mlp.2",
                     norm1="norm_self", norm2="norm_cross", norm3="norm_mlp")
        encoder = dict(names, self_attn="attention", norm1="norm_attention", norm2="norm_mlp")
        found = {}
        for name, value in self.state_dict().items():
            part, rest = name.split(".", 1) if "." in name else (name, "")
            if part in ("encoder", "decoder"):
                _, k, inner, *tail = rest.split(".")
                name = ".".join([part, k, (encoder if part == "encoder" else names)[inner], *tail])
            if part == "norm_memory":
                k, tail = rest.split(".")
                name = f"decoder.{k}.norm_memory.{tail}"
            if ".in_proj_" in name:
                D = self.config.dim
                found[name.replace("in_proj_", "query.")], found[name.replace("in_proj_", "key_value.")] = value[:D], value[D:]
            else:
                found[name.replace("out_proj", "out")] = value
        return found


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_stock_parts_have_the_same_loss_on_the_same_ranks(strategy):
    config = micro(depth=3, **strategy)
    stock, ours, images = Stock(config), randsac.RandSAC(config), torch.randn(4, 3, 16, 16)
    nn.init.normal_(stock.skip)
    ours.load_state_dict(stock.weights())
    ranks = randsac.sample_ranks(config, 4)
    assert torch.allclose(stock(images, ranks), ours(images, ranks), atol=1e-5)
    if randsac.segment_sizes(config):
        assert torch.allclose(stock(images, ranks), ours(images, ranks, trim=True), atol=1e-5)


# --- measured: pytest -m bench -s

def peak_rate(seconds=1.0):
    """The machine's float32 product rate in FLOP/s: the best of large square products."""
    best, a, end = 0, {n: torch.randn(n, n) for n in (1024, 2048)}, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for n, x in a.items():
            start = time.perf_counter()
            x @ x
            best = max(best, 2 * n ** 3 / (time.perf_counter() - start))
    return best


def rate(step, images, seconds):
    """Images per second of step(), which takes `images` images."""
    steps, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        step()
        steps += 1
    return images * steps / (time.perf_counter() - start)


def trainer(config, compiled=False):
    """-> a function that does one training step as `train` does, on images in memory."""
    model = randsac.RandSAC(config)
    optimizer, called = randsac.make_optimizer(model, config), torch.compile(model) if compiled else model
    images = torch.randint(0, 256, (max(2000, config.batch_size), 3, config.image_size, config.image_size), dtype=torch.uint8)
    steps = iter(range(10**9))

    def step():
        batch = images[torch.randint(0, len(images), (config.batch_size,))]
        randsac.training_step(called, optimizer, batch, config, next(steps), 10**6)

    step(), step()
    return step


def in_turn(*steps, images, rounds=5, seconds=4):
    """Images per second of each step, measured in turn -> [rounds, steps]: the machine's speed drifts, their ratio less."""
    return np.array([[rate(step, images, seconds) for step in steps] for _ in range(rounds)])


@pytest.mark.bench
@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_share_of_the_machines_peak(model):
    config = randsac.Config(model=model, device="cpu")
    step, shares, flops = trainer(config), [], training_flops(config)
    for _ in range(5):
        peak, images = peak_rate(), rate(step, config.batch_size, 4)
        shares.append(images * flops / max(peak, peak_rate()))
    print(f"\n{model}: {images:.0f} images/s, {flops / 1e6:.0f} MFLOP an image, {100 * np.median(shares):.0f} % of the "
          f"float32 peak ({peak / 1e9:.0f} GFLOP/s), peak memory {memory():.2f} GB")
    assert np.median(shares) >= 0.55


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kB


@pytest.mark.bench
def test_share_of_a_step_outside_the_model():
    config = randsac.Config(device="cpu")
    images, n = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8), config.batch_size
    step, order, shares = trainer(config), torch.randperm(50_000), []

    def outside():
        x = randsac.augment(images[order[:n]], 32, config.crop_scale, randsac.seeded("cpu", 0))
        randsac.attention_masks(torch.arange(64)[None])  # trimmed: one for the batch
        return x, randsac.sample_ranks(config, n, CPU, randsac.seeded("cpu", 1)).argsort(1)

    for _ in range(5):
        shares.append(rate(step, n, 3) / rate(outside, n, 1))
    print(f"\noutside the model (batch, augmentation, ranks, masks): {100 * np.median(shares):.1f} % of a step")
    assert np.median(shares) <= 0.03


@pytest.mark.bench
@pytest.mark.parametrize("compiled", [False, True])
def test_against_stock_parts(compiled):
    config = randsac.Config(device="cpu")
    images, n = torch.randint(0, 256, (20_000, 3, 32, 32), dtype=torch.uint8), config.batch_size
    model = Stock(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    loader = iter(DataLoader(StockImages(images), n, shuffle=True, num_workers=2, drop_last=True))

    def stock():
        loss = model(next(loader), randsac.sample_ranks(config, n))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    stock(), stock()
    found = in_turn(trainer(config, compiled), stock, images=n)
    ratios = found[:, 0] / found[:, 1]
    print(f"\n{'compiled' if compiled else 'eager'}: {np.median(ratios):.2f} times stock parts "
          f"({', '.join(f'{r:.2f}' for r in ratios)}); {np.median(found[:, 0]):.0f} and {np.median(found[:, 1]):.0f} images/s")
    assert np.median(ratios) > 1.15  # 1.3 measured; the project aimed at 1.5


@pytest.mark.bench
def test_from_the_command_to_the_first_step(tmp_path):
    """A prepared folder of CIFAR-10's size: 50,000 + 10,000 images of 32 x 32."""
    for split, count in dict(train=50_000, test=10_000).items():
        for i in range(10):
            (tmp_path / "images" / split / str(i)).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / split / str(i % 10) / f"{i}.bmp")
    flags = ["--dataset", "folder", "--data-dir", tmp_path / "images", "--model", "nano", "--device", "cpu"]
    peak = "import resource, runpy, sys; sys.argv = sys.argv[1:]\n" \
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n" \
        "finally: print('kB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    times = []
    for k in range(3):  # the first prepares
        start = time.perf_counter()
        words = [sys.executable, "-u", "-c", peak, ROOT / "randsac.py", *flags, "--out", tmp_path / f"run{k}",
                 "--max-steps", 30]
        with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
            for line in run.stdout:
                if " steps of " in line:  # what it says last before the first step
                    times.append(time.perf_counter() - start)
        gigabytes = int(line.split("kB")[1]) / 1e6
    print(f"\nfrom the command to the first step, on prepared images: {min(times[1:]):.1f} s (preparing them: {times[0]:.0f} "
          f"s); peak memory of 30 steps and the held-out loss {gigabytes:.2f} GB")
    assert len(times) == 3 and min(times[1:]) < 8 and gigabytes < 3


@pytest.mark.bench
def test_cost_against_work():
    """Images per second by strategy and by number of tokens, beside what the FLOPs say, both relative to the default."""
    base = randsac.Config(device="cpu", batch_size=32)
    step = trainer(base)
    print(f"\n{'':34}{'tokens':>7}{'MFLOP':>9}{'images/s':>10}{'cost':>7}{'FLOPs say':>10}")
    for settings in [*STRATEGIES, *(dict(image_size=size) for size in (48, 64, 128))]:
        config = randsac.Config(device="cpu", batch_size=32, **settings)
        (mine, reference), flops = in_turn(trainer(config), step, images=32, rounds=1, seconds=3)[0], training_flops(config)
        print(f"{' '.join(f'{v}' for v in settings.values()):34}{config.tokens:7}{flops / 1e6:9.0f}{mine:10.0f}"
              f"{reference / mine:7.2f}{flops / training_flops(base):10.2f}")
        assert 0.4 < (reference / mine) / (flops / training_flops(base)) < 4

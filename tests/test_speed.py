"""Speed. `pytest -m bench -s` measures it and asks only for ratios within one run, to the same
model made of stock parts; what depends on the machine is printed. What needs no clock runs always:
the count of FLOPs, that the host never waits for a device, that everything stays on it, and that
torch.compile sees one whole graph."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, HostReads, micro
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import randsac

STRATEGIES = [
    {"segments": "patch"},
    {"segments": "patch", "order": "raster"},
    {"segments": "square", "hierarchy": (16,)},
    {"segments": "square", "hierarchy": (4,)},
    {"segments": "square", "hierarchy": (16, 4)},
    {"segments": "square", "hierarchy": (16, 4), "last_rank": 4},
    {"segments": "mae"},
    {"segments": "blob", "hierarchy": (11, 5)},
    {"segments": "blob", "hierarchy": (11, 5), "last_rank": 3},
    {"segments": "scatter", "hierarchy": (9,)},
]


def name_of(strategy):
    return " ".join(str(value) for value in strategy.values())


every_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=name_of)


def training_flops(config):
    """FLOPs of a training step for one image, from the shapes alone: products only, two FLOPs for
    each multiplication with its addition."""
    D = config.dim
    pixels = 3 * config.patch_size**2
    sizes = randsac.segment_sizes(config) or [0]
    n = config.tokens - sizes[-1]  # tokens in the encoder
    m = config.tokens - sizes[0]  # and in the decoder

    # D x D products of a token: 4 for query, key, value, out, 8 for the MLP; then attention's
    # scores and sums. The decoder has 2 more of a token, its second query and out, and 2 of a
    # token in memory, key and value.
    encoder = config.depth * (n * 12 * D * D + 2 * n * n * D)
    decoder = config.decoder_depth * (
        m * 14 * D * D + n * 2 * D * D + 2 * m * m * D + 2 * m * n * D
    )
    mix = config.decoder_depth * config.depth * n * D if config.skip else 0
    forward = encoder + decoder + mix + m * D * pixels + n * pixels * D

    # Backward is twice forward, but no pixel needs a gradient.
    return 2 * (3 * forward - n * pixels * D)


@pytest.mark.parametrize("skip", [True, False])
@every_strategy
def test_flops_are_those_that_torch_counts(strategy, skip):
    config = micro(image_size=32, decoder_depth=3, depth=2, skip=skip, **strategy)
    model = randsac.RandSAC(config)
    images = torch.randn(3, 3, 32, 32)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # fused attention would count as nothing
        randsac.batch_loss(model, images, config).backward()
    assert counter.get_total_flops() == 3 * training_flops(config)


def test_a_last_rank_of_4_costs_what_mae_costs():
    """Of 16 squares: as in mae a quarter of the tokens is encoded, and the rest predicted."""
    whole = training_flops(randsac.Config())
    cut = training_flops(randsac.Config(last_rank=4))
    mae = training_flops(randsac.Config(segments="mae"))
    assert cut < 1.2 * mae
    assert cut < 0.5 * whole


# --- right by construction on a GPU


def random_images(count, size):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@every_strategy
def test_the_host_reads_no_value_in_a_step(strategy, precision):
    config = micro(batch_size=8, precision=precision, **strategy)
    model = randsac.RandSAC(config)
    optimizer = randsac.make_optimizer(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16")
    images = random_images(20, 16)
    order = torch.randperm(20)
    with HostReads() as reads:
        for step in range(3):
            batch = images[order[step : step + 8]]
            randsac.training_step(model, optimizer, scaler, batch, config, step, 10)
        calls = reads.calls

        # Forward, backward and optimizer went through here, and it does see what waits.
        assert calls > 500
        assert reads.found == []
        images.sum().item()
        images[images[:, 0, 0, 0] > 9]
        bool(images.any())
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
        x = randsac.augment(images[torch.arange(8, device="cuda")], 16, 0.3)
        loss = randsac.batch_loss(model, x, config)
        assert loss.device.type == "cuda"
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        with randsac.autocast(x.device):
            assert model.head[1](x.new_empty(1, 16)).dtype == torch.bfloat16
            assert model.encode(x).device.type == "cuda"
            ranks = randsac.sample_ranks(config, 8, x.device)
            assert ranks.device.type == "cuda"
            assert model(x, ranks).device.type == "cuda"
            assert model.predict(x, ranks).device.type == "cuda"
        with pytest.raises(RuntimeError, match="cuda.*cpu"):
            loss + torch.zeros(3)


@every_strategy
def test_compile_sees_one_graph_and_keeps_it(strategy):
    config = micro(depth=1, decoder_depth=1, **strategy)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = torch.compile(randsac.RandSAC(config), fullgraph=True, backend=backend)
    for _ in range(3):
        randsac.batch_loss(model, torch.randn(8, 3, 16, 16), config).backward()
    torch.compiler.reset()
    assert len(graphs) == 1


# --- the same model from stock parts


class StockImages(Dataset):
    """As torchvision's CIFAR10 gives them: one PIL image at a time, through torchvision's own
    transforms."""

    def __init__(self, images):
        self.images = images.permute(0, 2, 3, 1).numpy()
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(images.shape[-1], (0.3, 1)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i]))


class Stock(nn.Module):
    """RandSAC of torch's own layers, with masks for each sample over all tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.dim
        pixels = 3 * config.patch_size**2
        size = {"d_model": D, "nhead": config.heads, "dim_feedforward": 4 * D, "dropout": 0.0}
        size |= {"activation": "gelu", "batch_first": True, "norm_first": True}
        self.embed = nn.Linear(pixels, D)
        encoder_layer = nn.TransformerEncoderLayer(**size)
        decoder_layer = nn.TransformerDecoderLayer(**size)
        self.encoder = nn.TransformerEncoder(
            encoder_layer, config.depth, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(decoder_layer, config.decoder_depth)
        self.norm_memory = nn.ModuleList(nn.LayerNorm(D) for _ in range(config.decoder_depth))
        self.skip = nn.Parameter(torch.eye(config.depth)[-1:].repeat(config.decoder_depth, 1))
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, pixels))

    def forward(self, images, ranks):
        tokens = randsac.patchify(images, self.config.patch_size)
        source, target, memory = randsac.attention_masks(ranks)

        # An empty row would be NaN here. The row of rank 0 may see itself: nobody reads it.
        itself = (ranks == 0)[..., None] & torch.eye(ranks.shape[1], dtype=torch.bool)
        forbidden = []
        for mask in (source, target | itself, memory | itself):
            forbidden.append(~mask.repeat_interleave(self.config.heads, 0))  # [B*h,N,N]
        source, target, memory = forbidden

        place = randsac.positions(self.config.grid, self.config.grid, self.config.dim)
        x = self.embed(tokens) + place
        layers = []
        for layer in self.encoder.layers:
            x = layer(x, src_mask=source)
            layers.append(x)
        y = place.expand(len(x), -1, -1)
        for layer, norm, W in zip(self.decoder.layers, self.norm_memory, self.skip):
            Z = sum(w * h for w, h in zip(W, layers))
            y = layer(y, norm(Z), tgt_mask=target, memory_mask=memory)
        error = (self.head(y) - randsac.normalize_patches(tokens)).square().mean(-1)
        scored = (ranks >= 1).float()
        return ((error * scored).sum(1) / scored.sum(1).clamp(min=1)).mean()

    def weights(self):
        """Its weights under the names that RandSAC gives them."""
        decoder = {
            "self_attn": "self_attention",
            "multihead_attn": "cross_attention",
            "linear1": "mlp.0",
            "linear2": "mlp.2",
            "norm1": "norm_self",
            "norm2": "norm_cross",
            "norm3": "norm_mlp",
        }
        encoder = decoder | {
            "self_attn": "attention",
            "norm1": "norm_attention",
            "norm2": "norm_mlp",
        }
        found = {}
        for name, value in self.state_dict().items():
            part, *rest = name.split(".")
            if part == "encoder":
                _, k, inner, *tail = rest
                name = ".".join([part, k, encoder[inner], *tail])
            if part == "decoder":
                _, k, inner, *tail = rest
                name = ".".join([part, k, decoder[inner], *tail])
            if part == "norm_memory":
                k, tail = rest
                name = f"decoder.{k}.norm_memory.{tail}"
            if ".in_proj_" in name:  # query, key and value are one there
                D = self.config.dim
                found[name.replace("in_proj_", "query.")] = value[:D]
                found[name.replace("in_proj_", "key_value.")] = value[D:]
            else:
                found[name.replace("out_proj", "out")] = value
        return found


@every_strategy
def test_stock_parts_have_the_same_loss_on_the_same_ranks(strategy):
    config = micro(depth=3, **strategy)
    stock = Stock(config)
    nn.init.normal_(stock.skip)
    ours = randsac.RandSAC(config)
    ours.load_state_dict(stock.weights())
    images = torch.randn(4, 3, 16, 16)
    ranks = randsac.sample_ranks(config, 4)
    expected = stock(images, ranks)
    assert torch.allclose(expected, ours(images, ranks), atol=1e-5)
    if randsac.segment_sizes(config):
        assert torch.allclose(expected, ours(images, ranks, trim=True), atol=1e-5)


# --- measured: pytest -m bench -s


def peak_rate(seconds=1.0):
    """The machine's float32 product rate in FLOP/s: the best of large square products."""
    best = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for n in (1024, 2048):
            a = torch.ones(n, n)
            start = time.perf_counter()
            a @ a
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def rate(step, images, seconds):
    """Images per second of step(), which takes `images` images."""
    steps = 0
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        step()
        steps += 1
    return images * steps / (time.perf_counter() - start)


def trainer(config, compiled=False):
    """-> a function that does one training step as `train` does, on images in memory."""
    model = randsac.RandSAC(config)
    optimizer = randsac.make_optimizer(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    called = torch.compile(model) if compiled else model
    images = random_images(2000, config.image_size)
    done = 0

    def step():
        nonlocal done
        batch = images[torch.randint(0, len(images), (config.batch_size,))]
        randsac.training_step(called, optimizer, scaler, batch, config, done, 10**6)
        done += 1

    step()
    step()
    return step


def stock_trainer(config):
    """The same, of stock parts."""
    model = Stock(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    images = StockImages(random_images(2000, config.image_size))
    sampler = RandomSampler(images, replacement=True, num_samples=10**7)  # no epoch ever ends
    batches = iter(DataLoader(images, config.batch_size, sampler=sampler, num_workers=2))

    def step():
        batch = next(batches)
        loss = model(batch, randsac.sample_ranks(config, len(batch)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    step()
    step()
    return step


def in_turn(*steps, images, rounds=5, seconds=4):
    """Images per second of each step, measured in turn -> [rounds,steps]: the machine's speed
    drifts, their ratio less."""
    found = []
    for _ in range(rounds):
        found.append([rate(step, images, seconds) for step in steps])
    return np.array(found)


@pytest.mark.bench
@pytest.mark.parametrize("model, compiled", [("nano", False), ("nano", True), ("tiny", False)])
def test_against_stock_parts(model, compiled):
    config = randsac.Config(model=model, batch_size=128, device="cpu")
    ours = trainer(config, compiled)
    stock = stock_trainer(config)
    peaks = [peak_rate()]
    found = in_turn(ours, stock, images=config.batch_size)
    peaks.append(peak_rate())
    ratios = found[:, 0] / found[:, 1]
    ratio = np.median(ratios)
    speed, stock_speed = np.median(found, 0)
    flops = training_flops(config)
    share = speed * flops / max(peaks)
    print(
        f"\n{model}, {'compiled' if compiled else 'eager'}: {ratio:.2f} times stock parts", end=""
    )
    print(f" ({', '.join(f'{r:.2f}' for r in ratios)})", end="")
    print(f"; {speed:.0f} and {stock_speed:.0f} images/s; {flops / 1e6:.0f} MFLOP an image", end="")
    print(f"; {share:.0%} of the float32 peak ({max(peaks) / 1e9:.0f} GFLOP/s)")
    assert ratio > 1.1  # 1.27 measured for nano on an idle machine, 1.16 and more on a busy one


# A process of its own, as the peak of one in which other tests ran is theirs too. VmHWM begins anew
# with a program; ru_maxrss would begin with what the process held that started it.
PEAK = """
def peak():
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1e6  # GB
"""
ONE_TRAINER = """
import sys
sys.path.insert(0, sys.argv[1])
import test_speed
config = test_speed.randsac.Config(model=sys.argv[2], batch_size=128, device="cpu")
before = peak()
step = getattr(test_speed, sys.argv[3])(config)
step()
print(peak() - before)
"""
has_proc = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux has it")


@pytest.mark.bench
@has_proc
@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_memory_against_stock_parts(model):
    gigabytes = []
    for trains in ("trainer", "stock_trainer"):
        words = [sys.executable, "-c", PEAK + ONE_TRAINER, str(ROOT / "tests"), model, trains]
        said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        gigabytes.append(float(said))
    ours, stock = gigabytes
    print(f"\n{model}, batch of 128: {ours:.2f} GB for training, stock parts {stock:.2f} GB")
    assert ours < stock


@pytest.mark.bench
def test_share_of_a_step_outside_the_model():
    config = randsac.Config(device="cpu")
    images = random_images(50_000, 32)
    n = config.batch_size
    order = torch.randperm(50_000)
    step = trainer(config)

    def outside():
        randsac.augment(images[order[:n]], 32, config.crop_scale, randsac.seeded("cpu", 0))
        ranks = randsac.sample_ranks(config, n, generator=randsac.seeded("cpu", 1))
        ranks.argsort(1)
        randsac.attention_masks(ranks[:1].sort(1).values)  # trimmed: one for the batch

    shares = []
    for _ in range(5):
        shares.append(rate(step, n, 3) / rate(outside, n, 1))
    share = np.median(shares)
    print(f"\noutside the model (batch, augmentation, ranks, masks): {share:.1%} of a step")
    assert share <= 0.03


RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("GB", peak())
"""


@pytest.mark.bench
@has_proc
def test_from_the_command_to_the_first_step(tmp_path):
    """A folder of CIFAR-10's size: 50,000 + 10,000 images of 32 x 32."""
    for split, count in {"train": 50_000, "test": 10_000}.items():
        for i in range(10):
            (tmp_path / "images" / split / str(i)).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            place = tmp_path / "images" / split / str(i % 10) / f"{i}.bmp"
            Image.fromarray(noise).save(place)
    program = [sys.executable, "-u", "-c", PEAK + RUN, ROOT / "randsac.py"]
    flags = ["--dataset", "folder", "--data-dir", tmp_path / "images", "--model", "nano"]
    flags += ["--device", "cpu", "--max-steps", "30"]
    times = []
    for k in range(3):  # the first decodes
        words = [str(word) for word in [*program, *flags, "--out", tmp_path / f"run{k}"]]
        start = time.perf_counter()
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as run:
            for line in run.stdout:
                if " steps of " in line:  # what it says last before the first step
                    times.append(time.perf_counter() - start)
                if line.startswith("GB"):
                    gigabytes = float(line.split()[1])
        assert run.returncode == 0
    first, *later = times
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, torchvision"], check=True)
    imports = time.perf_counter() - start
    print(f"\nfrom the command to the first step, on decoded images: {min(later):.1f} s", end="")
    print(f" (with decoding {first:.0f} s, imports alone {imports:.1f} s)", end="")
    print(f"; peak memory of 30 steps and the held-out loss {gigabytes:.2f} GB")
    assert len(later) == 2
    assert min(later) < 3 * imports
    assert min(later) < first / 2
    assert gigabytes < 3


@pytest.mark.bench
def test_cost_against_work():
    """Images per second by strategy and by number of tokens, beside what the FLOPs say, both
    relative to the default."""
    base = randsac.Config(device="cpu", batch_size=32)
    step = trainer(base)
    print(f"\n{'':34}{'tokens':>7}{'MFLOP':>9}{'images/s':>10}{'cost':>7}{'FLOPs say':>10}")
    sizes = [{"image_size": size} for size in (48, 64, 128)]
    for settings in [*STRATEGIES, *sizes]:
        config = randsac.Config(device="cpu", batch_size=32, **settings)
        rates = in_turn(trainer(config), step, images=32, rounds=1, seconds=3)
        mine, reference = rates[0]
        cost = reference / mine
        flops = training_flops(config)
        work = flops / training_flops(base)
        print(f"{name_of(settings):34}{config.tokens:7}{flops / 1e6:9.0f}{mine:10.0f}", end="")
        print(f"{cost:7.2f}{work:10.2f}")
        assert 0.4 < cost / work < 4

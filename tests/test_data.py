"""Images: drawn, downloaded, or from a folder; crops. Nothing broken is ever trained on."""

import functools
import hashlib
import http.server
import io
import itertools
import os
import pickle
import re
import shlex
import shutil
import struct
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import tqdm
from conftest import MICRO_FLAGS, ROOT, micro, random_model, run_here
from PIL import Image

import randsac


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test stands in a directory of its own, in which decoded images lie."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def folder(path, **settings):
    settings = {"image_size": 8, "patch_size": 2, **settings}
    return randsac.Config(dataset="folder", data_dir=str(path), **settings)


def load(path, train=True, **settings):
    return randsac.load_images(folder(path, **settings), train=train)


def refusal(path, train=True, **settings):
    """The line with which a folder is refused. Nothing decoded is left of it."""
    with pytest.raises(randsac.UserError) as error:
        load(path, train, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert decoded() == {}
    return message


def decoded():
    """The files of decoded images, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in Path("runs/cache").glob("*")}


# --- shapes


def test_shapes_are_the_same_every_time_and_evenly_split():
    images, labels, names = randsac.draw_shapes(500, 32, seed=1)
    again, _, _ = randsac.draw_shapes(500, 32, seed=1)
    assert images.shape == (500, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, again)
    assert labels.bincount().tolist() == [50] * 10 and len(names) == 10
    assert not torch.equal(images, randsac.draw_shapes(500, 32, seed=0)[0])


def test_training_and_test_shapes_are_others():
    config = micro(image_size=8, patch_size=2)
    sets = [randsac.load_images(config, train)[0] for train in (True, False)]
    assert [len(images) for images in sets] == [20_000, 4_000]
    known = {image.numpy().tobytes() for image in sets[0]}
    assert not any(image.numpy().tobytes() in known for image in sets[1])


def test_colours_of_shapes_say_nothing_of_the_class():
    images, labels, _ = randsac.draw_shapes(20_000, 16, seed=1)
    means = torch.stack([images[labels == k].float().mean((0, 2, 3)) for k in range(10)])  # [10,3]
    assert means.std(0).max() < 5  # of 255
    flat = images.float().flatten(1) / 255
    known = flat[:10_000]
    centroids = torch.stack([known[labels[:10_000] == k].mean(0) for k in range(10)])
    nearest = torch.cdist(flat[10_000:], centroids).argmin(1)
    assert (nearest == labels[10_000:]).float().mean() < 0.3  # raw pixels do poorly


# --- folders: what is read


def save(path, mode="RGB", size=(12, 10), seed=0, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path, **kwargs)


def plant(root, *names):
    """Images at these places, each another one."""
    for i, name in enumerate(names):
        save(root / name, seed=i)


GOOD = ("train/ant/1.png", "train/bee/2.png", "test/bee/3.png")


def test_a_folder_gives_labels_by_class_and_is_decoded_once(image_folder):
    before = {path: path.lstat().st_mtime_ns for path in [image_folder, *image_folder.rglob("*")]}
    images, labels, names = load(image_folder)
    assert images.shape == (72, 3, 8, 8) and images.dtype == torch.uint8
    assert names == ["ant", "bee", "cat"]
    assert labels.bincount().tolist() == [24] * 3
    for label in range(3):  # each class is brightest in its own channel
        assert images[labels == label].float().mean((0, 2, 3)).argmax() == label
    assert len(load(image_folder, train=False)[0]) == 24

    # The user's own folder is as it was. What was decoded is used again, if files were moved too.
    files = decoded()
    assert len(files) == 2
    moved = shutil.copytree(image_folder, "moved", copy_function=shutil.copyfile)
    assert torch.equal(images, load(moved)[0])
    assert decoded() == files
    assert all(path.lstat().st_mtime_ns == time for path, time in before.items())


def test_another_size_or_another_image_is_decoded_anew(tmp_path):
    plant(tmp_path / "data", "train/a/1.png", "train/a/2.png")
    first = load(tmp_path / "data")[0]
    assert load(tmp_path / "data", image_size=16)[0].shape == (2, 3, 16, 16)
    save(tmp_path / "data/train/a/1.png", seed=7, size=(20, 20))
    assert not torch.equal(first, load(tmp_path / "data")[0])
    plant(tmp_path / "data", "train/a/3.png")
    assert load(tmp_path / "data")[0].shape == (3, 3, 8, 8)
    assert len(decoded()) == 4


def test_decoded_images_may_be_larger_than_memory(tmp_path, monkeypatch):
    """Linux refuses to map such a file where the mapping could be written to."""
    plant(tmp_path / "data", "train/a/1.png", "train/a/2.png")
    words = Path("/proc/meminfo").read_text().split()
    kilobytes = sum(int(words[words.index(name) + 1]) for name in ("MemTotal:", "SwapTotal:"))
    side = 2 * int((kilobytes * 1024 / 6) ** 0.5)  # of two images, which are four times as large

    def sparse(paths, size, cache):
        cache.parent.mkdir(parents=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": (2, 3, size, size)}
        with open(cache, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 6 * size**2)

    monkeypatch.setattr(randsac, "decode_all", sparse)
    large = {"image_size": side, "patch_size": side // 2, "hierarchy": (4,)}
    images, _, _ = load(tmp_path / "data", **large)
    assert images.shape == (2, 3, side, side) and images[1, 2, -1, -1] == 0
    assert len(decoded()) == 1
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert {line.split()[1][:3] for line in maps if ".npy" in line} == {"r--"}


def test_without_test_images_there_are_none_and_val_serves_as_test(tmp_path):
    plant(tmp_path, "train/a/1.png", "train/b/2.png")
    images, labels, names = load(tmp_path, train=False)
    assert images.shape == (0, 3, 8, 8) and len(labels) == 0 and names == ["a", "b"]
    plant(tmp_path, "val/b/3.png")
    assert load(tmp_path, train=False)[1].tolist() == [1]


def trained_lines(capsys, *given):
    """What a training of one step prints, line by line."""
    assert run_here(*MICRO_FLAGS, "--max-steps", 1, "--out", os.urandom(4).hex(), *given) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if not line.startswith("decoding")]


def test_before_training_lines_say_what_was_found_and_what_is_about_to_happen(tmp_path, capsys):
    data = tmp_path / "my photos"
    plant(data, *GOOD, "train/bee/deep/er/4.JPG", "train/.thumbnails/9.png", "train/5.png")
    for name in ("train/ant/notes.txt", "train/ant/5.gif", "test/bee/6.heic", "README"):
        (data / name).write_text("no image")
    (data / "masks").mkdir()
    (data / "train/ant/circle").symlink_to(data)
    found, run, advice, *_ = trained_lines(capsys, "--data-dir", data, "--batch-size", 2)
    words = ["3 images of 2 classes", "1 held out", "5 files", "3 folders", "8 x 8", "16 tokens"]
    words += [str(data), "--image-size", ".txt", ".gif", ".heic", ".png", ".thumbnails", "masks"]
    assert all(word in found for word in [*words, "circle", "README"]), found
    assert all(word in run for word in ("1 step", "million parameters", "cpu", "float32")), run

    # Without a GPU the advice is a command, here with the folder as a shell must be told it.
    command = shlex.split(advice)
    assert "nano" in command and str(data) in command
    given = command[command.index("--dataset") :]
    assert given[-2:] == ["--data-dir", str(data)]
    assert randsac.make_parser("").parse_args(given).model == "nano"
    nano = trained_lines(capsys, "--data-dir", data, "--batch-size", 2, "--model", "nano")
    assert not any("GPU" in line for line in nano)


def test_a_batch_larger_than_the_data_names_the_largest(image_folder):
    with pytest.raises(randsac.UserError, match=r"--batch-size.*\b72\b.*73|73.*\b72\b"):
        run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--batch-size", 73)
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--max-steps", 1]
    assert run_here(*flags, "--batch-size", 72) == 0


def test_entries_of_a_system_are_no_data_and_what_resembles_them_is(tmp_path):
    """Neither as a class, nor in one, nor beside train/; nor are a Mac's shadows of files."""
    plant(tmp_path, *GOOD)
    clean = load(tmp_path)
    made = ["__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", ".git", ".ipynb_checkpoints"]
    for name in made:
        plant(tmp_path, f"{name}/9.png", f"train/{name}/9.png", f"test/{name}/9.png")
        plant(tmp_path, f"train/ant/{name}/9.png", f"train/bee/deep/{name}/9.png")
    (tmp_path / "train/ant/._1.png").write_bytes(b"Mac OS X")
    again = load(tmp_path)
    assert torch.equal(clean[0], again[0]) and again[2] == ["ant", "bee"]
    assert len(load(tmp_path, train=False)[0]) == 1

    # Names of people, of modules, of money.
    names = ["@anna", "@ben", "__init__", "$5", "lost", "@eaDir2", "-x", "a b", "ü", "猫", "c.png"]
    names += ["new\nline", os.fsdecode(b"\xff\xfe")]
    plant(tmp_path / "odd", *[f"train/{name}/{name}.png" for name in names])
    images, labels, classes = load(tmp_path / "odd")
    assert classes == sorted(names) and labels.tolist() == list(range(len(names)))
    assert len({image.numpy().tobytes() for image in images}) == len(names)


def test_a_class_or_the_whole_may_be_a_link(tmp_path):
    plant(tmp_path / "disk", "ants/1.png", "bees/2.png", "tests/bee/3.png")
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/ant").symlink_to(tmp_path / "disk/ants")
    (tmp_path / "data/train/bee").symlink_to("../../disk/bees")
    (tmp_path / "data/test").symlink_to(tmp_path / "disk/tests")
    (tmp_path / "link").symlink_to("data")
    images, labels, _ = load(tmp_path / "data")
    assert labels.tolist() == [0, 1]
    assert torch.equal(images, load(tmp_path / "link")[0])
    assert len(load(tmp_path / "link", train=False)[0]) == 1


def test_the_order_of_images_is_that_of_their_names(tmp_path):
    """And not that in which a disk happens to list them."""
    names = [f"train/{c}/{i}.png" for c in ("b", "a", "c") for i in (9, 10, 1, 0)]
    for i, name in reversed(list(enumerate(names))):
        save(tmp_path / name, seed=i)
    images, labels, _ = load(tmp_path)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for image, name in zip(images, sorted(names), strict=True):
        assert np.array_equal(image, randsac.decode_image(tmp_path / name, 8))


# --- folders: what is refused


def test_what_cannot_be_trained_on_is_refused_by_what_was_found(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "train is a file").mkdir()
    (tmp_path / "train is a file/train").write_text("")
    plant(tmp_path, "upper/Train/ant/1.png", "high/data/train/ant/1.png", "low/ant/1.png")
    plant(tmp_path, "flat/train/1.png", "tests/test/ant/1.png")
    (tmp_path / "empty/train/ant").mkdir(parents=True)
    found = {"upper": "Train", "high": "data", "low": "ant", "flat": "1.png", "tests": ""}
    found |= {"empty": "", "file": "", "gone": "", "nowhere": "", "train is a file": ""}
    for name, word in found.items():
        message = refusal(tmp_path / name)
        assert str(tmp_path / name) in message and word in message, message
        assert "train/CLASS/" in message and "--data-dir" in message, message


def test_a_class_of_test_alone_is_refused_by_its_name(tmp_path):
    plant(tmp_path, *GOOD, "test/wasp/7.png")
    assert "'wasp'" in refusal(tmp_path) and "train/" in refusal(tmp_path)


# --- one image

MODES = {
    "png": ["RGB", "L", "1", "P", "RGBA", "LA"],
    "jpg": ["CMYK", "L"],
    "bmp": ["RGB"],
    "webp": ["RGB"],
    "tiff": ["RGB", "CMYK"],
    "ppm": ["RGB"],
    "pgm": ["L"],
}


@pytest.mark.parametrize("ending", MODES)
def test_every_mode_gives_its_colour(tmp_path, ending):
    for mode in MODES[ending]:
        path = tmp_path / f"x.{ending}"
        grey = mode in ("L", "LA", "1")
        white = Image.new("RGB", (12, 10), "white")
        white.paste("black" if grey else (40, 120, 200), (0, 0, 6, 10))
        white.convert(mode).save(path)
        left, right = randsac.decode_image(path, 8)[:, 4, [1, 6]].T.astype(int)
        assert abs(right - 255).max() < 12
        wanted = [0, 0, 0] if grey else [40, 120, 200]
        assert abs(left - wanted).max() < 30


def test_every_size_is_decoded(tmp_path):
    for size in [(1, 1), (3, 500), (500, 3), (8, 8), (7, 9)]:
        save(tmp_path / "x.png", size=size)
        assert randsac.decode_image(tmp_path / "x.png", 8).shape == (3, 8, 8)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("moving.png", "moving.webp", "pages.tiff"):
        lossless = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
        assert randsac.decode_image(tmp_path / name, 8)[:, 0, 0].tolist() == [255, 0, 0]


def test_transparency_and_rotation_are_respected(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (randsac.decode_image(tmp_path / "clear.png", 4) == 255).all()
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # top half
    exif = image.getexif()
    exif[0x0112] = 6  # camera held on its side
    image.save(tmp_path / "side.png", exif=exif)
    row = randsac.decode_image(tmp_path / "side.png", 8)[0, 4]
    assert row.tolist() == [0] * 4 + [255] * 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"\xff" * 40, b"MM\0*\0\0\0\xff"])
def test_a_damaged_note_of_the_camera_spoils_no_pixels(tmp_path, exif):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png", exif=exif)
    assert randsac.decode_image(tmp_path / "x.png", 8)[:, 0, 0].tolist() == [255, 0, 0]


def png_of_16_bits(path, kind):
    """A colour PNG with 16 bits a channel, which Pillow reads but does not write. Kind: PNG's
    number for colour (2) or colour and alpha (6)."""

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    channels = {2: 3, 6: 4}[kind]
    row = b"\0" + struct.pack(">H", 300) * channels * 4
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0))
    rest = chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + rest)


def test_more_than_8_bits_are_refused_by_name(tmp_path):
    place = tmp_path / "train/a"
    place.mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(place / "float of 0..1.tiff")
    Image.fromarray(np.full((8, 8), 2048, np.uint16)).save(place / "12 bits in 16.png")
    Image.fromarray(np.full((8, 8), 2048, np.uint16)).save(place / "12 bits in 16.tiff")
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(place / "32 bits.tiff")
    (place / "grey.pgm").write_bytes(b"P5 4 4 65535\n" + b"\x80\xff" * 16)
    png_of_16_bits(place / "colour.png", 2)
    png_of_16_bits(place / "alpha.png", 6)
    message = refusal(tmp_path)
    assert all(str(path) in message for path in place.iterdir())
    assert message.count("8 bits") == 7 and "convert" in message


def test_a_bitmap_with_16_bits_for_a_whole_pixel_is_fine(tmp_path):
    pixels = struct.pack("<H", 0xF800) * 16  # five bits of red, six of green, five of blue
    head = struct.pack("<IHHI", 66 + len(pixels), 0, 0, 66)
    head += struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    head += struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    (tmp_path / "x.bmp").write_bytes(b"BM" + head + pixels)
    assert randsac.decode_image(tmp_path / "x.bmp", 4)[:, 0, 0].tolist() == [255, 0, 0]


def test_pillow_is_asked_for_as_new_as_it_must_be():
    """Older ones have no has_transparency_data, so they would blame every good image."""
    asked = re.search(r"\npillow>=(\d+)\.(\d+)\n", (ROOT / "requirements.txt").read_text())
    assert tuple(map(int, asked.groups())) >= (10, 1)


# --- decoding


def cut_sideways_jpeg(path):
    """Half a photograph, with a note that it must be turned."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_all_broken_images_are_named_in_one_go_and_leave_nothing(tmp_path):
    good = [f"train/a/{i}.png" for i in range(40)]
    plant(tmp_path, *good, "test/a/1.png")
    place = tmp_path / "train/a"
    (place / "cut.png").write_bytes((place / "1.png").read_bytes()[:60])
    cut_sideways_jpeg(place / "side.jpg")
    (place / "empty.jpg").write_bytes(b"")
    (place / "text.png").write_text("<html>404 Not Found</html>")
    (place / "a b ü.png").write_bytes(os.urandom(99))
    Image.new("1", (14_000, 14_000)).save(place / "large.png")  # more than Pillow wants to open
    broken = {path for path in place.iterdir() if not path.stem.isdigit()}
    message = refusal(tmp_path)
    assert message.startswith("6 images") and all(str(path) in message for path in broken)
    for path in broken:
        path.rename(tmp_path / "test/a" / path.name)
    assert refusal(tmp_path, train=False).startswith("6 images")
    assert len(load(tmp_path)[0]) == 40

    # A line has an end, however many there are.
    for i in range(40):
        (place / f"{i}.png").write_text("no image")
    shutil.rmtree("runs")
    message = refusal(tmp_path)
    assert message.startswith("40 images") and len(message) < 10_000


def test_decoded_images_do_not_pile_up_where_the_disk_is_slow(tmp_path, monkeypatch):
    """Counted: how many are decoded and not yet written."""
    paths = [tmp_path / f"{i}.png" for i in range(50)]
    counts = {"decoded": 0, "written": 0, "most": 0}
    open_file = open

    def decode(path, size):
        counts["decoded"] += 1
        return np.zeros((3, size, size), np.uint8)

    def slow(path, mode="r"):
        file = open_file(path, mode, buffering=0)
        write = file.write

        def wait(content):
            time.sleep(0.01)
            counts["most"] = max(counts["most"], counts["decoded"] - counts["written"])
            counts["written"] += len(content) > 3_000_000 - 1
            return write(content)

        file.write = wait
        return file

    monkeypatch.setattr(randsac, "decode_image", decode)
    monkeypatch.setattr(randsac, "open", slow, raising=False)
    randsac.decode_all(paths, 1000, Path("runs/cache/x.npy"))
    assert counts["decoded"] == counts["written"] == 50
    assert 0 < counts["most"] * 3 < 100  # MB


def test_room_is_looked_at_before_anything_is_decoded(tmp_path, monkeypatch):
    plant(tmp_path / "data", *[f"train/a/{i}.png" for i in range(6)])  # 6 of 3 MB are 18 MB
    asked = []

    def free(place):
        asked.append(Path(place).resolve())
        return shutil._ntuple_diskusage(10**12, 10**12 - 17_000_000, 17_000_000)

    monkeypatch.setattr(shutil, "disk_usage", free)
    monkeypatch.setattr(randsac, "decode_image", None)  # whoever called it would fail
    message = refusal(tmp_path / "data", image_size=1000)
    assert "runs/cache" in message and "0.017 GB" in message and "room" in message
    assert asked == [Path("runs/cache").resolve()]  # it may be a link to a larger disk


def test_a_disk_that_fills_up_leaves_no_half_file(tmp_path, monkeypatch):
    plant(tmp_path / "data", "train/a/1.png")

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_room)
    message = refusal(tmp_path / "data")
    assert "No space left" in message and "runs/cache" in message


def test_a_log_file_is_not_flooded_by_bars(image_folder, capsys, monkeypatch):
    """On a clock that moves on by a second whenever it is looked at. Redrawn ten times a second,
    each of the 72 + 24 decoded images would have its line."""
    monkeypatch.setattr(tqdm.std, "time", itertools.count().__next__)
    run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--batch-size", 4, "--epochs", 2)
    said = capsys.readouterr().err
    assert "72/72" in said and "144/144" in said
    assert said.count("\r") < 20


# --- downloads, from a server on this machine


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's form on a loopback server -> its path."""
    served = tmp_path / "served"
    served.mkdir()
    rng = np.random.default_rng(0)
    parts = {}
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        data = rng.integers(0, 255, (4, 3072)).astype(np.uint8)
        parts[name] = pickle.dumps({"data": data, "labels": [0, 1, 2, i]})
    classes = [f"class {i}" for i in range(10)]
    parts["batches.meta"] = pickle.dumps({"label_names": classes})
    archive = served / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for name, content in parts.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=served)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in parts.items()}
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    expected = {
        "url": f"http://127.0.0.1:{server.server_port}/{archive.name}",
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
        "train_list": [[name, md5[name]] for name in md5 if name.startswith("data")],
        "test_list": [["test_batch", md5["test_batch"]]],
        "meta": meta,
    }
    for name, value in expected.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    yield archive
    server.shutdown()
    server.server_close()


def no_server(monkeypatch):
    url = "http://127.0.0.1:9/cifar-10-python.tar.gz"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)


def cifar_in(path):
    return randsac.Config(dataset="cifar10", data_dir=str(path))


def test_download(cifar, tmp_path):
    config = cifar_in(tmp_path / "data")
    images, labels, names = randsac.load_images(config, train=True)
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.uint8
    assert names == [f"class {i}" for i in range(10)]
    with tarfile.open(cifar) as archive:
        first = pickle.load(archive.extractfile("cifar-10-batches-py/data_batch_1"))["data"]
    assert np.array_equal(images[:4].numpy().reshape(4, -1), first)
    assert labels[:4].tolist() == [0, 1, 2, 0]
    assert len(randsac.load_images(config, train=False)[0]) == 4
    cifar.unlink()  # nothing more is fetched
    assert len(randsac.load_images(config, train=True)[0]) == 20


def test_archive_put_there_by_hand(cifar, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    cifar.rename(tmp_path / "data" / cifar.name)
    no_server(monkeypatch)
    assert len(randsac.load_images(cifar_in(tmp_path / "data"), train=True)[0]) == 20


def test_a_users_own_archive_is_kept_when_it_cannot_be_extracted(cifar, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    own = cifar.rename(tmp_path / "data" / cifar.name)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(randsac.UserError, match="No space left"):
        randsac.load_images(cifar_in(tmp_path / "data"), train=True)
    assert own.exists()


FAULTS = ["no server", "404", "cut short", "wrong checksum", "data is a file", "a page, no archive"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_download_says_both_ways_on_and_stands_in_no_later_one_s_way(
    cifar, tmp_path, monkeypatch, fault
):
    whole = cifar.read_bytes()
    server = torchvision.datasets.CIFAR10.url
    data = tmp_path / "data"
    if fault == "no server":
        no_server(monkeypatch)
    elif fault == "404":
        cifar.unlink()
    elif fault == "cut short":
        cifar.write_bytes(whole[: len(whole) // 2])
    elif fault == "wrong checksum":
        cifar.write_bytes(whole[:-1] + b"x")
    elif fault == "data is a file":
        data.write_text("")
    else:
        cifar.write_text("<html>Please log in to this network</html>")
    with pytest.raises(randsac.UserError) as error:
        randsac.load_images(cifar_in(data), train=True)
    message = str(error.value)
    assert "\n" not in message
    assert cifar.name in message and "--dataset shapes" in message and str(data) in message
    assert not (data / "cifar-10-batches-py").exists()

    # What came of the archive is no reason not to fetch it again.
    if fault == "data is a file":
        data.unlink()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", server)
    cifar.write_bytes(whole)
    assert len(randsac.load_images(cifar_in(data), train=True)[0]) == 20


# --- crops


def boxes(crop_scale, n=4000):
    """-> width and height of n random crops as shares of the side, width negative where flipped;
    and the cropped images."""
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(n, 1, 32, 32)
    images = torch.cat([ramp, ramp.transpose(-1, -2), ramp], 1)  # brightness tells x, y, x
    crops = randsac.random_crops(n, crop_scale, generator=randsac.seeded("cpu", 1))
    out = randsac.crop(images, crops, 32)
    whole = 248 / 127.5
    width = (out[:, 0, 0, -1] - out[:, 0, 0, 0]) / whole
    height = (out[:, 1, -1, 0] - out[:, 1, 0, 0]) / whole
    return width, height, out


def test_a_crop_is_a_box_of_the_stated_area_and_half_are_flipped():
    width, height, out = boxes(0.25)
    area = width.abs() * height
    assert area.min() > 0.2 and area.max() <= 1.001 and abs(area.mean() - 0.6) < 0.03
    assert (height > 0).all()
    assert 0.45 < (width < 0).float().mean() < 0.55
    assert 0.8 < (width.abs() / height).log().exp().mean() < 1.2
    assert (out[:, 0, 0] - out[:, 0, -1]).abs().max() < 1e-4  # rows stay rows
    left = torch.minimum(out[:, 0, 0, 0], out[:, 0, 0, -1])
    assert left.min() >= -1.0001 and left.std() > 0.1  # anywhere
    assert out.max() <= 248 / 127.5 - 1 + 1e-4  # never outside


def test_a_crop_that_keeps_the_whole_area_cuts_at_most_one_side():
    width, height, _ = boxes(1.0)
    assert torch.maximum(width.abs(), height).min() > 0.999
    assert width.abs().min() > 0.85 and height.min() > 0.85


def test_crops_are_reproducible_and_resize():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    a, b = (randsac.random_crops(8, 0.3, generator=randsac.seeded("cpu", 7)) for _ in range(2))
    assert torch.equal(a, b)
    assert randsac.crop(images, a, 24).shape == (8, 3, 24, 24)
    assert randsac.normalize(images, 8).shape == (8, 3, 8, 8)


def test_normalize_is_from_minus_one_to_one_and_grey_stays_grey(tmp_path):
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    for size in (4, 2):
        found = randsac.normalize(images, size)[:, 0, 0, 0].tolist()
        assert found == pytest.approx([-1, 1, -0.6], abs=1e-6)
    save(tmp_path / "x.png", "L")
    image = torch.from_numpy(randsac.decode_image(tmp_path / "x.png", 8).copy())[None]
    for x in (randsac.normalize(image, 8), randsac.crop(image, randsac.random_crops(1, 0.3), 8)):
        assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])


# --- held-out images


def test_the_held_out_loss_is_that_of_one_batch_and_takes_a_share_at_a_time():
    """No more images at once than a process has of a batch; the number does not depend on it."""
    model = random_model(micro(segments="blob", hierarchy=(5, 2))).float().eval()
    images = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8)
    sizes = []
    model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    losses = []
    for batch, world in ((40, 1), (8, 1), (14, 2), (3, 3)):
        sizes.clear()
        config = micro(segments="blob", hierarchy=(5, 2), batch_size=batch)
        loss = randsac.held_out_loss(model, images, config, torch.device("cpu"), world)
        losses.append(loss)
        assert sum(sizes) == 30 and max(sizes) == min(30, batch // world)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)

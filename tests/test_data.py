"""Images: drawn, downloaded, or from a folder; augmentation. Nothing broken is ever trained on."""

import fcntl
import functools
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import tarfile
import threading
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, micro
from PIL import Image

import randsac


def folder(path, **settings):
    settings = {"image_size": 8, "patch_size": 2, **settings}
    return randsac.Config(dataset="folder", data_dir=str(path), **settings)


def load(path, train=True, **settings):
    return randsac.load_images(folder(path, **settings), train=train)


def refusal(path, train=True):
    """The line with which a folder is refused."""
    with pytest.raises(randsac.UserError) as error:
        load(path, train)
    message = str(error.value)
    assert "\n" not in message
    return message


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
    sets = [randsac.load_images(config, train)[0].flatten(1) for train in (True, False)]
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


def tree(root):
    """All that lies in a folder, and when it was written."""
    return {path: path.lstat().st_mtime_ns for path in [root, *root.rglob("*")]}


def test_folder_gives_labels_by_class_and_maps_its_cache(image_folder):
    before = tree(image_folder)
    images, labels, names = load(image_folder)
    assert images.shape == (72, 3, 8, 8) and images.dtype == torch.uint8
    assert names == ["ant", "bee", "cat"]
    assert labels.bincount().tolist() == [24] * 3
    for label in range(3):  # each class is brightest in its own channel
        assert images[labels == label].float().mean((0, 2, 3)).argmax() == label
    assert len(load(image_folder, train=False)[0]) == 24

    # The user's own folder is as it was; the cache lies beside it, and is used again.
    assert tree(image_folder) == before
    place = Path(f"{image_folder}.cache")
    caches = {f: f.stat().st_mtime_ns for f in place.glob("*.npy")}
    assert len(caches) >= 2
    assert torch.equal(images, load(image_folder)[0])
    assert caches.items() <= {f: f.stat().st_mtime_ns for f in place.glob("*.npy")}.items()


def test_val_serves_as_test(tmp_path):
    plant(tmp_path, "train/a/1.png", "train/b/2.png", "val/b/3.png")
    assert load(tmp_path, train=False)[1].tolist() == [1]


def test_without_test_images_there_are_none(tmp_path):
    plant(tmp_path, "train/all/1.png", "train/all/2.png")
    assert len(load(tmp_path)[0]) == 2
    images, labels, names = load(tmp_path, train=False)
    assert images.shape == (0, 3, 8, 8) and len(labels) == 0 and names == ["all"]


def test_one_line_says_what_was_found(tmp_path, capsys):
    plant(tmp_path, *GOOD, "train/bee/deep/er/4.JPG")
    for name in ("train/ant/notes.txt", "train/ant/5.gif", "test/bee/6.heic", "train/README"):
        (tmp_path / name).write_text("no image")
    load(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{tmp_path}: 3 images of 2 classes, 1 held out, 3 files left out .gif .heic .txt"
    ]


HIDDEN = [".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", ".git", ".Trash-1000"]


@pytest.mark.parametrize("name", HIDDEN)
def test_entries_of_a_system_are_no_data(tmp_path, name, capsys):
    """Neither as a class, nor in one, nor beside train/; nor are a Mac's shadows of files."""
    plant(tmp_path, *GOOD)
    clean = load(tmp_path)
    found = capsys.readouterr().out
    plant(tmp_path, f"{name}/9.png", f"train/{name}/9.png", f"test/{name}/9.png")
    plant(tmp_path, f"train/ant/{name}/9.png", f"test/bee/{name}/9.png", f"train/{name}/x/9.png")
    (tmp_path / "train/ant/._1.png").write_bytes(b"Mac OS X")
    again = load(tmp_path)
    assert torch.equal(clean[0], again[0]) and torch.equal(clean[1], again[1])
    assert again[2] == ["ant", "bee"]
    assert len(load(tmp_path, train=False)[0]) == 1
    assert capsys.readouterr().out.startswith(found.split(", 0 files")[0])


def test_odd_names_are_names_like_others(tmp_path):
    """Spaces, letters of other languages, marks that a shell reads, and no valid UTF-8 at all."""
    names = ["a b", "ü", "猫", "-x", "$(x)", "new\nline", os.fsdecode(b"\xff\xfe"), "c.png"]
    for i, name in enumerate(names):
        save(tmp_path / "train" / name / f"{name}.png", seed=i)
    images, labels, classes = load(tmp_path)
    assert classes == sorted(names) and labels.tolist() == list(range(8))
    assert len({image.numpy().tobytes() for image in images}) == 8
    assert torch.equal(images, load(tmp_path)[0])


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
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "data", "link", "data.cache"}


def test_the_order_of_images_is_that_of_their_names(tmp_path):
    """And not that in which a disk happens to list them."""
    names = [f"train/{c}/{i}.png" for c in ("b", "a", "c") for i in (9, 10, 1, 0)]
    for i, name in enumerate(names):
        save(tmp_path / "one" / name, seed=i)
    for i, name in reversed(list(enumerate(names))):
        save(tmp_path / "two" / name, seed=i)
    one, labels, _ = load(tmp_path / "one")
    assert torch.equal(one, load(tmp_path / "two")[0])
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for image, name in zip(one, sorted(names)):
        assert np.array_equal(image, randsac.decode_image(tmp_path / "one" / name, 8))


def test_all_ways_to_write_a_place_are_one_place(tmp_path, monkeypatch):
    plant(tmp_path / "data", *GOOD)
    monkeypatch.chdir(tmp_path / "data")
    first, _, _ = load(".")
    (cache,) = (tmp_path / "data.cache").glob("*.npy")
    written = cache.stat().st_mtime_ns
    for way in (tmp_path / "data", f"{tmp_path}/data/", f"{tmp_path}/data/../data/.", "../data"):
        assert torch.equal(first, load(way)[0])
    assert list((tmp_path / "data.cache").glob("*.npy")) == [cache]
    assert cache.stat().st_mtime_ns == written
    assert {p.name for p in tmp_path.iterdir()} == {"data", "data.cache"}


# --- folders: what is refused, each as a change of the good one, with what the line must say

WANTED = "wanted are train/CLASS/ and test/CLASS/ or val/CLASS/"


def move(source, target):
    def change(root):
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / source).rename(root / target)

    return change


def add(*names):
    return lambda root: plant(root, *names)


def link(name, target):
    return lambda root: (root / name).symlink_to(target)


def write(name):
    def change(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")

    return change


REFUSED = {
    "Train": (move("train", "Train"), ["'Train'", WANTED]),
    "TEST": (move("test", "TEST"), ["'TEST'", WANTED]),
    "training": (move("train", "training"), ["'training'", WANTED]),
    "validation": (move("test", "validation"), ["'validation'", WANTED]),
    "one level too high": (lambda r: [move(n, f"x/{n}")(r) for n in ("train", "test")], ["'x'"]),
    "one level too low": (lambda r: [move("train/ant", "ant")(r), shutil.rmtree(r / "train")], []),
    "no train": (lambda r: shutil.rmtree(r / "train"), ["'test'", WANTED]),
    "test and val": (add("val/ant/7.png"), ["'val'", "'test'", WANTED]),
    "a folder beside": (add("masks/ant/7.png"), ["'masks'", WANTED]),
    "an image beside": (add("7.png"), ["no class", "7.png", WANTED]),
    "an image beside the classes": (add("train/7.png"), ["train", "no class", "7.png"]),
    "flat test": (add("test/7.JPEG"), ["test", "no class", "7.JPEG"]),
    "a class of test alone": (add("test/wasp/7.png"), ["test", "train/ has not", "'wasp'"]),
    "an empty class": (lambda r: (r / "train/cat").mkdir(), ["no images", "'cat'"]),
    "a class without images": (write("train/cat/1.gif"), ["no images", "'cat'"]),
    "no class at all": (
        lambda r: [shutil.rmtree(r / "test"), shutil.rmtree(r / "train"), (r / "train").mkdir()],
        ["no images", "train"],
    ),
    "train is a file": (lambda r: [shutil.rmtree(r / "train"), write("train")(r)], ["'test'"]),
    "archives": (lambda r: [shutil.rmtree(r / n) for n in ("train", "test")] + [write("a.zip")(r)],
                 [WANTED]),
    "a class's link leads nowhere": (link("train/cat", "/no/such"), ["nowhere", "'cat'"]),
    "train's link leads nowhere": (
        lambda r: [shutil.rmtree(r / "train"), link("train", "/no/such")(r)],
        ["nowhere", "'train'"],
    ),
    "a link in a class": (link("train/ant/more", "../bee"), ["links to folders", "train/ant/more"]),
    "a link in circles": (link("train/ant/up", ".."), ["links to folders", "train/ant/up"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_layout_is_refused_by_what_was_found(tmp_path, name):
    root = tmp_path / "data"
    plant(root, *GOOD)
    load(root)  # it was a good one
    shutil.rmtree(tmp_path / "data.cache")
    change, words = REFUSED[name]
    change(root)
    message = refusal(root)
    assert str(root) in message
    assert all(word in message for word in words), message
    left = [p for p in tmp_path.rglob("*") if p.suffix in (".npy", ".part")]
    assert left == []


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("nowhere")
    for name in ("nowhere", "file", "gone", "file/deeper"):
        message = refusal(tmp_path / name)
        assert f"{tmp_path / name} is not a folder" in message and "--data-dir" in message
    assert {p.name for p in tmp_path.iterdir()} == {"file", "gone"}


def test_config_is_checked_before_data_is_touched(tmp_path):
    with pytest.raises(randsac.UserError, match="--patch-size 5"):
        micro(dataset="folder", data_dir=str(tmp_path / "nowhere"), patch_size=5)


# --- one image

ENDINGS = [
    ("RGB", "png"),
    ("L", "png"),
    ("1", "png"),
    ("P", "png"),
    ("RGBA", "png"),
    ("LA", "png"),
    ("CMYK", "jpg"),
    ("L", "jpg"),
    ("RGB", "bmp"),
    ("RGB", "webp"),
    ("RGB", "tiff"),
    ("CMYK", "tiff"),
    ("RGB", "ppm"),
    ("L", "pgm"),
]


@pytest.mark.parametrize("mode, ending", ENDINGS)
def test_every_mode_gives_its_colour(tmp_path, mode, ending):
    path = tmp_path / f"x.{ending}"
    white = Image.new("RGB", (12, 10), "white")
    white.paste((40, 120, 200) if mode not in ("L", "LA", "1") else "black", (0, 0, 6, 10))
    white.convert(mode).save(path)
    left, right = randsac.decode_image(path, 8)[:, 4, [1, 6]].T.astype(int)
    assert abs(right - 255).max() < 12
    wanted = [0, 0, 0] if mode in ("L", "LA", "1") else [40, 120, 200]
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


DEEP = {
    "float of 0..1.tiff": np.full((8, 8), 0.5, np.float32),
    "12 bits in 16.png": np.full((8, 8), 2048, np.uint16),
    "12 bits in 16.tiff": np.full((8, 8), 2048, np.uint16),
    "32 bits.tiff": np.full((8, 8), 70_000, np.int32),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_refused_by_name(tmp_path, name):
    path = tmp_path / "train/a" / name
    path.parent.mkdir(parents=True)
    Image.fromarray(DEEP[name]).save(path)
    message = refusal(tmp_path)
    assert str(path) in message and "8 bits" in message and "convert" in message


def png_of_16_bits(path, kind):
    """A colour PNG with 16 bits a channel, which Pillow reads but does not write. Kind: PNG's
    number for colour (2) or colour and alpha (6)."""

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    channels = {2: 3, 6: 4}[kind]
    row = b"\0" + struct.pack(">H", 300) * channels * 4
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(row * 4))
        + chunk(b"IEND", b"")
    )


def test_a_grey_map_of_16_bits_is_refused(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 4 4 65535\n" + b"\x80\xff" * 16)
    with pytest.raises(randsac.UserError, match="8 bits"):
        randsac.decode_image(tmp_path / "x.pgm", 4)


@pytest.mark.parametrize("kind", [2, 6])
def test_colour_of_16_bits_is_refused(tmp_path, kind):
    png_of_16_bits(tmp_path / "x.png", kind)
    with pytest.raises(randsac.UserError, match="8 bits"):
        randsac.decode_image(tmp_path / "x.png", 4)


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


# --- broken images


def cut_png(path):
    save(path)
    path.write_bytes(path.read_bytes()[:60])


def cut_sideways_jpeg(path):
    """Half a photograph, with a note that it must be turned."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def too_large(path):
    """More pixels than Pillow is willing to open."""
    Image.new("1", (14_000, 14_000)).save(path)


BROKEN = {
    "large.png": too_large,
    "cut.png": cut_png,
    "side.jpg": cut_sideways_jpeg,
    "empty.jpg": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_text("<html>404 Not Found</html>"),
    "a b ü.png": lambda path: path.write_bytes(os.urandom(99)),
    "link.png": lambda path: path.symlink_to("nowhere.png"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_image_is_named_and_leaves_no_cache(tmp_path, name, split):
    plant(tmp_path / "data", *GOOD)
    path = tmp_path / "data" / split / "bee" / name
    BROKEN[name](path)
    message = refusal(tmp_path / "data", train=split == "train")
    assert message.startswith("1 images cannot be used") and str(path) in message
    assert list(tmp_path.rglob("*.npy*")) == []
    path.unlink()
    assert len(load(tmp_path / "data")[0]) == 2


def test_all_broken_images_are_named_in_one_go(tmp_path):
    plant(tmp_path, *[f"train/a/{i}.png" for i in range(95)])
    broken = {f"{tmp_path}/train/a/{i}.png" for i in (3, 20, 41, 66, 94)}
    for path in broken:
        Path(path).write_text("no image")
    message = refusal(tmp_path)
    assert message.startswith("5 images cannot be used")
    assert set(re.findall(r"(\S+\.png) \(", message)) == broken
    for i in range(60):
        (tmp_path / f"train/a/{i}.png").write_text("no image")
    message = refusal(tmp_path)
    assert message.startswith("62 images cannot be used")
    assert len(message) < 10_000


# --- the cache


@pytest.fixture
def cached(tmp_path):
    """-> a folder of four images that has been read, and its cache."""
    root = tmp_path / "data"
    plant(root, *[f"train/a/{i}.png" for i in range(4)])
    load(root)
    (cache,) = (tmp_path / "data.cache").glob("*.npy")
    return root, cache


DAMAGE = {
    "cut short": lambda whole: whole[:-7],
    "empty": lambda whole: b"",
    "no end of its header": lambda whole: whole[:40],
    "scrambled": lambda whole: b"x" * len(whole),
    "longer header": lambda whole: whole[:8] + b"\xff\xff" + whole[10:],
    "of another shape": lambda whole: whole.replace(b"(4, 3, 8, 8)", b"(4, 3, 8, 7)"),
    "of another type": lambda whole: whole.replace(b"|u1", b"|i1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_anew(cached, damage):
    root, cache = cached
    images = load(root)[0].clone()
    whole = cache.read_bytes()
    damaged = DAMAGE[damage](whole)
    assert damaged != whole
    cache.unlink()  # a new file: the old one may still be mapped
    cache.write_bytes(damaged)
    assert torch.equal(images, load(root)[0])
    assert cache.read_bytes() == whole


def test_any_flipped_bit_of_a_caches_header_is_found_or_harmless(cached):
    root, cache = cached
    images = load(root)[0].clone()
    whole = cache.read_bytes()
    for place in np.random.default_rng(0).integers(0, 8 * 128, 60):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        cache.unlink(missing_ok=True)
        cache.write_bytes(damaged)
        again = load(root)[0]
        assert again.dtype == torch.uint8 and torch.equal(images, again)


def test_another_size_or_image_makes_another_cache(cached):
    root, cache = cached
    assert load(root, image_size=16)[0].shape == (4, 3, 16, 16)
    assert cache.exists()
    plant(root, "train/a/9.png")
    assert load(root)[0].shape == (5, 3, 8, 8)
    # The outdated one goes, that of another size stays.
    left = [f.name for f in cache.parent.glob("*.npy")]
    assert len(left) == 2 and cache.name not in left
    # An image that is replaced by another of the same name.
    before = load(root)[0].clone()
    save(root / "train/a/9.png", seed=77)
    os.utime(root / "train/a/9.png", (1, 1))
    assert not torch.equal(before, load(root)[0])


def test_what_a_killed_run_left_in_the_cache_goes(cached):
    root, cache = cached
    part = cache.with_name(cache.name.replace(".npy", "0.npy.part"))
    part.write_bytes(b"half of the images")
    plant(root, "train/a/9.png")
    load(root)
    assert not part.exists() and not cache.exists()
    assert len(list(cache.parent.glob("*.npy"))) == 1


@pytest.mark.parametrize("other", ["decodes", "is killed"])
def test_while_one_process_decodes_a_folder_another_waits(cached, monkeypatch, capsys, other):
    """As the jobs of an array do, that start at once."""
    root, cache = cached
    whole = cache.read_bytes()
    cache.unlink()
    decoded = []
    decode_all = randsac.decode_all
    monkeypatch.setattr(randsac, "decode_all", lambda *given: decoded.append(decode_all(*given)))
    with ThreadPool(1) as pool:
        with open(cache.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = pool.apply_async(load, [root])
            with pytest.raises(multiprocessing.TimeoutError):
                waiting.get(0.5)
            assert f"another process decodes {root}" in capsys.readouterr().out
            if other == "decodes":
                cache.write_bytes(whole)
        assert len(waiting.get(30)[0]) == 4
    assert len(decoded) == (other == "is killed")


def test_a_full_disk_leaves_no_half_cache(tmp_path, monkeypatch):
    plant(tmp_path / "data", "train/a/1.png")

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_room)
    message = refusal(tmp_path / "data")
    assert "No space left" in message and "data.cache" in message and "make room" in message
    assert list((tmp_path / "data.cache").glob("*.npy*")) == []


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


def test_a_users_own_archive_is_kept_when_there_is_no_room_to_extract_it(
    cifar, tmp_path, monkeypatch
):
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


# --- augmentation


def boxes(crop_scale, n=4000):
    """-> width and height of n random crops as shares of the side, width negative where flipped;
    and the crops."""
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(n, 1, 32, 32)
    images = torch.cat([ramp, ramp.transpose(-1, -2), ramp], 1)  # brightness tells x, y, x
    out = randsac.augment(images, 32, crop_scale, randsac.seeded("cpu", 1))
    whole = 248 / 127.5
    width = (out[:, 0, 0, -1] - out[:, 0, 0, 0]) / whole
    height = (out[:, 1, -1, 0] - out[:, 1, 0, 0]) / whole
    return width, height, out


def test_augment_crops_a_box_of_the_stated_area_and_flips_half():
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


def test_augment_that_keeps_the_whole_area_cuts_at_most_one_side():
    width, height, _ = boxes(1.0)
    assert torch.maximum(width.abs(), height).min() > 0.999
    assert width.abs().min() > 0.85 and height.min() > 0.85


def test_augment_is_reproducible_and_resizes():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    a, b = (randsac.augment(images, 24, 0.3, randsac.seeded("cpu", 7)) for _ in range(2))
    assert a.shape == (8, 3, 24, 24) and torch.equal(a, b)
    assert randsac.normalize(images, 16).min() >= -1
    assert randsac.normalize(images, 8).shape == (8, 3, 8, 8)


def test_grey_stays_grey(tmp_path):
    """All channels have the same mean and deviation, in whole images and in crops."""
    save(tmp_path / "x.png", "L")
    image = torch.from_numpy(randsac.decode_image(tmp_path / "x.png", 8).copy())[None]
    for x in (randsac.normalize(image, 8), randsac.augment(image, 8)):
        assert torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])


def test_normalize_is_from_minus_one_to_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    for size in (4, 2):
        found = randsac.normalize(images, size)[:, 0, 0, 0].tolist()
        assert found == pytest.approx([-1, 1, -0.6], abs=1e-6)

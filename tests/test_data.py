"""Images: drawn, downloaded, or from a folder; crops. Nothing broken is ever trained on."""

import base64
import contextlib
import functools
import hashlib
import http.server
import itertools
import os
import pickle
import re
import shutil
import struct
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
import tqdm
from conftest import MICRO_FLAGS, ROOT, micro, random_model, refusal, run_here
from PIL import Image
from test_training import random_batch

import randsac


def load(path, train=True, **settings):
    settings = {"image_size": 8, "patch_size": 2, **settings}
    config = randsac.Config(dataset="folder", data_dir=str(path), **settings)
    return randsac.load_images(config, train)


def refused(path, train=True, **settings):
    """The line with which a folder is refused. Nothing decoded is left of it."""
    said = refusal(load, path, train, **settings)
    assert decoded() == {}
    return said


def decoded():
    """The files of decoded images, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in Path("runs/cache").glob("*")}


def test_shapes_are_the_same_every_time_evenly_split_and_others_in_the_test_set():
    config = micro(image_size=8, patch_size=2)
    images, labels, names = randsac.load_images(config, train=True)
    assert images.shape == (20_000, 3, 8, 8) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [2000] * 10 and len(names) == 10
    assert torch.equal(images[:2000], randsac.draw_shapes(2000, 8, seed=1)[0])
    known = {image.numpy().tobytes() for image in images}
    held_out, _, _ = randsac.load_images(config, train=False)
    assert len(held_out) == 4000
    assert not any(image.numpy().tobytes() in known for image in held_out)


def test_colours_of_shapes_say_nothing_of_the_class():
    images, labels, _ = randsac.draw_shapes(20_000, 16, seed=1)
    means = torch.stack([images[labels == k].float().mean((0, 2, 3)) for k in range(10)])  # [10,3]
    assert means.std(0).max() < 5  # of 255
    flat = images.float().flatten(1) / 255
    known = flat[:10_000]
    centroids = torch.stack([known[labels[:10_000] == k].mean(0) for k in range(10)])
    nearest = torch.cdist(flat[10_000:], centroids).argmin(1)
    assert (nearest == labels[10_000:]).float().mean() < 0.3  # raw pixels do poorly


# --- folders


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
    images, labels, classes = load(image_folder)
    assert images.shape == (72, 3, 8, 8) and images.dtype == torch.uint8
    assert classes == ["ant", "bee", "cat"]
    assert labels.bincount().tolist() == [24] * 3
    for label in range(3):  # each class is brightest in its own channel
        assert images[labels == label].float().mean((0, 2, 3)).argmax() == label
    assert len(load(image_folder, train=False)[0]) == 24

    # They may be larger than memory: Linux maps such a file only where nobody may write to it.
    maps = Path("/proc/self/maps").read_text().splitlines()
    mine = [line.split()[1] for line in maps if str(Path.cwd()) in line]
    assert mine and set(mine) <= {"r--s", "r--p"}

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

    # Two folders whose files have the same names and sizes.
    save(tmp_path / "one/train/a/1.bmp", seed=1)
    save(tmp_path / "two/train/a/1.bmp", seed=2)
    assert not torch.equal(load(tmp_path / "one")[0], load(tmp_path / "two")[0])

    # What a machine that failed has left of a file.
    for path in decoded():
        path.unlink()
        path.touch()
    assert load(tmp_path / "data")[0].shape == (3, 3, 8, 8)


def test_val_serves_as_test_and_links_are_followed(tmp_path):
    """To the whole, to a class, to the test images, of which there may be none."""
    plant(tmp_path / "disk", "ants/1.png", "tests/bee/3.png", "data/train/bee/2.png")
    (tmp_path / "disk/data/train/ant").symlink_to("../../ants")
    (tmp_path / "link").symlink_to("disk/data")
    images, labels, classes = load(tmp_path / "link", train=False)
    assert images.shape == (0, 3, 8, 8) and len(labels) == 0 and classes == ["ant", "bee"]
    (tmp_path / "disk/data/val").symlink_to(tmp_path / "disk/tests")
    assert load(tmp_path / "link", train=False)[1].tolist() == [1]
    assert load(tmp_path / "link")[1].tolist() == [0, 1]
    assert randsac.list_folder(tmp_path / "link")[3] == []  # nothing is left out


def test_before_training_lines_say_what_was_found_and_what_is_about_to_happen(tmp_path, capsys):
    data = tmp_path / "photos"
    plant(data, *GOOD, "train/bee/deep/er/4.JPG", "train/.thumbnails/9.png", "train/5.png")
    for name in ("train/ant/notes.txt", "train/ant/5.gif", "test/bee/6.heic", "README"):
        (data / name).write_text("no image")
    (data / "masks").mkdir()
    (data / "train/ant/circle").symlink_to(data)
    flags = [*MICRO_FLAGS, "--data-dir", data, "--batch-size", 2, "--max-steps", 1]
    run_here(*flags, "--dim", 256, "--depth", 3, "--out", "large")
    text = capsys.readouterr().out
    words = ["3 images of 2 classes", "1 held out", "5 files", "3 folders", "8 x 8", "16 tokens"]
    words += [str(data), "--image-size", ".txt", ".gif", ".heic", ".png", ".thumbnails", "masks"]
    words += ["circle", "README", "3.43 million parameters", "cpu", "float32", "1 steps of 2"]
    assert all(word in text for word in words), text

    # Without a GPU two flags are named with which a larger model's run ends within the hour.
    [given] = re.findall("GPU.*; with (.*) it ends", text)
    config = randsac.Config(**vars(randsac.make_parser("").parse_args(given.split())))
    assert (config.model, config.max_steps) == ("nano", 5000)
    run_here(*flags, "--out", "small")
    assert "GPU" not in capsys.readouterr().out


def test_a_batch_larger_than_the_data_names_the_largest(image_folder):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--max-steps", 1, "--batch-size"]
    said = refusal(run_here, *flags, 73)
    assert "--batch-size 73 " in said and "72" in said
    assert run_here(*flags, 72) == 0


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

    # Names of people, of modules, of money. Images stand in the order of their names, and not in
    # that in which a disk happens to list them.
    names = ["@anna", "@ben", "__init__", "$5", "lost", "@eaDir2", "-x", "a b", "ü", "猫", "c.png"]
    names += ["new\nline", os.fsdecode(b"\xff\xfe")]
    files = [f"train/{name}/{i}.png" for name in sorted(names) for i in (0, 1, 10, 9)]
    plant(tmp_path / "odd", *reversed(files))
    images, labels, classes = load(tmp_path / "odd")
    assert classes == sorted(names) and labels.tolist() == [i // 4 for i in range(len(files))]
    for image, file in zip(images, files, strict=True):
        assert np.array_equal(image, randsac.decode_image(tmp_path / "odd" / file, 8))


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("nowhere")
    plant(tmp_path, "upper/Train/ant/1.png", "high/data/train/ant/1.png", "low/ant/1.png")
    plant(tmp_path, "flat/train/1.png", "tests/test/ant/1.png")
    (tmp_path / "empty/train/ant").mkdir(parents=True)
    for name in ["upper", "high", "low", "flat", "tests", "empty", "file", "gone", "nowhere"]:
        message = refused(tmp_path / name)
        assert message.startswith(f"{tmp_path / name} has no image in train/CLASS/"), message
    plant(tmp_path / "more", *GOOD, "test/wasp/7.png")
    assert "'wasp'" in refused(tmp_path / "more")


# --- decoding

MODES = "1.png L.png P.png LA.png RGB.png RGBA.png L.jpg CMYK.jpg RGB.bmp RGB.webp RGB.tiff "
MODES += "CMYK.tiff RGB.ppm L.pgm"


@pytest.mark.parametrize("name", MODES.split())
def test_every_mode_gives_its_colour(name):
    mode = name.partition(".")[0]
    grey = mode in ("L", "LA", "1")
    white = Image.new("RGB", (12, 10), "white")
    white.paste("black" if grey else (40, 120, 200), (0, 0, 6, 10))
    white.convert(mode).save(name)
    left, right = randsac.decode_image(name, 8)[:, 4, [1, 6]].T.astype(int)
    assert abs(right - 255).max() < 12
    assert abs(left - ([0, 0, 0] if grey else [40, 120, 200])).max() < 30


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_unusual_files_have_their_colour():
    """The first frame of an animation; a photograph whose camera's note is damaged; a bitmap with
    16 bits for a whole pixel: five of red, six of green, five of blue."""
    red = Image.new("RGB", (8, 8), "red")
    others = [Image.new("RGB", (8, 8), "blue")]
    for name in ("moving.png", "moving.webp", "pages.tiff"):
        red.save(name, save_all=True, append_images=others, lossless=True)
    for i, exif in enumerate((b"Exif\0\0nonsense", b"\xff" * 40, b"MM\0*\0\0\0\xff")):
        red.save(f"{i}.png", exif=exif)
    pixels = struct.pack("<H", 0xF800) * 16
    head = struct.pack("<IHHI", 66 + len(pixels), 0, 0, 66)
    head += struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    head += struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    Path("16.bmp").write_bytes(b"BM" + head + pixels)
    for path in Path().iterdir():
        assert randsac.decode_image(path, 4)[:, 0, 0].tolist() == [255, 0, 0], path


def test_transparency_rotation_and_any_size_are_respected(tmp_path):
    for size in [(1, 1), (3, 500), (500, 3), (8, 8), (7, 9)]:
        save(tmp_path / "x.png", size=size)
        assert randsac.decode_image(tmp_path / "x.png", 8).shape == (3, 8, 8)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (randsac.decode_image(tmp_path / "clear.png", 4) == 255).all()
    [asked] = re.findall(r"\npillow>=(\d+\.\d)\n", (ROOT / "requirements.txt").read_text())
    assert float(asked) >= 10.1  # older ones know of no transparency
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # top half
    exif = image.getexif()
    exif[0x0112] = 6  # camera held on its side
    image.save(tmp_path / "side.png", exif=exif)
    row = randsac.decode_image(tmp_path / "side.png", 8)[0, 4]
    assert row.tolist() == [0] * 4 + [255] * 4


# Colour with 16 bits a channel, which Pillow reads but does not write.
PNG_16 = "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAEEAIAAAB2A9VqAAAAEElEQVR42mNg1MEOGagnAQCiSwhxErV2PgAAAABJ"
PNG_16 += "RU5ErkJggg=="


def test_more_than_8_bits_are_refused_by_name(tmp_path):
    place = tmp_path / "train/a"
    place.mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(place / "float of 0..1.tiff")
    Image.fromarray(np.full((8, 8), 2048, np.uint16)).save(place / "12 bits in 16.png")
    (place / "grey.pgm").write_bytes(b"P5 4 4 65535\n" + b"\x80\xff" * 16)
    (place / "colour.png").write_bytes(base64.b64decode(PNG_16))
    message = refused(tmp_path)
    assert all(str(path) in message for path in place.iterdir())
    assert message.count("8 bits") == 4 and "convert" in message


def test_all_broken_images_are_named_in_one_go_and_leave_nothing(tmp_path):
    plant(tmp_path, *[f"train/a/{i}.png" for i in range(24)], "test/a/1.png")
    place = tmp_path / "train/a"
    (place / "cut.png").write_bytes((place / "1.png").read_bytes()[:60])
    exif = Image.Exif()
    exif[0x0112] = 6  # half a photograph that must be turned
    save(place / "side.jpg", size=(64, 64), exif=exif)
    os.truncate(place / "side.jpg", (place / "side.jpg").stat().st_size * 2 // 3)
    (place / "empty.jpg").write_bytes(b"")
    (place / "text.png").write_text("<html>404 Not Found</html>")
    (place / "a b ü.png").write_bytes(os.urandom(99))
    Image.new("1", (14_000, 14_000)).save(place / "large.png")  # more than Pillow wants to open
    broken = [path for path in place.iterdir() if not path.stem.isdigit()]
    message = refused(tmp_path)
    assert message.startswith("6 images") and all(str(path) in message for path in broken)
    for path in broken:
        path.rename(tmp_path / "test/a" / path.name)
    assert refused(tmp_path, train=False).startswith("6 images")

    # A line has an end, however many there are.
    for path in place.iterdir():
        path.write_text("no image")
    message = refused(tmp_path)
    assert message.startswith("24 images") and message.count("; ") == 19


def test_decoded_images_do_not_pile_up_where_the_disk_is_slow(monkeypatch):
    decoded = []
    waiting = []  # how many were decoded and not yet written, at each write

    def decode(path, size):
        decoded.append(path)
        return np.zeros((3, size, size), np.uint8)

    def write(content):
        time.sleep(0.01)
        waiting.append(len(decoded) - len(waiting))

    slow = contextlib.nullcontext(SimpleNamespace(write=write))
    monkeypatch.setattr(randsac, "decode_image", decode)
    monkeypatch.setattr(randsac, "write_whole", lambda path: slow)
    randsac.decode_all([Path(str(i)) for i in range(50)], 1000, Path("runs/cache/x.npy"))
    assert len(decoded) == 50 and len(waiting) == 51  # with the file's head
    assert max(waiting) * 3 < 100  # MB


def test_room_is_looked_at_before_anything_is_decoded(tmp_path, monkeypatch):
    plant(tmp_path / "data", *[f"train/a/{i}.png" for i in range(6)])  # 6 of 3 MB are 18 MB
    free = {"runs/cache": 17_000_000}  # which may be a link to a larger disk
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free[str(place)]))
    monkeypatch.setattr(randsac, "decode_image", None)  # whoever called it would fail
    message = refused(tmp_path / "data", image_size=1000)
    assert "runs/cache" in message and "0.02 GB" in message, message


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
    place = tmp_path / "served/cifar-10-batches-py"
    place.mkdir(parents=True)
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    (place / "batches.meta").write_bytes(pickle.dumps(meta))
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        data = np.random.default_rng(i).integers(0, 255, (4, 3072)).astype(np.uint8)
        (place / name).write_bytes(pickle.dumps({"data": data, "labels": [0, 1, 2, i]}))
    known = torchvision.datasets.CIFAR10
    archive = place.parent / known.filename
    stem = str(archive).removesuffix(".tar.gz")
    shutil.make_archive(stem, "gztar", place.parent, place.name)

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    monkeypatch.setattr(known, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(known, "train_list", [[name, None] for name in names[:-1]])
    monkeypatch.setattr(known, "test_list", [["test_batch", None]])
    monkeypatch.setitem(known.meta, "md5", None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(known, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield archive
        server.shutdown()


def cifar_images(place, train=True):
    return randsac.load_images(randsac.Config(dataset="cifar10", data_dir=str(place)), train)


def test_download(cifar, tmp_path):
    images, labels, names = cifar_images(tmp_path / "data")
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.uint8
    assert names == [f"class {i}" for i in range(10)]
    first = pickle.loads((cifar.parent / "cifar-10-batches-py/data_batch_1").read_bytes())
    assert np.array_equal(images[:4].numpy().reshape(4, -1), first["data"])
    assert labels[:4].tolist() == [0, 1, 2, 0]
    cifar.unlink()  # nothing more is fetched
    assert len(cifar_images(tmp_path / "data", train=False)[0]) == 4


def test_a_failed_download_stands_in_no_later_ones_way(cifar, tmp_path, monkeypatch):
    data = tmp_path / "data"
    whole = cifar.read_bytes()

    def check_refusal(place=data):
        said = refusal(cifar_images, place)
        assert all(word in said for word in (cifar.name, "--dataset shapes", str(place))), said
        assert not (place / "cifar-10-batches-py").exists()

    def no_room(*_, **given):
        raise OSError(28, "No space left on device")

    for content in (whole[: len(whole) // 2], whole[:-1] + b"x", b"<html>Please log in</html>"):
        cifar.write_bytes(content)
        check_refusal()
    cifar.rename(data / "elsewhere")
    check_refusal()
    with monkeypatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:9/{cifar.name}")
        check_refusal()
    (tmp_path / "file").write_text("")
    check_refusal(tmp_path / "file")
    cifar.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", no_room)
        check_refusal()

    # The archive is there now, as one that was put there by hand. It is taken and kept.
    cifar.unlink()
    assert len(cifar_images(data)[0]) == 20 and (data / cifar.name).exists()


# --- crops, held-out images


def test_a_crop_is_a_box_of_the_stated_area_and_half_are_flipped():
    """As affine maps. test_training.py shows what they make of an image."""

    def drawn(crop_scale):
        return randsac.random_crops(2000, crop_scale, generator=randsac.seeded("cpu", 1))

    crops = drawn(0.25)
    assert torch.equal(crops, drawn(0.25))
    (width, x_of_y, x), (y_of_x, height, y) = crops.permute(1, 2, 0)
    area = width.abs() * height
    assert area.min() > 0.2 and area.max() <= 1.001
    assert 0.57 < area.mean() < 0.63
    assert (height > 0).all() and not x_of_y.any() and not y_of_x.any()
    assert 0.45 < (width < 0).float().mean() < 0.55
    assert 0.8 < (width.abs() / height).log().exp().mean() < 1.2
    for side, place in ((width.abs(), x), (height, y)):
        assert (side + place.abs()).max() < 1.0001  # never outside
        assert place.std() > 0.1 and abs(place.mean()) < 0.05  # anywhere

    # One that keeps the whole area cuts at most one side.
    sides = drawn(1.0)[:, [0, 1], [0, 1]].abs()
    assert sides.max(1).values.min() > 0.999 and sides.min() > 0.85


def test_normalize_is_from_minus_one_to_one_in_every_channel():
    for value, expected in ((0, -1.0), (255, 1.0), (51, -0.6)):
        image = torch.full((1, 3, 4, 4), value, dtype=torch.uint8)
        for size in (4, 2):
            found = randsac.normalize(image, size)
            torch.testing.assert_close(found, torch.full((1, 3, size, size), expected))


def test_the_held_out_loss_is_that_of_one_batch_and_takes_a_share_at_a_time():
    """No more images at once than a process has of a batch; the number does not depend on it."""
    model = random_model(micro(segments="blob", hierarchy=(5, 2))).float().eval()
    images = random_batch(30)
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

"""Images: drawn, downloaded, or from a folder; augmentation. Nothing broken is ever trained on."""
import functools
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
import torchvision
from conftest import micro
from PIL import Image

import randsac


def folder(path, **settings):
    return randsac.Config(dataset="folder", data_dir=str(path), image_size=8, patch_size=2, **settings)


# --- shapes

def test_shapes_are_the_same_every_time_and_evenly_split():
    images, labels, names = randsac.draw_shapes(500, 32, seed=1)
    again, _, _ = randsac.draw_shapes(500, 32, seed=1)
    assert images.shape == (500, 3, 32, 32) and images.dtype == torch.uint8 and torch.equal(images, again)
    assert labels.bincount().tolist() == [50] * 10 and len(names) == 10
    assert not torch.equal(images, randsac.draw_shapes(500, 32, seed=0)[0])


def test_colours_of_shapes_say_nothing_of_the_class():
    images, labels, _ = randsac.draw_shapes(20_000, 16, seed=1)
    means = torch.stack([images[labels == k].float().mean((0, 2, 3)) for k in range(10)])  # [10,3]
    assert means.std(0).max() < 5  # of 255
    flat = images.float().flatten(1) / 255
    centroids = torch.stack([flat[:10_000][labels[:10_000] == k].mean(0) for k in range(10)])
    nearest = torch.cdist(flat[10_000:], centroids).argmin(1)
    assert (nearest == labels[10_000:]).float().mean() < 0.3  # raw pixels do poorly


# --- folders

def test_folder_gives_labels_by_class_and_maps_its_cache(image_folder, capsys):
    images, labels, names = randsac.load_images(folder(image_folder), train=True)
    assert images.shape == (72, 3, 8, 8) and names == ["ant", "bee", "cat"]
    assert labels.bincount().tolist() == [24] * 3
    for label in range(3):  # each class is brightest in its own channel
        assert images[labels == label].float().mean((0, 2, 3)).argmax() == label
    caches = {f: f.stat().st_mtime_ns for f in (image_folder / "randsac-cache").iterdir()}
    again, _, _ = randsac.load_images(folder(image_folder), train=True)
    assert torch.equal(images, again)
    assert caches.items() <= {f: f.stat().st_mtime_ns for f in (image_folder / "randsac-cache").iterdir()}.items()
    assert len(randsac.load_images(folder(image_folder), train=False)[0]) == 24


def save(path, mode="RGB", size=(12, 10), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)).convert(mode).save(path, **kwargs)


def test_flat_folder_has_no_labels_and_no_test_images(tmp_path):
    for i in range(5):
        save(tmp_path / "deep er" / f"ü {i}.png")
    images, labels, names = randsac.load_images(folder(tmp_path), train=True)
    assert len(images) == 5 and labels.tolist() == [-1] * 5 and names == []
    assert len(randsac.load_images(folder(tmp_path), train=False)[0]) == 0


@pytest.mark.parametrize("name", ["test", "val"])
def test_test_images_are_never_among_images_without_classes(tmp_path, name):
    save(tmp_path / "photos" / "1.png"), save(tmp_path / name / "2.png")
    with pytest.raises(ValueError, match="no train/"):
        randsac.load_images(folder(tmp_path), train=True)
    (tmp_path / "photos").rename(tmp_path / "train")
    assert len(randsac.load_images(folder(tmp_path), train=True)[0]) == 1


def test_a_file_beside_the_classes_is_no_class(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "a" / "1.png")
        (tmp_path / split / "notes.txt").write_text("no class")
    assert randsac.load_images(folder(tmp_path), train=True)[2] == ["a"]
    assert len(randsac.load_images(folder(tmp_path), train=False)[0]) == 1


def test_val_serves_as_test_and_loose_class_is_refused(tmp_path):
    save(tmp_path / "train" / "a" / "1.png"), save(tmp_path / "train" / "b" / "1.png"), save(tmp_path / "val" / "b" / "2.png")
    assert randsac.load_images(folder(tmp_path), train=False)[1].tolist() == [1]
    save(tmp_path / "val" / "c" / "3.png")
    with pytest.raises(ValueError, match="'?c'?"):
        randsac.load_images(folder(tmp_path), train=False)


def test_every_mode_and_size_is_decoded(tmp_path):
    for mode, ending in [("RGB", "png"), ("L", "png"), ("1", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"),
                         ("CMYK", "jpg"), ("L", "jpg"), ("RGB", "bmp"), ("RGB", "webp"), ("RGB", "tiff")]:
        save(tmp_path / f"{mode}.{ending}", mode)
    save(tmp_path / "one.png", size=(1, 1)), save(tmp_path / "tall.png", size=(3, 500))
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    images, _, _ = randsac.load_images(folder(tmp_path), train=True)
    assert len(images) == 14
    assert randsac.decode(tmp_path / "moving.png", 8)[:, 0, 0].tolist() == [255, 0, 0]  # the first frame


def test_16_bits_transparency_and_rotation_are_respected(tmp_path):
    Image.fromarray(np.full((8, 8), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    assert (randsac.decode(tmp_path / "deep.png", 4) == 0x80).all()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (randsac.decode(tmp_path / "clear.png", 4) == 255).all()
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # top half
    exif = image.getexif()
    exif[0x0112] = 6  # camera held on its side
    image.save(tmp_path / "side.png", exif=exif)
    assert randsac.decode(tmp_path / "side.png", 8)[0, 4].tolist() == [0] * 4 + [255] * 4


def broken_png(path):
    save(path)
    path.write_bytes(path.read_bytes()[:60])


BROKEN = {"cut.png": broken_png, "empty.jpg": lambda p: p.write_bytes(b""), "text.png": lambda p: p.write_text("no image"),
          "a b ü.png": lambda p: p.write_bytes(os.urandom(99))}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named_and_leaves_no_cache(tmp_path, name):
    save(tmp_path / "good.png")
    BROKEN[name](tmp_path / name)
    with pytest.raises(ValueError, match=name):
        randsac.load_images(folder(tmp_path), train=True)
    assert list((tmp_path / "randsac-cache").iterdir()) == []


def test_no_folder_no_images_and_unreadable_images(tmp_path):
    with pytest.raises(ValueError, match="--data-dir"):
        randsac.load_images(folder(tmp_path / "nowhere"), train=True)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        randsac.load_images(folder(tmp_path), train=True)
    (tmp_path / "train" / "a" / "dangling.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises((ValueError, OSError), match="dangling"):
        randsac.load_images(folder(tmp_path), train=True)


def test_links_that_loop_come_to_an_end(tmp_path):
    save(tmp_path / "train" / "a" / "1.png"), save(tmp_path / "train" / "b" / "1.png")
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "b" / "loop").symlink_to(tmp_path)
    images, labels, _ = randsac.load_images(folder(tmp_path), train=True)
    assert len(images) == 2 and labels.tolist() == [0, 1]


def test_a_cache_cut_short_or_scrambled_is_rebuilt_and_said(tmp_path, capsys):
    for i in range(4):
        save(tmp_path / f"{i}.png")
    images, _, _ = randsac.load_images(folder(tmp_path), train=True)
    images = images.clone()
    cache, = (tmp_path / "randsac-cache").iterdir()
    for damage in (lambda b: b[:-7], lambda b: b"", lambda b: b[:40], lambda b: b"x" * len(b)):
        whole = cache.read_bytes()
        cache.unlink()  # a new file: the old one may still be mapped
        cache.write_bytes(damage(whole))
        again, _, _ = randsac.load_images(folder(tmp_path), train=True)
        assert torch.equal(images, again) and "decoding again" in capsys.readouterr().out


def test_another_size_or_image_makes_another_cache(tmp_path):
    save(tmp_path / "1.png")
    assert randsac.load_images(folder(tmp_path), train=True)[0].shape == (1, 3, 8, 8)
    config = randsac.Config(dataset="folder", data_dir=str(tmp_path), image_size=16)
    assert randsac.load_images(config, train=True)[0].shape == (1, 3, 16, 16)
    save(tmp_path / "2.png")
    assert randsac.load_images(folder(tmp_path), train=True)[0].shape == (2, 3, 8, 8)


def test_a_full_disk_leaves_no_half_cache(tmp_path, monkeypatch):
    save(tmp_path / "1.png")

    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(ValueError, match="No space left"):
        randsac.load_images(folder(tmp_path), train=True)
    assert list((tmp_path / "randsac-cache").iterdir()) == []


# --- downloads, from a server on this machine

@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's form on a loopback server -> (directory it serves, its archive's name)."""
    served, rng, parts = tmp_path / "served", np.random.default_rng(0), {}
    served.mkdir()
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        data = rng.integers(0, 255, (4, 3072)).astype(np.uint8)
        parts[name] = pickle.dumps(dict(data=data, labels=[0, 1, 2, i]))
    parts["batches.meta"] = pickle.dumps(dict(label_names=[f"class {i}" for i in range(10)]))
    with tarfile.open(served / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in parts.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in parts.items()}

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    whole = (served / "cifar-10-python.tar.gz").read_bytes()
    for name, value in dict(
            url=f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz", tgz_md5=hashlib.md5(whole).hexdigest(),
            train_list=[[n, md5[n]] for n in md5 if n.startswith("data")], test_list=[["test_batch", md5["test_batch"]]],
            meta=dict(filename="batches.meta", key="label_names", md5=md5["batches.meta"])).items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    yield served / "cifar-10-python.tar.gz"
    server.shutdown()
    server.server_close()


def test_download(cifar, tmp_path):
    config = randsac.Config(dataset="cifar10", data_dir=str(tmp_path / "data"))
    images, labels, names = randsac.load_images(config, train=True)
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.uint8 and len(names) == 10
    with tarfile.open(cifar) as archive:
        first = pickle.load(archive.extractfile("cifar-10-batches-py/data_batch_1"))["data"]
    assert np.array_equal(images[:4].numpy().reshape(4, -1), first)
    assert labels[:4].tolist() == [0, 1, 2, 0] and len(randsac.load_images(config, train=False)[0]) == 4
    cifar.unlink()  # nothing more is fetched
    assert len(randsac.load_images(config, train=True)[0]) == 20


def test_archive_put_there_by_hand(cifar, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    cifar.rename(tmp_path / "data" / cifar.name)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/none")
    config = randsac.Config(dataset="cifar10", data_dir=str(tmp_path / "data"))
    assert len(randsac.load_images(config, train=True)[0]) == 20


def test_a_users_own_archive_is_kept_when_there_is_no_room_to_extract_it(cifar, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    own = cifar.rename(tmp_path / "data" / cifar.name)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(ValueError, match="No space left"):
        randsac.load_images(randsac.Config(dataset="cifar10", data_dir=str(tmp_path / "data")), train=True)
    assert own.exists()


@pytest.mark.parametrize("fault", ["no server", "404", "cut short", "wrong checksum"])
def test_a_failed_download_says_both_ways_on_and_leaves_nothing_that_looks_whole(cifar, tmp_path, monkeypatch, fault):
    whole = cifar.read_bytes()
    if fault == "no server":
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/none")
    elif fault == "404":
        cifar.unlink()
    else:
        cifar.write_bytes(whole[:len(whole) // 2] if fault == "cut short" else whole[:-1] + b"x")
    config = randsac.Config(dataset="cifar10", data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError) as error:
        randsac.load_images(config, train=True)
    message = str(error.value)
    assert "\n" not in message and "cifar-10-python.tar.gz" in message and "--dataset shapes" in message
    assert not (tmp_path / "data" / "cifar-10-python.tar.gz").exists()
    assert not (tmp_path / "data" / "cifar-10-batches-py").exists()


# --- augmentation

def boxes(crop_scale, n=4000):
    """-> the width and height of n random crops as shares of the side, width negative where flipped; and the crops."""
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(n, 1, 32, 32)
    images = torch.cat([ramp, ramp.transpose(-1, -2), ramp], 1)  # brightness tells x, y, x
    out = randsac.augment(images, 32, crop_scale, randsac.seeded("cpu", 1))
    whole = 248 / 127.5
    return (out[:, 0, 0, -1] - out[:, 0, 0, 0]) / whole, (out[:, 1, -1, 0] - out[:, 1, 0, 0]) / whole, out


def test_augment_crops_a_box_of_the_stated_area_and_flips_half():
    width, height, out = boxes(0.25)
    area = width.abs() * height
    assert area.min() > 0.2 and area.max() <= 1.001 and abs(area.mean() - 0.6) < 0.03 and (height > 0).all()
    assert 0.45 < (width < 0).float().mean() < 0.55 and 0.8 < (width.abs() / height).log().exp().mean() < 1.2
    assert (out[:, 0, 0] - out[:, 0, -1]).abs().max() < 1e-4  # rows stay rows
    left = torch.minimum(out[:, 0, 0, 0], out[:, 0, 0, -1])
    assert left.min() >= -1.0001 and left.std() > 0.1 and out.max() <= 248 / 127.5 - 1 + 1e-4  # anywhere, never outside


def test_augment_that_keeps_the_whole_area_cuts_at_most_one_side():
    width, height, _ = boxes(1.0)
    assert torch.maximum(width.abs(), height).min() > 0.999 and width.abs().min() > 0.85 and height.min() > 0.85


def test_augment_is_reproducible_and_resizes():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    a, b = (randsac.augment(images, 24, 0.3, randsac.seeded("cpu", 7)) for _ in range(2))
    assert a.shape == (8, 3, 24, 24) and torch.equal(a, b)
    assert randsac.normalize(images, 16).min() >= -1 and randsac.normalize(images, 8).shape == (8, 3, 8, 8)


def test_config_is_checked_before_data_is_touched(tmp_path):
    with pytest.raises(ValueError, match="patch-size"):
        micro(dataset="folder", data_dir=str(tmp_path / "nowhere"), patch_size=5)

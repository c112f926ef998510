"""Every format and mode of Pillow, samples of more than 8 bits, and EXIF orientation."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.datasets import build_dataset
from kernelwarehouse.datasets.decoding import decode
from kernelwarehouse.models import read_config

Image.init()
RAMP = np.repeat(np.linspace(0, 255, 16).round().astype(np.uint8)[None], 16, axis=0)
MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La"]
MODES += ["I;16", "I;16L", "I;16B", "I;16N"]
FORMATS = sorted(
    set(Image.SAVE) & set(Image.OPEN) - {"EPS", "ICNS"}
)  # Ghostscript reads one, the other has fixed sizes
# Pillow's own writers of these clip samples of more than 8 bits.
CLIPPED_BY_PILLOW = {"AVIF", "GIF", "WEBP"}
LOSSY = {"AVIF", "JPEG", "WEBP"}
# The wide modes that have a white in a format; all others are refused.
READ = {(kind, mode) for kind in ("IM", "JPEG2000", "PNG", "PPM", "TIFF") for mode in MODES if mode[:4] == "I;16"}
READ |= {("PNG", "I"), ("PPM", "I")}


def ramp_of(mode):
    """The ramp as an image of a mode, from black to the mode's white."""
    if mode.startswith("I;16"):
        order = ">" if mode.endswith("B") else "<"
        return Image.frombytes(mode, RAMP.shape, (RAMP.astype(f"{order}u2") * 257).tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(RAMP.astype(np.int32) * 257 if mode == "I" else RAMP.astype(np.float32) / 255)
    return Image.fromarray(RAMP) if mode == "L" else Image.fromarray(RAMP).convert("RGB").convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def brightness(data):
    return decode(data).numpy().astype(int).mean(0)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_mode_of_a_format_keeps_its_brightness_or_is_refused_by_name(kind):
    for mode in MODES:
        wide = mode[0] in "IF"
        if wide and kind in CLIPPED_BY_PILLOW:
            continue
        try:
            data = encoded(ramp_of(mode), kind)
        except (OSError, KeyError, ValueError, SystemError):
            continue  # Pillow writes no such file
        expected = np.asarray(ramp_of(mode).convert("L")) if mode in ("1", "P", "PA") else RAMP
        if kind == "SPIDER" or (wide and (kind, mode) not in READ):
            with pytest.raises(ValueError, match=rf"{kind} of .* convert them to 8 or 16 unsigned bits"):
                decode(data)
            continue
        difference = np.abs(brightness(data) - expected)
        if kind in LOSSY:
            assert difference.mean() < 16, mode
        else:
            assert difference.max() <= 2, mode


def tiff(samples, bits, photometric=1, sample_format=1, order="<", orientation=1):
    """A grey TIFF, written by hand: (H, W) values → the file."""
    if bits == 12:
        flat = samples.astype(np.uint32).reshape(-1, 2)
        pairs = flat[:, 0] << 12 | flat[:, 1]
        data = np.stack([pairs >> 16, pairs >> 8 & 255, pairs & 255], 1).astype(np.uint8).tobytes()
    else:
        kind = {1: "u", 2: "i", 3: "f"}[sample_format]
        data = samples.astype(f"{order}{kind}{bits // 8}").tobytes()
    height, width = samples.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 274: orientation, 277: 1}
    tags |= {278: height, 279: len(data), 339: sample_format}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("bits", "photometric", "order"),
    [*((*case, "<") for case in ((8, 0), (8, 1), (12, 1), (16, 0), (16, 1), (32, 1))), (8, 0, ">"), (16, 1, ">")],
)
def test_unsigned_tiff_is_scaled_by_its_bits(bits, photometric, order):
    white = 2**bits - 1
    samples = (RAMP.astype(np.uint64) * white + 127) // 255
    found = brightness(tiff(samples if photometric else white - samples, bits, photometric, order=order))
    assert np.abs(found - RAMP).max() <= 1


@pytest.mark.parametrize(("bits", "sample_format"), [(8, 2), (16, 2), (32, 2), (32, 3)])
def test_signed_and_floating_point_tiff_is_refused(bits, sample_format):
    with pytest.raises(ValueError, match=r"TIFF of Pillow's mode '.': its samples are signed or floats"):
        decode(tiff(RAMP // 2, bits, sample_format=sample_format))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff_is_scaled(compression):
    assert np.array_equal(brightness(encoded(ramp_of("I;16"), "TIFF", compression=compression)), RAMP)


@pytest.mark.parametrize("white", [1, 3, 100, 255, 256, 1000, 4095, 65534, 65535])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_maximum_of_pgm_and_ppm(white, plain, channels):
    samples = (np.repeat(RAMP[..., None], channels, 2).astype(np.uint32) * white + 127) // 255
    magic = {(1, False): 5, (3, False): 6, (1, True): 2, (3, True): 3}[channels, plain]
    binary = samples.astype(">u2" if white > 255 else "u1").tobytes()
    body = " ".join(map(str, samples.flatten())).encode() if plain else binary
    found = brightness(f"P{magic} 16 16 {white}\n".encode() + body)
    assert np.abs(found - samples[..., 0] * 255 / white).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_ignored_or_applied_in_every_format(kind):
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    stored = Image.fromarray(np.random.default_rng(0).integers(256, size=(3, 4, 3), dtype=np.uint8))
    stored = stored.resize((32, 24), Image.Resampling.NEAREST)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        data = encoded(stored, kind, exif=exif, **({"quality": 100} if kind not in ("PNG", "TIFF") else {}))
        copy = stored.copy()
        copy.getexif()[274] = orientation
        for choice, expected in (("ignore", stored), ("apply", ImageOps.exif_transpose(copy))):
            found = decode(data, choice).permute(1, 2, 0).numpy().astype(int)
            assert found.shape == np.asarray(expected).shape
            assert np.abs(found - np.asarray(expected)).mean() < 16, (orientation, choice)


def test_orientation_of_a_wide_tiff():
    samples = np.arange(12).reshape(3, 4) * 4000
    stored, turned = (decode(tiff(samples, 16, orientation=6), choice)[0].numpy() for choice in ("ignore", "apply"))
    assert np.array_equal(stored, (samples * 255 + 32767) // 65535)
    assert np.array_equal(turned, np.rot90(stored, -1))


def test_a_run_chooses_the_orientation_and_names_what_it_refuses(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16] = 255
    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "val" / "a" / "0.png", exif=exif)
    (tmp_path / "val" / "a" / "1.tiff").write_bytes(tiff(RAMP, 32, sample_format=3))
    fields = {"model": "resnet18", "data_set": "IMNET", "data_path": str(tmp_path), "nb_classes": 1, "input_size": 32}
    tops = []
    for given in ({}, {"exif": "apply"}):
        dataset = build_dataset(read_config({**fields, "crop_pct": 1.0, **given}), train=False)
        tops.append(dataset[0][0][0, 2].tolist())
    assert tops == [[255] * 32, [0] * 16 + [255] * 16]
    with pytest.raises(ConfigError, match=r"1\.tiff: cannot be read \(TIFF of Pillow's mode 'F'.*16 unsigned bits\)"):
        dataset[1]

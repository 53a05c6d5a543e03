from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFont

from bolid.errors import BolidError
from bolid.formats import images
from bolid.formats.images import (
    decode_image,
    encode_jpeg,
    glance,
    is_grey,
    label_font,
    list_photos,
    own_jpeg,
    read_photo,
)

RED, GREEN, BLUE = (220, 30, 30), (30, 200, 30), (30, 30, 220)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_exif_orientation_is_applied():
    """A picture that is red on top, stored in each of the eight ways a camera may hold it."""
    upright = Image.new("RGB", (40, 60), GREEN)
    upright.paste(RED, (0, 0, 40, 20))
    turned = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, method in turned.items():
        stored = upright if method is None else upright.transpose(method)
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = decode_image(encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0))
        assert image.shape == (60, 40, 3)
        assert np.abs(image[5, 20] - np.array(RED)).max() < 12 and np.abs(image[50, 20] - np.array(GREEN)).max() < 12


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (4, 4), (*RED, 0))
    image.putpixel((1, 1), (*RED, 255))
    decoded = decode_image(encoded(image))
    assert tuple(decoded[0, 0]) == (255, 255, 255) and tuple(decoded[1, 1]) == RED
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([*BLUE, *RED])
    assert tuple(decode_image(encoded(palette, transparency=0))[0, 0]) == (255, 255, 255)
    assert tuple(decode_image(encoded(palette))[0, 0]) == BLUE
    grey = Image.new("LA", (4, 4), (10, 0))
    assert tuple(decode_image(encoded(grey))[0, 0]) == (255, 255, 255)


def test_all_modes_become_8_bit_rgb():
    deep = Image.fromarray(np.array([[0, 128 << 8, 65535]], np.uint16))
    for format in ("PNG", "TIFF"):
        assert decode_image(encoded(deep, format))[0, :, 0].tolist() == [0, 128, 255]
    assert decode_image(encoded(Image.new("1", (3, 3), 1)))[0, 0].tolist() == [255] * 3
    assert decode_image(encoded(Image.new("L", (3, 3), 77)))[0, 0].tolist() == [77] * 3
    cmyk = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))[4, 4]
    assert cmyk[0] > 200 and cmyk[1] < 60 and cmyk[2] < 60
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert decode_image(encoded(unit, "TIFF"))[0, :, 0].tolist() == [0, 127, 255]


def test_colours_are_brought_to_srgb():
    """A profile in which red and green have changed places: what the file calls red is green."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
    for mode in ("RGB", "RGBA"):
        red = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
        assert decode_image(encoded(red, icc_profile=swapped))[0, 0].tolist() == [0, 255, 0]
        assert decode_image(encoded(red, icc_profile=srgb))[0, 0].tolist() == [255, 0, 0]
        assert decode_image(encoded(red, icc_profile=b"broken"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    assert np.abs(decode_image(data)[4, 4].astype(int) - RED).max() < 12


def test_large_photos_are_reduced_and_small_ones_left_alone():
    image = Image.linear_gradient("L").resize((900, 600)).convert("RGB")
    for format in ("JPEG", "PNG"):
        assert decode_image(encoded(image, format), max_side=300).shape == (200, 300, 3)
        assert decode_image(encoded(image, format), max_side=2000).shape == (600, 900, 3)
    assert decode_image(encoded(Image.new("RGB", (5000, 2))), max_side=100).shape == (1, 100, 3)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(("format", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P")])
def test_a_glance_shows_what_decoding_shows(format, mode, orientation):
    yy, xx = np.mgrid[0:400, 0:600]
    picture = Image.fromarray(np.stack([yy * 255 // 400, xx * 255 // 600, (xx + yy) % 256], -1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture.convert(mode), format, exif=exif)
    grey, size, kind = glance(data, 120)
    assert (size, kind, grey.mode, max(grey.size)) == ((600, 400), format, "L", 120)
    decoded = np.asarray(Image.fromarray(decode_image(data, max_side=120)).convert("L"), int)
    assert np.asarray(grey).shape == decoded.shape and np.abs(np.asarray(grey, int) - decoded).mean() < 4
    assert glance(encoded(picture.resize((30, 20))), 120)[0].size == (30, 20)


def test_what_is_no_picture():
    for data in (b"", b"hello", b"%PDF-1.7 ..." * 50):
        with pytest.raises(BolidError, match="x.jpg is not a picture"):
            decode_image(data, name="x.jpg")


def test_what_is_no_picture_once_ultralytics_is_loaded(monkeypatch):
    import ultralytics.utils.checks

    def install(*args, **kwargs):
        pytest.fail("wants to install a package")

    monkeypatch.setattr(ultralytics.utils.checks, "check_requirements", install)
    with pytest.raises(BolidError, match="x.jpg is not a picture"):
        decode_image(b"hello", name="x.jpg")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_truncated_pictures_are_refused(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    for part in (0.3, 0.6, 0.95):
        with pytest.raises(BolidError, match="x is damaged|x is not a picture"):
            decode_image(data[: int(len(data) * part)], name="x")
        with pytest.raises(BolidError, match="x is damaged|x is not a picture"):
            glance(data[: int(len(data) * part)], 16, name="x")


def avif() -> bytes:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    return encoded(noise, "AVIF")


DDS = b"DDS " + (124).to_bytes(4, "little") + bytes(4) + (64).to_bytes(4, "little") * 2 + bytes(108)
ODD = {
    "cut AVIF": lambda: avif()[: len(avif()) // 2],
    "cut AVIF, 9/10": lambda: avif()[: len(avif()) * 9 // 10],
    "GRIB": lambda: b"GRIB\0\0\0\1" + bytes(64),
    "BUFR": lambda: b"BUFR" + bytes(64),
    "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(64),
    "DDS": lambda: DDS,
    "DDS of an unknown kind": lambda: DDS[:76] + (32).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"XXXX" * 11,
    "BLP1": lambda: b"BLP1" + bytes(200),
    "BLP2": lambda: b"BLP2" + (9).to_bytes(4, "little") * 50,
    "ICNS": lambda: b"icns" + (16).to_bytes(4, "big") + b"ic07" + (8).to_bytes(4, "big"),
    "FITS": lambda: b"SIMPLE  =                    T" + b" " * 2850,
    "QOI": lambda: b"qoif" + (64).to_bytes(4, "big") * 2 + b"\x04\0" + bytes(8),
    "PSD": lambda: b"8BPS\0\1" + bytes(60),
    "FLI": lambda: bytes(4) + b"\x12\xaf" + bytes(200),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_and_damaged_pictures_are_refused(kind, tmp_path):
    data = ODD[kind]()
    for decode in (decode_image, lambda data, name: glance(data, 16, name)):
        with pytest.raises(BolidError, match="x.jpg is damaged: .|x.jpg is not a picture"):
            decode(data, "x.jpg")


def test_whatever_a_decoder_raises_is_about_the_picture(monkeypatch):
    data = encoded(Image.new("L", (3, 3)), "BMP")
    for error in (ZeroDivisionError("x"), RuntimeError(), NotImplementedError(), MemoryError(), AttributeError("x")):

        def load(self, error=error):
            raise error

        monkeypatch.setattr(Image.Image, "load", load)
        with pytest.raises(BolidError, match=f"x.jpg is damaged: {str(error) or type(error).__name__}"):
            decode_image(data, name="x.jpg")


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40, b"Exif\0\0"])
def test_a_broken_exif_block_is_ignored(exif):
    picture = Image.linear_gradient("L").resize((30, 20)).convert("RGB")
    data = encoded(picture, "JPEG", exif=exif)
    assert decode_image(data).shape == (20, 30, 3) and glance(data, 30)[0].size == (30, 20)


@pytest.mark.slow
def test_a_phones_photo_of_108_megapixels_is_read_at_half_its_size():
    picture = Image.linear_gradient("L").resize((12_000, 9_001)).convert("RGB")
    picture.paste((255, 0, 0), (0, 0, 3_000, 9_001))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture, "JPEG", exif=exif, quality=30)
    before = Image.MAX_IMAGE_PIXELS
    whole = decode_image(data)
    assert Image.MAX_IMAGE_PIXELS == before
    assert whole.shape in ((6_000, 4_500, 3), (6_000, 4_501, 3))
    assert np.abs(whole[700, 2_000].astype(int) - [255, 0, 0]).max() < 20  # red on the left, upright: above
    assert decode_image(data, max_side=500).shape == (500, 375, 3)
    assert glance(data, 100)[0].size == (75, 100) and own_jpeg(data, whole) is None


def test_a_jpeg_of_more_than_400_megapixels_is_refused(monkeypatch):
    data = encoded(Image.new("L", (2_000, 1_000)), "JPEG")
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 1_999_999)
    with pytest.raises(BolidError, match="too large a picture .* as JPEG, 1"):
        decode_image(data)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    data = encoded(Image.new("1", (12_000, 9_000)))
    assert len(data) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(BolidError, match=r"bomb.png is too large a picture \(more than 100 megapixels; as JPEG, 400\)"):
        decode_image(data, name="bomb.png")
    # Other libraries switch Pillow's own guard off; ours stays.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BolidError, match="too large"):
        decode_image(data)
    with pytest.raises(BolidError, match="too large"):
        glance(data, 100)


def test_jpeg_bytes_are_reproducible_and_bare():
    image = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    data = encode_jpeg(image)
    assert data == encode_jpeg(image) and b"Exif" not in data
    assert decode_image(data).shape == image.shape


JPEGS = {
    "plain": ("RGB", {}),
    "progressive": ("RGB", {"progressive": True}),
    "grey": ("L", {"quality": 60}),
    "printer's colours": ("CMYK", {}),
    "restart markers": ("RGB", {"restart_marker_blocks": 2}),
    "wide gamut": ("RGB", {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()}),
}


@pytest.mark.parametrize(("mode", "options"), JPEGS.values(), ids=JPEGS)
def test_a_jpeg_loses_its_metadata_and_no_pixel(mode, options):
    """Where it was taken, its thumbnail, comments and what a phone hangs behind it go; the pixels stay."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "at home", 1
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)).convert(mode)
    data = encoded(picture, "JPEG", exif=exif, comment=b"secret", **options) + b"a film with sound"
    image = decode_image(data)
    bare = own_jpeg(data, image)
    assert np.array_equal(decode_image(bare), image) and own_jpeg(bare, image) == bare
    assert len(bare) < len(data) and not any(word in bare for word in (b"home", b"secret", b"film"))


def test_pixels_that_are_no_longer_the_files_are_encoded_anew():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (40, 40), RED)
    for data in (encoded(picture), encoded(picture, "JPEG", exif=exif), encoded(picture, "WEBP")):
        assert own_jpeg(data, decode_image(data)) is None
    data = encoded(picture, "JPEG")
    assert own_jpeg(data, decode_image(data)) and own_jpeg(data, decode_image(data, max_side=20)) is None


def test_list_photos(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a/x.webp", "a/notes.txt", ".hidden/x.jpg", "a/.hidden.jpg", "a/deeper/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [(person, path.relative_to(tmp_path).as_posix()) for person, path in list_photos(tmp_path)]
    assert found == [("a", "a/x.webp"), ("b", "b/1.png"), ("b", "b/2.JPG")]
    flat = [(person, path.name) for person, path in list_photos(tmp_path / "b")]
    assert flat == [("b", "1.png"), ("b", "2.JPG")]


def test_photo_folders_that_do_not_work(tmp_path):
    with pytest.raises(BolidError, match="the photo folder .*absent does not exist"):
        list_photos(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(BolidError, match="is a file, not a folder"):
        list_photos(tmp_path / "file")
    with pytest.raises(BolidError, match="no photos in") as caught:
        list_photos(tmp_path)
    assert ".jpg" in caught.value.hint
    with pytest.raises(BolidError, match="absent.jpg cannot be read: No such file"):
        read_photo(tmp_path / "absent.jpg")
    assert images.MAX_PIXELS == 100_000_000


# 32 x 24, red on the left and blue on the right, as pillow-heif wrote it; BoLID itself only reads.
HEIC = (
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAb1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9j"
    "AAAAAERAAAIAAQAAAAAB4QABAAAAAAAAADUAAgAAAAACFgABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAA"
    "ABVpbmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNg"
    "AAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAAAAyAAAADAIRiAAEABkQB"
    "wXPBiQAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAIAAAAAEAAAAYAAAAAf///+AAAAAC////2AAA"
    "AAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAAGmlyZWYAAAAAAAAADmNkc2MAAgABAAEAAABhbWRhdAAAADEo"
    "Aa8ZIXBSQO9dpb//fj7/WYX+JWTv/yo2vfab/NZVStq18qLfZoCrdmf0KKbtbq2AAAAABkV4aWYAAE1NACoAAAAIAAEBEgADAAAAAQAGAAAA"
    "AAAA"
)


def test_heic_and_avif(tmp_path):
    (tmp_path / "a.HEIC").write_bytes(base64.b64decode(HEIC))
    image = np.zeros((24, 32, 3), np.uint8)
    image[:, :16], image[:, 16:] = (200, 30, 30), (30, 30, 200)
    Image.fromarray(image).save(tmp_path / "b.avif", quality=95)
    assert [path.name for _, path in list_photos(tmp_path)] == ["a.HEIC", "b.avif"]
    for name in ("a.HEIC", "b.avif"):
        assert np.abs(read_photo(tmp_path / name).astype(int) - image)[:, [4, 28]].max() < 12, name
        assert glance((tmp_path / name).read_bytes(), 16)[1] == (32, 24)
    with pytest.raises(BolidError, match="damaged|not a picture"):
        decode_image(base64.b64decode(HEIC)[:300])


def test_black_and_white_photos_are_known():
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(0, 256, (90, 60, 1), np.uint8), 3, axis=2)
    assert is_grey(grey) and is_grey(np.clip(grey.astype(int) + np.array([3, 0, -3]), 0, 255).astype(np.uint8))
    coloured = grey.copy()
    coloured[:20, :20] = (200, 120, 90)  # a face
    assert not is_grey(coloured)


def test_letters_that_pillows_font_lacks_are_drawn_by_another():
    assert label_font("me ± 3 cm", 14).getname() == ImageFont.load_default(14).getname()
    for text in ("Zoë", "Анна"):
        font = label_font(text, 14)
        assert all(bytes(font.getmask(letter)) != bytes(font.getmask("\uffff")) for letter in text)
